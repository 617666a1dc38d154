//! What goes wrong, as one line for people and a code for scripts.

use std::error::Error;

use crate::exit::Code;
use crate::logger::say;
use crate::plain::plain;

/// A failure: what could not be done and why, in one line, and what to type instead.
#[derive(Debug)]
pub struct Failure {
    code: Code,
    message: String,
    hint: Option<String>,
}

impl Failure {
    /// A failure in our own words.
    pub fn new(code: Code, message: impl Into<String>) -> Failure {
        Failure { code, message: message.into(), hint: None }
    }

    /// An error with its whole chain of causes.
    pub fn from_error(code: Code, error: &(dyn Error + 'static)) -> Failure {
        Failure::new(code, vmm::chain(error))
    }

    /// Adds what to do about it.
    pub fn hint(mut self, hint: impl Into<String>) -> Failure {
        self.hint = Some(hint.into());
        self
    }

    /// The code to exit with.
    pub fn code(&self) -> Code {
        self.code
    }

    /// What failed, and why.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What to do about it.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// Says first for what it was tried.
    pub fn context(mut self, what: &str) -> Failure {
        self.message = format!("{what}: {}", self.message);
        self
    }

    /// Prints it; the code to exit with.
    pub fn tell(&self) -> Code {
        say(&self.message);
        if let Some(hint) = &self.hint {
            eprintln!("  hint: {}", plain(hint));
        }
        self.code
    }
}
