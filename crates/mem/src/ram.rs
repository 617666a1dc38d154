//! The guest's memory as a whole.

#![allow(unsafe_code)] // hands out host pointers into the guest's memory

use std::io::Error as IoError;
use std::ops::{Deref, Range};
use std::sync::Arc;

use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::mapping::{FLAGS, Mapping, PROT};
use crate::{PAGE_SIZE, PageLog, PageState};

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A range is empty or not made of whole pages.
    #[error("guest memory range {0:#x?} is not a whole number of pages")]
    Unaligned(Range<u64>),
    /// The host would not map it.
    #[error("cannot map {bytes} bytes of guest memory; try a smaller --memory")]
    Map {
        /// How much was asked for, in bytes.
        bytes: u64,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
}

/// One contiguous range of guest-physical memory and where it is in the host.
#[derive(Clone, Copy, Debug)]
pub struct RamRange {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes, a multiple of [`PAGE_SIZE`].
    pub len: u64,
    /// Host address of the first byte; valid while the [`GuestRam`] lives.
    pub host: *mut u8,
}

/// One page of guest memory as an engine sees it.
#[derive(Clone, Copy)]
pub struct Page<'a> {
    /// Host address of the page's first byte; valid for [`PAGE_SIZE`] bytes.
    pub host: *mut u8,
    /// The page's log entry: whoever writes through `host` tells it.
    pub state: &'a PageState,
}

struct Inner {
    mem: GuestMemoryMmap<PageLog>,
    /// The memory behind `mem`, and so after it.
    _mappings: Vec<Mapping>,
    ranges: Vec<(RamRange, PageLog)>,
}

/// The guest's memory. Clones share it.
#[derive(Clone)]
pub struct GuestRam(Arc<Inner>);

// SAFETY: the pointers in `ranges` point into mappings that `mem` keeps alive; the memory behind
// them is only touched by means that tolerate races (`vm-memory`, `HostInt`).
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl GuestRam {
    /// Maps zeroed memory at the given guest-physical ranges, which must not overlap.
    pub fn new(ranges: &[Range<u64>]) -> Result<GuestRam, Error> {
        let aligned = |r: &Range<u64>| r.start < r.end && (r.start | r.end).is_multiple_of(PAGE_SIZE);
        if let Some(bad) = ranges.iter().find(|r| !aligned(r)) {
            return Err(Error::Unaligned(bad.clone()));
        }
        let bytes = ranges.iter().map(|r| r.end - r.start).sum();
        let failed = |source| Error::Map { bytes, source };
        let mappings: Vec<_> = ranges
            .iter()
            .map(|r| Mapping::new((r.end - r.start) as usize))
            .collect::<Result<_, _>>()
            .map_err(failed)?;
        let regions = ranges.iter().zip(&mappings).map(region).collect::<Result<_, _>>().map_err(failed)?;
        let mem = GuestMemoryMmap::from_regions(regions).map_err(IoError::other).map_err(failed)?;
        let ranges = mem.iter().map(range_of).collect();
        Ok(GuestRam(Arc::new(Inner { mem, _mappings: mappings, ranges })))
    }

    /// The ranges in ascending order.
    pub fn ranges(&self) -> impl Iterator<Item = RamRange> + '_ {
        self.0.ranges.iter().map(|(range, _)| *range)
    }

    /// Total size in bytes.
    pub fn size(&self) -> u64 {
        self.ranges().map(|r| r.len).sum()
    }

    /// The page that holds `gpa`, or `None` where there is no memory.
    #[inline]
    pub fn page(&self, gpa: u64) -> Option<Page<'_>> {
        for (range, log) in &self.0.ranges {
            let offset = gpa.wrapping_sub(range.gpa);
            if offset < range.len {
                let page = offset / PAGE_SIZE;
                // SAFETY: `page` lies within the mapping of `range.len` bytes.
                let host = unsafe { range.host.add((page * PAGE_SIZE) as usize) };
                return Some(Page { host, state: &log.pages()[page as usize] });
            }
        }
        None
    }

    /// Guest-physical addresses of the pages written since the last call, in ascending order.
    pub fn take_dirty(&self) -> Vec<u64> {
        let mut dirty = Vec::new();
        for (range, log) in &self.0.ranges {
            let pages = log.pages().iter().enumerate();
            dirty
                .extend(pages.filter(|(_, s)| s.take_dirty()).map(|(i, _)| range.gpa + i as u64 * PAGE_SIZE));
        }
        dirty
    }
}

fn region((range, mapping): (&Range<u64>, &Mapping)) -> Result<GuestRegionMmap<PageLog>, IoError> {
    let len = (range.end - range.start) as usize;
    // SAFETY: the mapping is `len` bytes long and outlives the region, in `Inner`.
    let region = unsafe { MmapRegion::build_raw(mapping.start(), len, PROT, FLAGS) };
    GuestRegionMmap::new(region.map_err(IoError::other)?, GuestAddress(range.start))
        .ok_or_else(|| IoError::other("it ends beyond all addresses"))
}

fn range_of(region: &vm_memory::GuestRegionMmap<PageLog>) -> (RamRange, PageLog) {
    let host = region.get_host_address(vm_memory::MemoryRegionAddress(0)).expect("a region has a first byte");
    let range = RamRange { gpa: region.start_addr().raw_value(), len: region.len(), host };
    (range, region.get_mmap().bitmap().clone())
}

impl Deref for GuestRam {
    type Target = GuestMemoryMmap<PageLog>;

    fn deref(&self) -> &Self::Target {
        &self.0.mem
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn device_writes_show_up_in_the_page_the_engine_sees() {
        let ram = GuestRam::new(&[0..0x4000, 0x10_0000..0x10_2000]).unwrap();
        assert!(ram.page(0x4000).is_none());
        let (version, _) = ram.page(0x10_1000).unwrap().state.mark_code();
        ram.write_slice(b"ospite", GuestAddress(0x10_1ffa)).unwrap();
        let page = ram.page(0x10_1fff).unwrap();
        // SAFETY: the last byte of a valid page.
        assert_eq!(unsafe { *page.host.add(0xfff) }, b'e');
        assert_ne!(page.state.version(), version, "the write must void decoded code");
        assert_eq!(ram.take_dirty(), [0x10_1000]);
        assert!(ram.take_dirty().is_empty());
    }

    #[test]
    fn ranges_of_partial_pages_are_refused() {
        assert!(matches!(GuestRam::new(&[0..0x1001]), Err(Error::Unaligned(_))));
        assert!(matches!(GuestRam::new(&[0x1000..0x1000]), Err(Error::Unaligned(_))));
    }
}
