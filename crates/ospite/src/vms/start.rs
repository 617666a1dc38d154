//! Switching a VM on.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use store::vm::Folder;
use store::{Home, Lock};

use super::ready;
use crate::exit::Code;
use crate::failure::Failure;

/// Our own program, even if another one has been installed in its place meanwhile.
const OURSELVES: &str = "/proc/self/exe";
/// From this length on, in bytes, what our processes had to say gets a new file.
const MESSAGES: u64 = 1 << 20;

/// Switches a VM on, and returns when it runs.
///
/// # Errors
/// It is on, or cannot be started, with the reason.
pub fn start(home: &Home, folder: &Folder) -> Result<(), Failure> {
    let lock = folder.lock().map_err(|error| match error {
        store::vm::Error::On(name) => Failure::new(Code::WrongState, format!("{name} is running already"))
            .hint(format!("ospite console {name} shows it, ospite restart {name} starts it anew")),
        other => other.into(),
    })?;
    let what = format!("cannot start {}", folder.name());
    let host = |error: io::Error| Failure::new(Code::Internal, format!("{what}: {error}"));
    home.prepare().map_err(host)?;
    let (word, their_end) = io::pipe().map_err(host)?;
    let mut keeper = command(folder, "vm-keeper", &lock, their_end.into()).map_err(host)?;
    keeper.spawn().map_err(host)?; // not waited for: it outlives us
    drop(keeper); // and with it our end of the pipe
    match ready::hear(word) {
        Ok(()) => Ok(()),
        Err(Some(failure)) => Err(failure.context(&what)),
        Err(None) => Err(Failure::new(Code::Internal, format!("{what}: its process ended at once"))
            .hint(format!("see what it said last: tail {}", folder.messages().display()))),
    }
}

/// One of a VM's processes: its standard input is the lock, its standard output who waits for the start.
pub(super) fn command(folder: &Folder, role: &str, lock: &Lock, word: Stdio) -> io::Result<Command> {
    let mut command = Command::new(OURSELVES);
    command.arg0("ospite").args([role, folder.name().as_str()]).current_dir("/");
    command.stdin(lock.share()?).stdout(word).stderr(messages(&folder.messages())?);
    Ok(command)
}

fn messages(path: &Path) -> io::Result<File> {
    if fs::metadata(path).is_ok_and(|meta| meta.len() > MESSAGES) {
        fs::rename(path, path.with_extension("log.1"))?;
    }
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}
