//! The parts of a guest instruction's bytes, and how to put them together again with other registers.

use super::asm::{Asm, Mem};

/// A VEX prefix (SDM 2A, 2.3).
#[derive(Clone, Copy, Debug)]
pub struct Vex {
    /// `W`, as bit 7.
    w: u8,
    /// The second source register.
    pub vvvv: u8,
    /// `L` and `pp`.
    l_pp: u8,
}

/// An instruction with a ModRM byte, taken apart.
#[derive(Clone, Copy, Debug)]
pub struct Raw {
    /// 66h, F2h or F3h as they stood (legacy encodings).
    opsize: bool,
    repeat: Option<u8>,
    lock: bool,
    /// REX, 0 if there is none.
    rex: u8,
    vex: Option<Vex>,
    /// 0: one byte, 1: 0F, 2: 0F 38, 3: 0F 3A.
    map: u8,
    opcode: u8,
    modrm: u8,
    /// Immediate bytes.
    imm: [u8; 4],
    imm_len: u8,
}

/// A register field of the instruction to be emitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// As it was: an opcode extension, a vector register, AH to BH.
    Same,
    /// A host register.
    Host(u8),
}

/// What goes into ModRM.rm.
#[derive(Clone, Copy, Debug)]
pub enum Rm {
    /// A register.
    Reg(Field),
    /// A memory operand.
    Mem(Mem),
}

impl Raw {
    const NONE: Raw = Raw {
        opsize: false,
        repeat: None,
        lock: false,
        rex: 0,
        vex: None,
        map: 0,
        opcode: 0,
        modrm: 0,
        imm: [0; 4],
        imm_len: 0,
    };

    /// Takes apart an instruction that has a ModRM byte (the caller knows). `None` for EVEX, XOP and
    /// what else is not re-encoded.
    pub fn parse(bytes: &[u8], long64: bool) -> Option<Raw> {
        let mut raw = Raw::NONE;
        let mut at = 0;
        loop {
            match *bytes.get(at)? {
                0x66 => raw.opsize = true,
                0xf0 => raw.lock = true,
                repeat @ (0xf2 | 0xf3) => raw.repeat = Some(repeat),
                0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x67 => {}
                rex @ 0x40..=0x4f if long64 => {
                    raw.rex = rex;
                    at += 1;
                    continue;
                }
                _ => break,
            }
            raw.rex = 0; // a REX prefix that another prefix follows is none
            at += 1;
        }
        at = raw.parse_opcode(bytes, at, long64)?;
        raw.modrm = *bytes.get(at)?;
        at += 1 + raw.address_bytes(bytes.get(at + 1).copied(), bytes, long64);
        let imm = bytes.get(at..)?;
        if imm.len() > 4 {
            return None;
        }
        raw.imm[..imm.len()].copy_from_slice(imm);
        raw.imm_len = imm.len() as u8;
        Some(raw)
    }

    /// `mov` of `size` bytes between AL, AX or EAX and memory.
    pub fn move_a(size: u32, store: bool) -> Raw {
        let opcode = if store { 0x88 } else { 0x8a } | u8::from(size > 1);
        Raw { opsize: size == 2, opcode, ..Raw::NONE }
    }

    fn parse_opcode(&mut self, bytes: &[u8], mut at: usize, long64: bool) -> Option<usize> {
        let opcode = *bytes.get(at)?;
        let next = *bytes.get(at + 1)?;
        if (opcode == 0xc5 || opcode == 0xc4) && (long64 || next >= 0xc0) {
            return self.parse_vex(bytes, at, long64);
        }
        if opcode == 0x62 || opcode == 0x8f && next & 0x1f >= 8 {
            return None;
        }
        at += 1;
        self.opcode = if opcode == 0x82 { 0x80 } else { opcode }; // another name, not in 64-bit code
        if opcode == 0x0f {
            (self.map, self.opcode) = (1, next);
            at += 1;
            if next == 0x38 || next == 0x3a {
                self.map = if next == 0x38 { 2 } else { 3 };
                self.opcode = *bytes.get(at)?;
                at += 1;
            }
        }
        Some(at)
    }

    fn parse_vex(&mut self, bytes: &[u8], at: usize, long64: bool) -> Option<usize> {
        let byte = *bytes.get(at + 1)?;
        self.rex = 0x40 | (!byte >> 7 & 1) << 2;
        let (last, end) = if bytes[at] == 0xc5 {
            self.map = 1;
            (byte & 0x7f, at + 2)
        } else {
            self.map = byte & 0x1f;
            self.rex |= !byte >> 5 & 3;
            (*bytes.get(at + 2)?, at + 3)
        };
        self.vex = Some(Vex { w: last & 0x80, vvvv: !last >> 3 & 15, l_pp: last & 7 });
        if !long64 {
            self.ignore_upper_registers();
        }
        self.opcode = *bytes.get(end)?;
        Some(end + 1)
    }

    /// Outside of 64-bit code there are eight registers, whatever the bits for more of them.
    fn ignore_upper_registers(&mut self) {
        self.rex = 0x40;
        if let Some(vex) = &mut self.vex {
            vex.vvvv &= 7;
        }
    }

    /// Length of SIB and displacement.
    fn address_bytes(&self, sib: Option<u8>, bytes: &[u8], long64: bool) -> usize {
        let (mode, rm) = (self.modrm >> 6, self.modrm & 7);
        if mode == 3 {
            return 0;
        }
        let short = !long64 && bytes.iter().take(4).any(|&b| b == 0x67) && self.has_address_prefix(bytes);
        if short {
            return match (mode, rm) {
                (0, 6) | (2, _) => 2,
                (1, _) => 1,
                _ => 0,
            };
        }
        let has_sib = rm == 4;
        let base = if has_sib { sib.unwrap_or(0) & 7 } else { rm };
        let disp = match mode {
            0 if base == 5 => 4,
            0 => 0,
            1 => 1,
            _ => 4,
        };
        usize::from(has_sib) + disp
    }

    fn has_address_prefix(&self, bytes: &[u8]) -> bool {
        bytes
            .iter()
            .take_while(
                |b| matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3),
            )
            .any(|&b| b == 0x67)
    }

    /// Number in the ModRM.reg field, with REX.R.
    pub fn reg(&self) -> u8 {
        self.modrm >> 3 & 7 | (self.rex & 4) << 1
    }

    /// Whether there is a REX prefix, which changes what byte registers 4 to 7 mean.
    pub fn has_rex(&self) -> bool {
        self.rex != 0 && self.vex.is_none()
    }

    /// VEX.W.
    pub fn vex_w(&self) -> bool {
        self.vex.is_some_and(|vex| vex.w != 0)
    }

    /// Whether this is a VEX encoding.
    pub fn is_vex(&self) -> bool {
        self.vex.is_some()
    }

    /// Turns the instruction into another one of the same shape.
    pub fn set_opcode(&mut self, opcode: u8) {
        self.opcode = opcode;
    }

    /// Emits the instruction with other registers. `force_rex` for byte registers that need it.
    pub fn emit(&self, asm: &mut Asm, reg: Field, rm: Rm, vvvv: Field, force_rex: bool) {
        let mut rex = self.rex & 0x48;
        let reg_bits = match reg {
            Field::Same => self.reg(),
            Field::Host(number) => number,
        };
        rex |= (reg_bits & 8) >> 1;
        rex |= match rm {
            Rm::Reg(Field::Same) => self.rex & 1,
            Rm::Reg(Field::Host(number)) => number >> 3,
            Rm::Mem(ref mem) => mem.rex_xb(),
        };
        match self.vex {
            Some(vex) => self.emit_vex(asm, vex, rex, vvvv),
            None => self.emit_legacy(asm, rex, force_rex),
        }
        match rm {
            Rm::Reg(field) => {
                let low = match field {
                    Field::Same => self.modrm & 7,
                    Field::Host(number) => number & 7,
                };
                asm.raw(&[0xc0 | (reg_bits & 7) << 3 | low]);
            }
            Rm::Mem(mem) => asm.modrm_mem(reg_bits, &mem),
        }
        asm.raw(&self.imm[..usize::from(self.imm_len)]);
    }

    fn emit_vex(&self, asm: &mut Asm, vex: Vex, rex: u8, vvvv: Field) {
        let vvvv = match vvvv {
            Field::Same => vex.vvvv,
            Field::Host(number) => number,
        };
        asm.raw(&[0xc4, (!rex & 7) << 5 | self.map, vex.w | (!vvvv & 15) << 3 | vex.l_pp, self.opcode]);
    }

    fn emit_legacy(&self, asm: &mut Asm, rex: u8, force_rex: bool) {
        if self.lock {
            asm.raw(&[0xf0]);
        }
        if self.opsize {
            asm.raw(&[0x66]);
        }
        if let Some(repeat) = self.repeat {
            asm.raw(&[repeat]);
        }
        if rex & 0xf != 0 || force_rex {
            asm.raw(&[0x40 | rex & 0xf]);
        }
        match self.map {
            0 => {}
            1 => asm.raw(&[0x0f]),
            2 => asm.raw(&[0x0f, 0x38]),
            _ => asm.raw(&[0x0f, 0x3a]),
        }
        asm.raw(&[self.opcode]);
    }
}
