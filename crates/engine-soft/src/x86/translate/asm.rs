//! A small assembler: host instructions as bytes.
//!
//! Only the forms that the translator needs. Encodings: SDM volume 2, chapter 2.

/// A host register, by number.
pub type Reg = u8;

/// Host registers by name.
#[allow(missing_docs)]
pub mod host {
    use super::Reg;
    pub const RAX: Reg = 0;
    pub const RCX: Reg = 1;
    pub const RDX: Reg = 2;
    pub const RBX: Reg = 3;
    pub const RSP: Reg = 4;
    pub const RBP: Reg = 5;
    pub const RSI: Reg = 6;
    pub const RDI: Reg = 7;
    pub const R10: Reg = 10;
    pub const R11: Reg = 11;
    pub const R12: Reg = 12;
    pub const R13: Reg = 13;
    pub const R14: Reg = 14;
    pub const R15: Reg = 15;
}

/// Condition codes.
#[allow(missing_docs)]
pub mod cc {
    pub const Z: u8 = 4;
    pub const NZ: u8 = 5;
    pub const AE: u8 = 3;
    pub const BE: u8 = 6;
    pub const A: u8 = 7;
    pub const NS: u8 = 9;
}

/// Operations of the first ALU group, by their number in the opcode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Alu {
    Add = 0,
    Or = 1,
    And = 4,
    Sub = 5,
    Xor = 6,
    Cmp = 7,
}

/// A host memory operand.
#[derive(Clone, Copy, Debug)]
pub struct Mem {
    base: Option<Reg>,
    index: Option<(Reg, u8)>,
    disp: i32,
}

impl Mem {
    /// `[base + disp]`
    pub fn at(base: Reg, disp: i32) -> Mem {
        Mem { base: Some(base), index: None, disp }
    }

    /// `[base + index << scale + disp]`
    pub fn indexed(base: Reg, index: Reg, scale: u8, disp: i32) -> Mem {
        Mem { base: Some(base), index: Some((index, scale)), disp }
    }

    /// Any combination of parts.
    pub fn parts(base: Option<Reg>, index: Option<(Reg, u8)>, disp: i32) -> Mem {
        Mem { base, index, disp }
    }

    /// The `X` and `B` bits of a REX prefix.
    pub fn rex_xb(&self) -> u8 {
        let x = self.index.map_or(0, |(r, _)| r >> 3);
        x << 1 | self.base.map_or(0, |r| r >> 3)
    }
}

/// A forward jump whose target is not known yet: where its 32-bit offset is.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Fixup(usize);

impl Fixup {
    /// Position of the offset in the buffer.
    pub fn position(self) -> usize {
        self.0
    }
}

/// The assembler: appends to a buffer that will be executed at a known address.
pub struct Asm {
    buf: Vec<u8>,
    base: u64,
}

impl Asm {
    /// Code that will stand at `base`.
    pub fn new(base: u64) -> Asm {
        Asm { buf: Vec::with_capacity(1024), base }
    }

    /// The bytes so far.
    pub fn bytes(&self) -> &[u8] {
        &self.buf
    }

    /// Position in the buffer.
    pub fn position(&self) -> usize {
        self.buf.len()
    }

    /// Address of the next byte.
    pub fn here(&self) -> u64 {
        self.base + self.buf.len() as u64
    }

    /// Address of a position.
    pub fn address(&self, position: usize) -> u64 {
        self.base + position as u64
    }

    /// Appends bytes.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
    }

    fn imm32(&mut self, value: i32) {
        self.raw(&value.to_le_bytes());
    }

    fn rex(&mut self, wide: bool, reg: Reg, xb: u8, force: bool) {
        let rex = u8::from(wide) << 3 | (reg >> 3) << 2 | xb;
        if rex != 0 || force {
            self.buf.push(0x40 | rex);
        }
    }

    /// ModRM, SIB and displacement of a memory operand.
    pub fn modrm_mem(&mut self, reg: u8, mem: &Mem) {
        let reg = (reg & 7) << 3;
        let Some(base) = mem.base else {
            let sib = match mem.index {
                Some((index, scale)) => scale << 6 | (index & 7) << 3 | 5,
                None => 0x25,
            };
            self.raw(&[reg | 4, sib]);
            return self.imm32(mem.disp);
        };
        let (mode, short) = match mem.disp {
            0 if base & 7 != 5 => (0x00, true),
            -128..=127 => (0x40, true),
            _ => (0x80, false),
        };
        match mem.index {
            Some((index, scale)) => self.raw(&[mode | reg | 4, scale << 6 | (index & 7) << 3 | base & 7]),
            None if base & 7 == 4 => self.raw(&[mode | reg | 4, 0x24]),
            None => self.buf.push(mode | reg | base & 7),
        }
        match mode {
            0x40 => self.buf.push(mem.disp as u8),
            0x80 => self.imm32(mem.disp),
            _ => debug_assert!(short),
        }
    }

    /// `opcode reg, [mem]` or `opcode [mem], reg`.
    pub fn op_mem(&mut self, wide: bool, opcode: &[u8], reg: Reg, mem: &Mem) {
        self.rex(wide, reg, mem.rex_xb(), false);
        self.raw(opcode);
        self.modrm_mem(reg, mem);
    }

    /// `opcode` with two registers.
    pub fn op_reg(&mut self, wide: bool, opcode: &[u8], reg: Reg, rm: Reg) {
        self.rex(wide, reg, rm >> 3, false);
        self.raw(opcode);
        self.buf.push(0xc0 | (reg & 7) << 3 | rm & 7);
    }

    /// `mov dst, src`, 64 bits.
    pub fn mov(&mut self, dst: Reg, src: Reg) {
        if dst != src {
            self.op_reg(true, &[0x89], src, dst);
        }
    }

    /// `mov dst, src`, 32 bits: also clears the upper half.
    pub fn mov32(&mut self, dst: Reg, src: Reg) {
        self.op_reg(false, &[0x89], src, dst);
    }

    /// `movzx dst, src8`, the low byte.
    pub fn movzx_byte(&mut self, dst: Reg, src: Reg) {
        self.rex(false, dst, src >> 3, true);
        self.raw(&[0x0f, 0xb6, 0xc0 | (dst & 7) << 3 | src & 7]);
    }

    /// `mov dst, imm`, the shortest form. Leaves flags alone.
    pub fn mov_imm(&mut self, dst: Reg, value: u64) {
        if value <= u32::MAX.into() {
            self.rex(false, 0, dst >> 3, false);
            self.buf.push(0xb8 | dst & 7);
            self.raw(&(value as u32).to_le_bytes());
        } else if value as i64 >= i32::MIN.into() && (value as i64) < 0 {
            self.rex(true, 0, dst >> 3, false);
            self.raw(&[0xc7, 0xc0 | dst & 7]);
            self.imm32(value as i32);
        } else {
            self.rex(true, 0, dst >> 3, false);
            self.buf.push(0xb8 | dst & 7);
            self.raw(&value.to_le_bytes());
        }
    }

    /// `mov dst, [mem]`, 64 bits.
    pub fn load(&mut self, dst: Reg, mem: Mem) {
        self.op_mem(true, &[0x8b], dst, &mem);
    }

    /// `mov dst, [mem]`, 32 bits.
    pub fn load32(&mut self, dst: Reg, mem: Mem) {
        self.op_mem(false, &[0x8b], dst, &mem);
    }

    /// `mov [mem], src`, 64 bits.
    pub fn store(&mut self, mem: Mem, src: Reg) {
        self.op_mem(true, &[0x89], src, &mem);
    }

    /// `mov [mem], src`, 32 bits.
    pub fn store32(&mut self, mem: Mem, src: Reg) {
        self.op_mem(false, &[0x89], src, &mem);
    }

    /// `mov dword [mem], imm`.
    pub fn store_imm32(&mut self, mem: Mem, value: u32) {
        self.op_mem(false, &[0xc7], 0, &mem);
        self.raw(&value.to_le_bytes());
    }

    /// `mov byte [mem], imm`.
    pub fn store_imm8(&mut self, mem: Mem, value: u8) {
        self.op_mem(false, &[0xc6], 0, &mem);
        self.buf.push(value);
    }

    /// `lea dst, [mem]`.
    pub fn lea(&mut self, wide: bool, dst: Reg, mem: &Mem) {
        self.op_mem(wide, &[0x8d], dst, mem);
    }

    /// ALU operation with two registers, 64 bits.
    pub fn alu(&mut self, op: Alu, dst: Reg, src: Reg) {
        self.op_reg(true, &[(op as u8) << 3 | 1], src, dst);
    }

    /// ALU operation of a register with memory, 64 bits.
    pub fn alu_mem(&mut self, op: Alu, dst: Reg, mem: Mem) {
        self.op_mem(true, &[(op as u8) << 3 | 3], dst, &mem);
    }

    /// ALU operation with an immediate.
    pub fn alu_imm(&mut self, wide: bool, op: Alu, dst: Reg, value: i32) {
        self.rex(wide, 0, dst >> 3, false);
        let modrm = 0xc0 | (op as u8) << 3 | dst & 7;
        if let Ok(short) = i8::try_from(value) {
            self.raw(&[0x83, modrm, short as u8]);
        } else {
            self.raw(&[0x81, modrm]);
            self.imm32(value);
        }
    }

    /// `cmp dword [mem], imm8`.
    pub fn cmp_mem32(&mut self, mem: Mem, value: i8) {
        self.op_mem(false, &[0x83], 7, &mem);
        self.buf.push(value as u8);
    }

    /// ALU operation of 32-bit memory with an immediate.
    pub fn alu_mem32_imm(&mut self, op: Alu, mem: Mem, value: u32) {
        self.op_mem(false, &[0x81], op as u8, &mem);
        self.raw(&value.to_le_bytes());
    }

    /// `test reg8, mask`.
    pub fn test_low(&mut self, reg: Reg, mask: u8) {
        self.rex(false, 0, reg >> 3, true);
        self.raw(&[0xf6, 0xc0 | reg & 7, mask]);
    }

    /// `shr dst, count`, 64 bits.
    pub fn shr(&mut self, dst: Reg, count: u8) {
        self.op_reg(true, &[0xc1], 5, dst);
        self.buf.push(count);
    }

    /// `rorx dst, src, count`, 64 bits (BMI2). Leaves flags alone.
    pub fn rorx(&mut self, dst: Reg, src: Reg, count: u8) {
        let extended = |reg: Reg| !reg >> 3 & 1;
        let registers = extended(dst) << 7 | 0x40 | extended(src) << 5;
        self.raw(&[0xc4, registers | 3, 0xfb, 0xf0, 0xc0 | (dst & 7) << 3 | src & 7, count]);
    }

    /// `add qword [mem], imm32`.
    pub fn add_mem_imm(&mut self, mem: Mem, value: i32) {
        self.op_mem(true, &[0x81], 0, &mem);
        self.imm32(value);
    }

    /// `shl dst, count`, 32 bits.
    pub fn shl32(&mut self, dst: Reg, count: u8) {
        self.op_reg(false, &[0xc1], 4, dst);
        self.buf.push(count);
    }

    /// `push imm32` (sign-extended).
    pub fn push_imm(&mut self, value: u32) {
        self.buf.push(0x68);
        self.raw(&value.to_le_bytes());
    }

    /// `jmp target`, five bytes.
    pub fn jmp(&mut self, target: u64) {
        self.buf.push(0xe9);
        self.rel32(target);
    }

    /// `jcc target`, six bytes.
    pub fn jcc(&mut self, cc: u8, target: u64) {
        self.raw(&[0x0f, 0x80 | cc]);
        self.rel32(target);
    }

    fn rel32(&mut self, target: u64) {
        let offset = target.wrapping_sub(self.here() + 4);
        self.imm32(offset as i32);
    }

    /// `jmp` to a place further on.
    pub fn jmp_forward(&mut self) -> Fixup {
        self.buf.push(0xe9);
        self.imm32(0);
        Fixup(self.buf.len() - 4)
    }

    /// `jcc` to a place further on.
    pub fn jcc_forward(&mut self, cc: u8) -> Fixup {
        self.raw(&[0x0f, 0x80 | cc]);
        self.imm32(0);
        Fixup(self.buf.len() - 4)
    }

    /// Makes a forward jump go here.
    pub fn bind(&mut self, fixup: Fixup) {
        let offset = (self.buf.len() - fixup.0 - 4) as u32;
        self.buf[fixup.0..fixup.0 + 4].copy_from_slice(&offset.to_le_bytes());
    }

    /// `jmp [mem]`.
    pub fn jmp_mem(&mut self, mem: Mem) {
        self.op_mem(false, &[0xff], 4, &mem);
    }

    /// `jmp reg`.
    pub fn jmp_reg(&mut self, reg: Reg) {
        self.op_reg(false, &[0xff], 4, reg);
    }

    /// `call reg`.
    pub fn call_reg(&mut self, reg: Reg) {
        self.op_reg(false, &[0xff], 2, reg);
    }

    /// `push reg`.
    pub fn push(&mut self, reg: Reg) {
        self.rex(false, 0, reg >> 3, false);
        self.buf.push(0x50 | reg & 7);
    }

    /// `pop reg`.
    pub fn pop(&mut self, reg: Reg) {
        self.rex(false, 0, reg >> 3, false);
        self.buf.push(0x58 | reg & 7);
    }

    /// An opcode with a register in its low bits.
    pub fn rex_opcode(&mut self, wide: bool, opcode: &[u8], reg: Reg) {
        self.rex(wide, 0, reg >> 3, false);
        self.opcode_with(opcode, reg);
    }

    /// The same with a byte register.
    pub fn rex_opcode_forced(&mut self, opcode: &[u8], reg: Reg) {
        self.rex(false, 0, reg >> 3, true);
        self.opcode_with(opcode, reg);
    }

    fn opcode_with(&mut self, opcode: &[u8], reg: Reg) {
        if let [first @ .., last] = opcode {
            self.raw(first);
            self.buf.push(last | reg & 7);
        }
    }

    /// `call target`.
    pub fn call(&mut self, target: u64) {
        self.buf.push(0xe8);
        self.rel32(target);
    }

    /// `ret`.
    pub fn ret(&mut self) {
        self.buf.push(0xc3);
    }

    /// `lahf; seto al`: the arithmetic flags into AX.
    pub fn flags_to_ax(&mut self) {
        self.raw(&[0x9f, 0x0f, 0x90, 0xc0]);
    }

    /// `add al, 0x7f; sahf`: the arithmetic flags out of AX.
    pub fn flags_from_ax(&mut self) {
        self.raw(&[0x04, 0x7f, 0x9e]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

    fn disassemble(asm: &Asm) -> Vec<String> {
        let decoder = Decoder::with_ip(64, asm.bytes(), asm.base, DecoderOptions::NONE);
        let mut formatter = IntelFormatter::new();
        decoder
            .into_iter()
            .map(|ins| {
                let mut text = String::new();
                formatter.format(&ins, &mut text);
                text
            })
            .collect()
    }

    #[test]
    fn every_form_disassembles_to_what_was_asked_for() {
        let mut asm = Asm::new(0x1000);
        asm.load(host::R10, Mem::at(host::RSP, 8));
        asm.lea(true, host::R11, &Mem::indexed(host::R13, host::R12, 2, 0));
        asm.lea(false, host::RAX, &Mem::parts(None, Some((host::RCX, 3)), 0x1000));
        asm.alu_imm(true, Alu::Cmp, host::R10, 4088);
        asm.alu_mem(Alu::Sub, host::R10, Mem::indexed(host::RSP, host::R11, 0, 0x1234));
        asm.mov_imm(host::R15, u64::MAX);
        asm.mov_imm(host::RDI, 0x1234_5678_9abc);
        asm.store(Mem::at(host::R12, 0), host::RBP);
        asm.store(Mem::at(host::R13, 0), host::RBP);
        asm.shr(host::R11, 7);
        asm.rorx(host::R11, host::R10, 7);
        asm.rorx(host::RCX, host::R13, 12);
        let forward = asm.jcc_forward(cc::A);
        asm.ret();
        asm.bind(forward);
        asm.jmp_mem(Mem::at(host::RSP, 0x100));
        let expected = [
            "mov r10,[rsp+8]",
            "lea r11,[r13+r12*4]",
            "lea eax,[rcx*8+1000h]",
            "cmp r10,0FF8h",
            "sub r10,[rsp+r11+1234h]",
            "mov r15,0FFFFFFFFFFFFFFFFh",
            "mov rdi,123456789ABCh",
            "mov [r12],rbp",
            "mov [r13],rbp",
            "shr r11,7",
            "rorx r11,r10,7",
            "rorx rcx,r13,0Ch",
        ];
        let text = disassemble(&asm);
        assert_eq!(&text[..expected.len()], expected);
        assert!(text[12].starts_with("ja "), "{}", text[12]);
        assert!(text[12].contains(&format!("{:X}", asm.here() - 7)), "{text:?} {:x}", asm.here());
    }
}
