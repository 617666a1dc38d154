//! The keyboard of the console port.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};

use super::layout::{CONSOLE, receive_queue};
use super::ports::Shared;
use crate::lock;

/// Keystrokes that wait for the guest; a sender waits past that.
pub(super) const MAX_INPUT: usize = 1 << 16;

/// What was typed and not yet read.
#[derive(Default)]
pub(super) struct Input {
    pub(super) bytes: VecDeque<u8>,
    /// The console is gone: senders need not wait.
    pub(super) closed: bool,
}

/// The keyboard of a console. Clones are the same keyboard.
#[derive(Clone)]
pub struct ConsoleInput(pub(super) Arc<Shared>);

impl ConsoleInput {
    /// Types `bytes`, all of them: waits while the guest does not read. Gives up when the console
    /// goes away.
    pub fn send(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let input = lock(&self.0.input);
            let full = |input: &mut Input| input.bytes.len() >= MAX_INPUT && !input.closed;
            let waited = self.0.room.wait_while(input, full);
            let mut input = waited.unwrap_or_else(PoisonError::into_inner);
            if input.closed {
                return;
            }
            bytes = &bytes[self.append(&mut input, bytes)..];
        }
    }

    /// Types as much of `bytes` as there is room for at once; how much that was.
    pub fn try_send(&self, bytes: &[u8]) -> usize {
        self.append(&mut lock(&self.0.input), bytes)
    }

    fn append(&self, input: &mut Input, bytes: &[u8]) -> usize {
        let count = bytes.len().min(MAX_INPUT.saturating_sub(input.bytes.len()));
        input.bytes.extend(&bytes[..count]);
        self.0.wake(receive_queue(CONSOLE));
        count
    }
}
