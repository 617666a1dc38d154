//! 82093AA I/O APIC (Intel order 290566-001) with the EOI register of its successors (ICH data sheets,
//! version 0x20), 24 pins.
//!
//! A line's level means "asserted"; the polarity bit is kept and has no effect. The device sends messages
//! and learns from the local APICs, through the machine, which vectors ended.

use std::sync::Arc;

use device::{BadState, Device, Msi, MsiSink, Snapshot};
use serde::{Deserialize, Serialize};

/// Number of pins.
pub(crate) const PINS: usize = 24;
const VERSION: u32 = 0x20;
/// Bits 24 to 27 of the ID register (3.2.1).
const ID_MASK: u8 = 0xf;

/// Offsets of the memory-mapped registers (3.1).
mod mmio {
    pub const SELECT: u64 = 0x00;
    pub const WINDOW: u64 = 0x10;
    pub const EOI: u64 = 0x40;
}

/// Indirect registers (3.2).
mod index {
    pub const ID: u8 = 0;
    pub const VERSION: u8 = 1;
    pub const ARBITRATION: u8 = 2;
    pub const REDIRECTION: u8 = 0x10;
}

/// Redirection table entry (3.2.4).
mod entry {
    pub const VECTOR: u64 = 0xff;
    pub const DELIVERY_SHIFT: u32 = 8;
    pub const LOGICAL: u64 = 1 << 11;
    pub const STATUS: u64 = 1 << 12;
    pub const REMOTE_IRR: u64 = 1 << 14;
    pub const LEVEL: u64 = 1 << 15;
    pub const MASKED: u64 = 1 << 16;
    pub const DESTINATION_SHIFT: u32 = 56;
    pub const READ_ONLY: u64 = STATUS | REMOTE_IRR;
    pub const WRITABLE: u64 = 0xff00_0000_0001_afff;
}

const LOWEST_PRIORITY: u64 = 1;
/// The delivery modes whose messages are edges whatever the entry says: SMI, NMI, INIT, ExtINT.
const EDGE_ONLY_MODES: [u64; 4] = [2, 4, 5, 7];

/// Saved state of [`IoApic`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    /// APIC ID, four bits.
    pub id: u8,
    /// IOREGSEL.
    pub select: u8,
    /// Level of each pin, by bit.
    pub lines: u32,
    /// Redirection table.
    pub entries: [u64; PINS],
}

/// The I/O APIC.
pub struct IoApic {
    state: IoApicState,
    /// The ID that reset sets.
    id: u8,
    sink: Arc<dyn MsiSink>,
}

/// The entry's message in the format that local APICs take (SDM 3A, 11.11).
fn message(entry: u64) -> Msi {
    let mode = entry >> entry::DELIVERY_SHIFT & 7;
    let mut address = 0xfee0_0000 | (entry >> entry::DESTINATION_SHIFT) << 12;
    if entry & entry::LOGICAL != 0 {
        address |= 1 << 2;
    }
    if mode == LOWEST_PRIORITY {
        address |= 1 << 3; // redirection hint
    }
    let mut data = (entry & entry::VECTOR | mode << 8) as u32;
    if is_level(entry) {
        data |= 1 << 15 | 1 << 14;
    }
    Msi { address, data }
}

fn is_level(entry: u64) -> bool {
    let mode = entry >> entry::DELIVERY_SHIFT & 7;
    entry & entry::LEVEL != 0 && !EDGE_ONLY_MODES.contains(&mode)
}

impl IoApic {
    /// An I/O APIC with this ID, of which four bits count, that sends to `sink`.
    pub fn new(id: u8, sink: Arc<dyn MsiSink>) -> IoApic {
        IoApic { state: power_on(id & ID_MASK), id: id & ID_MASK, sink }
    }

    /// Sets the level of a pin. Beyond the last pin there is nothing.
    pub fn set_pin(&mut self, pin: u32, high: bool) {
        if pin as usize >= PINS {
            return;
        }
        let bit = 1 << pin;
        let rises = high && self.state.lines & bit == 0;
        self.state.lines = self.state.lines & !bit | if high { bit } else { 0 };
        let entry = self.state.entries[pin as usize];
        if is_level(entry) {
            self.service_level(pin as usize);
        } else if rises && entry & entry::MASKED == 0 {
            // An edge on a masked pin is ignored, not held (3.2.4, interrupt mask).
            self.sink.send(message(entry));
        }
    }

    /// Sends the interrupt of a level pin that asks for one and is not in service.
    fn service_level(&mut self, pin: usize) {
        let entry = &mut self.state.entries[pin];
        let asks = self.state.lines & 1 << pin != 0 && is_level(*entry);
        if asks && *entry & (entry::MASKED | entry::REMOTE_IRR) == 0 {
            *entry |= entry::REMOTE_IRR;
            self.sink.send(message(*entry));
        }
    }

    /// A local APIC ended the level-triggered interrupt `vector`: its pins may ask again.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for pin in 0..PINS {
            let entry = &mut self.state.entries[pin];
            if *entry & entry::REMOTE_IRR != 0 && *entry & entry::VECTOR == u64::from(vector) {
                *entry &= !entry::REMOTE_IRR;
                self.service_level(pin);
            }
        }
    }

    fn read_window(&self) -> u32 {
        match self.state.select {
            index::ID | index::ARBITRATION => u32::from(self.state.id) << 24,
            index::VERSION => VERSION | (PINS as u32 - 1) << 16,
            select => match half(select) {
                Some((pin, high)) => (self.state.entries[pin] >> if high { 32 } else { 0 }) as u32,
                None => 0,
            },
        }
    }

    fn write_window(&mut self, value: u32) {
        match self.state.select {
            index::ID => self.state.id = (value >> 24) as u8 & ID_MASK,
            select => {
                if let Some((pin, high)) = half(select) {
                    self.write_entry(pin, high, value);
                }
            }
        }
    }

    fn write_entry(&mut self, pin: usize, high: bool, value: u32) {
        let entry = &mut self.state.entries[pin];
        let merged = if high {
            *entry & 0xffff_ffff | u64::from(value) << 32
        } else {
            *entry & !0xffff_ffff | u64::from(value)
        };
        *entry = merged & entry::WRITABLE | *entry & entry::READ_ONLY;
        // Software ends a stuck level interrupt by switching the pin to edge and back.
        if !is_level(*entry) {
            *entry &= !entry::REMOTE_IRR;
        }
        self.service_level(pin);
    }
}

fn power_on(id: u8) -> IoApicState {
    IoApicState { id, select: 0, lines: 0, entries: [entry::MASKED; PINS] }
}

/// Which entry, and whether its high half, an indirect register is.
fn half(select: u8) -> Option<(usize, bool)> {
    let offset = select.checked_sub(index::REDIRECTION)?;
    let pin = usize::from(offset / 2);
    (pin < PINS).then_some((pin, offset & 1 == 1))
}

impl Device for IoApic {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            mmio::SELECT => u32::from(self.state.select),
            mmio::WINDOW => self.read_window(),
            _ => 0,
        };
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let value = data.iter().take(4).rev().fold(0, |value, &byte| value << 8 | u32::from(byte));
        match offset {
            mmio::SELECT => self.state.select = value as u8,
            mmio::WINDOW => self.write_window(value),
            mmio::EOI => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }

    fn reset(&mut self) {
        let lines = self.state.lines;
        self.state = power_on(self.id);
        self.state.lines = lines;
    }
}

impl Snapshot for IoApic {
    type State = IoApicState;

    fn save(&self) -> IoApicState {
        self.state.clone()
    }

    fn restore(&mut self, state: IoApicState) -> Result<(), BadState> {
        let IoApicState { id, select: _, lines, entries } = &state;
        let bad = |what: String| Err(BadState::new("ioapic", what));
        if id & !ID_MASK != 0 {
            return bad(format!("ID {id:#x}"));
        }
        if lines >> PINS != 0 {
            return bad(format!("lines {lines:#x}"));
        }
        let known = entry::WRITABLE | entry::READ_ONLY;
        if let Some(entry) = entries.iter().find(|&&e| e & !known != 0) {
            return bad(format!("redirection entry {entry:#x}"));
        }
        self.state = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Cpus(Mutex<Vec<Msi>>);

    impl MsiSink for Cpus {
        fn send(&self, msi: Msi) {
            self.0.lock().unwrap().push(msi);
        }
    }

    struct Bench {
        ioapic: IoApic,
        cpus: Arc<Cpus>,
    }

    fn bench() -> Bench {
        let cpus = Arc::new(Cpus::default());
        Bench { ioapic: IoApic::new(4, cpus.clone()), cpus }
    }

    impl Bench {
        fn read(&mut self, index: u8) -> u32 {
            self.ioapic.write(mmio::SELECT, &u32::from(index).to_le_bytes());
            let mut data = [0; 4];
            self.ioapic.read(mmio::WINDOW, &mut data);
            u32::from_le_bytes(data)
        }
        fn write(&mut self, index: u8, value: u32) {
            self.ioapic.write(mmio::SELECT, &u32::from(index).to_le_bytes());
            self.ioapic.write(mmio::WINDOW, &value.to_le_bytes());
        }
        fn route(&mut self, pin: u8, entry: u64) {
            self.write(0x11 + 2 * pin, (entry >> 32) as u32);
            self.write(0x10 + 2 * pin, entry as u32);
        }
        fn sent(&self) -> Vec<Msi> {
            std::mem::take(&mut self.cpus.0.lock().unwrap())
        }
    }

    #[test]
    fn a_kernel_finds_24_masked_pins() {
        let mut b = bench();
        assert_eq!(b.read(1), 23 << 16 | 0x20);
        assert_eq!(b.read(0), 4 << 24);
        b.write(0, 0xff00_0000 | 9);
        assert_eq!((b.read(0), b.read(2)), (0x0f00_0000, 0x0f00_0000), "an ID has four bits");
        for pin in 0..24 {
            assert_eq!((b.read(0x10 + 2 * pin), b.read(0x11 + 2 * pin)), (1 << 16, 0));
        }
        assert_eq!(b.read(0x40), 0);
    }

    #[test]
    fn an_edge_becomes_a_message_for_the_cpu_named_in_the_entry() {
        let mut b = bench();
        b.route(4, 2 << 56 | 0x34);
        b.ioapic.set_pin(4, true);
        b.ioapic.set_pin(4, true);
        assert_eq!(b.sent(), [Msi { address: 0xfee0_2000, data: 0x34 }]);
        b.ioapic.set_pin(4, false);
        assert!(b.sent().is_empty());
        b.route(4, 0xff << 56 | 1 << 11 | 1 << 8 | 0x34); // logical, lowest priority
        b.ioapic.set_pin(4, true);
        assert_eq!(b.sent(), [Msi { address: 0xfeef_f00c, data: 0x134 }]);
        b.ioapic.set_pin(99, true);
    }

    #[test]
    fn the_pic_comes_through_as_extint() {
        let mut b = bench();
        b.route(0, 7 << 8);
        b.ioapic.set_pin(0, true);
        assert_eq!(b.sent(), [Msi { address: 0xfee0_0000, data: 0x700 }]);
    }

    #[test]
    fn an_edge_on_a_masked_pin_is_lost_and_a_level_is_not() {
        let mut b = bench();
        b.route(4, 1 << 16 | 0x34);
        b.route(10, 1 << 16 | 1 << 15 | 0x3a);
        b.ioapic.set_pin(4, true);
        b.ioapic.set_pin(10, true);
        b.route(4, 0x34);
        assert!(b.sent().is_empty());
        b.route(10, 1 << 15 | 0x3a);
        assert_eq!(b.sent(), [Msi { address: 0xfee0_0000, data: 0xc03a }]);
    }

    #[test]
    fn a_level_interrupt_comes_again_only_after_its_end() {
        let mut b = bench();
        b.route(16, 1 << 15 | 0x50);
        b.ioapic.set_pin(16, true);
        assert_eq!(b.sent().len(), 1);
        assert_eq!(b.read(0x10 + 32) & 1 << 14, 1 << 14, "remote IRR");
        b.ioapic.set_pin(16, false);
        b.ioapic.set_pin(16, true);
        assert!(b.sent().is_empty());
        b.ioapic.end_of_interrupt(0x51);
        assert!(b.sent().is_empty(), "another vector");
        b.ioapic.end_of_interrupt(0x50);
        assert_eq!(b.sent().len(), 1, "still asserted");
        b.ioapic.set_pin(16, false);
        b.ioapic.write(mmio::EOI, &0x50u32.to_le_bytes());
        assert!(b.sent().is_empty());
        assert_eq!(b.read(0x10 + 32) & 1 << 14, 0);
    }

    #[test]
    fn switching_to_edge_and_back_ends_a_stuck_level_interrupt() {
        let mut b = bench();
        b.route(16, 1 << 15 | 0x50);
        b.ioapic.set_pin(16, true);
        b.route(16, 1 << 16 | 0x50);
        b.route(16, 1 << 15 | 0x50);
        assert_eq!(b.sent().len(), 2);
    }

    #[test]
    fn a_saved_controller_keeps_what_is_in_service_and_an_impossible_one_is_refused() {
        let mut b = bench();
        b.route(16, 1 << 15 | 0x50);
        b.ioapic.set_pin(16, true);
        let saved = b.ioapic.save();
        let mut other = bench();
        other.ioapic.restore(saved.clone()).unwrap();
        other.ioapic.end_of_interrupt(0x50);
        assert_eq!(other.sent().len(), 1);
        assert!(other.ioapic.restore(IoApicState { lines: 1 << 24, ..saved.clone() }).is_err());
        assert!(other.ioapic.restore(IoApicState { id: 0x10, ..saved }).is_err());
    }
}
