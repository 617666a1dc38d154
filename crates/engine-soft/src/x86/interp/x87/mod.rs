//! The x87 unit.
//!
//! Arithmetic is executed by the host's CPU with the guest's whole x87 state loaded ([`arithmetic`]);
//! what loads, stores or clears control words and environments is in [`control`].
//!
//! An exception that is not masked is not raised by the instruction that causes it, but by the next
//! one that waits for it (SDM 1, 8.6); so a stub, which ends with the instruction, never raises one.

mod arithmetic;
mod control;

use iced_x86::Mnemonic;

use crate::x86::cpu::Cpu;
use crate::x86::decode::Lower;
use crate::x86::exception::Exec;
use crate::x86::fpu::stub;
use crate::x86::op::{Handler, Op};

/// Chooses the handler of an x87 instruction.
pub fn lower(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    if !stub::is_x87(l.ins) && l.ins.mnemonic() != Mnemonic::Wait {
        return None;
    }
    control::lower(l, op).or_else(|| arithmetic::lower(l, op))
}

/// May an instruction execute that reports pending exceptions first?
#[inline(always)]
fn wait(cpu: &Cpu) -> Exec {
    cpu.check_x87()?;
    cpu.check_pending_x87()
}

/// Pointers have the addresses of real mode: linear ones.
fn real_mode(cpu: &Cpu) -> bool {
    !cpu.mode.protected || cpu.mode.v86
}
