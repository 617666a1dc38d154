//! `ospite down`: the VMs of a file are switched off.

use std::time::Duration;

use store::Home;
use store::vm::Folder;

use super::progress::Progress;
use crate::at_once::at_once;
use crate::cli::DownArgs;
use crate::exit::Code;
use crate::failure::Failure;
use crate::vms::commands::{Done, done, tell};
use crate::vms::{self, Stopped};

/// Switches off what the file declared, all at the same time.
pub fn down(args: &DownArgs) -> Result<Code, Failure> {
    let home = vms::home()?;
    let (file, _) = super::read(&args.file)?;
    let folders = super::members(&home, &file)?;
    let progress = Progress::new(folders.iter().map(|folder| folder.name()), args.output.is_json());
    let results = at_once(&folders, |folder| one(&home, folder, args.remove, &progress));
    progress.end();
    tell(&results.into_iter().collect::<Result<Vec<_>, _>>()?, args.output)?;
    Ok(Code::Success)
}

fn one(home: &Home, folder: &Folder, remove: bool, progress: &Progress) -> Result<Done, Failure> {
    let name = folder.name();
    let mut what = "was off";
    if folder.is_on()? {
        progress.say(name, "powering off");
        let timeout = Duration::from_secs(folder.definition()?.stop_timeout);
        what = match vms::stop(home, folder, timeout)? {
            Stopped::PoweredOff => "powered off",
            Stopped::Cut => "power cut",
        };
    }
    if remove {
        vms::remove(home, folder)?;
        what = "removed";
    }
    progress.say(name, what);
    Ok(done(folder, what))
}
