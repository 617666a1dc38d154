//! What a device says when the guest ends or restarts the machine.

use std::sync::Arc;

/// The guest asked for the end of the machine, or for a new beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// Soft-off (ACPI S5).
    PowerOff,
    /// A system reset.
    Reset,
    /// A test kernel reports this value through the debug-exit port and ends.
    DebugExit(u32),
}

/// Takes power events; called with the device's lock held, so it only passes the news on.
pub type PowerSink = Arc<dyn Fn(PowerEvent) + Send + Sync>;

#[cfg(test)]
pub(crate) mod testing {
    use super::{PowerEvent, PowerSink};
    use std::sync::{Arc, mpsc};

    /// A sink whose events come out of the receiver.
    pub(crate) fn sink() -> (PowerSink, mpsc::Receiver<PowerEvent>) {
        let (tx, rx) = mpsc::channel();
        (Arc::new(move |event| tx.send(event).unwrap()), rx)
    }
}
