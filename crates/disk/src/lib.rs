//! Disk images behind one trait, [`Disk`]: raw files and block devices by our own calls, qcow2 and
//! VMDK through the library `imago`.
//!
//! # Formats
//! [`open`] takes the format that the user names or tells it by content. Telling a *raw* image by
//! content is a trap: its guest owns the first sector and could write a qcow2 header there, which
//! names a backing file, and read any file of the host after the next start. So the first sector of
//! an image that was told to be raw cannot be made to look like another format: such a write fails
//! with an I/O error, and a warning says that `format=raw` lifts this.
//!
//! # Other files
//! A qcow2 or VMDK image may name further files. They are opened read-only, and only if they lie in
//! the image's own folder or below it (symbolic links followed): an image from somewhere else must
//! not reach into the host. At most [`MAX_BACKING`] images may be stacked. An overlay of ours, whose base
//! lies elsewhere, is opened with [`open_overlay`]: the caller says where the base is, not the overlay.
//!
//! # Locks
//! Every image is locked (`flock`): one opened for writing belongs to this process alone, readers
//! share. The kernel lifts the lock when the process ends, however it ends.
//!
//! # Durability
//! [`Disk::flush`] returns when everything written before it is on stable storage (`fdatasync`;
//! for qcow2 the cached metadata is written first, in an order that a power cut of the host keeps, see
//! `ordered.rs`). Nothing else promises that.
//!
//! # Copies
//! Raw and qcow2 data moves between guest memory and the page cache without a copy in between,
//! except in compressed qcow2 clusters, the partial clusters around a first write, and the guarded
//! first sector of a raw image.

mod create;
mod error;
mod file;
mod format;
mod gate;
#[cfg(test)]
mod hostile;
mod image;
mod ordered;
mod qcow2_check;
mod raw;
mod reader;
#[cfg(test)]
mod testing;

use std::io;
use std::path::{Path, PathBuf};

pub use create::{copy, create, create_overlay};
pub use error::Error;
pub use format::Format;
pub use gate::MAX_BACKING;
pub use reader::Reader;
use serde::Serialize;

/// A piece of guest memory.
pub type Slice<'a> = vm_memory::VolatileSlice<'a, mem::PageLog>;

/// What every disk is addressed in, in bytes, whatever the host's own blocks.
pub const SECTOR: u64 = 512;

/// What ospite chose for a disk, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Description {
    /// The format.
    pub format: Format,
    /// Whether the format was told by content rather than named.
    pub probed: bool,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Size that the guest sees, in bytes.
    pub size: u64,
}

/// A disk image as a block device uses it. Calls may come from several threads at once.
///
/// Offsets and lengths are in bytes; what does not lie within [`Disk::size`] is refused with
/// [`io::ErrorKind::InvalidInput`], and a write to a read-only disk with
/// [`io::ErrorKind::ReadOnlyFilesystem`].
pub trait Disk: Send + Sync {
    /// Size in bytes, a multiple of [`SECTOR`]; does not change.
    fn size(&self) -> u64;

    /// What was chosen.
    fn description(&self) -> Description;

    /// The unit below which [`Disk::discard`] frees nothing, in bytes.
    fn discard_granularity(&self) -> u64;

    /// Fills `slices` from `offset` on.
    fn read_vectored_at(&self, slices: &[Slice<'_>], offset: u64) -> io::Result<()>;

    /// Writes all of `slices` from `offset` on.
    fn write_vectored_at(&self, slices: &[Slice<'_>], offset: u64) -> io::Result<()>;

    /// The first byte from `offset` on that may be anything but zero, where that can be told cheaply.
    fn data_from(&self, offset: u64) -> Option<u64> {
        (offset < self.size()).then_some(offset)
    }

    /// Returns when all that was written is on stable storage.
    fn flush(&self) -> io::Result<()>;

    /// The guest needs this range no more; what it reads from there is undefined.
    fn discard(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Makes the range read as zeroes; its space is given back where `may_free`.
    fn write_zeroes(&self, offset: u64, length: u64, may_free: bool) -> io::Result<()>;
}

/// Opens an image, in `format` or in the one that its content shows.
pub fn open(path: &Path, format: Option<Format>, read_only: bool) -> Result<Box<dyn Disk>, Error> {
    let file = file::open(path, read_only)?;
    let head = file::head(&file).map_err(|source| Error::io(path, "read", source))?;
    let found = format::tell(&head);
    let chosen = match (format, found) {
        (Some(format), found) if format == Format::Raw || found == Ok(format) => format,
        (Some(format), _) => return Err(Error::WrongFormat { path: path.into(), format }),
        (None, Ok(format)) => format,
        (None, Err(what)) => return Err(Error::Unsupported { path: path.into(), what }),
    };
    let probed = format.is_none();
    match chosen {
        Format::Raw => Ok(Box::new(raw::RawDisk::new(path, file, read_only, probed)?)),
        Format::Qcow2 => Ok(Box::new(image::qcow2(path, file, read_only, probed)?)),
        Format::Vmdk => Ok(Box::new(image::vmdk(path, file, read_only, probed)?)),
    }
}

/// Opens the qcow2 image `path` on the qcow2 image `base`, whatever base it names itself. The base is only
/// read, and needs no other file.
pub fn open_overlay(path: &Path, base: &Path, read_only: bool) -> Result<Box<dyn Disk>, Error> {
    Ok(Box::new(image::overlay(path, base, read_only)?))
}

/// The other files that [`open`] would open with an image; none where it cannot be opened.
pub fn others(path: &Path, format: Option<Format>) -> Vec<PathBuf> {
    let Ok(file) = file::open(path, true) else { return Vec::new() };
    let told = || file::head(&file).ok().and_then(|head| format::tell(&head).ok());
    match format.or_else(told) {
        Some(format) => image::others(path, file, format).unwrap_or_default(),
        None => Vec::new(),
    }
}

/// The size in bytes of a qcow2 image that can be a base: one that needs no other file.
pub fn base_size(path: &Path) -> Result<u64, Error> {
    image::base_size(path)
}

/// Whether a request lies within a disk, and may be made of it.
fn check_range(size: u64, offset: u64, length: u64) -> io::Result<()> {
    match offset.checked_add(length) {
        Some(end) if end <= size => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{length} bytes at {offset} reach past the disk's end at {size}"),
        )),
    }
}

fn check_write(read_only: bool) -> io::Result<()> {
    if read_only { Err(io::ErrorKind::ReadOnlyFilesystem.into()) } else { Ok(()) }
}

fn total(slices: &[Slice<'_>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}
