//! Jumps, calls and returns.

use super::super::op::reg;
use super::asm::{Alu, Mem, cc, host};
use super::build::{Builder, Cold, in_page, link_entry, slot};
use super::frame::at;
use super::insn::{ARITHMETIC, Insn, gpr};
use super::memory::Location;
use super::regs::{A, B};
use super::site::Entry;

impl Builder<'_> {
    pub(super) fn jump(&mut self, insn: &Insn) {
        self.go(insn, insn.target(), insn.live_after);
    }

    pub(super) fn branch(&mut self, insn: &Insn) {
        self.want_host(insn.needs() | insn.live_after);
        // The condition is in the low bits of the last opcode byte, short form and near.
        let condition = insn.ins.condition_code() as u8;
        let jump = self.asm.jcc_forward(condition_bits(condition));
        let save = self.host && !self.slot;
        self.cold.push(match in_page(insn.target()) {
            Some(target) => Cold::Link { jump, target, entry: link_entry(target, insn), save },
            None => Cold::Far { jump, offset: insn.target(), save },
        });
    }

    /// `LOOP`, and the jumps if RCX is zero. They go on as calls do, for the comparison is in the flags.
    pub(super) fn count_down(&mut self, insn: &Insn) {
        self.disturb(insn.live_after);
        let counts = insn.ins.is_loop();
        if counts {
            self.asm.lea(!self.narrow, host::RCX, &Mem::at(host::RCX, -1));
        }
        self.asm.op_reg(!self.narrow, &[0x85], host::RCX, host::RCX); // test
        let jump = self.asm.jcc_forward(if counts { cc::NZ } else { cc::Z });
        let (offset, save) = (insn.target(), false);
        self.cold.push(match in_page(offset) {
            Some(target) => {
                let forward = link_entry(target, insn) == Entry::Direct;
                let entry = if forward { Entry::Forward } else { Entry::Indirect };
                Cold::Link { jump, target, entry, save }
            }
            None => Cold::Far { jump, offset, save },
        });
    }

    pub(super) fn call(&mut self, insn: &Insn) {
        self.push_return(insn);
        // Calls go on as jumps to other pages do: the flags are in their slot already.
        match in_page(insn.target()) {
            Some(target) => {
                let jump = self.asm.jmp_forward();
                let entry = if target > insn.at { Entry::Forward } else { Entry::Indirect };
                self.cold.push(Cold::Link { jump, target, entry, save: false });
            }
            None => self.far(insn.target()),
        }
    }

    /// Pushes the address behind a call.
    fn push_return(&mut self, insn: &Insn) {
        self.disturb(insn.live_after);
        let word = insn.word() as i32;
        let operand = self.stack(insn, Location::at(reg::RSP, -word), true, true);
        self.page_relative(B, insn.end().into());
        self.store_word(operand.mem, B);
        self.move_stack(-word);
        self.complete(insn, operand);
    }

    pub(super) fn ret(&mut self, insn: &Insn) {
        self.disturb(ARITHMETIC);
        let operand = self.stack(insn, Location::at(reg::RSP, 0), false, false);
        self.load_word(A, operand.mem);
        self.move_stack(insn.ins.stack_pointer_increment());
        self.indirect();
        self.complete(insn, operand);
    }

    pub(super) fn jump_indirect(&mut self, insn: &Insn) {
        self.disturb(ARITHMETIC);
        self.target(insn);
        self.indirect();
    }

    pub(super) fn call_indirect(&mut self, insn: &Insn) {
        self.disturb(ARITHMETIC);
        self.target(insn);
        self.asm.store(slot(at::TEMP), A);
        self.push_return(insn);
        self.asm.load(A, Mem::at(host::RSP, at::TEMP));
        self.indirect();
    }

    /// Goes on at the linear address in A. Flags are in their slot.
    pub(super) fn indirect(&mut self) {
        let view = self.view;
        self.asm.movzx_byte(B, A);
        self.asm.alu_mem(Alu::Cmp, A, Mem::indexed(host::RSP, B, 3, at::latest_linear(view)));
        self.asm.jcc(cc::NZ, self.place.stubs.indirect[view as usize]);
        self.asm.alu_imm(true, Alu::And, A, -0x1000);
        self.asm.store(slot(at::PAGE), A);
        self.asm.jmp_mem(Mem::indexed(host::RSP, B, 3, at::latest_code(view)));
    }

    /// The target of an indirect jump or call to A.
    fn target(&mut self, insn: &Insn) {
        let Some(access) = insn.memory else {
            let number = gpr(insn.ins.op0_register()).unwrap_or(0);
            let register = self.in_register(number, A);
            if self.narrow {
                return self.asm.mov32(A, register);
            }
            return self.asm.mov(A, register);
        };
        let operand = self.memory(insn, access, false);
        self.load_word(A, operand.mem);
        self.complete(insn, operand);
    }
}

/// Condition bits of an opcode, from iced's numbering (which is theirs, counted from one).
fn condition_bits(code: u8) -> u8 {
    code.wrapping_sub(1) & 15
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    #[test]
    fn conditions_are_numbered_as_in_the_opcode() {
        for opcode in 0x70..=0x7fu8 {
            let bytes = [opcode, 0];
            let ins = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
            assert_eq!(condition_bits(ins.condition_code() as u8), opcode & 15);
        }
    }
}
