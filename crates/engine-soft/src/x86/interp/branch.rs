//! Near jumps, loops, conditions as bytes.
//!
//! A conditional branch does not end its block: not taken, execution goes on in it; taken, it leaves
//! it by [`Cpu::leave_block`].

use engine::x86::bits::rflags::ZF;
use iced_x86::{Code, FlowControl, Mnemonic, OpKind};

use super::flags::holds;
use super::forms::{by_condition, by_word};
use crate::x86::access::canonical;
use crate::x86::cpu::Cpu;
use crate::x86::decode::{Lower, is_setcc};
use crate::x86::exception::{Exception, Exec};
use crate::x86::int::Int;
use crate::x86::op::{Handler, Op, flag, reg, seg};

/// Chooses the handler.
pub fn lower(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    match l.ins.mnemonic() {
        Mnemonic::Jmp => jmp(l, op),
        Mnemonic::Loop => counted::<ANY>(l),
        Mnemonic::Loope => counted::<WHILE_EQUAL>(l),
        Mnemonic::Loopne => counted::<WHILE_DIFFERENT>(l),
        Mnemonic::Jcxz => Some(by_word!(target_bits(l), T => jump_if_none::<T, u16>)),
        Mnemonic::Jecxz => Some(by_word!(target_bits(l), T => jump_if_none::<T, u32>)),
        Mnemonic::Jrcxz => Some(by_word!(target_bits(l), T => jump_if_none::<T, u64>)),
        _ if l.ins.is_jcc_short_or_near() => {
            let condition = (l.ins.condition_code() as u8).wrapping_sub(1);
            Some(by_condition!(condition, C => by_word!(target_bits(l), T => jcc::<T, C>)))
        }
        _ => setcc(l),
    }
}

/// Width of a direct branch's target.
pub fn target_bits(l: &Lower<'_>) -> u32 {
    match l.ins.op_kind(0) {
        OpKind::NearBranch16 => 16,
        OpKind::NearBranch32 => 32,
        OpKind::NearBranch64 => 64,
        _ => 0,
    }
}

fn jmp(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    op.flags |= flag::ENDS_BLOCK;
    match l.ins.flow_control() {
        FlowControl::UnconditionalBranch if target_bits(l) != 0 => {
            Some(by_word!(target_bits(l), T => jmp_direct::<T>))
        }
        FlowControl::IndirectBranch => match l.ins.code() {
            Code::Jmp_rm16 | Code::Jmp_rm32 | Code::Jmp_rm64 => Some(by_word!(l.width(0), T => {
                if l.is_mem(0) { jmp_memory::<T> } else { jmp_register::<T> }
            })),
            _ => None, // through a far pointer
        },
        _ => None, // to another segment
    }
}

fn setcc(l: &Lower<'_>) -> Option<Handler> {
    if !is_setcc(l.ins.mnemonic()) {
        return None;
    }
    let condition = (l.ins.condition_code() as u8).wrapping_sub(1);
    Some(by_condition!(condition, C => if l.is_mem(0) { set_m::<C> } else { set_r::<C> }))
}

/// Checks where a near branch goes: a canonical address (SDM 1, 6.2.1), outside of 64-bit code one
/// within the code segment's limit.
#[inline(always)]
pub fn checked<T: Int>(cpu: &Cpu, target: u64) -> Exec<u64> {
    let target = target & T::MASK;
    let good =
        if T::BITS == 64 { canonical(target) } else { target <= cpu.segs[usize::from(seg::CS)].limit.into() };
    if good { Ok(target) } else { Err(Exception::GP0) }
}

/// Target of a direct branch, checked.
#[inline(always)]
pub fn direct<T: Int>(cpu: &Cpu, op: &Op) -> Exec<u64> {
    checked::<T>(cpu, cpu.rip().wrapping_add(op.imm))
}

#[inline(always)]
fn take<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.next_rip = direct::<T>(cpu, op)?;
    cpu.leave_block = true;
    Ok(())
}

fn jcc<T: Int, const C: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    if holds::<C>(cpu.rflags) { take::<T>(cpu, op) } else { Ok(()) }
}

fn jmp_direct<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.next_rip = direct::<T>(cpu, op)?;
    Ok(())
}

fn jmp_register<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.next_rip = checked::<T>(cpu, T::get(cpu, op.dst).zx())?;
    Ok(())
}

fn jmp_memory<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let target = cpu.load_mem::<T>(op)?.zx();
    cpu.next_rip = checked::<T>(cpu, target)?;
    Ok(())
}

const ANY: u8 = 0;
const WHILE_EQUAL: u8 = 1;
const WHILE_DIFFERENT: u8 = 2;

fn counted<const WHILE: u8>(l: &Lower<'_>) -> Option<Handler> {
    use Code::*;
    let bits = target_bits(l);
    Some(match l.ins.code() {
        Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX | Loopne_rel8_16_CX
        | Loopne_rel8_32_CX => by_word!(bits, T => loop_on::<T, u16, WHILE>),
        Loop_rel8_16_RCX | Loop_rel8_64_RCX | Loope_rel8_16_RCX | Loope_rel8_64_RCX | Loopne_rel8_16_RCX
        | Loopne_rel8_64_RCX => by_word!(bits, T => loop_on::<T, u64, WHILE>),
        _ => by_word!(bits, T => loop_on::<T, u32, WHILE>),
    })
}

fn loop_on<T: Int, A: Int, const WHILE: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    let left = A::cut(A::get(cpu, reg::RCX).zx().wrapping_sub(1));
    let goes_on = match WHILE {
        WHILE_EQUAL => cpu.flag(ZF),
        WHILE_DIFFERENT => !cpu.flag(ZF),
        _ => true,
    };
    if left.zx() != 0 && goes_on {
        take::<T>(cpu, op)?;
    }
    A::set(cpu, reg::RCX, left);
    Ok(())
}

fn jump_if_none<T: Int, A: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    if A::get(cpu, reg::RCX).zx() == 0 { take::<T>(cpu, op) } else { Ok(()) }
}

fn set_r<const C: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = holds::<C>(cpu.rflags);
    u8::set(cpu, op.dst, value.into());
    Ok(())
}

fn set_m<const C: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.store_mem(op, u8::from(holds::<C>(cpu.rflags)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::op::RIP;
    use crate::x86::testing::{CODE, DATA, Guest};

    const RAX: usize = reg::RAX as usize;
    const RCX: usize = reg::RCX as usize;

    #[test]
    fn a_branch_is_taken_or_not() {
        // je +2; jne -4 (to the start)
        let mut guest = Guest::new(64, &[0x74, 0x02, 0x75, 0xfc]);
        guest.cpu.rflags &= !ZF;
        guest.steps(2).unwrap();
        assert_eq!(guest.cpu.rip(), CODE);
        guest.cpu.rflags |= ZF;
        guest.steps(1).unwrap();
        assert_eq!(guest.cpu.rip(), CODE + 4);
    }

    #[test]
    fn a_loop_runs_its_count() {
        let mut guest = Guest::new(32, &[0x40, 0xe2, 0xfd]); // inc eax; loop -3
        guest.cpu.regs[RCX] = 3;
        guest.steps(6).unwrap();
        assert_eq!((guest.cpu.regs[RAX], guest.cpu.regs[RCX], guest.cpu.rip()), (3, 0, CODE + 3));
    }

    #[test]
    fn the_address_size_says_which_counter_is_looked_at() {
        let mut guest = Guest::new(64, &[0xe3, 0x10, 0x67, 0xe3, 0x10]); // jrcxz; jecxz
        guest.cpu.regs[RCX] = 1 << 32;
        guest.steps(2).unwrap();
        assert_eq!(guest.cpu.rip(), CODE + 5 + 16);
    }

    #[test]
    fn jumps_beyond_what_can_be_fetched_fault_where_they_are() {
        let mut guest = Guest::new(64, &[0xff, 0xe0]); // jmp rax
        guest.cpu.regs[RAX] = 1 << 47;
        assert_eq!(guest.step(), Err(Exception::GP0));
        assert_eq!(guest.cpu.rip(), CODE);
        let mut guest = Guest::new(32, &[0xff, 0x25, 0, 0, 0x10, 0]); // jmp [DATA]
        guest.cpu.segs[usize::from(seg::CS)].limit = 0x1_ffff;
        guest.poke(DATA, &0x2_0000u32.to_le_bytes());
        assert_eq!(guest.step(), Err(Exception::GP0));
        guest.poke(DATA, &0x1_fff0u32.to_le_bytes());
        guest.steps(1).unwrap();
        assert_eq!(guest.cpu.rip(), 0x1_fff0);
    }

    #[test]
    fn sixteen_bit_targets_wrap_in_their_segment() {
        let mut guest = Guest::new(16, &[0xe9, 0xfb, 0xff]); // jmp -5
        guest.steps(1).unwrap();
        assert_eq!(guest.cpu.rip(), 0xfffe);
        guest.cpu.regs[usize::from(RIP)] = 0;
        guest.cpu.segs[usize::from(seg::CS)].limit = 0xfff;
        assert_eq!(guest.step(), Err(Exception::GP0));
    }

    #[test]
    fn a_condition_becomes_a_byte() {
        let mut guest = Guest::new(64, &[0x0f, 0x94, 0xc4, 0x0f, 0x95, 0x04, 0x25, 0, 0, 0x10, 0]); // sete ah; setne
        guest.cpu.rflags |= ZF;
        guest.poke(DATA, &[9]);
        guest.steps(2).unwrap();
        assert_eq!((guest.cpu.regs[RAX], guest.peek(DATA)), (0x100, [0]));
    }
}
