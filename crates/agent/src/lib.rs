//! A client of the QEMU guest agent, and what can be done with it: run a command in a guest, copy files to
//! and from it, with no network.
//!
//! The agent starts a shell in the guest, which connects the command's streams to ports of the virtio
//! console device; so output flows while the command runs, holds it back where nobody reads, and is never
//! kept anywhere. The agent itself is asked to start, to look and to signal, nothing else.
//!
//! | what | file |
//! |---|---|
//! | the protocol: JSON lines, deadlines, limits | `protocol.rs` |
//! | a command in the guest | `command.rs`, `command.sh` |
//! | files and folders | `copy.rs`, `pack.rs`, `unpack.rs` |
//!
//! The guest may be an attacker. It can answer anything, at any length, or not at all: answers are limited
//! and strictly parsed, paths in archives stay below the destination, and its words are printed with their
//! control characters escaped.

mod command;
mod copy;
mod error;
mod pack;
mod protocol;
#[cfg(test)]
mod testing;
mod unpack;

pub use command::{Command, Exit, Output, Running, Signal, Signaller, WithInput, WithOutput};
pub use copy::{Copied, Progress, from_guest, size, to_guest};
pub use error::Error;
pub use protocol::{Agent, Connect};
