//! The commands for VMs that last.

use std::time::Duration;

use serde::Serialize;
use store::Home;
use store::vm::Folder;

use super::{Info, Stopped, info};
use crate::at_once::at_once;
use crate::cli::{ConsoleArgs, CreateArgs, LogsArgs, RmArgs, StopArgs, VmInfoArgs, VmListArgs, WhichArgs};
use crate::exit::Code;
use crate::failure::Failure;
use crate::output::{self, OutputArgs};

/// What was done with a VM.
#[derive(Clone, Debug, Serialize)]
pub struct Done {
    name: String,
    done: &'static str,
}

/// What was done with it.
pub fn done(folder: &Folder, done: &'static str) -> Done {
    Done { name: folder.name().to_string(), done }
}

/// `ospite create`
pub fn create(args: &CreateArgs) -> Result<Code, Failure> {
    let definition = super::definition(&args.name, &args.machine, &args.image, &args.life)?;
    let folder = super::create(&super::home()?, &definition)?;
    tell(&[done(&folder, "created")], args.output)?;
    Ok(Code::Success)
}

/// `ospite start`
pub fn start(which: &WhichArgs) -> Result<Code, Failure> {
    let home = super::home()?;
    let folders = folders(&home, which, |folder| Ok(!folder.is_on()?))?;
    each(&folders, which.output, |folder| super::start(&home, folder).map(|_| "started"))
}

/// `ospite stop`
pub fn stop(args: &StopArgs) -> Result<Code, Failure> {
    let home = super::home()?;
    let folders = folders(&home, &args.which, is_on)?;
    each(&folders, args.which.output, |folder| stop_one(&home, folder, args).map(told))
}

/// `ospite restart`
pub fn restart(args: &StopArgs) -> Result<Code, Failure> {
    let home = super::home()?;
    let folders = folders(&home, &args.which, is_on)?;
    each(&folders, args.which.output, |folder| {
        if folder.is_on()? {
            stop_one(&home, folder, args)?;
        }
        super::start(&home, folder).map(|_| "started anew")
    })
}

/// `ospite kill`
pub fn kill(which: &WhichArgs) -> Result<Code, Failure> {
    let home = super::home()?;
    let folders = folders(&home, which, is_on)?;
    each(&folders, which.output, |folder| super::kill(&home, folder).map(told))
}

/// `ospite rm`
pub fn rm(args: &RmArgs) -> Result<Code, Failure> {
    let home = super::home()?;
    let folders = folders(&home, &args.which, |folder| Ok(args.force || !folder.is_on()?))?;
    each(&folders, args.which.output, |folder| {
        if args.force && folder.is_on()? {
            super::kill(&home, folder)?;
        }
        super::remove(&home, folder).map(|()| "removed")
    })
}

/// `ospite list`
pub fn list(args: &VmListArgs) -> Result<Code, Failure> {
    let home = super::home()?;
    let infos =
        store::vm::list(&home)?.iter().map(|folder| info(&home, folder)).collect::<Result<Vec<_>, _>>()?;
    args.output.print(&infos, |infos| {
        if infos.is_empty() {
            return "there are no VMs; ospite create --help shows how to make one".into();
        }
        output::table(&super::info::TITLES, &infos.iter().map(Info::row).collect::<Vec<_>>())
    })?;
    Ok(Code::Success)
}

/// `ospite info`
pub fn info_of(args: &VmInfoArgs) -> Result<Code, Failure> {
    let home = super::home()?;
    args.output.print(&info(&home, &super::find(&home, &args.name)?)?, Info::text)?;
    Ok(Code::Success)
}

/// `ospite logs`
pub fn logs(args: &LogsArgs) -> Result<Code, Failure> {
    super::logs::logs(&super::find(&super::home()?, &args.name)?, args)
}

/// `ospite console`
pub fn console(args: &ConsoleArgs) -> Result<Code, Failure> {
    let home = super::home()?;
    super::console::console(&home, &super::find(&home, &args.name)?, args.escape, args.tail)?;
    Ok(Code::Success)
}

fn is_on(folder: &Folder) -> Result<bool, Failure> {
    Ok(folder.is_on()?)
}

fn told(stopped: Stopped) -> &'static str {
    match stopped {
        Stopped::PoweredOff => "powered off",
        Stopped::Cut => "power cut",
    }
}

fn stop_one(home: &Home, folder: &Folder, args: &StopArgs) -> Result<Stopped, Failure> {
    // A VM whose definition is broken can be stopped all the same.
    let timeout = args.timeout.or_else(|| Some(folder.definition().ok()?.stop_timeout)).unwrap_or(90);
    super::stop(home, folder, Duration::from_secs(timeout))
}

/// Those that are named, or all that `fit`.
fn folders(
    home: &Home,
    which: &WhichArgs,
    fit: impl Fn(&Folder) -> Result<bool, Failure>,
) -> Result<Vec<Folder>, Failure> {
    if !which.all {
        return which.names.iter().map(|name| super::find(home, name)).collect();
    }
    let mut folders = Vec::new();
    for folder in store::vm::list(home)? {
        if fit(&folder)? {
            folders.push(folder);
        }
    }
    Ok(folders)
}

/// Prints what was done.
pub fn tell(done: &[Done], output: OutputArgs) -> Result<(), Failure> {
    output.print(&done, |done| done.iter().map(|Done { name, done }| format!("{name}: {done}\n")).collect())
}

/// Acts on all at once, since most of it is waiting. One that fails keeps the others from nothing.
pub fn each(
    folders: &[Folder],
    output: OutputArgs,
    act: impl Fn(&Folder) -> Result<&'static str, Failure> + Sync,
) -> Result<Code, Failure> {
    let outcomes = at_once(folders, |folder| Ok::<_, Failure>(done(folder, act(folder)?)));
    let (done, mut failures) = (Vec::from_iter(outcomes.iter().flatten().cloned()), Vec::new());
    failures.extend(outcomes.into_iter().filter_map(Result::err));
    tell(&done, output)?;
    let Some(last) = failures.pop() else { return Ok(Code::Success) };
    for failure in failures {
        failure.tell();
    }
    Err(last)
}
