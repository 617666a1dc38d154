//! Instructions without control flow.

use engine::x86::bits::rflags;
use iced_x86::{Mnemonic, OpCodeOperandKind, OpKind};

use super::super::op::{HIGH, reg};
use super::asm::{Alu, Fixup, Mem, cc, host};
use super::build::{Builder, Cold, guest_slot, slot};
use super::frame::at;
use super::insn::{ARITHMETIC, Insn, gpr, high_byte};
use super::memory::Location;
use super::raw::{Field, Rm};
use super::regs::{A, B, SP, host_of};
use super::x87::Use;

/// Where an operand is encoded.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Reg,
    Rm,
    Vvvv,
    Elsewhere,
}

fn place(kind: OpCodeOperandKind) -> Place {
    use OpCodeOperandKind::*;
    match kind {
        r8_reg | r16_reg | r32_reg | r64_reg => Place::Reg,
        r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem | r16_rm | r32_rm | r64_rm | r32_reg_mem
        | r64_reg_mem => Place::Rm,
        r32_vvvv | r64_vvvv => Place::Vvvv,
        _ => Place::Elsewhere,
    }
}

/// Registers of an instruction, mapped.
struct Mapped {
    reg: Field,
    rm: Field,
    vvvv: Field,
    /// Guest registers in scratch registers: number, scratch, load before, store after.
    slots: [Option<(u8, u8, bool, bool)>; 2],
}

impl Mapped {
    fn new(insn: &Insn, pool: &[u8]) -> Mapped {
        let mut mapped = Mapped { reg: Field::Same, rm: Field::Same, vvvv: Field::Same, slots: [None; 2] };
        let (ins, code) = (&insn.ins, insn.ins.op_code());
        for n in 0..ins.op_count() {
            if ins.op_kind(n) != OpKind::Register {
                continue;
            }
            let high = high_byte(ins.op_register(n)).filter(|_| insn.memory.is_some());
            let Some(number) = gpr(ins.op_register(n)).or(high.map(|high| high | HIGH)) else { continue };
            let access = insn.slots >> (2 * n);
            let own = if number & HIGH == 0 { host_of(number) } else { None };
            let register =
                own.unwrap_or_else(|| mapped.scratch(number, pool, access & 1 != 0, access & 2 != 0));
            match place(code.op_kind(n)) {
                Place::Reg => mapped.reg = Field::Host(register),
                Place::Rm => mapped.rm = Field::Host(register),
                Place::Vvvv => mapped.vvvv = Field::Host(register),
                Place::Elsewhere => {}
            }
        }
        mapped
    }

    fn scratch(&mut self, number: u8, pool: &[u8], load: bool, store: bool) -> u8 {
        for (slot, &scratch) in self.slots.iter_mut().zip(pool) {
            match slot {
                Some((held, _, l, s)) if *held == number => {
                    (*l, *s) = (*l || load, *s || store);
                    return scratch;
                }
                Some(_) => {}
                None => {
                    *slot = Some((number, scratch, load, store));
                    return scratch;
                }
            }
        }
        debug_assert!(false, "classified without enough scratch registers");
        B
    }
}

/// Index of a scratch register in [`Builder::kept`].
fn which(scratch: u8) -> usize {
    usize::from(scratch == B)
}

impl Builder<'_> {
    /// An instruction that is copied with other registers.
    pub fn generic(&mut self, insn: &Insn) {
        if insn.vector {
            self.kept = [None; 2];
            self.want_vectors(insn);
        }
        if insn.x87 != Use::None {
            self.kept = [None; 2];
            self.want_x87(insn);
        }
        let Some(access) = insn.memory else {
            let mapped = self.mapped_as_kept(insn);
            self.note_x87(insn);
            self.want_host(insn.needs());
            self.emit_mapped(insn, &mapped, None);
            return self.keep(&mapped);
        };
        let mapped = Mapped::new(insn, &[B]);
        let operand = self.memory(insn, access, mapped.slots[0].is_some());
        self.note_x87(insn);
        self.want_host(insn.needs());
        self.emit_mapped(insn, &mapped, Some(operand.mem));
        self.complete(insn, operand);
    }

    /// Registers of an instruction without a memory operand: what is in a scratch register already stays there.
    fn mapped_as_kept(&self, insn: &Insn) -> Mapped {
        let mapped = Mapped::new(insn, &[A, B]);
        let crossed = |n: usize| {
            mapped.slots[n].is_some_and(|(number, scratch, ..)| self.kept[which(scratch) ^ 1] == Some(number))
        };
        if crossed(0) || crossed(1) { Mapped::new(insn, &[B, A]) } else { mapped }
    }

    /// What the scratch registers hold behind an instruction without a memory operand.
    fn keep(&mut self, mapped: &Mapped) {
        self.keeps = self.kept;
        for &(number, scratch, ..) in mapped.slots.iter().flatten() {
            self.keeps[which(scratch) ^ 1].take_if(|kept| *kept == number);
            self.keeps[which(scratch)] = Some(number);
        }
    }

    fn emit_mapped(&mut self, insn: &Insn, mapped: &Mapped, mem: Option<Mem>) {
        let Some(raw) = &insn.raw else { return };
        for &(number, scratch, load, _) in mapped.slots.iter().flatten() {
            let kept = mem.is_none() && self.kept[which(scratch)] == Some(number);
            if load && !kept {
                self.load_slot(scratch, number);
            }
        }
        let rm = mem.map_or(Rm::Reg(mapped.rm), Rm::Mem);
        raw.emit(&mut self.asm, mapped.reg, rm, mapped.vvvv, raw.has_rex());
        for &(number, scratch, _, store) in mapped.slots.iter().flatten() {
            if store && number & HIGH == 0 {
                self.asm.store(guest_slot(number), scratch);
            } else if store {
                self.asm.op_mem(false, &[0x88], scratch, &slot(at::TEMP));
                self.asm.op_mem(false, &[0x8a], number & 7, &slot(at::TEMP));
            }
        }
        self.executed(insn);
    }

    /// What is to be in a scratch register, from its slot. There are no encodings with AH to BH and with a
    /// register of 8 and above: they come through memory.
    fn load_slot(&mut self, scratch: u8, number: u8) {
        if number & HIGH == 0 {
            return self.asm.load(scratch, guest_slot(number));
        }
        self.asm.op_mem(false, &[0x88], number & 7, &slot(at::TEMP));
        self.asm.op_mem(false, &[0x0f, 0xb6], scratch, &slot(at::TEMP));
    }

    /// `BT` and its kin: first the word that the bit is in, then the bit in it.
    pub(super) fn bit_string(&mut self, insn: &Insn) {
        let (Some(access), Some(raw)) = (insn.memory, &insn.raw) else { return };
        let number = gpr(insn.ins.op1_register()).unwrap_or(0);
        let wide = access.size == 8;
        self.disturb(insn.live_before());
        let retry = self.asm.here();
        self.address(insn);
        let bit = self.in_register(number, B);
        self.asm.op_reg(true, if wide { &[0x8b] } else { &[0x63] }, B, bit); // mov, movsxd
        self.asm.op_reg(true, &[0xc1], 7, B); // sar
        self.asm.raw(&[if wide { 6 } else { 5 }]);
        self.asm.lea(!self.narrow, A, &Mem::indexed(A, B, if wide { 3 } else { 2 }, 0));
        let checked = self.check(insn, retry, access.size, access.write);
        let mem = self.operand_in_a();
        let bit = self.in_register(number, B);
        self.asm.mov32(B, bit);
        self.asm.alu_imm(false, Alu::And, B, if wide { 63 } else { 31 });
        self.want_host(insn.needs());
        raw.emit(&mut self.asm, Field::Host(B), Rm::Mem(mem), Field::Same, false);
        self.executed(insn);
        self.done(checked);
    }

    /// `PUSHF`: the arithmetic flags from their slot, the others from RFLAGS, but for RF and VM.
    pub(super) fn push_flags(&mut self, insn: &Insn) {
        self.want_slot(ARITHMETIC);
        self.disturb(ARITHMETIC);
        let word = insn.word() as i32;
        let operand = self.stack(insn, Location::at(reg::RSP, -word), true, true);
        let (flags, temp) = (slot(at::FLAGS), slot(at::TEMP));
        self.asm.load32(B, slot(at::RFLAGS));
        self.asm.alu_imm(false, Alu::And, B, !(rflags::STATUS | rflags::RF | rflags::VM) as i32);
        self.asm.store(temp, B);
        self.asm.load32(B, flags);
        self.asm.shr(B, 8);
        self.asm.alu_imm(false, Alu::And, B, (rflags::STATUS & !rflags::OF) as i32);
        self.asm.alu_mem(Alu::Or, B, temp);
        self.asm.store(temp, B);
        self.asm.load32(B, flags);
        self.asm.alu_imm(false, Alu::And, B, 1);
        self.asm.shl32(B, 11); // OF
        self.asm.alu_mem(Alu::Or, B, temp);
        self.store_word(operand.mem, B);
        self.move_stack(-word);
        self.complete(insn, operand);
    }

    /// `CLD`
    pub(super) fn clear_direction(&mut self, insn: &Insn) {
        self.disturb(insn.live_before());
        self.asm.alu_mem32_imm(Alu::And, slot(at::RFLAGS), !rflags::DF as u32);
    }

    /// A division natively if it is safe, that is if it cannot raise `#DE`; else its handler.
    pub(super) fn divide(&mut self, insn: &Insn) {
        let wide = if insn.memory.is_some() {
            insn.ins.memory_size().size() == 8
        } else {
            insn.ins.op0_register().size() == 8
        };
        let mut operand = None;
        let divisor = match insn.memory {
            Some(access) => {
                let memory = self.memory(insn, access, false);
                self.asm.op_mem(wide, &[0x8b], B, &memory.mem);
                self.holds = None;
                operand = Some(memory);
                B
            }
            None => self.in_register(gpr(insn.ins.op0_register()).unwrap_or(0), B),
        };
        self.disturb(insn.live_before());
        let signed = insn.ins.mnemonic() == Mnemonic::Idiv;
        let unsafe_jumps =
            if signed { self.signed_guard(wide, divisor) } else { self.unsigned_guard(wide, divisor) };
        self.asm.op_reg(wide, &[0xf7], if signed { 7 } else { 6 }, divisor);
        self.executed(insn);
        let resume = self.asm.position();
        for jump in unsafe_jumps.into_iter().flatten() {
            let site = self.op_site(insn, 0, 0, false);
            self.cold.push(Cold::Miss { jump, site, resume, restore: true, run: true });
        }
        if let Some(operand) = operand {
            self.complete(insn, operand);
        }
    }

    /// The quotient fits if the upper half of the dividend is less than the divisor.
    fn unsigned_guard(&mut self, wide: bool, divisor: u8) -> [Option<Fixup>; 2] {
        self.asm.op_reg(wide, &[0x39], divisor, host::RDX);
        [Some(self.asm.jcc_forward(cc::AE)), None]
    }

    /// The quotient fits if the dividend is a sign extension and the divisor neither 0 nor -1.
    fn signed_guard(&mut self, wide: bool, divisor: u8) -> [Option<Fixup>; 2] {
        self.asm.op_reg(wide, &[0x89], host::RAX, A);
        self.asm.op_reg(wide, &[0xc1], 7, A); // sar
        self.asm.raw(&[if wide { 63 } else { 31 }]);
        self.asm.op_reg(wide, &[0x39], host::RDX, A);
        let long = self.asm.jcc_forward(cc::NZ);
        self.asm.lea(wide, A, &Mem::at(divisor, 1));
        self.asm.alu_imm(wide, Alu::Cmp, A, 1);
        [Some(long), Some(self.asm.jcc_forward(cc::BE))]
    }

    pub(super) fn lea(&mut self, insn: &Insn) {
        let Some(number) = gpr(insn.ins.op0_register()) else { return };
        let target = host_of(number);
        let dst = target.unwrap_or(A);
        match insn.ins.op0_register().size() {
            2 => {
                self.offset(insn, A);
                // mov dst16, A16: the upper bits stay.
                match target {
                    Some(dst) => {
                        self.asm.raw(&[0x66]);
                        self.asm.op_reg(false, &[0x89], A, dst);
                    }
                    None => {
                        self.asm.raw(&[0x66]);
                        self.asm.op_mem(false, &[0x89], A, &guest_slot(number));
                    }
                }
            }
            size => {
                let registers = gpr(insn.ins.memory_base()).or(gpr(insn.ins.memory_index()));
                let short = size == 4 && registers.is_some();
                self.offset_of_size(insn, dst, !short && insn.op.mem.mask == u64::MAX);
                if size == 4 && !short {
                    self.asm.mov32(dst, dst);
                }
                if target.is_none() {
                    self.asm.store(guest_slot(number), dst);
                }
            }
        }
    }

    pub(super) fn opcode_reg(&mut self, insn: &Insn) {
        let register = insn.ins.op0_register();
        let Some(number) = gpr(register) else { return };
        let size = register.size();
        let wide = size == 8;
        match insn.ins.mnemonic() {
            Mnemonic::Mov => self.mov_imm(number, size, insn.op.imm),
            Mnemonic::Inc | Mnemonic::Dec => self.count(insn, number, size),
            Mnemonic::Bswap => {
                let dst = self.in_register(number, A);
                self.asm.rex_opcode(wide, &[0x0f, 0xc8], dst);
                self.back_to_slot(number, dst);
            }
            _ => {
                // xchg reg, rax
                let dst = self.in_register(number, A);
                if size == 2 {
                    self.asm.raw(&[0x66]);
                }
                self.asm.op_reg(wide, &[0x87], host::RAX, dst);
                self.back_to_slot(number, dst);
            }
        }
    }

    /// `inc` and `dec` in the form that 64-bit code does not have. Only there are all registers the host's.
    fn count(&mut self, insn: &Insn, number: u8, size: usize) {
        self.want_host(insn.needs());
        if size == 2 {
            self.asm.raw(&[0x66]);
        }
        let dst = self.in_register(number, A);
        self.asm.op_reg(false, &[0xff], u8::from(insn.ins.mnemonic() == Mnemonic::Dec), dst);
        self.executed(insn);
    }

    fn back_to_slot(&mut self, number: u8, register: u8) {
        if host_of(number).is_none() {
            self.asm.store(guest_slot(number), register);
        }
    }

    fn mov_imm(&mut self, number: u8, size: usize, value: u64) {
        let dst = host_of(number).unwrap_or(A);
        match size {
            1 => {
                self.asm.rex_opcode_forced(&[0xb0], dst);
                self.asm.raw(&[value as u8]);
            }
            2 => {
                self.asm.raw(&[0x66]);
                self.asm.rex_opcode(false, &[0xb8], dst);
                self.asm.raw(&(value as u16).to_le_bytes());
            }
            4 => self.asm.mov_imm(dst, value & 0xffff_ffff),
            _ => self.asm.mov_imm(dst, value),
        }
        self.back_to_slot(number, dst);
    }

    pub(super) fn push(&mut self, insn: &Insn) {
        let mut loaded = None;
        if let Some(access) = insn.memory {
            let operand = self.memory(insn, access, false);
            self.load_word(A, operand.mem);
            self.asm.store(slot(at::TEMP), A);
            loaded = Some(operand);
        }
        let register =
            if insn.ins.op0_kind() == OpKind::Register { gpr(insn.ins.op0_register()) } else { None };
        let source = register.and_then(host_of);
        let copied = source.is_none() && (register.is_some() || loaded.is_some());
        let word = insn.word() as i32;
        let operand = self.stack(insn, Location::at(reg::RSP, -word), true, copied);
        let mem = operand.mem;
        match (source, register) {
            (Some(source), _) => self.store_word(mem, source),
            (None, Some(number)) => self.store_slot(mem, guest_slot(number)),
            (None, None) if loaded.is_some() => self.store_slot(mem, slot(at::TEMP)),
            (None, None) => {
                self.asm.op_mem(!self.narrow, &[0xc7], 0, &mem);
                self.asm.raw(&(insn.op.imm as i32).to_le_bytes());
            }
        }
        self.move_stack(-word);
        self.complete(insn, operand);
        if let Some(operand) = loaded {
            self.complete(insn, operand);
        }
    }

    /// Copies a slot to the checked address. Uses B.
    fn store_slot(&mut self, mem: Mem, from: Mem) {
        self.asm.load(B, from);
        self.store_word(mem, B);
    }

    pub(super) fn pop(&mut self, insn: &Insn) {
        let operand = self.stack(insn, Location::at(reg::RSP, 0), false, false);
        let number = gpr(insn.ins.op0_register()).unwrap_or(0);
        let dst = host_of(number).unwrap_or(A);
        self.load_word(dst, operand.mem);
        self.back_to_slot(number, dst);
        if dst != SP {
            self.move_stack(insn.word() as i32);
        }
        self.complete(insn, operand);
    }

    pub(super) fn leave(&mut self, insn: &Insn) {
        let operand = self.stack(insn, Location::at(reg::RBP, 0), false, false);
        self.load_word(A, operand.mem);
        self.asm.lea(!self.narrow, SP, &Mem::at(host::RBP, insn.word() as i32));
        self.asm.mov(host::RBP, A);
        self.complete(insn, operand);
    }
}
