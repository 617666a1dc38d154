//! Small system instructions that kernels execute all the time.

use engine::x86::bits::rflags;

use super::super::op::seg;
use super::super::tlb::View;
use super::asm::Alu;
use super::build::{Builder, slot};
use super::frame::at;
use super::insn::{Class, Insn};
use super::regs::{A, B};
use super::translator::INTERRUPTS;

impl Builder<'_> {
    /// `CLI` and `STI` at CPL 0. What waits for the flag is looked at where attention is next, which is
    /// behind the instruction in the shadow of `STI`.
    pub fn interrupt_flag(&mut self, insn: &Insn) {
        self.disturb(insn.live_before());
        let (flags, mask) = (slot(at::RFLAGS), slot(at::ATTENTION_MASK));
        if insn.class == Class::Sti {
            self.asm.alu_mem32_imm(Alu::Or, flags, rflags::IF as u32);
            self.asm.alu_mem32_imm(Alu::Or, mask, INTERRUPTS);
        } else {
            self.asm.alu_mem32_imm(Alu::And, flags, !rflags::IF as u32);
            self.asm.alu_mem32_imm(Alu::And, mask, !INTERRUPTS);
        }
    }

    /// `STAC` and `CLAC` at CPL 0 with SMAP on: the view changes, and with it the context that the jump
    /// cache tells targets apart by.
    pub fn user_access(&mut self, insn: &Insn) {
        self.disturb(insn.live_before());
        let flags = slot(at::RFLAGS);
        if insn.class == Class::Stac {
            self.asm.alu_mem32_imm(Alu::Or, flags, rflags::AC as u32);
            self.view = View::KernelUser;
        } else {
            self.asm.alu_mem32_imm(Alu::And, flags, !rflags::AC as u32);
            self.view = View::Kernel;
        }
        let view = self.view as u8;
        self.asm.store_imm8(slot(at::VIEW), view);
        self.asm.store_imm8(slot(at::CONTEXT), self.place.mode as u8 & !3 | view);
        self.asm.store_imm32(slot(at::LINK_ID), 0);
    }

    /// `SWAPGS` at CPL 0.
    pub fn swap_gs(&mut self) {
        let (base, other) = (slot(at::segment_base(seg::GS)), slot(at::KERNEL_GS_BASE));
        self.asm.load(A, base);
        self.asm.load(B, other);
        self.asm.store(base, B);
        self.asm.store(other, A);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_is_stored_as_its_number() {
        for view in [View::User, View::Kernel, View::KernelUser] {
            let cell = Some(view);
            // `Builder::user_access` writes the byte.
            assert_eq!(cell.map(|v| v as u8), Some(view as u8));
            let bytes = crate::x86::cpu::Mode { view: cell, ..Default::default() };
            assert_eq!(bytes.view, cell);
        }
    }
}
