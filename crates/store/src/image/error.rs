//! What goes wrong with images, for the person who asked.

use std::io;
use std::path::{Path, PathBuf};

use crate::Name;

/// What goes wrong with images.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such image.
    #[error(
        "there is no image {name}; ospite image list shows those that are there, and this makes it: ospite image build {name}"
    )]
    Missing {
        /// The image.
        name: Name,
    },
    /// One of this name is there.
    #[error(
        "there is an image {name} already; take another name, or remove it first: ospite image rm {name}"
    )]
    Exists {
        /// The image.
        name: Name,
    },
    /// VMs are on it.
    #[error(
        "image {name} is what the disks of these VMs are on: {}; remove them first: ospite rm {}",
        list(vms, ", "),
        list(vms, " ")
    )]
    InUse {
        /// The image.
        name: Name,
        /// The VMs.
        vms: Vec<Name>,
    },
    /// A manifest that is none.
    #[error("{} is no image's manifest; remove that folder, then build or import the image again", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is not what it was.
    #[error("image {name} is damaged: {} is not what its manifest says; remove it and build or import it again: ospite image rm {name}", path.display())]
    Damaged {
        /// The image.
        name: Name,
        /// The file.
        path: PathBuf,
    },
    /// A disk smaller than what is on it.
    #[error("a disk of {} cannot hold image {name}, which has {}; ask for that or more", mib(*asked), mib(*least))]
    TooSmall {
        /// The image.
        name: Name,
        /// What was asked for, in bytes.
        asked: u64,
        /// What it takes, in bytes.
        least: u64,
    },
    /// A disk image failed.
    #[error(transparent)]
    Disk(disk::Error),
    /// The host's disk is full.
    #[error("no space left on the disk that holds {}; make room, then try again", path.display())]
    Full {
        /// What was to be written.
        path: PathBuf,
    },
    /// The host failed.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

fn list(names: &[Name], between: &str) -> String {
    names.iter().map(Name::as_str).collect::<Vec<_>>().join(between)
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

impl Error {
    pub(crate) fn io(what: &'static str, path: &Path, source: io::Error) -> Error {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::Full { path: path.into() },
            _ => Error::Io { what, path: path.into(), source },
        }
    }
}
