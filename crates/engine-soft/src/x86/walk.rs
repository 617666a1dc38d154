//! The page walker: linear to guest-physical, with every check, accessed and dirty bits.
//!
//! SDM 3A chapter 4: 32-bit paging (4.3), PAE (4.4), 4-level (4.5); access rights (4.6), error codes
//! (4.7), accessed and dirty flags (4.8).

#![allow(unsafe_code)] // reads and updates page-table entries in the guest's RAM

use engine::x86::bits::{cr0, cr4, efer};
use mem::{HostInt, PAGE_SIZE};

use super::cpu::Cpu;
use super::exception::{Exception, Exec, vector};
use super::tlb::View;

/// What an access wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// A data read.
    Read,
    /// A data write.
    Write,
    /// An instruction fetch.
    Fetch,
}

/// Where a walk ended.
#[derive(Clone, Copy, Debug)]
pub struct Walked {
    /// Guest-physical address of the byte.
    pub gpa: u64,
    /// A global translation.
    pub global: bool,
    /// A page larger than 4 KiB.
    pub large: bool,
    /// The view may write here, and the dirty bit is set.
    pub writable: bool,
}

/// A user page's entry and what the program may do there.
#[derive(Clone, Copy, Debug)]
pub struct UserLeaf {
    entry: u64,
    slot: u64,
    /// Log2 of the page size.
    pub bits: u32,
    above: (bool, bool),
    /// Writes are allowed.
    pub write: bool,
    /// So is execution.
    pub execute: bool,
    /// It was used before.
    pub accessed: bool,
    /// It was written before.
    pub dirty: bool,
}

impl UserLeaf {
    fn new(entry: u64, slot: u64, bits: u32, write: bool, execute: bool) -> UserLeaf {
        UserLeaf {
            entry,
            slot,
            bits,
            above: (write, execute),
            write: write && entry & RW != 0,
            execute: execute && entry & NX == 0,
            accessed: entry & A != 0,
            dirty: entry & D != 0,
        }
    }

    /// Guest-physical address of the 4 KiB page of `linear`, which this entry maps.
    pub fn address(&self, linear: u64) -> u64 {
        let mask = (1u64 << self.bits) - 1;
        self.entry & FRAME & !mask | linear & mask & !(PAGE_SIZE - 1)
    }

    /// The entry of another 4 KiB page in the same table.
    pub fn neighbour(&self, cpu: &Cpu, linear: u64) -> Option<UserLeaf> {
        let slot = (self.slot & !0xfff) + (linear >> 12 & 511) * 8;
        let entry = cpu.entry::<u64>(slot);
        (entry & (P | US) == P | US).then(|| UserLeaf::new(entry, slot, 12, self.above.0, self.above.1))
    }
}

/// The address of a table or page in an 8-byte entry or in CR3.
const FRAME: u64 = 0x000f_ffff_ffff_f000;
const P: u64 = 1 << 0;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;

/// Bits of a page-fault error code (SDM 3A, 4.7).
mod code {
    pub const PRESENT: u32 = 1 << 0;
    pub const WRITE: u32 = 1 << 1;
    pub const USER: u32 = 1 << 2;
    pub const RESERVED: u32 = 1 << 3;
    pub const FETCH: u32 = 1 << 4;
}

/// Rights gathered on the way down.
struct Rights {
    user: bool,
    write: bool,
    execute: bool,
}

/// The entry that maps the page, and where.
struct Leaf {
    entry: u64,
    slot: u64,
    /// Log2 of the page size.
    bits: u32,
    /// 8-byte entry.
    wide: bool,
}

impl Cpu {
    /// Translates one byte's address for an access, or raises `#PF` with CR2 set.
    pub fn translate(&mut self, view: View, linear: u64, intent: Intent) -> Exec<Walked> {
        if !self.mode.paging {
            return Ok(Walked { gpa: linear, global: true, large: false, writable: true });
        }
        self.walk(view, linear, intent).map_err(|found| self.page_fault(view, linear, intent, found))
    }

    fn page_fault(&mut self, view: View, linear: u64, intent: Intent, found: u32) -> Exception {
        self.cr2 = linear;
        let mut code = found;
        if view == View::User {
            code |= code::USER;
        }
        match intent {
            Intent::Write => code |= code::WRITE,
            // The fetch bit is only reported where a fetch can be refused.
            Intent::Fetch if self.fetch_rights_matter() => code |= code::FETCH,
            _ => {}
        }
        Exception::with_code(vector::PF, code)
    }

    fn fetch_rights_matter(&self) -> bool {
        (self.cr4 & cr4::PAE != 0 && self.efer & efer::NXE != 0) || self.cr4 & cr4::SMEP != 0
    }

    /// Translates as [`Cpu::translate`], but raises nothing.
    pub fn probe(&mut self, view: View, linear: u64, intent: Intent) -> Option<Walked> {
        self.walk(view, linear, intent).ok()
    }

    /// The entry that maps a page of a user program in long mode; nothing is marked as accessed.
    pub fn user_leaf(&self, linear: u64) -> Option<UserLeaf> {
        let mut table = self.cr3 & FRAME;
        let (mut write, mut execute) = (true, true);
        for bits in [39, 30, 21, 12] {
            let slot = table + (linear >> bits & 511) * 8;
            let entry = self.entry::<u64>(slot);
            if entry & (P | US) != P | US {
                return None;
            }
            if bits == 12 || entry & PS != 0 {
                return Some(UserLeaf::new(entry, slot, bits, write, execute));
            }
            write &= entry & RW != 0;
            execute &= entry & NX == 0;
            table = entry & FRAME;
        }
        None
    }

    fn walk(&mut self, view: View, linear: u64, intent: Intent) -> Result<Walked, u32> {
        loop {
            let mut rights = Rights { user: true, write: true, execute: true };
            let leaf = self.find_leaf(linear, &mut rights)?;
            let writable = self.check_rights(view, intent, &rights)?;
            if self.set_accessed(&leaf, intent == Intent::Write) {
                let page_mask = (1u64 << leaf.bits) - 1;
                let dirty = leaf.entry & D != 0 || intent == Intent::Write;
                return Ok(Walked {
                    gpa: frame(leaf.entry, &leaf) & !page_mask | linear & page_mask,
                    global: leaf.entry & G != 0 && self.cr4 & cr4::PGE != 0,
                    large: leaf.bits > 12,
                    writable: writable && dirty,
                });
            }
            // Another CPU changed the entry in between: walk again.
        }
    }

    /// Goes down to the entry that maps the page, setting accessed bits on the way.
    fn find_leaf(&mut self, linear: u64, rights: &mut Rights) -> Result<Leaf, u32> {
        if self.mode.long {
            return self.descend(linear, self.cr3 & FRAME, 39, rights);
        }
        if self.cr4 & cr4::PAE != 0 {
            let pdpte = self.pdptes[(linear >> 30 & 3) as usize];
            if pdpte & P == 0 {
                return Err(0);
            }
            return self.descend(linear, pdpte & FRAME, 21, rights);
        }
        self.descend_32bit(linear, rights)
    }

    /// The 8-byte entry formats: `shift` is the lowest linear-address bit that the first table translates.
    fn descend(&mut self, linear: u64, table: u64, shift: u32, rights: &mut Rights) -> Result<Leaf, u32> {
        let (mut table, mut shift) = (table, shift);
        loop {
            let slot = table + (linear >> shift & 511) * 8;
            let entry = self.entry::<u64>(slot);
            if entry & P == 0 {
                return Err(0);
            }
            let leaf = shift == 12 || entry & PS != 0;
            if entry & self.reserved(shift, leaf) != 0 {
                return Err(code::PRESENT | code::RESERVED);
            }
            rights.user &= entry & US != 0;
            rights.write &= entry & RW != 0;
            rights.execute &= entry & NX == 0;
            let found = Leaf { entry, slot, bits: shift, wide: true };
            if leaf {
                return Ok(found);
            }
            if !self.set_accessed(&found, false) {
                continue; // changed under us: read it again
            }
            table = entry & FRAME;
            shift -= 9;
        }
    }

    /// Reserved bits of an 8-byte entry (SDM 3A, tables 4-8 to 4-20).
    fn reserved(&self, shift: u32, leaf: bool) -> u64 {
        let physical = self.vm.cpuid.physical_bits();
        let mut reserved = !((1u64 << physical) - 1) & FRAME;
        if self.efer & efer::NXE == 0 {
            reserved |= NX;
        }
        if !self.mode.long {
            reserved |= 0x7ff0_0000_0000_0000; // PAE: bits 52-62
        }
        if leaf && shift > 12 {
            reserved |= (1u64 << shift) - (1 << 13); // below the frame, above PAT
            if shift == 39 {
                reserved |= PS;
            }
        }
        reserved
    }

    fn descend_32bit(&mut self, linear: u64, rights: &mut Rights) -> Result<Leaf, u32> {
        let slot = (self.cr3 & 0xffff_f000) + (linear >> 22 & 1023) * 4;
        let pde = u64::from(self.entry::<u32>(slot));
        if pde & P == 0 {
            return Err(0);
        }
        rights.user = pde & US != 0;
        rights.write = pde & RW != 0;
        let found = Leaf { entry: pde, slot, bits: 22, wide: false };
        if pde & PS != 0 && self.cr4 & cr4::PSE != 0 {
            // Bit 21 is reserved; bits 13-20 are address bits 32-39 (PSE-36).
            return if pde & 1 << 21 != 0 { Err(code::PRESENT | code::RESERVED) } else { Ok(found) };
        }
        if !self.set_accessed(&found, false) {
            return self.descend_32bit(linear, rights);
        }
        let slot = (pde & 0xffff_f000) + (linear >> 12 & 1023) * 4;
        let pte = u64::from(self.entry::<u32>(slot));
        if pte & P == 0 {
            return Err(0);
        }
        rights.user &= pte & US != 0;
        rights.write &= pte & RW != 0;
        Ok(Leaf { entry: pte, slot, bits: 12, wide: false })
    }

    /// Access rights (SDM 3A, 4.6.1). Returns whether the view may write.
    fn check_rights(&self, view: View, intent: Intent, rights: &Rights) -> Result<bool, u32> {
        let user_view = view == View::User;
        let denied = Err(code::PRESENT);
        if user_view && !rights.user {
            return denied;
        }
        if intent == Intent::Fetch {
            let smep = self.cr4 & cr4::SMEP != 0 && !user_view && rights.user;
            return if !rights.execute || smep { denied } else { Ok(false) };
        }
        let smap = self.cr4 & cr4::SMAP != 0 && view == View::Kernel && rights.user;
        let writable = rights.write || (!user_view && self.cr0 & cr0::WP == 0);
        if smap || (intent == Intent::Write && !writable) {
            return denied;
        }
        Ok(writable)
    }

    fn entry<T: HostInt + Default>(&self, gpa: u64) -> T {
        let Some(page) = self.vm.ram.page(gpa) else { return T::default() };
        // SAFETY: an aligned entry within the page.
        unsafe { T::load(page.host.add((gpa % PAGE_SIZE) as usize)) }
    }

    /// Sets the accessed bit, and the dirty bit of a page that is written; `false` if the entry is
    /// no longer what the walk saw.
    fn set_accessed(&self, leaf: &Leaf, dirty: bool) -> bool {
        let wanted = leaf.entry | A | if dirty { D } else { 0 };
        if wanted == leaf.entry {
            return true;
        }
        let Some(page) = self.vm.ram.page(leaf.slot) else { return true };
        // SAFETY: an aligned entry within the page.
        let done = unsafe {
            let host = page.host.add((leaf.slot % PAGE_SIZE) as usize);
            if leaf.wide {
                u64::compare_exchange(host, leaf.entry, wanted).is_ok()
            } else {
                u32::compare_exchange(host, leaf.entry as u32, wanted as u32).is_ok()
            }
        };
        page.state.note_write();
        done
    }
}

/// Guest-physical base of the page that a leaf maps.
fn frame(entry: u64, leaf: &Leaf) -> u64 {
    if leaf.wide {
        return entry & FRAME;
    }
    if leaf.bits == 22 {
        return entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32;
    }
    entry & 0xffff_f000
}
