//! Where guest registers live in translated code.
//!
//! | guest | host |
//! |---|---|
//! | RAX-RBX, RBP-R9, R12-R14 | the same register |
//! | RSP | R15 |
//! | R10, R11, R15 (used least by compilers) | their slot in [`Cpu::regs`](super::super::cpu::Cpu::regs) |
//!
//! The host's RSP points at the [`Cpu`](super::super::cpu::Cpu), R10 and R11 are scratch. RAX, RCX and RDX
//! must be themselves: instructions name them implicitly.

use super::asm::{Reg, host};

/// First scratch register: the address of an access.
pub const A: Reg = host::R10;
/// Second scratch register.
pub const B: Reg = host::R11;
/// The guest's stack pointer.
pub const SP: Reg = host::R15;

/// The host register of a guest register, if it has one.
pub const fn host_of(guest: u8) -> Option<Reg> {
    match guest {
        4 => Some(SP),
        10 | 11 | 15 => None,
        other => Some(other),
    }
}

/// The guest registers that have host registers, and which.
pub fn pairs() -> impl Iterator<Item = (u8, Reg)> {
    (0..16).filter_map(|guest| host_of(guest).map(|host| (guest, host)))
}
