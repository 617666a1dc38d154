//! Interrupt lines with nothing behind them, for the tests of devices.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use device::IrqSink;

use crate::sync::lock;

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

/// Remembers what was said of any lines, in order.
#[derive(Default)]
pub(crate) struct Changes(Mutex<Vec<(u32, bool)>>);

impl Changes {
    pub(crate) fn take(&self) -> Vec<(u32, bool)> {
        std::mem::take(&mut *lock(&self.0))
    }
}

impl IrqSink for Changes {
    fn set_level(&self, pin: u32, high: bool) {
        lock(&self.0).push((pin, high));
    }
}
