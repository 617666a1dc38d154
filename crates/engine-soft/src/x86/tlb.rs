//! The TLB: linear pages to host memory, tagged by address space.
//!
//! Entries carry an address-space id (ASID) of our own instead of a PCID. Flushing a PCID gives it a
//! new ASID, so nothing is walked over; when the ASIDs run out, everything is flushed once. Global
//! pages carry ASID 0 and match in every address space.
//!
//! Every privilege view ([`View`]) has an array of its own, so that a hit is one comparison with no
//! look at permission bits. Only RAM is cached here; MMIO takes the slow path each time.

use super::fast::{FastTlb, JumpCache};
use super::native::flushes::Flushes;

/// A view of memory: who is asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum View {
    /// CPL 3.
    User = 0,
    /// CPL 0-2, and user pages are off limits (SMAP on, AC clear) – or implicit supervisor accesses.
    Kernel = 1,
    /// CPL 0-2 with access to user pages.
    KernelUser = 2,
}

const VIEWS: usize = 3;
/// Kernels touch pages all over their map of memory: with fewer, they drive each other out.
const ENTRIES: usize = 4096;
const PAGE: u64 = !0xfff;
/// Matches no tag: its low bits are no ASID that is ever given out.
const INVALID: u64 = u64::MAX;
const GLOBAL: u64 = 0;
const LAST_ASID: u16 = 0xffe;
const PCIDS: usize = 4096;

/// One data page.
#[derive(Clone, Copy)]
pub struct Entry {
    /// Page | ASID if reads hit here.
    read: u64,
    /// Page | ASID if writes hit here: the page is writable, its PTE is dirty, and it holds no
    /// decoded code.
    write: u64,
    /// What to add to a linear address to get the host's.
    addend: u64,
}

/// One code page.
#[derive(Clone, Copy)]
pub struct CodeEntry {
    tag: u64,
    /// Guest-physical address of the page.
    pub gpa: u64,
}

/// What a page walk found, as the TLB stores it.
#[derive(Clone, Copy, Debug)]
pub struct Fill {
    /// Linear address, any in the page.
    pub linear: u64,
    /// Host address of the 4 KiB page's first byte.
    pub host: u64,
    /// Global page.
    pub global: bool,
    /// Part of a 2 MiB, 4 MiB or 1 GiB page.
    pub large: bool,
    /// Writes may hit.
    pub writable: bool,
}

/// The TLB of one vCPU.
pub struct Tlb {
    /// What translated code looks into; filled from `data`, forgotten with it.
    pub fast: FastTlb,
    /// Where jumps go in translated code; valid as long as the translations they were made with.
    pub jumps: JumpCache,
    data: Box<[[Entry; ENTRIES]; VIEWS]>,
    /// Indexed by user (0) and supervisor (1).
    code: Box<[[CodeEntry; ENTRIES]; 2]>,
    asid: u64,
    next_asid: u16,
    /// ASID of each PCID; 0 where it has none yet.
    of_pcid: Box<[u16; PCIDS]>,
    /// Bloom filter over 1 GiB regions that have entries of large pages: `INVLPG` there flushes all.
    large: [u64; 8],
    /// What was flushed.
    pub flushes_log: Flushes,
    /// Number of full flushes, for statistics.
    pub flushes: u64,
}

#[inline(always)]
fn index(linear: u64) -> usize {
    (linear >> 12) as usize & (ENTRIES - 1)
}

#[inline(always)]
fn hits(tag: u64, page: u64, asid: u64) -> bool {
    let rest = tag ^ page;
    rest == asid || rest == GLOBAL
}

impl Default for Tlb {
    fn default() -> Self {
        Tlb::new()
    }
}

impl Tlb {
    /// An empty TLB, in the address space of PCID 0.
    pub fn new() -> Tlb {
        let data = Entry { read: INVALID, write: INVALID, addend: 0 };
        let code = CodeEntry { tag: INVALID, gpa: 0 };
        let mut tlb = Tlb {
            fast: FastTlb::default(),
            jumps: JumpCache::default(),
            data: Box::new([[data; ENTRIES]; VIEWS]),
            code: Box::new([[code; ENTRIES]; 2]),
            asid: 0,
            next_asid: 1,
            of_pcid: Box::new([0; PCIDS]),
            large: [0; 8],
            flushes_log: Flushes::default(),
            flushes: 0,
        };
        tlb.switch(0);
        tlb
    }

    /// Host address for a read, if it hits. The access must not cross the page.
    #[inline(always)]
    pub fn read(&self, view: View, linear: u64) -> Option<*const u8> {
        let entry = &self.data[view as usize][index(linear)];
        hits(entry.read, linear & PAGE, self.asid)
            .then(|| std::ptr::with_exposed_provenance(linear.wrapping_add(entry.addend) as usize))
    }

    /// Host address for a write, if it hits. The access must not cross the page.
    #[inline(always)]
    pub fn write(&self, view: View, linear: u64) -> Option<*mut u8> {
        let entry = &self.data[view as usize][index(linear)];
        hits(entry.write, linear & PAGE, self.asid)
            .then(|| std::ptr::with_exposed_provenance_mut(linear.wrapping_add(entry.addend) as usize))
    }

    /// Guest-physical page of the code at `linear`, if it hits.
    #[inline(always)]
    pub fn code(&self, user: bool, linear: u64) -> Option<u64> {
        let entry = &self.code[usize::from(!user)][index(linear)];
        hits(entry.tag, linear & PAGE, self.asid).then_some(entry.gpa)
    }

    fn tag(&mut self, linear: u64, global: bool, large: bool) -> u64 {
        if large {
            let region = (linear >> 30) as usize & 511;
            self.large[region / 64] |= 1 << (region % 64);
        }
        linear & PAGE | if global { GLOBAL } else { self.asid }
    }

    /// Remembers a readable data page.
    pub fn fill(&mut self, view: View, fill: Fill) {
        let tag = self.tag(fill.linear, fill.global, fill.large);
        let write = if fill.writable { tag } else { INVALID };
        self.data[view as usize][index(fill.linear)] =
            Entry { read: tag, write, addend: fill.host.wrapping_sub(fill.linear & PAGE) };
    }

    /// Remembers a code page.
    pub fn fill_code(&mut self, user: bool, linear: u64, gpa: u64, global: bool, large: bool) {
        let tag = self.tag(linear, global, large);
        self.code[usize::from(!user)][index(linear)] = CodeEntry { tag, gpa: gpa & PAGE };
    }

    /// Makes `pcid` the current address space, keeping what is known of it.
    pub fn switch(&mut self, pcid: u16) {
        let slot = usize::from(pcid) % PCIDS;
        if self.of_pcid[slot] == 0 {
            self.of_pcid[slot] = self.fresh_asid();
        }
        let asid = self.of_pcid[slot].into();
        if asid != self.asid {
            self.asid = asid;
            self.fast.switch();
            self.jumps.switch();
        }
    }

    /// The tag of the current address space.
    pub fn asid(&self) -> u64 {
        self.asid
    }

    /// Whether the code page at `linear`, which hits, is a global one.
    pub fn code_is_global(&self, user: bool, linear: u64) -> bool {
        self.code[usize::from(!user)][index(linear)].tag == linear & PAGE | GLOBAL
    }

    /// Takes a page that hits here over into the fast part; `false` if it misses.
    pub fn refill(&mut self, view: View, linear: u64, write: bool) -> bool {
        let entry = &self.data[view as usize][index(linear)];
        let page = linear & PAGE;
        let readable = hits(entry.read, page, self.asid);
        let writable = hits(entry.write, page, self.asid);
        if readable && (writable || !write) {
            let global = entry.read == page | GLOBAL;
            self.fast.fill(view, linear, page.wrapping_add(entry.addend), writable, global);
        }
        readable && (writable || !write)
    }

    fn fresh_asid(&mut self) -> u16 {
        if self.next_asid > LAST_ASID {
            self.clear();
        }
        self.next_asid += 1;
        self.next_asid - 1
    }

    fn clear(&mut self) {
        for entry in self.data.as_flattened_mut() {
            (entry.read, entry.write) = (INVALID, INVALID);
        }
        for entry in self.code.as_flattened_mut() {
            entry.tag = INVALID;
        }
        self.of_pcid.fill(0);
        self.large = [0; 8];
        self.next_asid = 1;
        self.fast.clear();
        self.jumps.clear();
        self.flushes_log.all += 1;
        self.flushes += 1;
    }

    /// Forgets the non-global pages of one PCID.
    pub fn flush_pcid(&mut self, pcid: u16, current: u16) {
        self.of_pcid[usize::from(pcid) % PCIDS] = 0;
        self.switch(current);
    }

    /// Forgets all non-global pages of every PCID.
    pub fn flush_non_global(&mut self, current: u16) {
        self.of_pcid.fill(0);
        self.switch(current);
    }

    /// Forgets everything.
    pub fn flush_all(&mut self, current: u16) {
        self.clear();
        self.switch(current);
    }

    /// `INVLPG`: forgets one page of every address space (more than asked for is allowed).
    pub fn flush_page(&mut self, linear: u64, current: u16) {
        let region = (linear >> 30) as usize & 511;
        if self.large[region / 64] >> (region % 64) & 1 != 0 {
            return self.flush_all(current);
        }
        self.flushes_log.page(linear);
        self.fast.forget(linear);
        self.jumps.forget(linear);
        let (page, at) = (linear & PAGE, index(linear));
        for entry in self.data.iter_mut().map(|view| &mut view[at]) {
            if entry.read & PAGE == page {
                (entry.read, entry.write) = (INVALID, INVALID);
            }
        }
        for entry in self.code.iter_mut().map(|view| &mut view[at]) {
            if entry.tag & PAGE == page {
                entry.tag = INVALID;
            }
        }
    }

    /// Makes all writes take the slow path once more, so that they are logged (a page became code,
    /// or the dirty log was taken).
    pub fn protect_writes(&mut self) {
        self.flushes_log.writes += 1;
        self.fast.protect_writes();
        for entry in self.data.as_flattened_mut() {
            entry.write = INVALID;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(linear: u64, global: bool, large: bool) -> Fill {
        Fill { linear, host: 0x7000_0000, global, large, writable: true }
    }

    #[test]
    fn an_address_space_is_found_again_after_a_switch_and_gone_after_its_flush() {
        let mut tlb = Tlb::new();
        tlb.fill(View::User, fill(0x1000, false, false));
        tlb.switch(5);
        assert!(tlb.read(View::User, 0x1000).is_none());
        tlb.switch(0);
        assert_eq!(tlb.read(View::User, 0x1234).map(|p| p.addr()), Some(0x7000_0234));
        assert!(tlb.read(View::Kernel, 0x1000).is_none(), "views do not share entries");
        tlb.flush_pcid(0, 0);
        assert!(tlb.read(View::User, 0x1000).is_none());
    }

    #[test]
    fn global_pages_survive_all_but_a_full_flush() {
        let mut tlb = Tlb::new();
        tlb.fill(View::Kernel, fill(0xffff_8000_0000_0000, true, false));
        tlb.flush_non_global(0);
        tlb.switch(7);
        assert!(tlb.write(View::Kernel, 0xffff_8000_0000_0fff).is_some());
        tlb.flush_all(7);
        assert!(tlb.read(View::Kernel, 0xffff_8000_0000_0000).is_none());
    }

    #[test]
    fn invlpg_of_any_address_in_a_large_page_forgets_all_its_parts() {
        let mut tlb = Tlb::new();
        tlb.fill(View::Kernel, fill(0x20_3000, false, true));
        tlb.flush_page(0x20_0000, 0);
        assert!(tlb.read(View::Kernel, 0x20_3000).is_none());
        tlb.fill_code(true, 0x5000, 0x9000, false, false);
        tlb.flush_page(0x6000, 0);
        assert_eq!(tlb.code(true, 0x5000), Some(0x9000));
        tlb.flush_page(0x5fff, 0);
        assert_eq!(tlb.code(true, 0x5000), None);
    }

    #[test]
    fn running_out_of_asids_forgets_but_never_mixes_address_spaces() {
        let mut tlb = Tlb::new();
        for round in 0..10_000u64 {
            tlb.flush_pcid(1, 1);
            assert!(tlb.read(View::User, 0x8000).is_none(), "round {round}");
            tlb.fill(View::User, fill(0x8000, false, false));
        }
    }
}
