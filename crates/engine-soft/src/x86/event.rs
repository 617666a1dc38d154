//! Delivery of exceptions and interrupts through the IDT or the real-mode vector table.

use super::cpu::Cpu;
use super::exception::Exception;

/// The CPU gave up: an exception while a double fault was being delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shutdown;

/// What is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An exception of the instruction at RIP.
    Exception(Exception),
    /// `INT n`, `INT3`, `INTO`: RIP is behind the instruction when the handler gets to run.
    Software(u8),
    /// An external interrupt.
    External(u8),
    /// A non-maskable interrupt.
    Nmi,
}

impl Cpu {
    /// Delivers an event; exceptions on the way become double faults, and those the shutdown.
    pub fn deliver(&mut self, _event: Event) -> Result<(), Shutdown> {
        Err(Shutdown)
    }
}
