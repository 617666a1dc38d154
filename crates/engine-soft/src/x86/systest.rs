//! A guest with descriptor tables, page tables and a task state segment, for the tests of the system
//! instructions.

use engine::x86::bits::{access, cr0, cr4, efer};
use engine::x86::{DescriptorTable, Segment};

use super::event::{Event, Shutdown};
use super::op::{RIP, reg, seg};
use super::testing::{Guest, STACK};

pub const GDT: u64 = 0x2000;
pub const IDT: u64 = 0x3000;
pub const TSS: u64 = 0x4000;
/// Where handlers are: vector n at `HANDLERS + 16 * n`, 16 bytes each.
pub const HANDLERS: u64 = 0x5000;
pub const KERNEL_STACK: u64 = 0xb_0000;
pub const IST_STACK: u64 = 0xc_0000;
/// Page tables.
pub const TABLES: u64 = 0x20_0000;

pub const KERNEL_CODE: u16 = 0x08;
pub const KERNEL_DATA: u16 = 0x10;
pub const USER_CODE32: u16 = 0x1b;
pub const USER_DATA: u16 = 0x23;
pub const USER_CODE: u16 = 0x2b;
pub const KERNEL_CODE32: u16 = 0x30;
pub const KERNEL_CODE16: u16 = 0x38;
pub const TASK: u16 = 0x40;
/// Free slots from here on.
pub const FREE: u16 = 0x50;

/// A descriptor, as its two halves of the manual's drawing.
pub fn descriptor(base: u64, limit: u64, access: u64, flags: u64) -> u64 {
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}

/// The low half of a gate; `access` is its type, DPL and present bit.
pub fn gate(selector: u16, offset: u64, access: u64) -> u64 {
    offset & 0xffff | u64::from(selector) << 16 | access << 40 | (offset >> 16 & 0xffff) << 48
}

pub struct System {
    pub guest: Guest,
}

impl std::ops::Deref for System {
    type Target = Guest;
    fn deref(&self) -> &Guest {
        &self.guest
    }
}

impl std::ops::DerefMut for System {
    fn deref_mut(&mut self) -> &mut Guest {
        &mut self.guest
    }
}

impl System {
    /// 64-bit code at CPL 0 with 4-level paging: the first 64 KiB belong to the kernel, the rest of
    /// the 4 MiB to user and kernel.
    pub fn long(code: &[u8]) -> System {
        let mut system = System::tables(64, code);
        system.put64(GDT + u64::from(TASK), &[descriptor(TSS, 0x67, 0x8b, 0), 0]);
        system.map();
        let cpu = &mut system.guest.cpu;
        cpu.cr0 |= cr0::PG | cr0::WP;
        cpu.cr4 |= cr4::PAE;
        cpu.cr3 = TABLES;
        cpu.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
        cpu.segs[seg::CS as usize] = segment(KERNEL_CODE, 0xa09b);
        cpu.tr = Segment { base: TSS, limit: 0x67, ..segment(TASK, 0x8b) };
        cpu.update_mode();
        for vector in 0..256 {
            system.handler(vector, 0x8e, 0);
        }
        system.put64(TSS + 4, &[KERNEL_STACK]);
        system.put64(TSS + 0x24, &[IST_STACK]);
        system
    }

    /// Real mode, with the tables of [`System::long`] in memory, an available task state segment, and
    /// paging off.
    pub fn real(code: &[u8]) -> System {
        let system = System::tables(16, code);
        system.put64(GDT + u64::from(TASK), &[descriptor(TSS, 0x67, 0x89, 0), 0]);
        system.map();
        system
    }

    /// 32-bit protected mode at CPL 0, paging off.
    pub fn protected(code: &[u8]) -> System {
        let mut system = System::tables(32, code);
        let busy = descriptor(TSS, 0x67, 0x8b, 0);
        system.put64(GDT + u64::from(TASK), &[busy]);
        let cpu = &mut system.guest.cpu;
        cpu.segs[seg::CS as usize] = segment(KERNEL_CODE32, 0xc09b);
        cpu.tr = Segment { base: TSS, limit: 0x67, ..segment(TASK, 0x8b) };
        cpu.update_mode();
        for vector in 0..256u64 {
            let low = gate(KERNEL_CODE32, HANDLERS + 16 * vector, 0x8e);
            system.put64(IDT + 8 * vector, &[low]);
        }
        system.put32(TSS + 4, &[KERNEL_STACK as u32, KERNEL_DATA.into()]);
        system
    }

    fn tables(bits: u8, code: &[u8]) -> System {
        let mut guest = Guest::new(bits, code);
        let cpu = &mut guest.cpu;
        cpu.gdtr = DescriptorTable { base: GDT, limit: 0xff };
        cpu.idtr = DescriptorTable { base: IDT, limit: 0xfff };
        if bits != 16 {
            cpu.segs = [segment(KERNEL_DATA, 0xc093); 6];
        }
        cpu.update_mode();
        let system = System { guest };
        let flat = |access, flags| descriptor(0, 0xf_ffff, access, flags);
        system.put64(
            GDT,
            &[
                0,
                flat(0x9b, 0xa),
                flat(0x93, 0xc),
                flat(0xfb, 0xc),
                flat(0xf3, 0xc),
                flat(0xfb, 0xa),
                flat(0x9b, 0xc),
                descriptor(0, 0xffff, 0x9b, 0),
            ],
        );
        system
    }

    /// Identity-maps the guest's 4 MiB.
    fn map(&self) {
        const KERNEL: u64 = 0x3;
        const USER: u64 = 0x7;
        self.put64(TABLES, &[(TABLES + 0x1000) | USER]);
        self.put64(TABLES + 0x1000, &[(TABLES + 0x2000) | USER]);
        self.put64(TABLES + 0x2000, &[(TABLES + 0x3000) | USER, (TABLES + 0x4000) | USER]);
        for page in 0..1024u64 {
            let rights = if page < 16 { KERNEL } else { USER };
            self.put64(TABLES + 0x3000 + 8 * page, &[page << 12 | rights]);
        }
    }

    /// Takes the page at `linear` away.
    pub fn unmap(&mut self, linear: u64) {
        self.put64(TABLES + 0x3000 + (linear >> 12) * 8, &[0]);
        self.guest.cpu.tlb.flush_all(0);
    }

    /// Points a long-mode vector at its handler through a gate of these rights and IST index.
    pub fn handler(&self, vector: u64, access: u64, ist: u64) {
        let low = gate(KERNEL_CODE, HANDLERS + 16 * vector, access) | ist << 32;
        self.put64(IDT + 16 * vector, &[low, 0]);
    }

    /// Code of the handler of `vector`.
    pub fn handler_code(&self, vector: u64, code: &[u8]) {
        self.guest.poke(HANDLERS + 16 * vector, code);
    }

    /// Drops to ring 3 at the current RIP, with the user's segments.
    pub fn enter_ring3(&mut self) {
        let long = self.cpu.mode.long;
        let cpu = &mut self.guest.cpu;
        let (cs, rights) = if long { (USER_CODE, 0xa0fb) } else { (USER_CODE32, 0xc0fb) };
        cpu.segs = [segment(USER_DATA, 0xc0f3); 6];
        cpu.segs[seg::CS as usize] = segment(cs, rights);
        cpu.cpl = 3;
        cpu.update_mode();
    }

    /// One instruction, and the delivery of what it raises.
    pub fn go(&mut self) -> Result<(), Shutdown> {
        match self.guest.step() {
            Ok(()) => Ok(()),
            Err(exception) => self.guest.cpu.deliver(Event::Exception(exception)),
        }
    }

    pub fn put64(&self, gpa: u64, values: &[u64]) {
        for (at, value) in (gpa..).step_by(8).zip(values) {
            self.guest.poke(at, &value.to_le_bytes());
        }
    }

    pub fn put32(&self, gpa: u64, values: &[u32]) {
        for (at, value) in (gpa..).step_by(4).zip(values) {
            self.guest.poke(at, &value.to_le_bytes());
        }
    }

    pub fn get64<const N: usize>(&self, gpa: u64) -> [u64; N] {
        std::array::from_fn(|n| u64::from_le_bytes(self.guest.peek(gpa + 8 * n as u64)))
    }

    pub fn get32<const N: usize>(&self, gpa: u64) -> [u32; N] {
        std::array::from_fn(|n| u32::from_le_bytes(self.guest.peek(gpa + 4 * n as u64)))
    }

    pub fn rip(&self) -> u64 {
        self.guest.cpu.regs[RIP as usize]
    }

    pub fn rsp(&self) -> u64 {
        self.guest.cpu.regs[reg::RSP as usize]
    }

    pub fn cs(&self) -> u16 {
        self.guest.cpu.segs[seg::CS as usize].selector
    }

    pub fn ss(&self) -> u16 {
        self.guest.cpu.segs[seg::SS as usize].selector
    }

    pub const STACK: u64 = STACK;
}

pub fn segment(selector: u16, rights: u16) -> Segment {
    let limit = if rights & access::G != 0 { 0xffff_ffff } else { 0xffff };
    Segment { selector, base: 0, limit, access: rights, unusable: false }
}
