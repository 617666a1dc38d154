//! `STOS` and `MOVS`: upwards and within one page natively, else by their handlers.

use iced_x86::{Code, Instruction, OpKind};

use super::asm::{Alu, Fixup, Mem, cc, host};
use super::build::{Builder, Cold, slot};
use super::frame::at;
use super::insn::{Class, Features, Insn, narrow_segment};
use super::memory::Checked;
use super::regs::{A, B};

const PAGE: i32 = 4096;
/// `RFLAGS.DF` in the second byte.
const DF: u8 = 4;

/// Log2 of the element's size, and whether it is copied rather than filled in.
fn shape(ins: &Instruction) -> Option<(u8, bool)> {
    Some(match ins.code() {
        Code::Stosb_m8_AL => (0, false),
        Code::Stosw_m16_AX => (1, false),
        Code::Stosd_m32_EAX => (2, false),
        Code::Stosq_m64_RAX => (3, false),
        Code::Movsb_m8_m8 => (0, true),
        Code::Movsw_m16_m16 => (1, true),
        Code::Movsd_m32_m32 => (2, true),
        Code::Movsq_m64_m64 => (3, true),
        _ => return None,
    })
}

/// Log2 of the element that a `LODS` loads.
fn loaded(ins: &Instruction) -> Option<u8> {
    Some(match ins.code() {
        Code::Lodsb_AL_m8 => 0,
        Code::Lodsw_AX_m16 => 1,
        Code::Lodsd_EAX_m32 => 2,
        Code::Lodsq_RAX_m64 => 3,
        _ => return None,
    })
}

fn repeats(ins: &Instruction) -> bool {
    ins.has_rep_prefix() || ins.has_repne_prefix()
}

/// The class of a string instruction; its addresses are to be RDI's and RSI's own.
pub fn classify(insn: &Insn, features: Features) -> Option<Class> {
    let ins = &insn.ins;
    if loaded(ins).is_some() {
        let known = insn.op.mem.seg < 4 && (!insn.narrow() || narrow_segment(insn.op.mem.seg, features));
        let index = if insn.narrow() { OpKind::MemorySegESI } else { OpKind::MemorySegRSI };
        let single = known && ins.op1_kind() == index && !repeats(ins);
        return Some(if single { Class::LoadString } else { Class::Handler });
    }
    let (_, copies) = shape(ins)?;
    let (flat, index) = if insn.narrow() {
        (narrow_segment(insn.op.mem.seg, features), OpKind::MemoryESEDI)
    } else {
        (true, OpKind::MemoryESRDI)
    };
    let flat = !copies || insn.op.mem.seg < 4 && flat;
    Some(if flat && ins.op0_kind() == index { Class::String } else { Class::Handler })
}

impl Builder<'_> {
    /// Moves the index registers from guest addresses to the host's and back around the instruction.
    pub fn string(&mut self, insn: &Insn) {
        let Some((size, copies)) = shape(&insn.ins) else { return };
        self.disturb(insn.live_before());
        let mut rare = Vec::with_capacity(4);
        if self.narrow {
            self.cut_indices(&insn.ins, copies);
        }
        self.asm.op_mem(false, &[0xf6], 0, &slot(at::RFLAGS + 1)); // test byte
        self.asm.raw(&[DF]);
        rare.push(self.asm.jcc_forward(cc::NZ));
        if repeats(&insn.ins) {
            self.asm.alu_imm(true, Alu::Cmp, host::RCX, PAGE);
            rare.push(self.asm.jcc_forward(cc::A));
        }
        let source = copies.then(|| {
            let checked = self.distance(insn, host::RSI, size, false, &mut rare);
            self.asm.store(slot(at::TEMP), B);
            checked
        });
        let target = self.distance(insn, host::RDI, size, true, &mut rare);
        if copies {
            self.asm.load(A, slot(at::TEMP));
            self.asm.alu(Alu::Add, host::RSI, A);
        }
        self.asm.alu(Alu::Add, host::RDI, B);
        self.native(&insn.ins, size, copies);
        if copies {
            self.asm.alu(Alu::Sub, host::RSI, A);
        }
        self.asm.alu(Alu::Sub, host::RDI, B);
        if self.narrow {
            self.cut_indices(&insn.ins, copies);
        }
        let resume = self.asm.position();
        let site = self.op_site(insn, 0, 0, false);
        for jump in rare {
            self.cold.push(Cold::Miss { jump, site, resume, restore: false, run: true });
        }
        source.into_iter().chain([target]).for_each(|checked| self.done(checked));
    }

    /// `LODS`
    pub fn load_string(&mut self, insn: &Insn) {
        let Some(size) = loaded(&insn.ins) else { return };
        self.disturb(insn.live_before());
        self.asm.op_mem(false, &[0xf6], 0, &slot(at::RFLAGS + 1)); // test byte
        self.asm.raw(&[DF]);
        let downwards = self.asm.jcc_forward(cc::NZ);
        let retry = self.asm.here();
        if self.narrow {
            self.asm.mov32(A, host::RSI);
        } else {
            self.asm.mov(A, host::RSI);
        }
        let checked = self.check(insn, retry, 1 << size, false);
        let mem = self.operand();
        if size == 1 {
            self.asm.raw(&[0x66]);
        }
        self.asm.op_mem(size == 3, &[0x8a | u8::from(size != 0)], host::RAX, &mem);
        self.asm.lea(!self.narrow, host::RSI, &Mem::at(host::RSI, 1 << size));
        let (resume, site) = (self.asm.position(), self.op_site(insn, 0, 0, false));
        self.cold.push(Cold::Miss { jump: downwards, site, resume, restore: false, run: true });
        self.done(checked);
    }

    /// In 32-bit code: the instruction's registers to 32 bits. The host uses 64, and may count beyond 4 GiB.
    fn cut_indices(&mut self, ins: &Instruction, copies: bool) {
        self.asm.mov32(host::RDI, host::RDI);
        if copies {
            self.asm.mov32(host::RSI, host::RSI);
        }
        if repeats(ins) {
            self.asm.mov32(host::RCX, host::RCX);
        }
    }

    /// The distance from guest to host addresses at `index` to B. Uses A.
    fn distance(&mut self, insn: &Insn, index: u8, size: u8, write: bool, rare: &mut Vec<Fixup>) -> Checked {
        let repeats = repeats(&insn.ins);
        let retry = self.asm.here();
        self.asm.mov(A, index);
        let checked = self.check(insn, retry, if repeats { 1 } else { 1 << size }, write);
        let view = self.view;
        self.asm.load(B, Mem::indexed(host::RSP, B, 0, at::host(view)));
        self.asm.lea(true, B, &Mem::indexed(A, B, 0, 0));
        if repeats {
            self.asm.lea(true, A, &Mem::indexed(A, host::RCX, size, 0));
            self.asm.alu_imm(true, Alu::Cmp, A, PAGE);
            rare.push(self.asm.jcc_forward(cc::A));
        }
        self.asm.alu(Alu::Sub, B, index);
        checked
    }

    fn native(&mut self, ins: &Instruction, size: u8, copies: bool) {
        if size == 1 {
            self.asm.raw(&[0x66]);
        }
        if repeats(ins) {
            self.asm.raw(&[0xf3]);
        }
        if size == 3 {
            self.asm.raw(&[0x48]);
        }
        let opcode = if copies { 0xa4 } else { 0xaa };
        self.asm.raw(&[opcode | u8::from(size != 0)]);
    }
}

#[cfg(test)]
mod tests {
    use crate::x86::op::reg;
    use crate::x86::testing::DATA;
    use crate::x86::translate::tests::pair::Pair;

    /// Runs `code` (and `ud2`) twice from RDI, RSI and RCX; answers how many handlers ran the second time.
    fn handlers(code: &[u8], rdi: u64, rsi: u64, rcx: u64) -> u64 {
        let mut pair = Pair::new(&[code, &[0x0f, 0x0b]].concat());
        let data: Vec<u8> = (0..0x4000u32).map(|i| ((i * 7) >> 3) as u8).collect();
        pair.poke(DATA, &data);
        let mut before = 0;
        for _ in 0..2 {
            before = pair.translator.stats.handlers;
            pair.restart();
            pair.set(reg::RDI, rdi);
            pair.set(reg::RSI, rsi);
            pair.set(reg::RCX, rcx);
            pair.run();
        }
        pair.translator.stats.handlers - before
    }

    #[test]
    fn what_stays_in_its_pages_needs_no_handler() {
        let (rdi, rsi) = (DATA + 0x1010, DATA + 0x20);
        for code in
            [&[0xf3, 0xaa][..], &[0xf3, 0x48, 0xab], &[0xf3, 0xa4], &[0xf3, 0x66, 0xa5], &[0x48, 0xa5]]
        {
            for count in [0, 1, 17, 300] {
                assert_eq!(handlers(code, rdi, rsi, count), 0, "{code:x?} {count}");
            }
        }
        assert_eq!(handlers(&[0xf3, 0xa4], DATA + 1, DATA, 64), 0, "a copy onto its own source");
    }

    #[test]
    fn what_does_not_is_done_by_its_handler() {
        for (rdi, rsi, count) in [
            (DATA + 0xff0, DATA + 0x1100, 17),
            (DATA, DATA + 0x1ff0, 17),
            (DATA, DATA + 0x1000, 0x1001),
            (DATA + 0xfff, DATA + 0x1000, 3),
        ] {
            assert_eq!(handlers(&[0xf3, 0xa4], rdi, rsi, count), 1, "{rdi:x} {rsi:x} {count}");
        }
        // std; movsb: two handlers
        assert_eq!(handlers(&[0xfd, 0xa4, 0xfc], DATA, DATA + 100, 0), 2);
        // Not mapped, and a count that wraps around the address space.
        handlers(&[0xf3, 0xa4], 0x7000_0000_0000, DATA, 4);
        handlers(&[0xf3, 0x48, 0xab], DATA + 8, DATA, 0);
        handlers(&[0xf3, 0x67, 0xaa], DATA + 8, DATA, 5);
    }
}
