//! SSE and AVX instructions: copied, on the guest's registers in the host's.

use iced_x86::InstructionInfoFactory;

use super::super::cpu::Mode;
use super::insn::{Class, Features, Insn};

/// Whether, and how, an instruction on vector registers is translated.
pub fn classify(_: &mut Insn, _: &Mode, _: Features, _: &mut InstructionInfoFactory) -> Class {
    Class::Handler
}
