//! An interrupt line with nothing behind it, for the tests of devices.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use device::IrqSink;

/// Keeps the level and counts rising edges.
#[derive(Default)]
pub(crate) struct Wire {
    level: AtomicBool,
    edges: AtomicU32,
}

impl Wire {
    pub(crate) fn is_high(&self) -> bool {
        self.level.load(Ordering::SeqCst)
    }

    pub(crate) fn edges(&self) -> u32 {
        self.edges.load(Ordering::SeqCst)
    }
}

impl IrqSink for Wire {
    fn set_level(&self, _pin: u32, high: bool) {
        if !self.level.swap(high, Ordering::SeqCst) && high {
            self.edges.fetch_add(1, Ordering::SeqCst);
        }
    }
}
