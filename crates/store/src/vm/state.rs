//! How a VM is: `state.json`. Whether it is on at all, the lock says.

use serde::{Deserialize, Serialize};

use super::Process;

/// What the keeper of a VM knows about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Who restarts it.
    pub keeper: Option<Process>,
    /// The VM.
    pub vm: Option<Process>,
    /// What goes on.
    pub phase: Phase,
    /// When its present process was started, in seconds since 1970.
    pub started: u64,
    /// How often it has come back by its restart policy since it was started.
    pub restarts: u64,
    /// How it ended the last time.
    pub last_end: Option<LastEnd>,
    /// Whether it does its work, where it has a health check.
    #[serde(default)]
    pub health: Option<HealthState>,
    /// Nobody has switched it off: after a restart of the host it may come back.
    #[serde(default)]
    pub wanted: bool,
}

/// Whether a VM does its work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthState {
    /// In a word.
    pub word: Word,
    /// Why it does not.
    pub reason: Option<String>,
}

/// See [`HealthState`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Word {
    /// It has yet to.
    Starting,
    /// It does.
    Healthy,
    /// It does not.
    Unhealthy,
}

impl Word {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Word::Starting => "starting",
            Word::Healthy => "healthy",
            Word::Unhealthy => "unhealthy",
        }
    }
}

/// What goes on with a VM that is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Its process is there.
    Running,
    /// It ended, and comes back after a pause.
    Restarting,
    /// It is off.
    Ended,
}

/// How a VM ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastEnd {
    /// When, in seconds since 1970.
    pub at: u64,
    /// The exit code of its process; none where a signal ended it.
    #[serde(default)]
    pub code: Option<i32>,
    /// In words.
    pub how: String,
    /// Not as anybody wanted it.
    pub failed: bool,
}

impl LastEnd {
    /// The end of a VM that somebody switched off before it came back: it is off because of that.
    pub fn switched_off(self) -> LastEnd {
        LastEnd {
            how: format!("{}, and was switched off before it came back", self.how),
            failed: false,
            ..self
        }
    }
}
