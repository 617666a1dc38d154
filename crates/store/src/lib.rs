//! Images and VMs as they lie on the host's file system.
//!
//! Everything is in one [`Home`]: a folder for each image and for each VM, and a folder for sockets
//! that is empty after a restart of the host. A file is either as it was or as it was to become,
//! whatever instant the power fails at: [`write_atomically`]. A folder comes into being under a name
//! that nobody looks at and gets its own by a rename.

mod atomic;
pub mod cloud_init;
mod home;
pub mod image;
mod name;
pub mod office;
mod size;
pub mod vm;

pub use atomic::{Lock, write_atomically};
pub use home::Home;
pub use name::{BadName, Name};
pub use size::{Size, SizeError};
