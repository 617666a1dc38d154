//! The guest's memory as a whole.

#![allow(unsafe_code)] // hands out host pointers into the guest's memory

use std::fs::File;
use std::io::Error as IoError;
use std::ops::{Deref, Range};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::mapping::{HUGE_PAGE, Mapping, PROT, memory_file};
use crate::{Kind, PAGE_SIZE, PageLog, PageState};

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
    /// The host has too few huge pages set aside.
    #[error(
        "the host has not {pages} huge pages (2 MiB) free in its pool; `sudo sysctl vm.nr_hugepages={pages}` sets \
         them aside (more if other programs use some: `grep HugePages /proc/meminfo`), and --memory-backing thp \
         needs no pool"
    )]
    HugePages {
        /// How many are needed.
        pages: u64,
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

/// Who can map guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// This process alone.
    #[default]
    Private,
    /// Other processes too, to whom its file is given ([`GuestRam::file`]).
    Shared,
}

struct Inner {
    mem: GuestMemoryMmap<PageLog>,
    /// The memory behind `mem`, and so after it.
    _mappings: Vec<Mapping>,
    /// What shared memory is in, each range at the next multiple of a huge page.
    file: Option<File>,
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
    /// Maps zeroed private memory at the given guest-physical ranges, which must not overlap.
    pub fn new(ranges: &[Range<u64>]) -> Result<GuestRam, Error> {
        GuestRam::with_backing(ranges, Backing::Private)
    }

    /// Maps zeroed memory at the given guest-physical ranges, which must not overlap.
    pub fn with_backing(ranges: &[Range<u64>], backing: Backing) -> Result<GuestRam, Error> {
        GuestRam::of_kind(ranges, Kind::default(), backing)
    }

    /// The same, of a kind of host memory.
    pub fn of_kind(ranges: &[Range<u64>], kind: Kind, backing: Backing) -> Result<GuestRam, Error> {
        let aligned = |r: &Range<u64>| r.start < r.end && (r.start | r.end).is_multiple_of(PAGE_SIZE);
        if let Some(bad) = ranges.iter().find(|r| !aligned(r)) {
            return Err(Error::Unaligned(bad.clone()));
        }
        let bytes = ranges.iter().map(|r| r.end - r.start).sum();
        let shared = backing == Backing::Shared || kind == Kind::Shared;
        map(ranges, kind, shared).map_err(|source| match kind {
            Kind::Hugetlb => Error::HugePages { pages: huge_pages(ranges), source },
            _ => Error::Map { bytes, source },
        })
    }

    /// The file that shared memory is in, and the offset there of the page of `gpa`; `None` for private
    /// memory, and where there is none.
    pub fn file(&self, gpa: u64) -> Option<(BorrowedFd<'_>, u64)> {
        let file = self.0.file.as_ref()?;
        let lens = self.ranges().map(|range| range.len);
        let (range, offset) =
            self.ranges().zip(offsets(lens)).find(|(r, _)| gpa.wrapping_sub(r.gpa) < r.len)?;
        Some((file.as_fd(), offset + (gpa - range.gpa) / PAGE_SIZE * PAGE_SIZE))
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

/// Where ranges of these lengths are in their file.
fn offsets(lens: impl Iterator<Item = u64>) -> impl Iterator<Item = u64> {
    lens.scan(0, |next, len| {
        let offset = *next;
        *next = (offset + len).next_multiple_of(HUGE_PAGE as u64);
        Some(offset)
    })
}

/// How many it takes for all of these.
fn huge_pages(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| (range.end - range.start).div_ceil(HUGE_PAGE as u64)).sum()
}

fn map(ranges: &[Range<u64>], kind: Kind, shared: bool) -> Result<GuestRam, IoError> {
    let len = |r: &Range<u64>| r.end - r.start;
    let lens = || ranges.iter().map(len);
    let (file, mappings) = match shared {
        false => {
            (None, lens().map(|len| Mapping::private(len as usize, kind)).collect::<Result<Vec<_>, _>>()?)
        }
        true => {
            let end = offsets(lens()).zip(lens()).last().map_or(0, |(offset, len)| offset + len);
            let file = memory_file(end, kind)?;
            let place = |(offset, len)| Mapping::shared(&file, offset, len as usize, kind);
            let mappings = offsets(lens()).zip(lens()).map(place).collect::<Result<Vec<_>, _>>()?;
            (Some(file), mappings)
        }
    };
    let regions = ranges.iter().zip(&mappings).map(region).collect::<Result<_, _>>()?;
    let mem = GuestMemoryMmap::from_regions(regions).map_err(IoError::other)?;
    let ranges = mem.iter().map(range_of).collect();
    Ok(GuestRam(Arc::new(Inner { mem, _mappings: mappings, file, ranges })))
}

fn region((range, mapping): (&Range<u64>, &Mapping)) -> Result<GuestRegionMmap<PageLog>, IoError> {
    let len = (range.end - range.start) as usize;
    // SAFETY: the mapping is at least `len` bytes long and outlives the region, in `Inner`.
    let region = unsafe { MmapRegion::build_raw(mapping.start(), len, PROT, mapping.flags()) };
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
    fn the_file_of_shared_memory_has_what_the_guest_sees() {
        use std::os::unix::fs::FileExt;
        let ranges = [0..0x4000, 0x10_0000..0x10_2000];
        let ram = GuestRam::with_backing(&ranges, Backing::Shared).unwrap();
        ram.write_slice(b"ospite", GuestAddress(0x10_1ffa)).unwrap();
        let (fd, offset) = ram.file(0x10_1ffa).unwrap();
        let mut found = [0; 6];
        File::from(fd.try_clone_to_owned().unwrap()).read_exact_at(&mut found, offset + 0xffa).unwrap();
        assert_eq!(&found, b"ospite");
        assert!(ram.file(0x4000).is_none());
        assert!(GuestRam::new(&ranges).unwrap().file(0).is_none());
    }

    #[test]
    fn memory_of_each_kind_is_zeroed_and_goes_as_far_as_it_says() {
        let all = Kind::ALL.into_iter().flat_map(|kind| [(kind, Backing::Private), (kind, Backing::Shared)]);
        for (kind, backing) in all {
            match GuestRam::of_kind(&[0..0x5000, 0x10_0000..0x50_1000], kind, backing) {
                Ok(ram) => {
                    assert_eq!(ram.read_obj::<u64>(GuestAddress(0x50_0ff8)).unwrap(), 0);
                    ram.write_obj(7u64, GuestAddress(0x50_0ff8)).unwrap();
                    assert!(ram.write_obj(7u8, GuestAddress(0x50_1000)).is_err());
                }
                Err(error) => {
                    assert_eq!(kind, Kind::Hugetlb, "{error}");
                    let text = error.to_string();
                    assert!(text.contains("not 4 huge pages") && text.contains("nr_hugepages=4"), "{text}");
                }
            }
        }
    }

    #[test]
    fn ranges_of_partial_pages_are_refused() {
        assert!(matches!(GuestRam::new(&[0..0x1001]), Err(Error::Unaligned(_))));
        assert!(matches!(GuestRam::new(&[0x1000..0x1000]), Err(Error::Unaligned(_))));
    }
}
