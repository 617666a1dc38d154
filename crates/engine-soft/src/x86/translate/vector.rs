//! SSE and AVX instructions: copied, on the guest's registers in the host's.

use iced_x86::InstructionInfoFactory;

use super::super::cpu::Mode;
use super::asm::cc;
use super::build::{Builder, Cold, slot};
use super::frame::at;
use super::insn::{Class, Features, Insn};

/// Whether, and how, an instruction on vector registers is translated.
pub fn classify(_: &mut Insn, _: &Mode, _: Features, _: &mut InstructionInfoFactory) -> Class {
    Class::Handler
}

impl Builder<'_> {
    /// Brings the guest's vector registers into the host's, where they stay for the rest of the unit.
    pub fn want_vectors(&mut self, insn: &Insn) {
        if self.vectors {
            return;
        }
        self.disturb(insn.live_before());
        self.asm.cmp_mem32(slot(at::SIMD), 0);
        let jump = self.asm.jcc_forward(cc::Z);
        let resume = self.asm.position();
        self.cold.push(Cold::LoadVectors { jump, resume });
        self.vectors = true;
    }
}
