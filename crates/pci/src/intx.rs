//! Legacy interrupt pins (PCI Local Bus 3.0, 2.2.6): level-triggered and shared.

use std::sync::{Arc, Mutex};

use device::{IrqLine, IrqSink};

use crate::lock;

/// An interrupt pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pin {
    /// INTA#.
    A,
    /// INTB#.
    B,
    /// INTC#.
    C,
    /// INTD#.
    D,
}

/// First global system interrupt of the pins, and how many they are spread over.
const FIRST_GSI: u32 = 16;
const GSIS: u32 = 8;

/// Joins the pins of all slots into the interrupt controller's eight inputs: an input is high while
/// any of its pins is.
pub struct IntxRouter {
    sink: Arc<dyn IrqSink>,
    /// For each input, the sources (4 × slot + pin) that want it.
    asserted: Mutex<[u128; GSIS as usize]>,
}

impl IntxRouter {
    /// A router into `sink`, whose pins are global system interrupts.
    pub fn new(sink: Arc<dyn IrqSink>) -> Arc<IntxRouter> {
        Arc::new(IntxRouter { sink, asserted: Mutex::default() })
    }

    /// The global system interrupt of a slot's pin: 16 + (slot + pin) % 8 with INTA = 0, as the
    /// ACPI `_PRT` has to say too.
    pub fn gsi(slot: u8, pin: Pin) -> u32 {
        FIRST_GSI + (u32::from(slot) + pin as u32) % GSIS
    }

    /// The pin of a slot.
    pub fn intx(self: &Arc<Self>, slot: u8, pin: Pin) -> Intx {
        let source = u32::from(slot % 32) * 4 + pin as u32;
        let line = IrqLine::new(self.clone(), source);
        Intx { pin, gsi: Self::gsi(slot, pin), line, state: Arc::default() }
    }
}

impl IrqSink for IntxRouter {
    fn set_level(&self, source: u32, high: bool) {
        let gsi = Self::gsi((source / 4) as u8, [Pin::A, Pin::B, Pin::C, Pin::D][source as usize % 4]);
        let mut asserted = lock(&self.asserted);
        let sources = &mut asserted[(gsi - FIRST_GSI) as usize];
        let bit = 1u128 << (source % 128);
        *sources = if high { *sources | bit } else { *sources & !bit };
        // Under the lock, so that two devices' changes arrive in order.
        self.sink.set_level(gsi, *sources != 0);
    }
}

#[derive(Default)]
struct State {
    asserted: bool,
    disabled: bool,
}

/// One function's interrupt pin with its status and disable bits. Clones are the same pin.
#[derive(Clone)]
pub struct Intx {
    pin: Pin,
    gsi: u32,
    line: IrqLine,
    state: Arc<Mutex<State>>,
}

impl Intx {
    /// Which pin.
    pub fn pin(&self) -> Pin {
        self.pin
    }

    /// The global system interrupt it ends at.
    pub fn gsi(&self) -> u32 {
        self.gsi
    }

    /// Raises or lowers it.
    pub fn set(&self, asserted: bool) {
        self.update(|state| state.asserted = asserted);
    }

    /// Whether the function wants service: the interrupt status bit.
    pub fn is_asserted(&self) -> bool {
        lock(&self.state).asserted
    }

    pub(crate) fn set_disabled(&self, disabled: bool) {
        self.update(|state| state.disabled = disabled);
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.state);
        let before = state.asserted && !state.disabled;
        change(&mut state);
        let level = state.asserted && !state.disabled;
        if level != before {
            self.line.set(level);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Levels(Mutex<Vec<(u32, bool)>>);

    impl IrqSink for Levels {
        fn set_level(&self, pin: u32, high: bool) {
            lock(&self.0).push((pin, high));
        }
    }

    #[test]
    fn a_shared_line_falls_when_the_last_device_lets_go() {
        let levels = Arc::new(Levels::default());
        let router = IntxRouter::new(levels.clone());
        let (one, two) = (router.intx(1, Pin::A), router.intx(8, Pin::B));
        assert_eq!((one.gsi(), two.gsi()), (17, 17));
        one.set(true);
        two.set(true);
        one.set(false);
        assert_eq!(lock(&levels.0).last(), Some(&(17, true)));
        two.set_disabled(true);
        assert_eq!(lock(&levels.0).last(), Some(&(17, false)));
        assert!(two.is_asserted());
        two.set_disabled(false);
        two.set(false);
        assert_eq!(lock(&levels.0).as_slice()[3..], [(17, false), (17, true), (17, false)]);
    }
}
