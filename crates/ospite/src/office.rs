//! `ospite up`, `down`, `ps`: several VMs that a file declares.

mod down;
mod health;
mod progress;
mod ps;
mod up;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use agent::{Command, Output, Signal};
pub use down::down;
pub use ps::ps;
use store::Home;
use store::office::Office;
use store::vm::Folder;
pub use up::up;

use crate::exit::Code;
use crate::failure::Failure;
use crate::guest;

/// The label of a VM that a file declared: the file's absolute path.
const LABEL: &str = "office";

/// The file, and what it says.
fn read(file: &Path) -> Result<(PathBuf, Office), Failure> {
    let path = file.canonicalize().map_err(|error| {
        Failure::new(Code::Build, format!("cannot read {}: {error}", file.display()))
            .hint("name the file that declares the VMs: ospite up office.toml")
    })?;
    let office = Office::read(&path).map_err(|error| Failure::from_error(Code::Build, &error))?;
    Ok((path, office))
}

/// Runs a command of a health check in a VM, whose output nobody reads.
fn run(folder: &Folder) -> impl FnOnce(&[String], Duration) -> Result<(), String> {
    |words, patience| {
        let agent = guest::agent(folder.name().as_str(), patience.as_secs())
            .map_err(|failure| failure.message().to_owned())?;
        let command = Command { words: words.to_vec(), env: Vec::new(), user: None, dir: None };
        let told = |error: agent::Error| vmm::chain(&error);
        let running = command.start(&agent, false).map_err(told)?;
        let (signaller, (done, end)) = (running.signaller(), mpsc::channel::<()>());
        thread::spawn(move || {
            if end.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
                let _ = signaller.send(Signal::Kill); // it may have ended meanwhile
            }
        });
        let exit = running.attend(None, Box::new(ignore), Box::new(ignore)).map_err(told)?;
        drop(done);
        if exit.0 == 0 { Ok(()) } else { Err(format!("{:?} exits with {}", words.join(" "), exit.0)) }
    }
}

fn ignore(mut output: Output) {
    let _ = io::copy(&mut output, &mut io::sink()); // a check is what it returns, not what it says
}

/// The VMs that the file has declared and that are there, by name; also those that it no longer declares.
fn members(home: &Home, file: &Path) -> Result<Vec<Folder>, Failure> {
    let all = store::vm::list(home)?;
    Ok(all.into_iter().filter(|folder| belongs(folder, file)).collect())
}

fn belongs(folder: &Folder, file: &Path) -> bool {
    folder.definition().is_ok_and(|vm| vm.labels.get(LABEL).map(Path::new) == Some(file))
}
