//! Why a guest did not do what it was asked.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// What failed; the cause is the error's source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The VM does not take connections.
    #[error("cannot connect to the VM")]
    Connect(#[source] io::Error),
    /// Nobody in the guest answers.
    #[error(
        "the guest agent does not answer within {} s: qemu-guest-agent has to be installed and running in the guest",
        .0.as_secs()
    )]
    Silent(Duration),
    /// All ports for commands are taken.
    #[error("too many commands run in this guest at once")]
    Busy,
    /// The connection broke.
    #[error("the connection to the guest broke; has the guest stopped or restarted?")]
    Broken(#[source] io::Error),
    /// The agent does not do it.
    #[error("the guest agent refuses: {0}")]
    Refused(String),
    /// The agent's answer is none.
    #[error("the guest agent's answer makes no sense: {0}")]
    Nonsense(String),
    /// The guest could not make the command's streams.
    #[error("the guest cannot start commands: {0}")]
    NotStarted(String),
    /// A command that a copy needs has failed in the guest.
    #[error("the guest cannot copy: {0}")]
    Guest(String),
    /// A file of the host.
    #[error("cannot copy {}", path.display())]
    Host {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// An archive from the guest is not one, or wants to leave its folder.
    #[error("the guest sent an archive that is not accepted: {0}")]
    Archive(String),
}

impl Error {
    pub(crate) fn host(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Host { path, source }
    }
}

/// The guest's words for a person's terminal: without control characters, and not many.
pub(crate) fn plain(words: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().collect() } else { c.to_string() };
    words.trim_end().chars().take(400).map(escape).collect()
}
