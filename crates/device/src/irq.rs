//! How an interrupt leaves a device: a line with a level, or a message.

use std::sync::Arc;

/// Where interrupt lines end: an interrupt controller, or several behind one router.
pub trait IrqSink: Send + Sync {
    /// Line `pin` now has this level. Called on every change and, harmlessly, without one.
    fn set_level(&self, pin: u32, high: bool);
}

/// One interrupt line. Clones are the same line.
#[derive(Clone)]
pub struct IrqLine {
    sink: Arc<dyn IrqSink>,
    pin: u32,
}

impl IrqLine {
    /// The line that ends at `pin` of `sink`.
    pub fn new(sink: Arc<dyn IrqSink>, pin: u32) -> IrqLine {
        IrqLine { sink, pin }
    }

    /// Sets the level.
    pub fn set(&self, high: bool) {
        self.sink.set_level(self.pin, high);
    }

    /// One edge: up and down again.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

/// A message-signalled interrupt (PCI Local Bus 3.0, section 6.8): a write of `data` to `address`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    /// Target address; on x86 `0xfee0_0000` and up, with the destination in it.
    pub address: u64,
    /// The data written; on x86 the vector and delivery mode.
    pub data: u32,
}

/// Where messages go.
pub trait MsiSink: Send + Sync {
    /// Delivers the message; one that names no vCPU is dropped, as on a bus.
    fn send(&self, msi: Msi);
}
