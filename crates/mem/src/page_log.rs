//! What happened to each page: written, decoded as code.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

use crate::PAGE_SIZE;

/// See [`code_changes`].
static CODE_CHANGES: AtomicU64 = AtomicU64::new(0);

/// How many times a page with code was written, in the whole process. An engine that keeps jumps between
/// pieces of translated code looks here whether any of them may be void.
#[inline]
pub fn code_changes() -> u64 {
    CODE_CHANGES.load(Ordering::Acquire)
}

/// The log entry of one page.
///
/// `version` counts how often the page changed between "data" and "code". It is odd while an
/// engine holds decoded or translated code of the page, and any write to the page then makes it
/// even. Code that was decoded at version *v* is valid while the version still is *v*.
#[derive(Default)]
pub struct PageState {
    version: AtomicU32,
    dirty: AtomicU32,
}

impl PageState {
    /// The current code version; odd while the page is known to hold code.
    #[inline]
    pub fn version(&self) -> u32 {
        self.version.load(Ordering::Acquire)
    }

    /// Whether an engine holds code of this page.
    #[inline]
    pub fn has_code(&self) -> bool {
        self.version() & 1 == 1
    }

    /// Marks the page as holding code and returns the version to key that code with, and whether
    /// the page was plain data until now.
    ///
    /// Must come before the bytes are read: a write after the mark changes the version, so code
    /// made of the older bytes is never taken for valid.
    pub fn mark_code(&self) -> (u32, bool) {
        loop {
            let version = self.version();
            if version & 1 == 1 {
                return (version, false);
            }
            let next = version.wrapping_add(1);
            if self.version.compare_exchange(version, next, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                fence(Ordering::SeqCst); // see `note_write`
                return (next, true);
            }
        }
    }

    /// Notes a write: the page is dirty, and code made of it is void.
    ///
    /// Must come after the bytes were written.
    #[inline]
    pub fn note_write(&self) {
        // The bytes are there before the look at the version: whoever marks the page behind it reads them.
        fence(Ordering::SeqCst);
        if self.dirty.load(Ordering::Relaxed) == 0 {
            self.dirty.store(1, Ordering::Release);
        }
        let version = self.version();
        if version & 1 == 1 {
            // Lost races are fine: somebody else's write voided the code just as well.
            let next = version.wrapping_add(1);
            let _ = self.version.compare_exchange(version, next, Ordering::AcqRel, Ordering::Relaxed);
            CODE_CHANGES.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Marks the page dirty without touching its code version. For an engine that is about to hand
    /// out write access to a page that holds no code.
    #[inline]
    pub fn mark_dirty(&self) {
        self.dirty.store(1, Ordering::Release);
    }

    /// Whether the page was written since [`PageState::take_dirty`].
    pub fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::Acquire) != 0
    }

    /// Reads and clears the dirty mark.
    pub fn take_dirty(&self) -> bool {
        self.dirty.swap(0, Ordering::AcqRel) != 0
    }
}

/// The page log of one memory region; `vm-memory` calls it on every device write.
#[derive(Clone, Default)]
pub struct PageLog {
    pages: Arc<[PageState]>,
    /// Byte offset of this slice in its region.
    base: usize,
}

impl PageLog {
    /// The entries of the region's pages, in order.
    pub fn pages(&self) -> &[PageState] {
        &self.pages
    }
}

impl fmt::Debug for PageLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageLog").field("pages", &self.pages.len()).field("base", &self.base).finish()
    }
}

impl WithBitmapSlice<'_> for PageLog {
    type S = PageLog;
}

impl BitmapSlice for PageLog {}

impl Bitmap for PageLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let first = self.base.saturating_add(offset) / PAGE_SIZE as usize;
        let last = self.base.saturating_add(offset).saturating_add(len - 1) / PAGE_SIZE as usize;
        for page in self.pages.iter().take(last.saturating_add(1)).skip(first) {
            page.note_write();
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.pages.get((self.base + offset) / PAGE_SIZE as usize).is_some_and(PageState::is_dirty)
    }

    fn slice_at(&self, offset: usize) -> PageLog {
        PageLog { pages: self.pages.clone(), base: self.base.saturating_add(offset) }
    }
}

impl NewBitmap for PageLog {
    fn with_len(len: usize) -> Self {
        let pages = len.div_ceil(PAGE_SIZE as usize);
        PageLog { pages: (0..pages).map(|_| PageState::default()).collect(), base: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_voids_code_and_only_once() {
        let page = PageState::default();
        let (version, fresh) = page.mark_code();
        assert!(fresh && page.has_code());
        assert_eq!(page.mark_code(), (version, false));
        page.note_write();
        assert!(!page.has_code());
        assert_ne!(page.version(), version);
        let after = page.version();
        page.note_write();
        assert_eq!(page.version(), after, "data pages keep their version");
    }

    #[test]
    fn who_reads_old_bytes_while_another_thread_writes_finds_its_code_void() {
        const PAGES: usize = 1 << 14;
        for _ in 0..8 {
            let pages: Vec<_> = (0..PAGES).map(|_| (PageState::default(), AtomicU32::new(0))).collect();
            let pace = AtomicU64::new(0);
            // Each page when both are there, so that they meet.
            let meet = |at: usize| {
                pace.fetch_add(1, Ordering::AcqRel);
                let mut patience = 100_000;
                while pace.load(Ordering::Acquire) < 2 * (at as u64 + 1) && patience > 0 {
                    patience -= 1;
                    std::hint::spin_loop();
                }
            };
            let decoded: Vec<_> = std::thread::scope(|scope| {
                scope.spawn(|| {
                    for (at, (state, bytes)) in pages.iter().enumerate() {
                        meet(at);
                        bytes.store(1, Ordering::Relaxed);
                        state.note_write();
                    }
                });
                let decode = |(at, (state, bytes)): (usize, &(PageState, AtomicU32))| {
                    meet(at);
                    (state.mark_code().0, bytes.load(Ordering::Relaxed))
                };
                pages.iter().enumerate().map(decode).collect()
            });
            for ((version, bytes), (state, _)) in decoded.into_iter().zip(&pages) {
                assert!(bytes == 1 || state.version() != version, "old bytes are taken for valid");
            }
        }
    }

    #[test]
    fn a_write_across_pages_marks_each() {
        let log = PageLog::with_len(3 * 4096);
        log.slice_at(4000).mark_dirty(90, 10);
        assert!(log.dirty_at(0) && log.dirty_at(4096) && !log.dirty_at(8192));
    }
}
