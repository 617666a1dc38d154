//! VMs that last: what can be done with them from outside, as functions. Commands call these; so may
//! whatever else manages several VMs.
//!
//! A VM that is on is two processes: `vm-keeper`, which does nothing but wait and restart by policy, and
//! `vm-process`, which is the VM. Both hold the lock of the VM's folder; everything that is asked of the
//! VM goes through its control socket ([`protocol`]).

pub mod attached;
pub mod autostart;
mod client;
pub mod commands;
mod console;
mod create;
pub mod health;
mod info;
pub mod keeper;
mod logs;
pub mod protocol;
pub mod ready;
pub mod socket;
pub mod spec;
mod start;
mod stop;
mod watch;

use std::time::{SystemTime, UNIX_EPOCH};

pub use client::Client;
pub use create::{create, definition, told};
pub use info::{Info, info};
pub use start::start;
pub use stop::{Stopped, kill, stop};
use store::vm::{Error, Folder};
use store::{Home, Name};

use crate::exit::Code;
use crate::failure::Failure;

/// The home that the environment names.
pub fn home() -> Result<Home, Failure> {
    Home::find().map_err(|why| Failure::new(Code::Build, format!("cannot tell where VMs lie: {why}")))
}

/// The VM of that name.
pub fn find(home: &Home, name: &Name) -> Result<Folder, Failure> {
    Ok(store::vm::find(home, name)?)
}

/// Removes a VM that is off, with its disk.
pub fn remove(home: &Home, folder: &Folder) -> Result<(), Failure> {
    Ok(store::vm::remove(home, folder)?)
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let hint = match &error {
            Error::NoSuch { similar: Some(similar), .. } => Some(format!("did you mean `{similar}`?")),
            Error::NoSuch { similar: None, .. } => Some("ospite list shows those that are there".into()),
            Error::Taken(name) => Some(format!("take another name, or remove it: ospite rm {name}")),
            Error::On(name) => Some(format!("ospite stop {name} powers it off")),
            _ => None,
        };
        let code = match &error {
            Error::NoSuch { .. } | Error::Taken(_) | Error::On(_) => Code::WrongState,
            _ => Code::Build,
        };
        let failure = Failure::from_error(code, &error);
        match hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
