//! Which guest memory is still free while a kernel is being placed.

use std::ops::Range;

use crate::memory_map::without;
use crate::{MemoryMap, Problem, layout};

/// Free RAM; every successful claim takes its range away.
pub(crate) struct Space {
    free: Vec<Range<u64>>,
    total: u64,
}

impl Space {
    /// All RAM of the map but what the loader itself writes.
    pub fn new(map: &MemoryMap) -> Result<Space, Problem> {
        let total = map.ram().map(|r| r.end - r.start).sum();
        let mut space = Space { free: map.ram().collect(), total };
        if !space.claim(layout::LOADER) {
            return Err(space.no_room(2 * layout::HIGH_MEMORY));
        }
        Ok(space)
    }

    /// Gives back what of the loader's memory it does not use for this kernel.
    pub fn release(&mut self, range: Range<u64>) {
        self.free.push(range);
        self.free.sort_by_key(|free| free.start);
    }

    /// Takes exactly this range; false if any byte of it is not free.
    pub fn claim(&mut self, range: Range<u64>) -> bool {
        let Some(index) = self.free.iter().position(|f| f.start <= range.start && range.end <= f.end) else {
            return range.start >= range.end;
        };
        let left = without(&self.free[index], &range);
        self.free.splice(index..=index, left);
        true
    }

    /// Takes `len` bytes at the lowest multiple of `align` from `from`, ending at most at `below`.
    pub fn claim_lowest(&mut self, len: u64, align: u64, from: u64, below: u64) -> Option<u64> {
        let start = self.free.iter().find_map(|free| {
            let start = free.start.max(from).checked_next_multiple_of(align)?;
            (start.checked_add(len)? <= free.end.min(below)).then_some(start)
        })?;
        self.claim(start..start + len).then_some(start)
    }

    /// All places for `len` bytes at multiples of `align`, in ascending order.
    pub fn places(&self, len: u64, align: u64, from: u64, below: u64) -> Vec<u64> {
        let places = self.free.iter().filter_map(|free| {
            let first = free.start.max(from).checked_next_multiple_of(align)?;
            let end = free.end.min(below).checked_sub(len)?;
            Some((first..=end).step_by(align as usize))
        });
        places.flatten().collect()
    }

    /// Takes `len` bytes at the highest multiple of `align` above the first MiB, ending at most at
    /// `below`.
    pub fn claim_highest(&mut self, len: u64, align: u64, below: u64) -> Option<u64> {
        let start = self.free.iter().rev().find_map(|free| {
            let start = free.end.min(below).checked_sub(len)?;
            let start = start - start % align;
            (start >= free.start.max(layout::HIGH_MEMORY)).then_some(start)
        })?;
        self.claim(start..start + len).then_some(start)
    }

    /// Says how much memory a guest must have for something that ends at `end`.
    pub fn no_room(&self, end: u64) -> Problem {
        Problem::NoRoom { needs_mib: to_mib(end), has_mib: (self.total + layout::HIGH_MEMORY / 2) >> 20 }
    }

    /// Why an initrd of `size` bytes has no place after a kernel that ends at `end`.
    pub fn no_initrd_place(&self, end: u64, size: u64, below: u64) -> Problem {
        let start = end.max(layout::HIGH_MEMORY);
        match self.refusal(start..start.saturating_add(size).saturating_add(mem::PAGE_SIZE)) {
            Problem::NoPlace { .. } => Problem::InitrdPlace { size, below },
            too_small => too_small,
        }
    }

    /// Why `range` could not be claimed: more memory would help, or nothing would.
    pub fn refusal(&self, range: Range<u64>) -> Problem {
        let too_small = range.start >= layout::HIGH_MEMORY && range.end <= layout::FOUR_GIB;
        let error = self.no_room(range.end);
        match error {
            Problem::NoRoom { needs_mib, has_mib } if too_small && needs_mib > has_mib => error,
            _ => Problem::NoPlace { start: range.start, end: range.end },
        }
    }
}

fn to_mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mem::GuestRam;

    const MIB: u64 = 1 << 20;

    fn space(mib: u64) -> Space {
        let ram = GuestRam::new(&[0..mib * MIB]).unwrap();
        Space::new(&MemoryMap::pc(&ram, &[])).unwrap()
    }

    #[test]
    fn what_was_claimed_is_not_given_twice() {
        let mut space = space(8);
        assert!(space.claim(2 * MIB..4 * MIB));
        assert!(!space.claim(3 * MIB..5 * MIB));
        assert_eq!(space.claim_highest(4 * MIB, 4096, u64::MAX), Some(4 * MIB));
        assert_eq!(space.claim_highest(MIB, 4096, u64::MAX), Some(MIB));
        assert_eq!(space.claim_highest(4096, 4096, u64::MAX), None, "low memory is not for initrds");
        assert_eq!(space.claim_lowest(4096, 4096, 0, u64::MAX), Some(layout::LOADER.end));
    }

    #[test]
    fn the_loaders_own_memory_is_never_free() {
        let mut space = space(8);
        assert!(!space.claim(layout::ZERO_PAGE..layout::ZERO_PAGE + 1));
        assert!(space.claim(layout::LOADER.end..layout::EBDA));
    }

    #[test]
    fn limits_and_alignment_hold() {
        let mut space = space(64);
        assert_eq!(space.claim_highest(5000, 4096, 32 * MIB), Some(32 * MIB - 8192));
        assert_eq!(space.claim_lowest(MIB, 16 * MIB, MIB, u64::MAX), Some(16 * MIB));
        assert_eq!(space.claim_lowest(u64::MAX, 4096, MIB, u64::MAX), None);
        assert_eq!(space.claim_highest(u64::MAX, 4096, u64::MAX), None);
    }

    #[test]
    fn places_are_all_that_fit() {
        let mut space = space(16);
        space.claim(8 * MIB..8 * MIB + 4096);
        assert_eq!(space.places(3 * MIB, 2 * MIB, 3 * MIB, 15 * MIB), [4 * MIB, 10 * MIB, 12 * MIB]);
        assert!(space.places(17 * MIB, 4096, 0, u64::MAX).is_empty());
    }

    #[test]
    fn a_guest_without_low_memory_is_refused() {
        let ram = GuestRam::new(&[0..0x8000]).unwrap();
        assert!(matches!(Space::new(&MemoryMap::pc(&ram, &[])), Err(Problem::NoRoom { .. })));
    }
}
