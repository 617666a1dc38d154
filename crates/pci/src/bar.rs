//! Base address registers and the allocator that firmware would be (PCI Local Bus 3.0, 6.2.5.1).

use std::ops::Range;

/// What a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Mem32,
    /// Memory anywhere; takes this register and the next.
    Mem64,
}

/// The address space of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Space {
    /// I/O ports.
    Io,
    /// Guest-physical memory.
    Memory,
}

/// One BAR: how large and of what kind. Not prefetchable: registers have side effects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// What it decodes.
    pub kind: BarKind,
    /// Size in bytes; a power of two, at least 4 for ports and 16 for memory.
    pub size: u64,
}

impl Bar {
    /// The address space it lies in.
    pub fn space(self) -> Space {
        if self.kind == BarKind::Io { Space::Io } else { Space::Memory }
    }

    /// The read-only low bits of the register.
    pub(crate) fn flags(self) -> u32 {
        match self.kind {
            BarKind::Io => 0b01,
            BarKind::Mem32 => 0b000,
            BarKind::Mem64 => 0b100,
        }
    }

    pub(crate) fn is_sound(self) -> bool {
        let least = if self.kind == BarKind::Io { 4 } else { 16 };
        let most = match self.kind {
            BarKind::Io => 256, // 3.2.2.3.2: a device asks for no more than 256 bytes a BAR
            BarKind::Mem32 => 1 << 31,
            BarKind::Mem64 => 1 << 40,
        };
        self.size.is_power_of_two() && (least..=most).contains(&self.size)
    }
}

/// Where BARs may lie, as the machine's ACPI tables tell the guest too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// I/O ports.
    pub io: Range<u64>,
    /// Memory below 4 GiB.
    pub mem32: Range<u64>,
    /// Memory above the guest's RAM.
    pub mem64: Range<u64>,
}

/// Hands out a window from its start; never takes back.
pub(crate) struct Allocator {
    windows: Windows,
}

impl Allocator {
    pub(crate) fn new(windows: Windows) -> Allocator {
        Allocator { windows }
    }

    /// An address for `bar`. 64-bit BARs go below 4 GiB too while there is room: 32-bit guests
    /// reach them there.
    pub(crate) fn take(&mut self, bar: Bar) -> Option<u64> {
        let Windows { io, mem32, mem64 } = &mut self.windows;
        match bar.kind {
            BarKind::Io => take_from(io, bar.size),
            BarKind::Mem32 => take_from(mem32, bar.size),
            BarKind::Mem64 => take_from(mem32, bar.size).or_else(|| take_from(mem64, bar.size)),
        }
    }
}

fn take_from(window: &mut Range<u64>, size: u64) -> Option<u64> {
    let start = window.start.checked_next_multiple_of(size)?;
    let end = start.checked_add(size)?;
    // Address 0 means "not assigned" to operating systems.
    if end > window.end || start == 0 {
        return None;
    }
    window.start = end;
    Some(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_aligned_to_their_size_and_spill_above_4_gib() {
        let windows = Windows {
            io: 0xc000..0xc100,
            mem32: 0xc000_1000..0xc040_0000,
            mem64: 0x40_0000_0000..0x80_0000_0000,
        };
        let mut allocator = Allocator::new(windows);
        let big = Bar { kind: BarKind::Mem64, size: 1 << 21 };
        assert_eq!(allocator.take(big), Some(0xc020_0000));
        assert_eq!(allocator.take(big), Some(0x40_0000_0000));
        assert_eq!(allocator.take(Bar { kind: BarKind::Mem32, size: 1 << 21 }), None);
        assert_eq!(allocator.take(Bar { kind: BarKind::Io, size: 256 }), Some(0xc000));
        assert_eq!(allocator.take(Bar { kind: BarKind::Io, size: 4 }), None);
    }
}
