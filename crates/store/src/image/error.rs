//! What goes wrong with images, for the person who asked.

use std::io;
use std::path::{Path, PathBuf};

use super::recipe::Bad;
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
    /// A recipe that is none.
    #[error("the recipe is wrong")]
    Recipe(#[from] Bad),
    /// A program that a build needs.
    #[error("{tool} is missing, which building an image needs; install it: sudo apt-get install {packages}")]
    Tool {
        /// The program.
        tool: String,
        /// The packages that have what is missing.
        packages: String,
    },
    /// Namespaces do not work here.
    #[error("an image cannot be built here: {why}; this may mend it: {mend}")]
    Namespace {
        /// What the host says.
        why: String,
        /// What to type.
        mend: String,
    },
    /// The host has no mirror of Debian.
    #[error(
        "the host's apt knows no mirror with Debian's packages for {release}; type: sudo apt-get update, or name a \
         sources.list that has one in OSPITE_SOURCES"
    )]
    Sources {
        /// The release.
        release: String,
    },
    /// No such package.
    #[error("Debian has no package {package}; this searches for one: apt-cache search {package}")]
    Package {
        /// The package.
        package: String,
    },
    /// No way to the mirror.
    #[error(
        "the mirror of the host's apt cannot be reached; see whether this works: sudo apt-get update{tail}"
    )]
    Network {
        /// What the tool said.
        tail: String,
    },
    /// The disk asked for is too small.
    #[error("what is installed does not fit on a disk of that size; it takes {mib} MiB: --size {mib}M")]
    DoesNotFit {
        /// What it takes.
        mib: u64,
    },
    /// A disk without a kernel.
    #[error(
        "no kernel is found in {}: neither in /boot nor in / of an ext4 file system; name one with --kernel, its initial \
         RAM disk with --initrd, and its command line with --append", file.display()
    )]
    NoKernel {
        /// The disk.
        file: PathBuf,
    },
    /// A kernel that does not know its root.
    #[error(
        "the kernel's command line for {} cannot be told; say what is its root: --append 'root=/dev/vda1 ro console=ttyS0'",
        file.display()
    )]
    NoRoot {
        /// The disk.
        file: PathBuf,
    },
    /// A tool cannot be started.
    #[error("cannot {what}")]
    Start {
        /// What it does.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A tool failed.
    #[error("cannot {what}; the last that was said about it:{tail}")]
    Step {
        /// What it does.
        what: &'static str,
        /// What it said.
        tail: String,
    },
    /// Whoever waited has ended it.
    #[error("stopped; nothing has changed")]
    Stopped,
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

impl From<disk::Error> for Error {
    fn from(error: disk::Error) -> Error {
        match error {
            disk::Error::Io { path, source, .. } if is_full(&source) => Error::Full { path },
            error => Error::Disk(error),
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl Error {
    pub(crate) fn io(what: &'static str, path: &Path, source: io::Error) -> Error {
        if is_full(&source) {
            Error::Full { path: path.into() }
        } else {
            Error::Io { what, path: path.into(), source }
        }
    }
}
