//! `ospite down`: the VMs of a file are switched off.

use std::thread;
use std::time::Duration;

use serde::Serialize;
use store::Home;
use store::vm::Folder;

use super::progress::Progress;
use crate::cli::DownArgs;
use crate::exit::Code;
use crate::failure::Failure;
use crate::vms::{self, Stopped};

/// What became of a VM.
#[derive(Debug, Serialize)]
struct Done {
    name: String,
    done: &'static str,
}

/// Switches off what the file declared, all at the same time.
pub fn down(args: &DownArgs) -> Result<Code, Failure> {
    let home = vms::home()?;
    let (file, _) = super::read(&args.file)?;
    let folders = super::members(&home, &file)?;
    let progress = Progress::new(folders.iter().map(|folder| folder.name()), args.output.is_json());
    let results: Vec<Result<Done, Failure>> = thread::scope(|scope| {
        let each = |folder| {
            let (home, progress) = (&home, &progress);
            scope.spawn(move || one(home, folder, args.remove, progress))
        };
        let threads: Vec<_> = folders.iter().map(each).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    progress.end();
    let done = results.into_iter().collect::<Result<Vec<_>, _>>()?;
    args.output
        .print(&done, |done| done.iter().map(|Done { name, done }| format!("{name}: {done}\n")).collect())?;
    Ok(Code::Success)
}

fn one(home: &Home, folder: &Folder, remove: bool, progress: &Progress) -> Result<Done, Failure> {
    let name = folder.name();
    let mut done = "was off";
    if folder.is_on()? {
        progress.say(name, "powering off");
        let timeout = Duration::from_secs(folder.definition()?.stop_timeout);
        done = match vms::stop(home, folder, timeout)? {
            Stopped::PoweredOff => "powered off",
            Stopped::Cut => "power cut",
        };
    }
    if remove {
        vms::remove(home, folder)?;
        done = "removed";
    }
    progress.say(name, done);
    Ok(Done { name: name.to_string(), done })
}
