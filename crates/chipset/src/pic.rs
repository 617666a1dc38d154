//! The PC's two cascaded 8259A interrupt controllers (Intel 8259A data sheet, order 231468-003) with
//! the edge/level control registers of EISA and PCI machines (ports 0x4d0, 0x4d1).
//!
//! One deviation, shared with other virtual machines: an edge that was seen stays requested when its
//! line falls before the acknowledge, so that a short pulse is never answered with a spurious IRQ 7.

use std::sync::{Arc, Mutex};

use device::{BadState, Device, Snapshot};
use serde::{Deserialize, Serialize};

use crate::part::{Parts, part};

/// Lines of the master and of the slave that cannot be level-triggered: timer, keyboard, cascade;
/// RTC and coprocessor.
const ELCR_MASKS: [u8; 2] = [0xf8, 0xde];
const CASCADE: u8 = 2;

mod icw1 {
    pub const NEEDS_ICW4: u8 = 1 << 0;
    pub const SINGLE: u8 = 1 << 1;
    pub const LEVEL: u8 = 1 << 3;
    pub const INIT: u8 = 1 << 4;
}

mod icw4 {
    pub const AUTO_EOI: u8 = 1 << 1;
    pub const FULLY_NESTED: u8 = 1 << 4;
}

mod ocw3 {
    pub const SELECT: u8 = 1 << 3;
    pub const POLL: u8 = 1 << 2;
}

/// Which initialization word is expected next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Init {
    #[default]
    Done,
    Icw2,
    Icw3,
    Icw4,
}

/// Saved state of one 8259A.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicChipState {
    lines: u8,
    irr: u8,
    isr: u8,
    imr: u8,
    elcr: u8,
    vector_base: u8,
    /// The line of the highest priority.
    highest: u8,
    init: Init,
    needs_icw4: bool,
    single: bool,
    level_mode: bool,
    read_isr: bool,
    poll: bool,
    special_mask: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    fully_nested: bool,
    master: bool,
}

/// Saved state of [`DualPic`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DualPicState {
    /// Lines 0 to 7.
    pub master: PicChipState,
    /// Lines 8 to 15.
    pub slave: PicChipState,
}

impl PicChipState {
    fn is_level(&self, bit: u8) -> bool {
        self.level_mode || self.elcr & bit != 0
    }

    fn set_line(&mut self, irq: u8, high: bool) {
        let bit = 1 << irq;
        let was_high = self.lines & bit != 0;
        self.lines = self.lines & !bit | if high { bit } else { 0 };
        if self.is_level(bit) {
            self.irr = self.irr & !bit | self.lines & bit;
        } else if high && !was_high {
            self.irr |= bit;
        }
    }

    /// The first of `lines` in the order of priority, and its place in it (0 is first).
    fn first_of(&self, lines: u8) -> Option<(u8, u8)> {
        let rotated = lines.rotate_right(u32::from(self.highest));
        (rotated != 0).then(|| {
            let place = rotated.trailing_zeros() as u8;
            ((self.highest + place) & 7, place)
        })
    }

    /// The line to interrupt the CPU for.
    fn pending(&self) -> Option<u8> {
        let (irq, place) = self.first_of(self.irr & !self.imr)?;
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        // The slave may interrupt its own service with a line of higher priority.
        if self.fully_nested && self.master {
            in_service &= !(1 << CASCADE);
        }
        match self.first_of(in_service) {
            Some((_, busy)) if busy <= place => None,
            _ => Some(irq),
        }
    }

    fn acknowledge(&mut self, irq: u8) {
        let bit = 1 << irq;
        if !self.is_level(bit) {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.highest = (irq + 1) & 7;
        }
    }

    /// OCW2: ends of interrupt and priorities.
    fn ocw2(&mut self, value: u8) {
        let level = value & 7;
        let served = if self.special_mask { self.isr & !self.imr } else { self.isr };
        match value >> 5 {
            0b000 => self.rotate_on_auto_eoi = false,
            0b100 => self.rotate_on_auto_eoi = true,
            command @ (0b001 | 0b101) => {
                if let Some((irq, _)) = self.first_of(served) {
                    self.isr &= !(1 << irq);
                    if command == 0b101 {
                        self.highest = (irq + 1) & 7;
                    }
                }
            }
            0b011 => self.isr &= !(1 << level),
            0b111 => {
                self.isr &= !(1 << level);
                self.highest = (level + 1) & 7;
            }
            0b110 => self.highest = (level + 1) & 7,
            _ => {}
        }
    }

    fn ocw3(&mut self, value: u8) {
        if value & ocw3::POLL != 0 {
            self.poll = true;
        }
        match value & 3 {
            2 => self.read_isr = false,
            3 => self.read_isr = true,
            _ => {}
        }
        match value >> 5 & 3 {
            2 => self.special_mask = false,
            3 => self.special_mask = true,
            _ => {}
        }
    }

    fn icw1(&mut self, value: u8) {
        *self = PicChipState {
            lines: self.lines,
            elcr: self.elcr,
            vector_base: self.vector_base,
            master: self.master,
            init: Init::Icw2,
            needs_icw4: value & icw1::NEEDS_ICW4 != 0,
            single: value & icw1::SINGLE != 0,
            level_mode: value & icw1::LEVEL != 0,
            ..PicChipState::default()
        };
        // Edges are forgotten, levels are still there.
        self.irr = if self.level_mode { self.lines } else { self.lines & self.elcr };
    }

    fn write_command(&mut self, value: u8) {
        if value & icw1::INIT != 0 {
            self.icw1(value);
        } else if value & ocw3::SELECT != 0 {
            self.ocw3(value);
        } else {
            self.ocw2(value);
        }
    }

    fn write_data(&mut self, value: u8) {
        let after_icw3 = if self.needs_icw4 { Init::Icw4 } else { Init::Done };
        match self.init {
            Init::Done => self.imr = value,
            Init::Icw2 => {
                self.vector_base = value & 0xf8;
                self.init = if self.single { after_icw3 } else { Init::Icw3 };
            }
            Init::Icw3 => self.init = after_icw3, // the wiring of a PC is what it is
            Init::Icw4 => {
                self.auto_eoi = value & icw4::AUTO_EOI != 0;
                self.fully_nested = value & icw4::FULLY_NESTED != 0;
                self.init = Init::Done;
            }
        }
    }

    /// A read in poll mode is an acknowledge.
    fn poll(&mut self) -> u8 {
        self.poll = false;
        match self.pending() {
            Some(irq) => {
                self.acknowledge(irq);
                0x80 | irq
            }
            None => 0,
        }
    }

    fn read(&mut self, data_port: bool) -> u8 {
        match (self.poll, data_port) {
            (true, _) => self.poll(),
            (false, true) => self.imr,
            (false, false) if self.read_isr => self.isr,
            (false, false) => self.irr,
        }
    }

    fn check(&self, master: bool) -> Result<(), BadState> {
        let bad = |what: String| Err(BadState::new("pic", what));
        if self.master != master {
            return bad("master and slave are exchanged".into());
        }
        if self.highest > 7 || self.vector_base & 7 != 0 {
            return bad(format!("priority {} or vector base {:#x}", self.highest, self.vector_base));
        }
        if self.elcr & !ELCR_MASKS[usize::from(!master)] != 0 {
            return bad(format!("level-triggered lines {:#x}", self.elcr));
        }
        Ok(())
    }
}

/// Both chips and their output to the CPU.
///
/// On a port bus, the range at 0x20 has offsets 0 and 1, that at 0xa0 offsets 2 and 3, the edge/level
/// registers offsets 4 and 5: see [`DualPic::at`].
pub struct DualPic {
    state: DualPicState,
    output: Box<dyn Fn(bool) + Send>,
    output_high: bool,
}

fn power_on() -> DualPicState {
    let chip = |master| PicChipState { master, ..PicChipState::default() };
    DualPicState { master: chip(true), slave: chip(false) }
}

impl DualPic {
    /// Controllers whose INT pin calls `output` at every change.
    pub fn new(output: impl Fn(bool) + Send + 'static) -> DualPic {
        DualPic { state: power_on(), output: Box::new(output), output_high: false }
    }

    /// The three port ranges: both chips and the edge/level registers.
    pub fn at(pic: &Arc<Mutex<DualPic>>) -> Parts<3> {
        [(0x20..0x22, part(pic, 0)), (0xa0..0xa2, part(pic, 2)), (0x4d0..0x4d2, part(pic, 4))]
    }

    /// Sets the level of a line, 0 to 15. The cascade, line 2, is not to be had.
    pub fn set_line(&mut self, irq: u8, high: bool) {
        match irq {
            CASCADE => {}
            0..8 => self.state.master.set_line(irq, high),
            8..16 => self.state.slave.set_line(irq - 8, high),
            _ => {}
        }
        self.update();
    }

    /// The CPU takes the interrupt: its vector. `None` if the request is gone, where a real chip would
    /// make up an IRQ 7.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let irq = self.state.master.pending()?;
        self.state.master.acknowledge(irq);
        let vector = if irq == CASCADE {
            let slave = &mut self.state.slave;
            // The request may have been masked since; the slave then answers with its line 7.
            let line = slave.pending().inspect(|&line| slave.acknowledge(line)).unwrap_or(7);
            slave.vector_base | line
        } else {
            self.state.master.vector_base | irq
        };
        self.update();
        Some(vector)
    }

    fn update(&mut self) {
        let DualPicState { master, slave } = &mut self.state;
        let slave_out = slave.pending().is_some();
        // A slave that has more to say raises its line anew for the master's edge detector.
        if slave_out && master.irr & 1 << CASCADE == 0 {
            master.set_line(CASCADE, false);
        }
        master.set_line(CASCADE, slave_out);
        if !slave_out {
            master.irr &= !(1 << CASCADE);
        }
        let high = master.pending().is_some();
        if high != self.output_high {
            self.output_high = high;
            (self.output)(high);
        }
    }

    fn read_port(&mut self, offset: u64) -> u8 {
        match offset {
            0 | 1 => self.state.master.read(offset == 1),
            2 | 3 => self.state.slave.read(offset == 3),
            4 => self.state.master.elcr,
            5 => self.state.slave.elcr,
            _ => 0xff,
        }
    }

    fn write_port(&mut self, offset: u64, value: u8) {
        let DualPicState { master, slave } = &mut self.state;
        match offset {
            0 => master.write_command(value),
            1 => master.write_data(value),
            2 => slave.write_command(value),
            3 => slave.write_data(value),
            4 => master.elcr = value & ELCR_MASKS[0],
            5 => slave.elcr = value & ELCR_MASKS[1],
            _ => {}
        }
    }
}

impl Device for DualPic {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (offset, byte) in (offset..).zip(data) {
            *byte = self.read_port(offset);
        }
        self.update();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (offset, &byte) in (offset..).zip(data) {
            self.write_port(offset, byte);
        }
        self.update();
    }

    fn reset(&mut self) {
        let (master, slave) = (self.state.master.lines, self.state.slave.lines);
        self.state = power_on();
        self.state.master.lines = master;
        self.state.slave.lines = slave;
        self.update();
    }
}

impl Snapshot for DualPic {
    type State = DualPicState;

    fn save(&self) -> DualPicState {
        self.state.clone()
    }

    fn restore(&mut self, state: DualPicState) -> Result<(), BadState> {
        let DualPicState { master, slave } = &state;
        master.check(true)?;
        slave.check(false)?;
        self.state = state;
        self.update();
        // The engine's own state is restored apart: tell it the level in any case.
        (self.output)(self.output_high);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    const ALL_OPEN: u8 = 0;

    struct Bench {
        pic: DualPic,
        output: Arc<AtomicBool>,
    }

    /// Initialized as Linux does: vectors 0x30 and 0x38, everything unmasked.
    fn bench(icw4: u8) -> Bench {
        let output = Arc::new(AtomicBool::new(false));
        let theirs = output.clone();
        let mut pic = DualPic::new(move |high| theirs.store(high, Ordering::SeqCst));
        for (port, value) in [(0, 0x11), (1, 0x30), (1, 4), (1, icw4), (2, 0x11), (3, 0x38), (3, 2), (3, 1)] {
            pic.write(port, &[value]);
        }
        pic.write(1, &[ALL_OPEN]);
        pic.write(3, &[ALL_OPEN]);
        Bench { pic, output }
    }

    impl Bench {
        fn is_high(&self) -> bool {
            self.output.load(Ordering::SeqCst)
        }
        fn read(&mut self, port: u64) -> u8 {
            let mut byte = [0xff];
            self.pic.read(port, &mut byte);
            byte[0]
        }
    }

    #[test]
    fn an_edge_is_taken_once_and_ended() {
        let mut b = bench(1);
        b.pic.set_line(4, true);
        assert!(b.is_high());
        assert_eq!(b.pic.acknowledge(), Some(0x34));
        assert!(!b.is_high());
        assert_eq!(b.pic.acknowledge(), None);
        b.pic.write(0, &[0x20]);
        assert!(!b.is_high(), "the line is still high, but that is no new edge");
        b.pic.set_line(4, false);
        b.pic.set_line(4, true);
        assert!(b.is_high());
    }

    #[test]
    fn the_slave_comes_through_the_cascade_and_both_want_an_end() {
        let mut b = bench(1);
        b.pic.set_line(8, true);
        assert_eq!(b.pic.acknowledge(), Some(0x38));
        b.pic.set_line(4, true);
        assert!(!b.is_high(), "line 4 is behind the cascade");
        b.pic.set_line(1, true);
        assert_eq!(b.pic.acknowledge(), Some(0x31), "line 1 is before it");
        b.pic.write(0, &[0x20]);
        b.pic.write(2, &[0x20]);
        b.pic.write(0, &[0x20]);
        assert_eq!(b.pic.acknowledge(), Some(0x34));
    }

    #[test]
    fn two_slave_lines_are_served_one_after_the_other() {
        let mut b = bench(1);
        b.pic.set_line(10, true);
        b.pic.set_line(12, true);
        assert_eq!(b.pic.acknowledge(), Some(0x3a));
        b.pic.write(2, &[0x20]);
        b.pic.write(0, &[0x20]);
        assert_eq!(b.pic.acknowledge(), Some(0x3c));
        b.pic.write(2, &[0x20]);
        b.pic.write(0, &[0x20]);
        assert!(!b.is_high());
    }

    #[test]
    fn a_level_line_asks_again_until_it_falls() {
        let mut b = bench(1);
        b.pic.write(5, &[0xff]);
        assert_eq!(b.read(5), 0xde, "lines 8 and 13 stay edge-triggered");
        b.pic.set_line(11, true);
        for _ in 0..3 {
            assert_eq!(b.pic.acknowledge(), Some(0x3b));
            b.pic.write(2, &[0x20]);
            b.pic.write(0, &[0x20]);
        }
        b.pic.set_line(11, false);
        assert!(!b.is_high());
    }

    #[test]
    fn masked_lines_wait_and_special_mask_lets_lower_ones_in() {
        let mut b = bench(1);
        b.pic.write(1, &[1 << 3]);
        b.pic.set_line(3, true);
        assert!(!b.is_high());
        assert_eq!(b.read(0), 1 << 3, "requested all the same");
        b.pic.write(1, &[ALL_OPEN]);
        assert_eq!(b.pic.acknowledge(), Some(0x33));
        b.pic.set_line(6, true);
        assert!(!b.is_high());
        b.pic.write(1, &[1 << 3]);
        b.pic.write(0, &[0x68]);
        assert_eq!(b.pic.acknowledge(), Some(0x36));
        b.pic.write(0, &[0x0b]);
        assert_eq!(b.read(0), 1 << 3 | 1 << 6, "OCW3 chose ISR");
    }

    #[test]
    fn rotation_makes_the_served_line_the_last() {
        let mut b = bench(1);
        b.pic.set_line(0, true);
        assert_eq!(b.pic.acknowledge(), Some(0x30));
        b.pic.write(0, &[0xa0]); // rotate on non-specific EOI
        b.pic.set_line(0, false);
        b.pic.set_line(0, true);
        b.pic.set_line(7, true);
        assert_eq!(b.pic.acknowledge(), Some(0x37));
        b.pic.write(0, &[0x60 | 7]); // specific EOI
        assert_eq!(b.pic.acknowledge(), Some(0x30));
    }

    #[test]
    fn automatic_end_of_interrupt_leaves_nothing_in_service() {
        let mut b = bench(1 | icw4::AUTO_EOI);
        b.pic.set_line(5, true);
        assert_eq!(b.pic.acknowledge(), Some(0x35));
        b.pic.write(0, &[0x0b]);
        assert_eq!(b.read(0), 0);
        b.pic.set_line(6, true);
        assert_eq!(b.pic.acknowledge(), Some(0x36));
    }

    #[test]
    fn software_polls_instead_of_taking_interrupts() {
        let mut b = bench(1);
        b.pic.write(0, &[0x0c]);
        assert_eq!(b.read(0), 0);
        b.pic.set_line(5, true);
        b.pic.write(0, &[0x0c]);
        assert_eq!(b.read(0), 0x85);
        assert!(!b.is_high());
    }

    #[test]
    fn initialization_forgets_edges_and_masks() {
        let mut b = bench(1);
        b.pic.write(1, &[0xff]);
        b.pic.set_line(4, true);
        b.pic.write(0, &[0x11]);
        assert_eq!((b.read(0), b.pic.acknowledge()), (0, None));
    }

    #[test]
    fn a_saved_pair_still_has_its_request_and_an_impossible_one_is_refused() {
        let mut b = bench(1);
        b.pic.set_line(9, true);
        let saved = b.pic.save();
        let mut other = bench(1);
        other.pic.restore(saved.clone()).unwrap();
        assert!(other.is_high());
        assert_eq!(other.pic.acknowledge(), Some(0x39));
        let exchanged = DualPicState { master: saved.slave, slave: saved.master };
        assert!(other.pic.restore(exchanged).is_err());
    }
}
