//! What a VM's processes get from who starts them: the lock as standard input, and as standard output the
//! pipe on which `start` waits.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;

use rustix::io::fcntl_dupfd_cloexec;
use rustix::stdio::{dup2_stdin, dup2_stdout};
use store::Lock;
use store::vm::Folder;

use crate::exit::Code;
use crate::failure::Failure;

/// Takes over the lock; standard input is empty afterwards.
pub fn take_lock(folder: &Folder) -> Result<Lock, Failure> {
    let host = |error: io::Error| Failure::from_error(Code::Internal, &error);
    let lock = Lock::inherited(fcntl_dupfd_cloexec(io::stdin(), 3).map_err(|error| host(error.into()))?);
    let path = folder.lock_path();
    if !lock.is_at(&path) || !Lock::is_held(&path).map_err(host)? {
        return Err(Failure::new(Code::Usage, "this command is for ospite itself")
            .hint(format!("ospite start {} starts the VM", folder.name())));
    }
    dup2_stdin(null().map_err(host)?).map_err(|error| host(error.into()))?;
    Ok(lock)
}

/// Takes over the pipe; standard output goes nowhere afterwards.
pub fn take_word() -> io::Result<File> {
    let word = File::from(fcntl_dupfd_cloexec(io::stdout().as_fd(), 3)?);
    dup2_stdout(null()?)?;
    Ok(word)
}

fn null() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/null")
}
