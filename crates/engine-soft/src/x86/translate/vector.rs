//! SSE and AVX instructions: copied, on the guest's registers in the host's.
//!
//! The guest's vector registers and MXCSR come into the host's when a unit first needs them, and go back
//! when Rust code runs. Whether the guest may execute an instruction (features, XCR0, CR4) the
//! interpreter's family has decided when it found a handler, or the mode that the unit is keyed by says.

use iced_x86::{
    Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic, OpCodeOperandKind, OpKind,
};

use super::super::cpu::Mode;
use super::asm::{Fixup, cc};
use super::build::{Builder, Cold, slot};
use super::frame::at;
use super::insn::{Class, Features, Insn, access, slot_accesses, slot_count, with_raw};
use super::regs::A;

/// Whether, and how, an instruction on vector registers is translated.
pub fn classify(
    insn: &mut Insn,
    mode: &Mode,
    features: Features,
    factory: &mut InstructionInfoFactory,
) -> Class {
    use Mnemonic::*;
    let ins = &insn.ins;
    let vex = match ins.encoding() {
        iced_x86::EncodingKind::Legacy => false,
        iced_x86::EncodingKind::VEX if features.avx => true,
        _ => return Class::Handler,
    };
    if vex && matches!(ins.mnemonic(), Vzeroupper | Vzeroall) {
        insn.vector = true;
        return Class::Copy;
    }
    if !registers_fit(ins) || matches!(ins.mnemonic(), Maskmovdqu | Vmaskmovdqu | Extrq | Insertq) {
        return Class::Handler;
    }
    let memory = (0..ins.op_count()).find(|&n| ins.op_kind(n) == OpKind::Memory);
    let Some(slots) = slot_count(ins, memory.is_some()) else { return Class::Handler };
    if slots > 0 {
        insn.slots = slot_accesses(ins, factory);
    }
    if let Some(n) = memory {
        let info = factory.info_options(ins, InstructionInfoOptions::NO_REGISTER_USAGE);
        insn.memory = access(ins, info.op_access(n));
        if insn.memory.is_none() {
            return Class::Handler;
        }
        insn.alignment = alignment(ins, vex);
    }
    insn.vector = true;
    let class = with_raw(insn, mode, Class::Generic);
    if insn.narrow() && wide_only(insn) { Class::Handler } else { class }
}

/// Whether a VEX encoding in 32-bit code means something else in 64-bit code, where W is not ignored beside
/// general registers, and the fourth register has a fourth bit.
pub fn wide_only(insn: &Insn) -> bool {
    use OpCodeOperandKind::*;
    let code = insn.ins.op_code();
    let general = |kind| {
        matches!(kind, r32_or_mem | r32_reg | r32_rm | r32_vvvv | r64_or_mem | r64_reg | r64_rm | r64_vvvv)
    };
    let kinds = || (0..insn.ins.op_count()).map(|n| code.op_kind(n));
    let w = insn.raw.is_some_and(|raw| raw.vex_w());
    w && kinds().any(general) || kinds().any(|kind| matches!(kind, xmm_is4 | ymm_is4))
}

/// Vector registers are among the operands, and nothing that is not known here.
fn registers_fit(ins: &Instruction) -> bool {
    use OpCodeOperandKind::*;
    let code = ins.op_code();
    let mut vector = false;
    for n in 0..ins.op_count() {
        match code.op_kind(n) {
            xmm_or_mem | ymm_or_mem | xmm_reg | xmm_rm | xmm_vvvv | xmm_is4 | ymm_reg | ymm_rm | ymm_vvvv
            | ymm_is4 => vector = true,
            r32_or_mem | r64_or_mem | r32_reg | r64_reg | r32_rm | r64_rm | r32_reg_mem | r64_reg_mem
            | mem | imm8 => {}
            // XMM0 is implied by some.
            _ if ins.op_kind(n) == OpKind::Register && ins.op_register(n).is_xmm() => {}
            _ => return false,
        }
    }
    vector
}

/// Alignment that the instruction asks of its memory operand, in bytes.
fn alignment(ins: &Instruction, vex: bool) -> u8 {
    use Mnemonic::*;
    let size = ins.memory_size().size() as u8;
    let unaligned = matches!(
        ins.mnemonic(),
        Movups | Movupd | Movdqu | Lddqu | Pcmpestri | Pcmpestrm | Pcmpistri | Pcmpistrm
    );
    let aligned_vex =
        matches!(ins.mnemonic(), Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa);
    if if vex { aligned_vex } else { size == 16 && !unaligned } { size } else { 1 }
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
        self.cold.push(Cold::Load { jump, resume, stub: self.place.stubs.simd_load });
        self.vectors = true;
    }

    /// Where the address in A is not aligned as the instruction wants it. Disturbs flags.
    pub fn check_alignment(&mut self, insn: &Insn) -> Option<Fixup> {
        (insn.alignment > 1).then(|| {
            self.asm.test_low(A, insn.alignment - 1);
            self.asm.jcc_forward(cc::NZ)
        })
    }
}
