//! From bytes to [`Op`]s: `iced-x86` decodes, the instruction families choose their handlers.

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

use super::cpu::Mode;
use super::exception::{Exception, Exec, vector};
use super::interp;
use super::op::{HIGH, Handler, MemRef, Op, RIP, ZERO, flag, seg};

/// The longest instruction, in bytes.
pub const MAX_LEN: usize = 15;

/// What a family sees of an instruction when it chooses a handler.
pub struct Lower<'a> {
    /// The instruction, decoded as if it stood at address 0 (branch targets are offsets from its start).
    pub ins: &'a Instruction,
    /// Its bytes, and what follows them.
    pub bytes: &'a [u8],
    /// Width of the code segment: 16, 32 or 64.
    pub bits: u8,
    /// Width of the stack pointer: 16, 32 or 64.
    pub stack_bits: u8,
}

impl Lower<'_> {
    /// Whether operand `n` is in memory (an explicit operand with an effective address).
    pub fn is_mem(&self, n: u32) -> bool {
        n < self.ins.op_count() && self.ins.op_kind(n) == OpKind::Memory
    }

    /// Whether operand `n` is an immediate.
    pub fn is_imm(&self, n: u32) -> bool {
        n < self.ins.op_count()
            && !matches!(self.ins.op_kind(n), OpKind::Register | OpKind::Memory)
            && self.ins.try_immediate(n).is_ok()
    }

    /// Width in bits of operand `n`: a register, a memory operand, or an immediate (its operand size).
    pub fn width(&self, n: u32) -> u32 {
        match self.ins.op_kind(n) {
            OpKind::Register => self.ins.op_register(n).size() as u32 * 8,
            OpKind::Memory => self.ins.memory_size().size() as u32 * 8,
            _ => 0,
        }
    }
}

/// Decodes the instruction at the start of `bytes`.
///
/// `Err` is the exception that executing it raises: `#UD`, or `#GP(0)` for more than 15 bytes. If the
/// bytes end before the instruction does, the answer is `Ok(None)`.
pub fn decode(bytes: &[u8], mode: &Mode) -> Exec<Option<Op>> {
    Ok(decode_full(bytes, mode)?.map(|(_, op)| op))
}

/// As [`decode`], with what `iced` found (at address 0).
pub fn decode_full(bytes: &[u8], mode: &Mode) -> Exec<Option<(Instruction, Op)>> {
    let mut decoder = Decoder::with_ip(mode.code_bits.into(), bytes, 0, DecoderOptions::NONE);
    let mut ins = Instruction::default();
    decoder.decode_out(&mut ins);
    match decoder.last_error() {
        DecoderError::None => {}
        DecoderError::NoMoreBytes if bytes.len() < MAX_LEN => return Ok(None),
        DecoderError::NoMoreBytes => return Err(Exception::GP0),
        // The library stops at the longest length by itself.
        _ if decoder.position() >= MAX_LEN => return Err(Exception::GP0),
        _ => return Err(Exception::new(vector::UD)),
    }
    let lower = Lower { ins: &ins, bytes, bits: mode.code_bits, stack_bits: mode.stack_bits };
    let mut op = operands(&ins, mode);
    match interp::lower(&lower, &mut op) {
        Some(run) => op.run = run,
        None => return Err(Exception::UD),
    }
    Ok(Some((ins, op)))
}

fn placeholder(_: &mut super::cpu::Cpu, _: &Op) -> Exec {
    Err(Exception::UD)
}

/// Fills in what all families share: register numbers, the memory operand, the immediate, prefixes.
fn operands(ins: &Instruction, mode: &Mode) -> Op {
    let mut op = Op {
        run: placeholder as Handler,
        imm: 0,
        mem: MemRef { disp: 0, mask: u64::MAX, base: ZERO, index: ZERO, scale: 0, seg: seg::DS },
        dst: 0,
        src: 0,
        aux: 0,
        len: ins.len() as u8,
        flags: 0,
        ext: 0,
    };
    for n in 0..ins.op_count() {
        match ins.op_kind(n) {
            OpKind::Register => {
                let number = number(ins.op_register(n));
                match n {
                    0 => op.dst = number,
                    1 => op.src = number,
                    2 => op.aux = number,
                    _ => {}
                }
            }
            OpKind::Memory => op.mem = memory(ins, mode),
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                op.imm = ins.near_branch_target();
            }
            OpKind::FarBranch16 | OpKind::FarBranch32 => {
                op.imm = if ins.op_kind(n) == OpKind::FarBranch16 {
                    ins.far_branch16().into()
                } else {
                    ins.far_branch32().into()
                };
                op.ext = ins.far_branch_selector().into();
            }
            _ => {
                // A second immediate (ENTER, EXTRQ) is its family's business.
                if let (0, Ok(imm)) = (op.imm, ins.try_immediate(n)) {
                    op.imm = imm;
                }
            }
        }
    }
    if ins.has_lock_prefix() {
        op.flags |= flag::LOCK;
    }
    if ins.has_rep_prefix() {
        op.flags |= flag::REP;
    }
    if ins.has_repne_prefix() {
        op.flags |= flag::REPNE;
    }
    op
}

/// Number of a register within its class; 8-bit high registers carry [`HIGH`].
pub fn number(register: Register) -> u8 {
    match register {
        Register::None => 0,
        Register::AH => HIGH,
        Register::CH => HIGH | 1,
        Register::DH => HIGH | 2,
        Register::BH => HIGH | 3,
        // SPL to R15L are counted behind AH to BH by the library.
        other if other.is_gpr() => other.full_register().number() as u8,
        other => other.number() as u8,
    }
}

fn memory(ins: &Instruction, mode: &Mode) -> MemRef {
    let base = ins.memory_base();
    let index = ins.memory_index();
    let (base_slot, mask) = match base {
        Register::RIP | Register::EIP => (RIP, if base == Register::RIP { u64::MAX } else { 0xffff_ffff }),
        Register::None => (ZERO, 0),
        other => (other.number() as u8, address_mask(other.size())),
    };
    let index_slot = if index == Register::None { ZERO } else { index.number() as u8 };
    let mask = match (mask, index) {
        (0, Register::None) => displacement_mask(ins, mode),
        (0, index) if index.is_gpr() => address_mask(index.size()),
        (0, _) => displacement_mask(ins, mode), // VSIB without a base
        (mask, _) => mask,
    };
    MemRef {
        disp: ins.memory_displacement64(),
        mask,
        base: base_slot,
        index: if index.is_gpr() { index_slot } else { ZERO },
        scale: ins.memory_index_scale().trailing_zeros() as u8,
        seg: number(segment(ins, mode)),
    }
}

/// The operand's segment register. 64-bit code ignores prefixes that name ES, CS, SS or DS.
fn segment(ins: &Instruction, mode: &Mode) -> Register {
    match (mode.code_bits, ins.segment_prefix()) {
        (64, Register::ES | Register::CS | Register::SS | Register::DS) => {
            let base = ins.memory_base().full_register();
            if matches!(base, Register::RSP | Register::RBP) { Register::SS } else { Register::DS }
        }
        _ => ins.memory_segment(),
    }
}

/// `CMOVcc`.
pub fn is_cmov(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Cmovo
            | Cmovno
            | Cmovb
            | Cmovae
            | Cmove
            | Cmovne
            | Cmovbe
            | Cmova
            | Cmovs
            | Cmovns
            | Cmovp
            | Cmovnp
            | Cmovl
            | Cmovge
            | Cmovle
            | Cmovg
    )
}

/// `SETcc`.
pub fn is_setcc(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Seto | Setno
            | Setb
            | Setae
            | Sete
            | Setne
            | Setbe
            | Seta
            | Sets
            | Setns
            | Setp
            | Setnp
            | Setl
            | Setge
            | Setle
            | Setg
    )
}

fn address_mask(bytes: usize) -> u64 {
    match bytes {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// Address size of an absolute displacement.
fn displacement_mask(ins: &Instruction, mode: &Mode) -> u64 {
    match (ins.memory_displ_size(), mode.code_bits) {
        (2, _) => 0xffff,
        (8, _) | (_, 64) => u64::MAX,
        _ => 0xffff_ffff,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(bits: u8) -> Mode {
        Mode { code_bits: bits, stack_bits: bits, long64: bits == 64, ..Mode::default() }
    }

    #[test]
    fn rip_relative_operands_are_offsets_from_the_instruction() {
        // mov eax, [rip + 0x10]: 6 bytes
        let op = decode(&[0x8b, 0x05, 0x10, 0, 0, 0], &mode(64)).unwrap().unwrap();
        assert_eq!((op.mem.base, op.mem.disp, op.len), (RIP, 0x16, 6));
    }

    #[test]
    fn byte_registers_have_the_numbers_of_the_whole_ones() {
        // mov r9b, r14b; mov spl, ah is not encodable, so: mov spl, dil; mov ah, bl
        for (code, dst, src) in
            [(&[0x45u8, 0x88, 0xf1][..], 9, 14), (&[0x40, 0x88, 0xfc], 4, 7), (&[0x88, 0xdc], HIGH, 3)]
        {
            let op = decode(code, &mode(64)).unwrap().unwrap();
            assert_eq!((op.dst, op.src), (dst, src), "{code:x?}");
        }
    }

    #[test]
    fn prefixes_of_the_flat_segments_are_ignored_in_64_bit_code() {
        // fidiv word ss:[rcx]; mov eax, ds:[rbp]; mov eax, fs:[rcx]
        for (code, segment) in [
            (&[0x36, 0xde, 0x31][..], seg::DS),
            (&[0x36, 0x66, 0xde, 0x31][..], seg::DS),
            (&[0x3e, 0x8b, 0x45, 0], seg::SS),
            (&[0x64, 0x8b, 0x01], seg::FS),
        ] {
            assert_eq!(decode(code, &mode(64)).unwrap().unwrap().mem.seg, segment, "{code:x?}");
        }
    }

    #[test]
    fn branches_carry_the_offset_from_their_own_start() {
        let op = decode(&[0xeb, 0xfe], &mode(64)).unwrap().unwrap();
        assert_eq!(op.imm, 0, "jmp $");
    }

    #[test]
    fn a_cut_instruction_asks_for_more_and_an_endless_one_faults() {
        assert!(decode(&[0x48, 0xb8, 1, 2], &mode(64)).unwrap().is_none());
        assert_eq!(decode(&[0x66; 15], &mode(64)).err(), Some(Exception::GP0));
        assert_eq!(decode(&[0x0f, 0x0b, 0, 0], &mode(64)).err(), Some(Exception::UD));
    }
}
