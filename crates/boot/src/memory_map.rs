//! The memory map that every boot protocol hands to the kernel in its own format.

use std::ops::Range;

use mem::GuestRam;

use crate::layout;

/// What a range of guest-physical memory is good for; the values of ACPI 6.5, table 15.5, which
/// Linux, PVH and multiboot all use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// Usable by the guest.
    Ram = 1,
    /// Not memory, or not the guest's.
    Reserved = 2,
    /// ACPI tables, usable once they were read.
    AcpiReclaimable = 3,
    /// Kept over sleep states.
    AcpiNvs = 4,
}

/// One entry of the map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// Guest-physical addresses.
    pub range: Range<u64>,
    /// What they are.
    pub kind: MemoryKind,
}

/// Entries in ascending order that do not overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryMap(Vec<MemoryRange>);

impl MemoryMap {
    /// The map of a PC: the guest's RAM without the legacy hole ([`layout::LEGACY_HOLE`]), which is
    /// reserved, as is each range in `reserved` (the ECAM window belongs here: Linux uses it only if
    /// firmware reserved it).
    pub fn pc(ram: &GuestRam, reserved: &[Range<u64>]) -> MemoryMap {
        let reserved = merged(reserved.iter().cloned().chain([layout::LEGACY_HOLE]));
        let mut usable: Vec<_> = ram.ranges().map(|r| r.gpa..r.gpa + r.len).collect();
        for hole in &reserved {
            usable = usable.into_iter().flat_map(|range| without(&range, hole)).collect();
        }
        let entry = |kind| move |range| MemoryRange { range, kind };
        let mut map: Vec<_> = usable.into_iter().map(entry(MemoryKind::Ram)).collect();
        map.extend(reserved.into_iter().map(entry(MemoryKind::Reserved)));
        map.sort_by_key(|entry| entry.range.start);
        MemoryMap(map)
    }

    /// The entries in ascending order.
    pub fn entries(&self) -> &[MemoryRange] {
        &self.0
    }

    /// The ranges that are RAM.
    pub fn ram(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter().filter(|e| e.kind == MemoryKind::Ram).map(|e| e.range.clone())
    }

    /// Bytes of RAM from 1 MiB up to the first hole: multiboot's `mem_upper`.
    pub(crate) fn upper_memory(&self) -> u64 {
        self.ram().find(|r| r.start == layout::HIGH_MEMORY).map_or(0, |r| r.end - r.start)
    }
}

/// What is left of `range` when `hole` is cut out.
pub(crate) fn without(range: &Range<u64>, hole: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let below = range.start..range.end.min(hole.start).max(range.start);
    let above = range.start.max(hole.end).min(range.end)..range.end;
    [below, above].into_iter().filter(|r| r.start < r.end)
}

fn merged(ranges: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut ranges: Vec<_> = ranges.filter(|r| r.start < r.end).collect();
    ranges.sort_by_key(|r| r.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn kinds(map: &MemoryMap) -> Vec<(u64, u64, MemoryKind)> {
        map.entries().iter().map(|e| (e.range.start, e.range.end, e.kind)).collect()
    }

    #[test]
    fn a_small_pc_has_two_pieces_of_ram_and_the_legacy_hole_between() {
        let ram = GuestRam::new(&[0..16 * MIB]).unwrap();
        let map = MemoryMap::pc(&ram, &[0xe000_0000..0xf000_0000]);
        assert_eq!(
            kinds(&map),
            [
                (0, 0x9fc00, MemoryKind::Ram),
                (0x9fc00, MIB, MemoryKind::Reserved),
                (MIB, 16 * MIB, MemoryKind::Ram),
                (0xe000_0000, 0xf000_0000, MemoryKind::Reserved),
            ]
        );
        assert_eq!(map.upper_memory(), 15 * MIB);
    }

    #[test]
    fn memory_above_4_gib_stays_and_overlapping_reservations_merge() {
        let ram = GuestRam::new(&[0..4 * MIB, layout::FOUR_GIB..layout::FOUR_GIB + MIB]).unwrap();
        let map = MemoryMap::pc(&ram, &[2 * MIB..3 * MIB, 2 * MIB + 4096..3 * MIB + 4096, 9..9]);
        let ram: Vec<_> = map.ram().collect();
        assert_eq!(
            ram,
            [0..0x9fc00, MIB..2 * MIB, 3 * MIB + 4096..4 * MIB, layout::FOUR_GIB..layout::FOUR_GIB + MIB]
        );
    }
}
