//! Boots guests and talks to them, for tests and for the demo: [`Ospite`] starts the program on a
//! pipe or a terminal, [`Session`] reads what the guest prints and types.
//!
//! The tests are ignored by a plain `cargo test`: they need kernels and disks, which `tools/` makes on
//! first use, and minutes. `make guest-test` runs them.

pub mod artefacts;
pub mod disk_log;
mod ospite;
mod session;
mod shell;
mod transcript;

pub use ospite::{Ospite, Refusal};
pub use session::{End, Session, patience};
pub use shell::Shell;
