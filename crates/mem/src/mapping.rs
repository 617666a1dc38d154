//! Host memory for one range of guest memory, where huge pages can back it.

#![allow(unsafe_code)] // mmap and munmap

use std::io::Error;
use std::ptr::null_mut;

/// Size of the host's huge pages on x86-64. A nested page table maps that much at once only where host
/// and guest addresses agree below it; guest ranges of any size begin at multiples of it.
const HUGE_PAGE: usize = 2 << 20;

/// What [`Mapping::new`] maps with.
pub(crate) const PROT: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// Private, and taken from the host only as it is touched.
pub(crate) const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Zeroed pages, given back when it is dropped.
pub(crate) struct Mapping {
    start: *mut u8,
    len: usize,
}

impl Mapping {
    /// Maps `len` bytes, a multiple of the page size.
    pub(crate) fn new(len: usize) -> Result<Mapping, Error> {
        let room = len.checked_add(HUGE_PAGE).ok_or(Error::from_raw_os_error(libc::ENOMEM))?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(null_mut(), room, PROT, FLAGS, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let all = Mapping { start: start.cast(), len: room };
        let head = all.start.align_offset(HUGE_PAGE);
        let mapping = all.cut(head, len);
        if len >= HUGE_PAGE {
            // SAFETY: our own mapping. A host without huge pages refuses, and small ones do too.
            unsafe { libc::madvise(mapping.start.cast(), len, libc::MADV_HUGEPAGE) };
        }
        Ok(mapping)
    }

    /// Keeps `len` bytes from `head` on.
    fn cut(self, head: usize, len: usize) -> Mapping {
        let (start, tail) = (self.start, self.len - head - len);
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
        Mapping { start: unsafe { start.add(head) }, len }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_begins_where_a_huge_page_may() {
        for len in [0x1000, HUGE_PAGE, 5 * HUGE_PAGE + 0x3000] {
            let mapping = Mapping::new(len).unwrap();
            assert_eq!(mapping.start() as usize % HUGE_PAGE, 0);
            // SAFETY: first and last byte of the mapping.
            unsafe {
                assert_eq!(mapping.start().add(len - 1).read(), 0);
                mapping.start().write(1);
            }
        }
        assert!(Mapping::new(usize::MAX & !0xfff).is_err());
    }
}
