//! Saved state.

use serde::{Serialize, de::DeserializeOwned};

/// A part with guest-visible state.
///
/// `restore` destructures the state exhaustively (no `..`), so that a field added later cannot be
/// forgotten, and checks every value: saved state is as untrusted as the guest.
pub trait Snapshot {
    /// One plain struct with everything the guest can observe.
    type State: Serialize + DeserializeOwned;

    /// Copies the state out.
    fn save(&self) -> Self::State;

    /// Takes the state on, or says what is wrong with it and changes nothing.
    fn restore(&mut self, state: Self::State) -> Result<(), BadState>;
}

/// A saved state that no device could be in.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("saved state of {part}: {what}")]
pub struct BadState {
    /// Which part refused it.
    pub part: &'static str,
    /// What is impossible about it.
    pub what: String,
}

impl BadState {
    /// A refusal by `part`.
    pub fn new(part: &'static str, what: impl Into<String>) -> BadState {
        BadState { part, what: what.into() }
    }
}
