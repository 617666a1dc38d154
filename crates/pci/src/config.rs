//! A function's configuration space: header type 0 and capabilities (PCI Local Bus 3.0, chapter 6).

use std::ops::Range;

use device::BadState;
use serde::{Deserialize, Serialize};

use crate::{Bar, BarKind, Intx, Msix, Space};

/// Registers of the type 0 header (6.1) and of the capabilities we make.
pub mod reg {
    /// Command register.
    pub const COMMAND: u16 = 0x04;
    /// Status register.
    pub const STATUS: u16 = 0x06;
    /// First base address register.
    pub const BAR0: u16 = 0x10;
    /// Pointer to the first capability.
    pub const CAPABILITIES: u16 = 0x34;
    /// Interrupt line, a scratch register for software.
    pub const INTERRUPT_LINE: u16 = 0x3c;
    /// Interrupt pin, 1 = INTA#.
    pub const INTERRUPT_PIN: u16 = 0x3d;

    /// Command: answers accesses to ports.
    pub const COMMAND_IO: u16 = 1 << 0;
    /// Command: answers accesses to memory.
    pub const COMMAND_MEMORY: u16 = 1 << 1;
    /// Command: may access memory and send messages.
    pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
    /// Command: parity error response, a bit without effect here.
    pub const COMMAND_PARITY: u16 = 1 << 6;
    /// Command: SERR# enable, a bit without effect here.
    pub const COMMAND_SERR: u16 = 1 << 8;
    /// Command: must not raise INTx.
    pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
    /// Status: INTx is wanted, whether or not it is disabled.
    pub const STATUS_INTX: u16 = 1 << 3;
    /// Status: there is a capability list.
    pub const STATUS_CAPABILITIES: u16 = 1 << 4;

    /// Capability ID of vendor-specific capabilities.
    pub const CAP_VENDOR: u8 = 0x09;
    /// Capability ID of MSI-X.
    pub const CAP_MSIX: u8 = 0x11;
}

const SIZE: usize = 4096;
/// First byte after the header.
const CAPS_START: usize = 0x40;
/// Capabilities end where the extended configuration space begins.
const CAPS_END: usize = 0x100;

/// A class code (PCI Code and ID Assignment).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class {
    /// Base class.
    pub base: u8,
    /// Sub-class.
    pub sub: u8,
    /// Programming interface.
    pub interface: u8,
}

/// What a function says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class code.
    pub class: Class,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// The registers a guest can change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    /// Offset and value of every 32-bit register that has writable bits, in ascending order.
    pub registers: Vec<(u16, u32)>,
}

struct MsixCap {
    /// Offset of the message control register.
    control: u16,
    msix: Msix,
}

/// Configuration space with its write masks.
pub struct ConfigSpace {
    bytes: Box<[u8; SIZE]>,
    /// A guest's write changes these bits only.
    writable: Box<[u8; SIZE]>,
    /// Contents after reset.
    power_on: Box<[u8; SIZE]>,
    bars: [Option<Bar>; 6],
    /// Where the next capability goes, and the pointer that has to lead to it.
    next_cap: usize,
    cap_link: usize,
    msix: Option<MsixCap>,
    intx: Option<Intx>,
}

impl ConfigSpace {
    /// The configuration space of a function without BARs or capabilities.
    pub fn new(identity: Identity) -> ConfigSpace {
        let mut config = ConfigSpace {
            bytes: Box::new([0; SIZE]),
            writable: Box::new([0; SIZE]),
            power_on: Box::new([0; SIZE]),
            bars: [None; 6],
            next_cap: CAPS_START,
            cap_link: reg::CAPABILITIES.into(),
            msix: None,
            intx: None,
        };
        let Identity { vendor, device, revision, class, subsystem_vendor, subsystem } = identity;
        config.fix(0x00, &vendor.to_le_bytes());
        config.fix(0x02, &device.to_le_bytes());
        config.fix(0x08, &[revision, class.interface, class.sub, class.base]);
        config.fix(0x2c, &subsystem_vendor.to_le_bytes());
        config.fix(0x2e, &subsystem.to_le_bytes());
        let command = reg::COMMAND_BUS_MASTER | reg::COMMAND_PARITY | reg::COMMAND_SERR;
        config.allow(reg::COMMAND, &command.to_le_bytes());
        config.allow(0x0c, &[0xff]); // cache line size: a scratch register on PCI Express
        config.allow(reg::INTERRUPT_LINE, &[0xff]);
        config
    }

    /// Sets what a register holds now and after reset.
    fn fix(&mut self, offset: usize, value: &[u8]) {
        self.bytes[offset..offset + value.len()].copy_from_slice(value);
        self.power_on[offset..offset + value.len()].copy_from_slice(value);
    }

    /// Lets the guest write the bits of `mask`, besides those it may write already.
    fn allow(&mut self, offset: u16, mask: &[u8]) {
        for (allowed, bits) in self.writable[offset.into()..].iter_mut().zip(mask) {
            *allowed |= bits;
        }
    }

    fn u16_at(&self, offset: u16) -> u16 {
        let at = usize::from(offset);
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn u32_at(&self, offset: u16) -> u32 {
        u32::from(self.u16_at(offset)) | u32::from(self.u16_at(offset + 2)) << 16
    }

    /// Adds a BAR.
    ///
    /// # Panics
    /// If the function's author gave it an impossible size or place.
    #[must_use]
    pub fn with_bar(mut self, index: usize, bar: Bar) -> ConfigSpace {
        let registers = if bar.kind == BarKind::Mem64 { 2 } else { 1 };
        assert!(bar.is_sound(), "{bar:?}");
        assert!(index + registers <= 6 && self.bars[index].is_none(), "BAR {index} is taken");
        let offset = reg::BAR0 + 4 * index as u16;
        let mask = !(bar.size - 1);
        self.fix(offset.into(), &bar.flags().to_le_bytes());
        self.allow(offset, &(mask as u32).to_le_bytes());
        if registers == 2 {
            self.allow(offset + 4, &((mask >> 32) as u32).to_le_bytes());
        }
        let decode = if bar.kind == BarKind::Io { reg::COMMAND_IO } else { reg::COMMAND_MEMORY };
        self.allow(reg::COMMAND, &decode.to_le_bytes());
        self.bars[index] = Some(bar);
        self
    }

    /// Adds a capability: `body` follows the ID and the link, `writable` says which of its bits a
    /// guest may change (zeroes if shorter). Its offset.
    ///
    /// # Panics
    /// If the capabilities outgrow the space for them.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let at = self.next_cap;
        assert!(at + 2 + body.len() <= CAPS_END && writable.len() <= body.len(), "capability {id:#x}");
        self.fix(self.cap_link, &[at as u8]);
        self.fix(at, &[id, 0]);
        self.fix(at + 2, body);
        self.allow(at as u16 + 2, writable);
        let status = self.u16_at(reg::STATUS) | reg::STATUS_CAPABILITIES;
        self.fix(reg::STATUS.into(), &status.to_le_bytes());
        self.cap_link = at + 1;
        self.next_cap = (at + 2 + body.len()).next_multiple_of(4);
        at as u16
    }

    /// Adds the MSI-X capability (6.8.2); table and PBA lie in `bar` as [`Msix`] lays them out.
    pub fn add_msix(&mut self, bar: u8, msix: &Msix) {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(msix.vectors() - 1).to_le_bytes());
        body[2..6].copy_from_slice(&u32::from(bar).to_le_bytes());
        body[6..10].copy_from_slice(&(msix.pba_offset() as u32 | u32::from(bar)).to_le_bytes());
        let at = self.add_capability(reg::CAP_MSIX, &body, &[0x00, 0xc0]);
        self.msix = Some(MsixCap { control: at + 2, msix: msix.clone() });
    }

    /// Gives the function an interrupt pin.
    pub fn add_intx(&mut self, intx: &Intx) {
        self.fix(reg::INTERRUPT_PIN.into(), &[intx.pin() as u8 + 1]);
        self.allow(reg::COMMAND, &reg::COMMAND_INTX_DISABLE.to_le_bytes());
        self.intx = Some(intx.clone());
    }

    /// A guest's read; all ones beyond the end.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
            if at == usize::from(reg::STATUS) && self.intx.as_ref().is_some_and(Intx::is_asserted) {
                *byte |= reg::STATUS_INTX as u8;
            }
        }
    }

    /// A guest's write; read-only bits stay as they are.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, byte) in (usize::from(offset)..SIZE).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | byte & mask;
        }
        self.apply();
    }

    /// Tells the interrupt parts what the registers now say.
    fn apply(&self) {
        let command = self.command();
        if let Some(intx) = &self.intx {
            intx.set_disabled(command & reg::COMMAND_INTX_DISABLE != 0);
        }
        if let Some(cap) = &self.msix {
            cap.msix.set_control(self.u16_at(cap.control), command & reg::COMMAND_BUS_MASTER != 0);
        }
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.u16_at(reg::COMMAND)
    }

    /// Whether the guest lets the function access memory and send messages.
    pub fn bus_master(&self) -> bool {
        self.command() & reg::COMMAND_BUS_MASTER != 0
    }

    /// Vendor and device ID, class code (base, sub, interface).
    pub fn identity(&self) -> (u16, u16, [u8; 3]) {
        (self.u16_at(0), self.u16_at(2), [self.bytes[0xb], self.bytes[0xa], self.bytes[0x9]])
    }

    /// The BARs there are.
    pub fn bars(&self) -> impl Iterator<Item = (usize, Bar)> + '_ {
        self.bars.iter().enumerate().filter_map(|(index, bar)| Some((index, (*bar)?)))
    }

    /// Where BAR `index` is programmed to; 0 if nowhere.
    pub fn bar_address(&self, index: usize) -> u64 {
        let Some(Some(bar)) = self.bars.get(index) else { return 0 };
        let offset = reg::BAR0 + 4 * index as u16;
        let high = if bar.kind == BarKind::Mem64 { self.u32_at(offset + 4) } else { 0 };
        (u64::from(high) << 32 | u64::from(self.u32_at(offset))) & !(bar.size - 1)
    }

    /// Programs BAR `index` as firmware would.
    pub fn set_bar_address(&mut self, index: usize, address: u64) {
        let Some(Some(bar)) = self.bars.get(index) else { return };
        let len = if bar.kind == BarKind::Mem64 { 8 } else { 4 };
        self.write(reg::BAR0 + 4 * index as u16, &address.to_le_bytes()[..len]);
    }

    /// Programs the rest that firmware would: decoding on, and where the interrupt pin leads.
    pub(crate) fn enable_decode(&mut self) {
        let command = self.command() | reg::COMMAND_IO | reg::COMMAND_MEMORY;
        self.write(reg::COMMAND, &command.to_le_bytes());
        if let Some(gsi) = self.intx.as_ref().map(Intx::gsi) {
            self.write(reg::INTERRUPT_LINE, &[u8::try_from(gsi).unwrap_or(0xff)]);
        }
    }

    /// The ranges the function answers at now.
    pub(crate) fn decoded(&self) -> Vec<(usize, Space, Range<u64>)> {
        let command = self.command();
        let mut ranges = Vec::new();
        for (index, bar) in self.bars() {
            let (bit, limit) = match bar.space() {
                Space::Io => (reg::COMMAND_IO, 0x1_0000),
                Space::Memory => (reg::COMMAND_MEMORY, u64::MAX),
            };
            let start = self.bar_address(index);
            // Address 0 is what an unprogrammed BAR holds: not decoded, whatever lies there stays.
            let end = start.checked_add(bar.size).filter(|&end| start != 0 && end <= limit);
            if let Some(end) = end.filter(|_| command & bit != 0) {
                ranges.push((index, bar.space(), start..end));
            }
        }
        ranges
    }

    /// Back to the power-on contents. [`Msix`] and [`Intx`] are reset with it.
    pub fn reset(&mut self) {
        self.bytes.copy_from_slice(&*self.power_on);
        if let Some(cap) = &self.msix {
            cap.msix.reset();
        }
        if let Some(intx) = &self.intx {
            intx.set(false);
        }
        self.apply();
    }

    fn writable_registers(&self) -> impl Iterator<Item = (u16, u32)> + '_ {
        let masks = self.writable.chunks_exact(4).enumerate();
        let masks = masks.map(|(i, m)| (4 * i as u16, u32::from_le_bytes([m[0], m[1], m[2], m[3]])));
        masks.filter(|(_, mask)| *mask != 0)
    }

    /// Copies out what the guest may have changed. [`Msix`] has a state of its own.
    pub fn save(&self) -> ConfigState {
        let registers = self.writable_registers().map(|(offset, _)| (offset, self.u32_at(offset)));
        ConfigState { registers: registers.collect() }
    }

    /// Takes a state on. The BARs are decoded again by [`PciRoot::refresh`](crate::PciRoot::refresh).
    pub fn restore(&mut self, state: ConfigState) -> Result<(), BadState> {
        let ConfigState { registers } = state;
        let bad = |what: String| BadState::new("PCI configuration space", what);
        let masks: Vec<_> = self.writable_registers().collect();
        if masks.len() != registers.len() {
            return Err(bad(format!("{} registers instead of {}", registers.len(), masks.len())));
        }
        for (&(offset, mask), &(saved, value)) in masks.iter().zip(&registers) {
            if saved != offset || (value ^ self.u32_at(offset)) & !mask != 0 {
                return Err(bad(format!("register {saved:#x} = {value:#x} is not this function's")));
            }
        }
        for (offset, value) in registers {
            let at = usize::from(offset);
            self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        self.apply();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> ConfigSpace {
        let class = Class { base: 1, sub: 0, interface: 0 };
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        ConfigSpace::new(identity)
            .with_bar(0, Bar { kind: BarKind::Mem64, size: 0x4000 })
            .with_bar(2, Bar { kind: BarKind::Mem32, size: 0x1000 })
            .with_bar(3, Bar { kind: BarKind::Io, size: 0x20 })
    }

    fn dword(config: &ConfigSpace, offset: u16) -> u32 {
        let mut data = [0; 4];
        config.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn an_os_sizes_bars_by_writing_all_ones() {
        let mut config = sample();
        for bar in 0..6 {
            config.write(reg::BAR0 + 4 * bar, &[0xff; 4]);
        }
        let read: Vec<u32> = (0..6).map(|bar| dword(&config, reg::BAR0 + 4 * bar)).collect();
        assert_eq!(read, [0xffff_c004, 0xffff_ffff, 0xffff_f000, 0xffff_ffe1, 0, 0]);
    }

    #[test]
    fn identity_is_read_only_and_byte_writes_reach_their_byte() {
        let mut config = sample();
        config.write(0, &[0; 64]);
        assert_eq!(dword(&config, 0), 0x1042_1af4);
        assert_eq!(dword(&config, 8), 0x0100_0001);
        config.write(reg::BAR0 + 1, &[0x7f]);
        assert_eq!(config.bar_address(0), 0x4000);
        let mut beyond = [0; 4];
        config.read(4094, &mut beyond);
        config.write(4094, &[1, 2, 3, 4]);
        assert_eq!(beyond, [0, 0, 0xff, 0xff]);
    }

    #[test]
    fn bars_are_decoded_only_where_they_can_be() {
        let mut config = sample();
        config.set_bar_address(0, 0x40_0000_4000);
        config.set_bar_address(3, 0xc020);
        assert!(config.decoded().is_empty(), "the command register is still 0");
        config.write(reg::COMMAND, &[3]);
        let ranges = config.decoded();
        assert_eq!(ranges.len(), 2, "BAR 2 is at 0");
        assert_eq!(ranges[0], (0, Space::Memory, 0x40_0000_4000..0x40_0000_8000));
        assert_eq!(ranges[1], (3, Space::Io, 0xc020..0xc040));
        config.write(reg::BAR0, &[0xff; 8]);
        config.write(reg::BAR0 + 12, &[0xff; 4]);
        assert!(config.decoded().is_empty(), "no range may wrap around: {:x?}", config.decoded());
    }

    #[test]
    fn capabilities_are_chained() {
        let mut config = sample();
        let first = config.add_capability(reg::CAP_VENDOR, &[16, 1, 2, 3, 4], &[]);
        config.add_capability(reg::CAP_VENDOR, &[4, 5], &[]);
        assert_eq!(dword(&config, 4) >> 16, u32::from(reg::STATUS_CAPABILITIES));
        assert_eq!(dword(&config, reg::CAPABILITIES) & 0xff, u32::from(first));
        assert_eq!(dword(&config, first) & 0xffff, 0x4809);
        assert_eq!(dword(&config, 0x48), 0x0504_0009);
    }

    #[test]
    fn state_of_another_function_is_refused_and_changes_nothing() {
        let mut config = sample();
        config.write(reg::BAR0, &[0, 0x40, 0, 0xc0]);
        let saved = config.save();
        config.reset();
        assert_eq!(config.bar_address(0), 0);
        let mut bad = saved.clone();
        bad.registers.last_mut().unwrap().1 ^= 0x100;
        assert!(config.restore(bad).is_err());
        assert_eq!(config.bar_address(0), 0);
        config.restore(saved.clone()).unwrap();
        assert_eq!(config.save(), saved);
        assert_eq!(config.bar_address(0), 0xc000_4000);
    }
}
