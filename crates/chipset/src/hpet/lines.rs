//! Where the timers' interrupts go: pins that they share with PCI, or, with the legacy routes on (2.3.5), the
//! lines of PIT and RTC in their place.

use std::sync::{Arc, Mutex};

use device::IrqSink;

use crate::sync::lock;

/// The lines that timers 0 and 1 have with the legacy routes on: those of PIT and RTC.
pub(super) const LEGACY: [u32; 2] = [0, 8];

/// Levels by bit.
#[derive(Default)]
struct Levels {
    board: u32,
    hpet: u32,
    legacy: bool,
}

impl Levels {
    fn joined(&self) -> u32 {
        let taken = LEGACY.map(|line| 1 << line).iter().fold(0, |all, bit| all | bit);
        self.hpet | if self.legacy { self.board & !taken } else { self.board }
    }
}

/// The board's lines, an HPET among them.
pub struct HpetLines {
    sink: Arc<dyn IrqSink>,
    levels: Mutex<Levels>,
}

impl HpetLines {
    /// Lines that end at `sink`. The board's other devices use them as an [`IrqSink`].
    pub fn new(sink: Arc<dyn IrqSink>) -> Arc<HpetLines> {
        Arc::new(HpetLines { sink, levels: Mutex::default() })
    }

    /// The level-triggered lines that the HPET holds, and whether it has those of PIT and RTC.
    pub(super) fn hold(&self, lines: u32, legacy: bool) {
        let mut levels = lock(&self.levels);
        self.change(&mut levels, |levels| (levels.hpet, levels.legacy) = (lines, legacy));
    }

    /// One edge.
    pub(super) fn pulse(&self, line: u32) {
        let mut levels = lock(&self.levels);
        let held = levels.hpet;
        self.change(&mut levels, |levels| levels.hpet |= 1 << line);
        self.change(&mut levels, |levels| levels.hpet = held);
    }

    /// Tells of changes under the lock, so that those of several devices arrive in order.
    fn change(&self, levels: &mut Levels, change: impl FnOnce(&mut Levels)) {
        let before = levels.joined();
        change(levels);
        let after = levels.joined();
        for line in (0..u32::BITS).filter(|line| (before ^ after) >> line & 1 != 0) {
            self.sink.set_level(line, after >> line & 1 != 0);
        }
    }
}

impl IrqSink for HpetLines {
    fn set_level(&self, pin: u32, high: bool) {
        let Some(bit) = 1u32.checked_shl(pin) else { return };
        let mut levels = lock(&self.levels);
        self.change(&mut levels, |levels| {
            levels.board = if high { levels.board | bit } else { levels.board & !bit };
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Changes;

    #[test]
    fn the_pit_is_not_heard_while_the_hpet_has_its_line() {
        let seen = Arc::new(Changes::default());
        let lines = HpetLines::new(seen.clone());
        lines.set_level(0, true);
        assert_eq!(seen.take(), [(0, true)]);
        lines.hold(0, true);
        assert_eq!(seen.take(), [(0, false)]);
        lines.set_level(0, false);
        lines.set_level(8, true);
        lines.set_level(4, true);
        assert_eq!(seen.take(), [(4, true)]);
        lines.pulse(0);
        assert_eq!(seen.take(), [(0, true), (0, false)]);
        lines.hold(0, false);
        assert_eq!(seen.take(), [(8, true)], "the RTC still wants to be heard");
    }

    #[test]
    fn a_shared_line_falls_when_the_last_lets_go() {
        let seen = Arc::new(Changes::default());
        let lines = HpetLines::new(seen.clone());
        lines.set_level(16, true);
        lines.hold(1 << 16, false);
        lines.set_level(16, false);
        assert_eq!(seen.take(), [(16, true)]);
        lines.hold(0, false);
        assert_eq!(seen.take(), [(16, false)]);
        lines.set_level(99, true);
        assert!(seen.take().is_empty());
    }
}
