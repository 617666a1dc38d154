//! What can be wrong with a VM's files.

use std::io;
use std::path::{Path, PathBuf};

use crate::Name;

/// Why something cannot be done with a VM's files.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody of that name.
    #[error("there is no VM `{name}`")]
    NoSuch {
        /// What was asked for.
        name: Name,
        /// One that is there and has a name like it.
        similar: Option<Name>,
    },
    /// Somebody of that name.
    #[error("there is a VM `{0}` already")]
    Taken(Name),
    /// It is on, and must not be for this.
    #[error("the VM `{0}` is on")]
    On(Name),
    /// A file of a version that we cannot read.
    #[error("{} has version {version}; this ospite reads version {known}", path.display(), known = super::definition::VERSION)]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u64,
    },
    /// A file that does not hold what it should.
    #[error("{} is broken", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// The host refuses.
    #[error("cannot {what} {}", path.display())]
    Host {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
}

impl Error {
    /// For `map_err`.
    pub(super) fn host(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Host { what, path: path.into(), source }
    }
}
