//! What goes wrong, as one line for people and a code for scripts.

use std::error::Error;

use crate::exit::Code;
use crate::logger::say;

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

    /// Prints it; the code to exit with.
    pub fn tell(&self) -> Code {
        say(&self.message);
        if let Some(hint) = &self.hint {
            eprintln!("  hint: {hint}");
        }
        self.code
    }
}
