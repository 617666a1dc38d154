//! Host memory for one range of guest memory, where huge pages can back it.

#![allow(unsafe_code)] // mmap and munmap

use std::fs::File;
use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::null_mut;

use crate::Kind;

/// Size of the host's huge pages on x86-64. A nested page table maps that much at once only where host
/// and guest addresses agree below it; guest ranges of any size begin at multiples of it.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// What [`Mapping::new`] maps with.
pub(crate) const PROT: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// Flags of private memory, which is taken from the host only as it is touched.
const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
/// Of huge pages from the host's pool: set aside here, so that a pool too small is an error now and not a fatal
/// signal later.
const POOL: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;

/// Zeroed pages, given back when it is dropped.
pub(crate) struct Mapping {
    start: *mut u8,
    len: usize,
    flags: i32,
}

impl Mapping {
    /// Maps `len` bytes, a multiple of the page size, that only this process has.
    pub(crate) fn private(len: usize, kind: Kind) -> Result<Mapping, Error> {
        let mut mapping = Mapping::reserve(whole(len, kind)?)?;
        if kind == Kind::Hugetlb {
            mapping.replace(POOL, None)?;
        }
        mapping.ask_for_pages(kind);
        Ok(mapping)
    }

    /// Maps `len` bytes of a file, from `offset` on; both whole pages.
    pub(crate) fn shared(file: &File, offset: u64, len: usize, kind: Kind) -> Result<Mapping, Error> {
        let mut mapping = Mapping::reserve(whole(len, kind)?)?;
        mapping.replace(libc::MAP_SHARED, Some((file, offset)))?;
        mapping.ask_for_pages(kind);
        Ok(mapping)
    }

    /// Maps something else in its place.
    fn replace(&mut self, flags: i32, file: Option<(&File, u64)>) -> Result<(), Error> {
        let (fd, offset) = file.map_or((-1, 0), |(file, offset)| (file.as_raw_fd(), offset as i64));
        let fixed = flags | libc::MAP_FIXED;
        // SAFETY: takes the place of our own mapping.
        let start = unsafe { libc::mmap(self.start.cast(), self.len, PROT, fixed, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        self.flags = flags;
        Ok(())
    }

    /// Room for `len` bytes where a huge page may begin.
    fn reserve(len: usize) -> Result<Mapping, Error> {
        let room = len.checked_add(HUGE_PAGE).ok_or(Error::from_raw_os_error(libc::ENOMEM))?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(null_mut(), room, PROT, PRIVATE, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let all = Mapping { start: start.cast(), len: room, flags: PRIVATE };
        let head = all.start.align_offset(HUGE_PAGE);
        Ok(all.cut(head, len))
    }

    fn ask_for_pages(&self, kind: Kind) {
        let advice = if kind == Kind::Small { libc::MADV_NOHUGEPAGE } else { libc::MADV_HUGEPAGE };
        if self.len >= HUGE_PAGE {
            // SAFETY: our own mapping. A host without huge pages refuses, and small ones do too.
            unsafe { libc::madvise(self.start.cast(), self.len, advice) };
        }
    }

    /// Keeps `len` bytes from `head` on.
    fn cut(self, head: usize, len: usize) -> Mapping {
        let (start, flags, tail) = (self.start, self.flags, self.len - head - len);
        std::mem::forget(self);
        let unmap = |offset: usize, len: usize| {
            if len != 0 {
                // SAFETY: whole pages of our own mapping that nobody has seen.
                unsafe { libc::munmap(start.add(offset).cast(), len) };
            }
        };
        unmap(0, head);
        unmap(head + len, tail);
        // SAFETY: `head + len` is within the mapping.
        Mapping { start: unsafe { start.add(head) }, len, flags }
    }

    /// The flags that it was mapped with.
    pub(crate) fn flags(&self) -> i32 {
        self.flags
    }

    /// Its first byte.
    pub(crate) fn start(&self) -> *mut u8 {
        self.start
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping; whoever dropped it has let go of the memory.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// `len` bytes, or as many as huge pages of the pool have.
fn whole(len: usize, kind: Kind) -> Result<usize, Error> {
    let grain = if kind == Kind::Hugetlb { HUGE_PAGE } else { 1 };
    len.checked_next_multiple_of(grain).ok_or(Error::from_raw_os_error(libc::ENOMEM))
}

/// A file of `len` zeroed bytes in memory, which others can map to whom it is given.
pub(crate) fn memory_file(len: u64, kind: Kind) -> Result<File, Error> {
    let pool = if kind == Kind::Hugetlb { libc::MFD_HUGETLB | libc::MFD_HUGE_2MB } else { 0 };
    let len = whole(len as usize, kind)? as u64;
    // SAFETY: a system call on a constant string.
    let fd = unsafe { libc::memfd_create(c"guest-memory".as_ptr(), libc::MFD_CLOEXEC | pool) };
    if fd < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: a new descriptor, ours alone.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_begins_where_a_huge_page_may() {
        for len in [0x1000, HUGE_PAGE, 5 * HUGE_PAGE + 0x3000] {
            let mapping = Mapping::private(len, Kind::Thp).unwrap();
            assert_eq!(mapping.start() as usize % HUGE_PAGE, 0);
            // SAFETY: first and last byte of the mapping.
            unsafe {
                assert_eq!(mapping.start().add(len - 1).read(), 0);
                mapping.start().write(1);
            }
        }
        assert!(Mapping::private(usize::MAX & !0xfff, Kind::Thp).is_err());
    }

    /// The flags that proc_pid_smaps(5) tells of a mapping.
    fn flags(mapping: &Mapping) -> String {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", mapping.start as usize);
        let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&start));
        lines.find_map(|line| line.strip_prefix("VmFlags:")).unwrap().to_owned()
    }

    #[test]
    fn each_kind_of_memory_is_what_it_says() {
        let private = |kind| flags(&Mapping::private(4 * HUGE_PAGE, kind).unwrap());
        // A kernel without huge pages has no flags for them.
        if std::fs::exists("/sys/kernel/mm/transparent_hugepage").unwrap() {
            assert!(private(Kind::Thp).contains(" hg"), "{}", private(Kind::Thp));
            assert!(private(Kind::Small).contains(" nh"), "{}", private(Kind::Small));
        }
        let file = memory_file(4 * HUGE_PAGE as u64, Kind::Shared).unwrap();
        let shared = Mapping::shared(&file, 0, 4 * HUGE_PAGE, Kind::Shared).unwrap();
        assert!(flags(&shared).contains(" sh") && !private(Kind::Thp).contains(" sh"));
        // A host with huge pages free gives some of them; any other refuses at once.
        if let Ok(mapping) = Mapping::private(0x1000, Kind::Hugetlb) {
            assert!(flags(&mapping).contains(" ht") && mapping.len == HUGE_PAGE);
        }
    }
}
