//! Why a disk image could not be opened, for the person who named it.

use std::io;
use std::path::{Path, PathBuf};

use crate::Format;

/// Why a disk image could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing there.
    #[error("disk image {} does not exist; check the path, or make one with: qemu-img create", path.display())]
    Missing {
        /// The image.
        path: PathBuf,
    },
    /// A directory.
    #[error("disk image {} is a directory; name an image file in it", path.display())]
    Directory {
        /// The image.
        path: PathBuf,
    },
    /// A socket, a pipe, a terminal.
    #[error("disk image {} is neither a file nor a block device", path.display())]
    NotADisk {
        /// The image.
        path: PathBuf,
    },
    /// The host says no.
    #[error(
        "no permission to {} disk image {}; {}", if *write { "write to" } else { "read" }, path.display(),
        if *write { "add ,readonly to use it unchanged, or change its mode or owner" } else { "change its mode or owner" }
    )]
    Permission {
        /// The image.
        path: PathBuf,
        /// Whether writing was asked for.
        write: bool,
    },
    /// Another process has it.
    #[error(
        "disk image {} is in use by another VM; stop that VM{}", path.display(),
        if *write { "" } else { ", which writes to it" }
    )]
    Locked {
        /// The image.
        path: PathBuf,
        /// Whether writing was asked for.
        write: bool,
    },
    /// No bytes.
    #[error("disk image {} is empty; give it a size with: truncate -s 10G {}", path.display(), path.display())]
    Empty {
        /// The image.
        path: PathBuf,
    },
    /// Not what the user says it is.
    #[error(
        "disk image {} is not in {format} format; leave format= out to have it told by content",
        path.display()
    )]
    WrongFormat {
        /// The image.
        path: PathBuf,
        /// What the user said.
        format: Format,
    },
    /// A format that we know but cannot open.
    #[error(
        "disk image {0} is in {what} format, which ospite does not open; convert it with: qemu-img convert -O qcow2 {0} NEW.qcow2",
        path.display()
    )]
    Unsupported {
        /// The image.
        path: PathBuf,
        /// The format's name.
        what: &'static str,
    },
    /// Part of it is missing.
    #[error(
        "disk image {} is truncated: {what} lies past the end of the file; copy or download it again",
        path.display()
    )]
    Truncated {
        /// The image.
        path: PathBuf,
        /// What is missing.
        what: &'static str,
    },
    /// It contradicts itself, or needs what we do not do.
    #[error("disk image {} cannot be used; see: qemu-img check {}", path.display(), path.display())]
    Bad {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: io::Error,
    },
    /// A format that can only be read.
    #[error("{format} images can only be read; add ,readonly or convert it with: qemu-img convert -O qcow2 {} NEW.qcow2", path.display())]
    ReadOnlyFormat {
        /// The image.
        path: PathBuf,
        /// Its format.
        format: Format,
    },
    /// The disk that is to be copied cannot be read.
    #[error("cannot read the disk at byte {offset}")]
    Read {
        /// Where.
        offset: u64,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The host failed.
    #[error("cannot {what} disk image {}", path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// What was being done.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn io(path: &Path, what: &'static str, source: io::Error) -> Error {
        Error::Io { path: path.into(), what, source }
    }

    pub(crate) fn bad(path: &Path, what: impl Into<String>) -> Error {
        Error::Bad { path: path.into(), source: io::Error::new(io::ErrorKind::InvalidData, what.into()) }
    }
}
