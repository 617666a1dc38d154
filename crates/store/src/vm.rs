//! VMs as they lie in a [`Home`](crate::Home), a folder each:
//!
//! | file | what it is | written by |
//! |---|---|---|
//! | `vm.json` | the [`Definition`] | whoever creates it |
//! | `disk.qcow2` | the disk, if the VM has one of its own | the VM |
//! | `lock` | held while the VM is on: this decides, whatever other files say | – |
//! | `state.json` | the [`State`] | whoever holds the lock |
//! | `log/console.log`, `.1`, ... | what the guest printed, see [`log`] | the VM |
//! | `ospite.log` | what our own processes had to say | they |
//!
//! A folder comes and goes by one rename: at any instant a VM is there, whole, or it is not.

mod definition;
mod error;
mod folder;
pub mod log;
mod process;
mod state;

pub use definition::{Boot, Console, Definition, Disk, Health, OnFailure, Probe, Restart, VERSION};
pub use error::Error;
pub use folder::{Folder, create, find, list, remove};
pub use process::Process;
pub use state::{HealthState, LastEnd, Phase, State, Word};
