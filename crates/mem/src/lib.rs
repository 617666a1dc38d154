//! Guest memory.
//!
//! [`GuestRam`] is the one owner of a guest's memory: devices reach it through `vm-memory`'s
//! checked accessors, engines through [`GuestRam::page`]. Both ways leave their mark in the
//! [`PageLog`]: which pages were written (the dirty log of a snapshot or a migration), and which
//! pages hold code that an engine has decoded or translated.

mod host;
mod kind;
mod mapping;
mod page_log;
mod ram;
mod vectored;

pub use host::HostInt;
pub use kind::{Kind, UnknownKind};
pub use page_log::{PageLog, PageState, code_changes};
pub use ram::{Backing, Error, GuestRam, Page, RamRange};
pub use vectored::{read_vectored_at, write_vectored_at};
pub use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Size of a guest page in bytes, the grain of the page log.
pub const PAGE_SIZE: u64 = 4096;
