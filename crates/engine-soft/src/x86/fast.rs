//! The part of the TLB that translated code reads: laid out for a check of few instructions.
//!
//! It holds what is valid *now*: one address space, no tags to compare but the page. A switch of the
//! address space empties it of all that is not global, and the [`Tlb`](super::tlb::Tlb) behind it, which
//! knows ASIDs, refills it.

use super::tlb::View;
use super::translate::mode::{ModeBits, mode_of};

/// Entries of each view; a power of two.
pub const FAST_ENTRIES: usize = 1024;
/// Entries of the jump cache; a power of two.
pub const JUMP_ENTRIES: usize = 4096;
/// Views of memory ([`View`]).
const VIEWS: usize = 3;
const PAGE: u64 = !0xfff;
/// Bits of the filter of pages with jump targets. Kernels forget pages of data all the time.
const FILTER: usize = 1 << 16;
/// How many refills are remembered, so that emptying need not touch everything.
const REMEMBERED: usize = 512;

/// A page. `address - tag` is the offset within it, or out of range for any other page.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub struct FastEntry {
    /// Linear page that reads hit.
    pub read: u64,
    /// Linear page that writes hit.
    pub write: u64,
    /// Host address of the page.
    pub host: u64,
    /// What to add to a linear address in the page to get the host's.
    pub addend: u64,
}

/// A page number that addresses of this slot never have.
fn nowhere(slot: usize) -> u64 {
    ((slot ^ 1) << 12) as u64
}

/// Slot of an address.
#[inline(always)]
pub fn slot(linear: u64) -> usize {
    (linear >> 12) as usize & (FAST_ENTRIES - 1)
}

/// Data pages, by view.
#[repr(C)]
pub struct FastTlb {
    /// By view, then by slot.
    pub entries: [[FastEntry; FAST_ENTRIES]; 3],
    /// Which entries are valid in every address space.
    global: [bool; 3 * FAST_ENTRIES],
    refilled: Refilled,
    /// Those that go with their address space; a part of `refilled`.
    private: Refilled,
}

/// The entries that were filled, as far as there is room.
struct Refilled {
    at: [u16; REMEMBERED],
    count: usize,
}

impl Refilled {
    const NONE: Refilled = Refilled { at: [0; REMEMBERED], count: 0 };

    fn push(&mut self, at: usize) {
        if self.count < REMEMBERED {
            self.at[self.count] = at as u16;
        }
        self.count += 1;
    }

    /// Calls `change` with each entry that was filled, or with all, and with what they hold if empty.
    fn each(
        &self,
        entries: &mut [[FastEntry; FAST_ENTRIES]; 3],
        change: impl Fn(&mut FastEntry, u64, usize),
    ) {
        let flat = entries.as_flattened_mut();
        if self.count <= REMEMBERED {
            for &at in &self.at[..self.count] {
                let at = usize::from(at);
                change(&mut flat[at], nowhere(at % FAST_ENTRIES), at);
            }
        } else {
            for (at, entry) in flat.iter_mut().enumerate() {
                change(entry, nowhere(at % FAST_ENTRIES), at);
            }
        }
    }
}

impl Default for FastTlb {
    fn default() -> Self {
        let mut entries = [[FastEntry { read: 0, write: 0, host: 0, addend: 0 }; FAST_ENTRIES]; 3];
        for view in &mut entries {
            for (slot, entry) in view.iter_mut().enumerate() {
                (entry.read, entry.write) = (nowhere(slot), nowhere(slot));
            }
        }
        FastTlb {
            entries,
            global: [false; 3 * FAST_ENTRIES],
            refilled: Refilled::NONE,
            private: Refilled::NONE,
        }
    }
}

impl FastTlb {
    /// Enters a page; `write` if writes may hit it too, `global` if it belongs to every address space.
    pub fn fill(&mut self, view: View, linear: u64, host: u64, write: bool, global: bool) {
        let slot = slot(linear);
        let entry = &mut self.entries[view as usize][slot];
        let page = linear & PAGE;
        entry.read = page;
        entry.write = if write { page } else { nowhere(slot) };
        entry.host = host;
        entry.addend = host.wrapping_sub(page);
        let at = (view as usize) * FAST_ENTRIES + slot;
        self.global[at] = global;
        self.refilled.push(at);
        if !global {
            self.private.push(at);
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.refilled.each(&mut self.entries, |entry, none, _| (entry.read, entry.write) = (none, none));
        (self.refilled.count, self.private.count) = (0, 0);
    }

    /// Forgets what belongs to one address space.
    pub fn switch(&mut self) {
        self.private.each(&mut self.entries, |entry, none, at| {
            if !self.global[at] {
                (entry.read, entry.write) = (none, none);
            }
        });
        self.private.count = 0;
    }

    /// Forgets one page.
    pub fn forget(&mut self, linear: u64) {
        let slot = slot(linear);
        for view in &mut self.entries {
            if view[slot].read == linear & PAGE {
                (view[slot].read, view[slot].write) = (nowhere(slot), nowhere(slot));
            }
        }
    }

    /// Makes the next write to each page miss.
    pub fn protect_writes(&mut self) {
        self.refilled.each(&mut self.entries, |entry, none, _| entry.write = none);
    }
}

/// Where a jump to a linear address goes in translated code.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub struct JumpEntry {
    /// Linear address of the target.
    pub linear: u64,
    /// Address space and mode it is valid in; [`NO_CONTEXT`] if none.
    pub context: u64,
    /// Linear address of the target's page.
    pub page: u64,
    /// Host address of the code.
    pub code: u64,
}

/// A context that is never current.
pub const NO_CONTEXT: u64 = u64::MAX;

/// The latest targets of indirect jumps and returns in one view, by the low byte of their address. They are
/// in the jump cache, too, and valid in the current context: translated code compares nothing but the address.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct LatestJumps {
    /// Linear addresses; one that belongs elsewhere where there is none.
    pub linear: [u64; 256],
    /// Host addresses of the code.
    pub code: [u64; 256],
}

impl LatestJumps {
    fn clear(&mut self) {
        self.linear = std::array::from_fn(|slot| slot as u64 ^ 1);
    }
}

impl Default for LatestJumps {
    fn default() -> Self {
        let mut none = LatestJumps { linear: [0; 256], code: [0; 256] };
        none.clear();
        none
    }
}

/// The jump cache: targets of indirect jumps, returns and jumps across pages.
#[repr(C)]
pub struct JumpCache {
    /// By view.
    pub latest: [LatestJumps; VIEWS],
    /// The mode, but for the view, that the latest jumps are of: of a user's, and of a supervisor's.
    modes: [ModeBits; 2],
    /// By [`jump_slot`].
    pub entries: [JumpEntry; JUMP_ENTRIES],
    /// What jumps across pages compare with the value that they were linked at. Identifies the current
    /// context since the cache was last cleared; 0 if that is to be found out.
    pub link_id: u64,
    /// How many times the cache was cleared: links of before are void.
    pub epoch: u64,
    /// Bloom filter of the linear pages that have entries.
    pages: [u64; FILTER / 64],
    filled: bool,
    /// A supervisor entry depends on a translation that is not global.
    private: bool,
}

/// Slot of a jump target; its second one is `slot ^ 1`.
#[inline(always)]
pub fn jump_slot(linear: u64) -> usize {
    (linear ^ linear >> 12) as usize & (JUMP_ENTRIES - 1)
}

/// Bits of the filter for a page: two, so that few pages without targets seem to have some.
fn filter_bits(linear: u64) -> [usize; 2] {
    let hash = (linear >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    [(hash >> 48) as usize % FILTER, (hash >> 32) as usize % FILTER]
}

impl Default for JumpCache {
    fn default() -> Self {
        let none = JumpEntry { linear: 0, context: NO_CONTEXT, page: 0, code: 0 };
        JumpCache {
            latest: [LatestJumps::default(); VIEWS],
            modes: [0; 2],
            entries: [none; JUMP_ENTRIES],
            link_id: 0,
            epoch: 0,
            pages: [0; FILTER / 64],
            filled: false,
            private: false,
        }
    }
}

impl JumpCache {
    /// Enters a target. `private` if it is a supervisor's and its page is not global.
    pub fn fill(&mut self, linear: u64, context: u64, code: u64, private: bool) {
        let slot = jump_slot(linear);
        let before = self.entries[slot];
        let other = before.context != NO_CONTEXT && (before.linear, before.context) != (linear, context);
        // What is here as its second choice goes, or it would drive out others for ever.
        if other && jump_slot(before.linear) == slot {
            self.entries[slot ^ 1] = before;
        }
        self.entries[slot] = JumpEntry { linear, context, page: linear & PAGE, code };
        self.note(linear, private);
    }

    /// What is linked depends on the translation of a linear address.
    pub fn note(&mut self, linear: u64, private: bool) {
        for bit in filter_bits(linear) {
            self.pages[bit / 64] |= 1 << (bit % 64);
        }
        self.filled = true;
        self.private |= private;
    }

    /// The entry of a target.
    pub fn find(&self, linear: u64, context: u64) -> Option<JumpEntry> {
        let slot = jump_slot(linear);
        [slot, slot ^ 1]
            .map(|slot| self.entries[slot])
            .into_iter()
            .find(|entry| (entry.linear, entry.context) == (linear, context))
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.epoch += 1;
        self.link_id = 0;
        if self.filled {
            for entry in &mut self.entries {
                entry.context = NO_CONTEXT;
            }
            self.pages.fill(0);
            self.filled = false;
            self.forget_latest();
        }
        self.private = false;
    }

    /// Has translated code look into the whole cache, and compare contexts, again.
    pub fn forget_latest(&mut self) {
        self.latest.iter_mut().for_each(LatestJumps::clear);
    }

    /// Code of a context is about to run: what is known of the latest jumps of another mode is void.
    pub fn enter(&mut self, context: u64) {
        let mode = mode_of(context);
        let supervisor = usize::from(mode & 3 != View::User as ModeBits);
        if mode & !3 != self.modes[supervisor] {
            self.modes[supervisor] = mode & !3;
            let (user, others) = self.latest.split_at_mut(1);
            let views = if supervisor == 0 { user } else { others };
            views.iter_mut().for_each(LatestJumps::clear);
        }
    }

    /// A page's translation is gone.
    pub fn forget(&mut self, linear: u64) {
        if filter_bits(linear).into_iter().all(|bit| self.pages[bit / 64] >> (bit % 64) & 1 != 0) {
            self.clear();
        }
    }

    /// The address space changed: contexts tell users' entries apart, but not supervisors'.
    pub fn switch(&mut self) {
        self.link_id = 0;
        self.latest[View::User as usize].clear();
        if self.private {
            self.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hits(tlb: &FastTlb, linear: u64) -> (bool, bool) {
        let entry = &tlb.entries[0][slot(linear)];
        (linear.wrapping_sub(entry.read) < 4096, linear.wrapping_sub(entry.write) < 4096)
    }

    #[test]
    fn an_empty_entry_matches_no_address_whatever_its_bits() {
        let tlb = FastTlb::default();
        for linear in [0, 0x1000, 0xfff, 0xffff_ffff_ffff_ffff, 0x8000_0000_0000_0000, 0x40_0000] {
            assert_eq!(hits(&tlb, linear), (false, false), "{linear:#x}");
        }
    }

    #[test]
    fn clearing_reaches_every_entry_however_many_were_filled() {
        let mut tlb = FastTlb::default();
        for pages in [3, 2000] {
            for page in 0..pages {
                tlb.fill(View::User, page << 12, 0x7000_0000, page % 2 == 0, false);
            }
            assert!(hits(&tlb, (pages - 1) << 12).0);
            tlb.protect_writes();
            assert!((0..pages).all(|page| !hits(&tlb, page << 12).1));
            tlb.clear();
            assert!((0..pages).all(|page| hits(&tlb, page << 12) == (false, false)));
        }
    }

    #[test]
    fn a_switch_of_the_address_space_keeps_global_pages_only() {
        let mut tlb = FastTlb::default();
        for pages in [3, 2000u64] {
            for page in 0..pages {
                tlb.fill(View::User, page << 12, 0x7000_0000, true, page % 2 == 0);
            }
            // A private page that takes the place of a global one, and the other way round.
            tlb.fill(View::User, 5 << 12, 0x7000_0000, true, true);
            tlb.fill(View::User, (4 + FAST_ENTRIES as u64) << 12, 0x7000_0000, true, false);
            tlb.switch();
            assert_eq!(hits(&tlb, 5 << 12), (true, true));
            assert!(!hits(&tlb, (4 + FAST_ENTRIES as u64) << 12).0);
            let first = pages.saturating_sub(FAST_ENTRIES as u64);
            for page in (first..pages).filter(|&page| page % FAST_ENTRIES as u64 > 5) {
                assert_eq!(hits(&tlb, page << 12).1, page % 2 == 0, "{page}");
            }
            tlb.clear();
            assert!((0..4096).all(|page| hits(&tlb, page << 12) == (false, false)));
        }
    }

    #[test]
    fn the_latest_jumps_are_void_in_other_address_spaces_and_modes_and_with_the_cache() {
        let mut jumps = JumpCache::default();
        let note = |jumps: &mut JumpCache| {
            jumps.fill(0x40_1234, 4, 99, false);
            for latest in &mut jumps.latest {
                (latest.linear[0x34], latest.code[0x34]) = (0x40_1234, 99);
            }
        };
        let known = |jumps: &JumpCache| jumps.latest.map(|latest| latest.linear[0x34] == 0x40_1234);
        note(&mut jumps);
        jumps.enter(4 | View::KernelUser as u64);
        assert_eq!(known(&jumps), [true, false, false], "it began in another mode");
        note(&mut jumps);
        jumps.enter(0x104 | View::User as u64);
        assert_eq!(known(&jumps), [false, true, true], "users' mode is not that of the supervisor");
        note(&mut jumps);
        jumps.enter(0x104 | View::User as u64);
        jumps.enter(4 | View::Kernel as u64);
        assert_eq!(known(&jumps), [true; 3], "views have their own");
        jumps.switch();
        assert_eq!(known(&jumps), [false, true, true]);
        jumps.forget(0x40_1000);
        assert_eq!(known(&jumps), [false; 3]);
        for latest in &jumps.latest {
            assert!(latest.linear.iter().enumerate().all(|(slot, linear)| *linear as usize & 255 != slot));
        }
    }

    #[test]
    fn forgetting_a_page_without_jump_targets_costs_the_others_nothing() {
        let mut jumps = JumpCache::default();
        jumps.fill(0x40_1234, 1, 99, false);
        jumps.forget(0x40_2000);
        assert_eq!(jumps.entries[jump_slot(0x40_1234)].context, 1);
        jumps.switch();
        assert_eq!(jumps.entries[jump_slot(0x40_1234)].context, 1);
        jumps.forget(0x40_1000);
        assert_eq!(jumps.entries[jump_slot(0x40_1234)].context, NO_CONTEXT);
    }
}
