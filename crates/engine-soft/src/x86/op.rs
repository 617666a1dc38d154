//! A decoded instruction, ready to run.

use super::cpu::Cpu;
use super::exception::Exec;

/// Executes one instruction. On `Err` no guest-visible state has changed (but accessed and dirty
/// bits, and what the manuals allow to be partial) and RIP still names the instruction.
pub type Handler = fn(&mut Cpu, &Op) -> Exec;

/// Slot in [`Cpu::regs`] that is always zero: the base or index of an address that has none.
pub const ZERO: u8 = 16;
/// Slot in [`Cpu::regs`] that holds RIP, the address of the instruction that is being executed.
pub const RIP: u8 = 17;
/// Added to an 8-bit register's number for AH, CH, DH and BH (`HIGH | 0..=3`).
pub const HIGH: u8 = 32;

/// Numbers of the general registers.
#[allow(missing_docs)]
pub mod reg {
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RDX: u8 = 2;
    pub const RBX: u8 = 3;
    pub const RSP: u8 = 4;
    pub const RBP: u8 = 5;
    pub const RSI: u8 = 6;
    pub const RDI: u8 = 7;
    pub const R11: u8 = 11;
}

/// Numbers of the segment registers.
#[allow(missing_docs)]
pub mod seg {
    pub const ES: u8 = 0;
    pub const CS: u8 = 1;
    pub const SS: u8 = 2;
    pub const DS: u8 = 3;
    pub const FS: u8 = 4;
    pub const GS: u8 = 5;
}

/// A memory operand: `seg:[base + (index << scale) + disp]`, cut to the address size.
#[derive(Clone, Copy, Debug)]
pub struct MemRef {
    /// Displacement. For RIP-relative operands the instruction's length is in it and `base` is [`RIP`].
    pub disp: u64,
    /// All ones of the address size.
    pub mask: u64,
    /// Slot in [`Cpu::regs`].
    pub base: u8,
    /// Slot in [`Cpu::regs`].
    pub index: u8,
    /// 0-3.
    pub scale: u8,
    /// Segment register ([`seg`]).
    pub seg: u8,
}

/// Bits of [`Op::flags`].
pub mod flag {
    /// The block ends behind this instruction: a branch, or something that changes how code is
    /// fetched, what mode the CPU is in, or whether interrupts are taken.
    pub const ENDS_BLOCK: u8 = 1 << 0;
    /// `LOCK` prefix (or an implicit lock: `XCHG` with memory).
    pub const LOCK: u8 = 1 << 1;
    /// `REP`/`REPE` prefix.
    pub const REP: u8 = 1 << 2;
    /// `REPNE` prefix.
    pub const REPNE: u8 = 1 << 3;
}

/// A decoded instruction. `dst`, `src` and `aux` are its first, second and third register operands
/// where it has them; `imm` its immediate, sign-extended to 64 bits (for near branches: the offset of
/// the target from the instruction's own start).
#[derive(Clone, Copy)]
pub struct Op {
    /// What it does.
    pub run: Handler,
    /// Immediate or branch offset.
    pub imm: u64,
    /// Memory operand; meaningless where there is none.
    pub mem: MemRef,
    /// Register of operand 0, if it is one.
    pub dst: u8,
    /// Register of operand 1, if it is one.
    pub src: u8,
    /// Register of operand 2, if it is one.
    pub aux: u8,
    /// Length in bytes, 1-15.
    pub len: u8,
    /// See [`flag`].
    pub flags: u8,
    /// For the use of the instruction's family (an index into a table, a condition code).
    pub ext: u32,
}

impl Op {
    /// Whether one of `bits` ([`flag`]) is set.
    #[inline(always)]
    pub fn has(&self, bits: u8) -> bool {
        self.flags & bits != 0
    }
}
