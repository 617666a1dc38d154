//! Guest memory: below the hole, and from 4 GiB up.

use std::ops::Range;

use mem::{Backing, GuestRam, Kind, PAGE_SIZE};

use crate::Error;
use crate::layout::{HOLE, PCI_MMIO_64};

/// The least that any kernel is loaded into.
const LEAST: u64 = 4 << 20;
/// RAM above 4 GiB ends where the window for 64-bit BARs begins.
const MOST: u64 = HOLE.start + (PCI_MMIO_64.start - HOLE.end);

/// The guest-physical ranges of `bytes` of RAM.
pub(crate) fn ranges(bytes: u64) -> Result<Vec<Range<u64>>, Error> {
    if !(LEAST..=MOST).contains(&bytes) || !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(Error::MemorySize { bytes, least_mib: LEAST >> 20, most_gib: MOST >> 30 });
    }
    let low = bytes.min(HOLE.start);
    let high = HOLE.end..HOLE.end + (bytes - low);
    Ok([0..low, high].into_iter().filter(|range| !range.is_empty()).collect())
}

/// Maps the guest's RAM.
pub(crate) fn map(bytes: u64, kind: Kind, backing: Backing) -> Result<GuestRam, Error> {
    Ok(GuestRam::of_kind(&ranges(bytes)?, kind, backing)?)
}

/// Bytes of RAM below and above the hole.
pub(crate) fn sizes(ram: &GuestRam) -> chipset::MemorySizes {
    let sum = |above: bool| ram.ranges().filter(|r| (r.gpa >= HOLE.end) == above).map(|r| r.len).sum();
    chipset::MemorySizes { below_4g: sum(false), above_4g: sum(true) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_beyond_3_gib_continues_above_the_hole() {
        assert_eq!(ranges(256 << 20).unwrap(), [0..256 << 20]);
        assert_eq!(ranges(3 * GIB).unwrap(), [0..3 * GIB]);
        assert_eq!(ranges(6 * GIB).unwrap(), [0..3 * GIB, 4 * GIB..7 * GIB]);
        assert_eq!(ranges(255 * GIB).unwrap()[1].end, PCI_MMIO_64.start);
    }

    #[test]
    fn sizes_that_cannot_be_are_refused_with_the_limits() {
        for bytes in [0, 1 << 20, 256 * GIB, u64::MAX, (64 << 20) + 1] {
            let error = ranges(bytes).unwrap_err().to_string();
            assert!(error.contains("4 MiB to 255 GiB"), "{error}");
        }
    }
}
