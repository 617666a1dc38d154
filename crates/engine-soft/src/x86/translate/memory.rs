//! Loads and stores in translated code: effective address, TLB check, access.

use iced_x86::Register;

use super::super::fast::FAST_ENTRIES;
use super::asm::{Alu, Fixup, Mem, cc, host};
use super::build::{Builder, Cold, guest_slot, slot};
use super::frame::at;
use super::groups::{Check, Use};
use super::insn::{Access, Insn, gpr};
use super::regs::{A, B, host_of};

const PAGE: i32 = 4096;
/// Log2 of an entry's size.
const ENTRY_BITS: u8 = 5;

/// An access whose check was emitted: where its miss comes from and goes.
#[must_use]
pub(super) struct Checked {
    miss: Fixup,
    site: u32,
}

/// A memory operand in host memory.
#[must_use]
pub(super) struct Operand {
    /// What to access.
    pub mem: Mem,
    checked: Option<Checked>,
    /// The access is not aligned as it should be.
    unaligned: Option<Fixup>,
}

/// What a guest address is made of.
#[derive(Clone, Copy)]
pub(super) struct Location {
    base: Option<u8>,
    /// With the scale's log2.
    index: Option<(u8, u8)>,
    disp: i32,
    /// Slots whose values are added: the page's address, a segment's base.
    adds: [Option<i32>; 2],
}

impl Location {
    /// `[base + disp]`
    pub fn at(base: u8, disp: i32) -> Location {
        Location { base: Some(base), index: None, disp, adds: [None; 2] }
    }

    /// The memory operand of an instruction that [`groups`](super::groups) found fit.
    fn of(insn: &Insn) -> Location {
        let ins = &insn.ins;
        let relative = ins.memory_base() == Register::RIP;
        let disp = insn.displacement() + if relative { i64::from(insn.at) } else { 0 };
        let segment = insn.op.mem.seg;
        let scale = ins.memory_index_scale().trailing_zeros() as u8;
        Location {
            base: gpr(ins.memory_base()).filter(|_| !relative),
            index: gpr(ins.memory_index()).map(|number| (number, scale)),
            disp: disp as i32,
            adds: [relative.then_some(at::PAGE), (segment >= 4).then(|| at::segment_base(segment))],
        }
    }
}

impl Builder<'_> {
    /// Linear address of the memory operand to A. Uses B; leaves flags alone.
    pub fn address(&mut self, insn: &Insn) {
        self.offset(insn, A);
        let segment = insn.op.mem.seg;
        if segment >= 4 {
            self.asm.load(B, slot(at::segment_base(segment)));
            self.asm.lea(!self.narrow, A, &Mem::indexed(A, B, 0, 0));
        }
    }

    /// Effective address (without the segment's base) to `dst`. Uses A and B.
    pub fn offset(&mut self, insn: &Insn, dst: u8) {
        self.offset_of_size(insn, dst, insn.op.mem.mask == u64::MAX);
    }

    /// The same with 32 bits unless `wide`, if it has a register in it.
    pub fn offset_of_size(&mut self, insn: &Insn, dst: u8, wide: bool) {
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
        let disp = disp as i32;
        match (base, index, disp) {
            (Some(base), None, 0) if wide => self.asm.mov(dst, base),
            (Some(base), None, 0) => self.asm.mov32(dst, base),
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

    /// The instruction's memory operand, checked. It occupies A and B, or A only if B is `wanted`. Disturbs
    /// flags, which are seen to, unless the check was made before.
    pub fn memory(&mut self, insn: &Insn, access: Access, b_wanted: bool) -> Operand {
        if let Some(part) = self.uses.memory {
            if insn.alignment > 1 {
                self.disturb(insn.live_before());
            }
            let mut mem = self.grouped(insn, Location::of(insn), part);
            let mut unaligned = None;
            if b_wanted || insn.alignment > 1 {
                self.holds = None; // whoever resumes behind a handler knows nothing of B
                self.asm.lea(true, A, &mem);
                mem = Mem::at(A, 0);
            }
            if insn.alignment > 1 {
                unaligned = self.check_alignment(insn);
            }
            return Operand { mem, checked: None, unaligned };
        }
        self.disturb(insn.live_before());
        let retry = self.asm.here();
        self.address(insn);
        let unaligned = self.check_alignment(insn);
        let checked = self.check(insn, retry, access.size, access.write);
        let mem = if b_wanted { self.operand_in_a() } else { self.operand() };
        Operand { mem, checked: Some(checked), unaligned }
    }

    /// The word that an instruction pushes or pops, checked; as [`Builder::memory`].
    pub fn stack(&mut self, insn: &Insn, place: Location, write: bool, b_wanted: bool) -> Operand {
        if let Some(part) = self.uses.stack {
            let mut mem = self.grouped(insn, place, part);
            if b_wanted {
                self.holds = None;
                self.asm.lea(true, A, &mem);
                mem = Mem::at(A, 0);
            }
            return Operand { mem, checked: None, unaligned: None };
        }
        self.disturb(insn.live_before());
        let retry = self.asm.here();
        self.linear(place, 0);
        let checked = self.check(insn, retry, insn.word(), write);
        let mem = if b_wanted { self.operand_in_a() } else { self.operand() };
        Operand { mem, checked: Some(checked), unaligned: None }
    }

    /// An access that shares its check with others. Occupies A and B.
    fn grouped(&mut self, insn: &Insn, place: Location, part: Use) -> Mem {
        match part.check {
            Some(check) => self.check_group(insn, place, part.group, check),
            None if self.held.take() == Some(part.group) => {}
            None => self.asm.load(B, slot(at::group(part.group))),
        }
        self.holds = Some(part.group);
        let disp = place.disp;
        if self.narrow && ((place.base, place.index) != (None, None) || disp < 0) {
            // Addresses wrap at 4 GiB before anything is added to them.
            self.linear(place, 0);
            return Mem::indexed(A, B, 0, 0);
        }
        match (place.base, place.index) {
            (None, None) => Mem::at(B, disp),
            (Some(base), None) => Mem::indexed(self.in_register(base, A), B, 0, disp),
            (None, Some((index, scale))) => Mem::indexed(B, self.in_register(index, A), scale, disp),
            (Some(base), Some((index, scale))) => match (host_of(base), host_of(index)) {
                (Some(base), None) => {
                    let index = self.in_register(index, A);
                    self.asm.lea(true, A, &Mem::indexed(base, index, scale, 0));
                    Mem::indexed(A, B, 0, disp)
                }
                (_, index) => {
                    let base = self.in_register(base, A);
                    self.asm.lea(true, A, &Mem::indexed(base, B, 0, 0));
                    Mem::parts(Some(A), index.map(|index| (index, scale)), disp)
                }
            },
        }
    }

    /// Checks a group; behind it, what is to be added to its addresses is in B and in its slot.
    fn check_group(&mut self, insn: &Insn, place: Location, group: u8, check: Check) {
        self.disturb(insn.live_before());
        let retry = self.asm.here();
        self.linear(place, check.low);
        let miss = self.compare(check.span, check.write);
        let view = self.view;
        self.asm.load(B, Mem::indexed(host::RSP, B, 0, at::addend(view)));
        for add in place.adds.into_iter().flatten() {
            self.asm.alu_mem(Alu::Add, B, slot(add));
        }
        self.asm.store(slot(at::group(group)), B);
        let site = self.group_site(insn, retry, check.span, check.write);
        self.cold.push(Cold::Group { jump: miss, site, at: insn.at });
    }

    /// Linear address of a place, `low` bytes on, to A. Uses B; leaves flags alone.
    fn linear(&mut self, place: Location, low: i32) {
        let mut adds = place.adds.into_iter().flatten();
        let disp = place.disp + low;
        match (place.base, place.index) {
            (None, None) => match adds.next() {
                Some(add) => {
                    self.asm.load(A, slot(add));
                    self.asm.lea(true, A, &Mem::at(A, disp));
                }
                None if self.narrow => self.asm.mov_imm(A, u64::from(disp as u32)),
                None => self.asm.mov_imm(A, disp as i64 as u64),
            },
            (base, index) => {
                let base = base.map(|number| self.in_register(number, A));
                let index = index.map(|(number, scale)| (self.in_register(number, B), scale));
                match (base, index, disp) {
                    (Some(base), None, 0) if self.narrow => self.asm.mov32(A, base),
                    (Some(base), None, 0) => self.asm.mov(A, base),
                    _ => self.asm.lea(!self.narrow, A, &Mem::parts(base, index, disp)),
                }
            }
        }
        for add in adds {
            self.asm.load(B, slot(add));
            self.asm.lea(true, A, &Mem::indexed(A, B, 0, 0));
        }
    }

    /// Compares `size` bytes at A with the TLB: a jump for when they miss. Behind it, A is the offset in the
    /// page and B the entry of the page. Disturbs flags.
    fn compare(&mut self, size: u32, write: bool) -> Fixup {
        (self.held, self.holds) = (None, None);
        let view = self.view;
        if self.bmi2 {
            self.asm.rorx(B, A, 12 - ENTRY_BITS);
        } else {
            self.asm.mov(B, A);
            self.asm.shr(B, 12 - ENTRY_BITS);
        }
        self.asm.alu_imm(false, Alu::And, B, ((FAST_ENTRIES - 1) << ENTRY_BITS) as i32);
        self.asm.alu_mem(Alu::Sub, A, Mem::indexed(host::RSP, B, 0, at::tag(view, write)));
        self.asm.alu_imm(true, Alu::Cmp, A, PAGE - size as i32);
        self.asm.jcc_forward(cc::A)
    }

    /// Checks the access of `size` bytes at A. Behind it, A is the offset in the page and B the entry of
    /// the page. `retry` is where the address was computed. Disturbs flags; the caller saw to them.
    pub fn check(&mut self, insn: &Insn, retry: u64, size: u32, write: bool) -> Checked {
        let miss = self.compare(size, write);
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

    /// The same for an operand.
    pub fn complete(&mut self, insn: &Insn, operand: Operand) {
        if let Some(jump) = operand.unaligned {
            let (resume, restore) = (self.asm.position(), self.host);
            let site = self.op_site(insn, 0, 0, false);
            self.cold.push(Cold::Miss { jump, site, resume, restore, run: true });
        }
        if let Some(checked) = operand.checked {
            self.done(checked);
        }
    }
}
