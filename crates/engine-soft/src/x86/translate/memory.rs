//! Loads and stores in translated code: effective address, TLB check, access.

use iced_x86::Register;

use super::super::fast::FAST_ENTRIES;
use super::asm::{Alu, Mem, cc, host};
use super::build::{Builder, Cold, guest_slot, slot};
use super::frame::at;
use super::insn::{Insn, gpr};
use super::regs::{A, B, host_of};

const PAGE: i32 = 4096;
/// Log2 of an entry's size.
const ENTRY_BITS: u8 = 5;

/// An access whose check was emitted: where its miss comes from and goes.
#[must_use]
pub(super) struct Checked {
    miss: super::asm::Fixup,
    site: u32,
}

impl Checked {
    /// Its site.
    pub fn site(&self) -> u32 {
        self.site
    }
}

impl Builder<'_> {
    /// Linear address of the memory operand to A. Uses B; leaves flags alone.
    pub fn address(&mut self, insn: &Insn) {
        self.offset(insn, A);
        let segment = insn.op.mem.seg;
        if segment >= 4 {
            self.asm.load(B, slot(at::segment_base(segment)));
            self.asm.lea(true, A, &Mem::indexed(A, B, 0, 0));
        }
    }

    /// Effective address (without the segment's base) to `dst`. Uses A and B.
    pub fn offset(&mut self, insn: &Insn, dst: u8) {
        let ins = &insn.ins;
        let disp = ins.memory_displacement64();
        let (base, index) = (ins.memory_base(), ins.memory_index());
        if base == Register::RIP {
            return self.page_relative(dst, (disp as i64).wrapping_add(insn.at.into()));
        }
        if base == Register::None && index == Register::None {
            return self.asm.mov_imm(dst, disp & insn.op.mem.mask);
        }
        let base = gpr(base).map(|number| self.in_register(number, A));
        let scale = ins.memory_index_scale().trailing_zeros() as u8;
        let index = gpr(index).map(|number| (self.in_register(number, B), scale));
        let wide = insn.op.mem.mask == u64::MAX;
        let disp = disp as i32;
        match (base, index, disp) {
            (Some(base), None, 0) if wide => self.asm.mov(dst, base),
            (base, index, disp) => self.asm.lea(wide, dst, &Mem::parts(base, index, disp)),
        }
    }

    /// The host register that holds a guest register: its own, or `scratch`, loaded.
    pub fn in_register(&mut self, number: u8, scratch: u8) -> u8 {
        host_of(number).unwrap_or_else(|| {
            self.asm.load(scratch, guest_slot(number));
            scratch
        })
    }

    /// Checks the access of `size` bytes at A. Behind it, A is the offset in the page and B the entry of
    /// the page. `retry` is where the address was computed. Disturbs flags; the caller saw to them.
    pub fn check(&mut self, insn: &Insn, retry: u64, size: u32, write: bool) -> Checked {
        let view = self.view;
        self.asm.mov(B, A);
        self.asm.shr(B, 12 - ENTRY_BITS);
        self.asm.alu_imm(false, Alu::And, B, ((FAST_ENTRIES - 1) << ENTRY_BITS) as i32);
        self.asm.alu_mem(Alu::Sub, A, Mem::indexed(host::RSP, B, 0, at::tag(view, write)));
        self.asm.alu_imm(true, Alu::Cmp, A, PAGE - size as i32);
        let miss = self.asm.jcc_forward(cc::A);
        let site = self.op_site(insn, retry, size, write);
        Checked { miss, site }
    }

    /// The checked access as a memory operand that occupies A and B.
    pub fn operand(&mut self) -> Mem {
        let view = self.view;
        self.asm.load(B, Mem::indexed(host::RSP, B, 0, at::host(view)));
        Mem::indexed(A, B, 0, 0)
    }

    /// The checked access as a memory operand that occupies A only. Disturbs flags.
    pub fn operand_in_a(&mut self) -> Mem {
        let view = self.view;
        self.asm.alu_mem(Alu::Add, A, Mem::indexed(host::RSP, B, 0, at::host(view)));
        Mem::at(A, 0)
    }

    /// The instruction is complete: what its handler did after a miss goes on here.
    pub fn done(&mut self, checked: Checked) {
        let Checked { miss, site } = checked;
        let resume = self.asm.position();
        self.cold.push(Cold::Miss { jump: miss, site, resume, restore: self.host, run: false });
    }
}
