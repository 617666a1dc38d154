//! Far jumps, calls and returns.

use iced_x86::Code;

use super::super::cpu::Cpu;
use super::super::decode::Lower;
use super::super::exception::Exec;
use super::super::int::Int;
use super::super::op::{Handler, Op, flag};

/// Handlers for far control transfers.
pub fn lower(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    use Code::*;
    let handler: Handler = match l.ins.code() {
        Jmp_ptr1616 => jump::<2>,
        Jmp_ptr1632 => jump::<4>,
        Jmp_m1616 => jump_memory::<u16>,
        Jmp_m1632 => jump_memory::<u32>,
        Jmp_m1664 => jump_memory::<u64>,
        Call_ptr1616 => call::<2>,
        Call_ptr1632 => call::<4>,
        Call_m1616 => call_memory::<u16>,
        Call_m1632 => call_memory::<u32>,
        Call_m1664 => call_memory::<u64>,
        Retfw | Retfw_imm16 => far_return::<2>,
        Retfd | Retfd_imm16 => far_return::<4>,
        Retfq | Retfq_imm16 => far_return::<8>,
        Iretw => interrupt_return::<2>,
        Iretd => interrupt_return::<4>,
        Iretq => interrupt_return::<8>,
        _ => return None,
    };
    op.flags |= flag::ENDS_BLOCK;
    Some(handler)
}

/// Immediate pointers have their selector in `ext`.
fn jump<const SIZE: u64>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.far_jump(op.ext as u16, op.imm, SIZE)
}

fn call<const SIZE: u64>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.far_call(op.ext as u16, op.imm, SIZE)
}

/// Reads a far pointer: offset, then selector.
fn pointer<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec<(u16, u64)> {
    let at = cpu.ea(op);
    let offset = cpu.load::<T>(op.mem.seg, at)?;
    let selector = cpu.load::<u16>(op.mem.seg, at.wrapping_add(T::BYTES) & op.mem.mask)?;
    Ok((selector, offset.zx()))
}

fn jump_memory<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (selector, offset) = pointer::<T>(cpu, op)?;
    cpu.far_jump(selector, offset, T::BYTES)
}

fn call_memory<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (selector, offset) = pointer::<T>(cpu, op)?;
    cpu.far_call(selector, offset, T::BYTES)
}

fn far_return<const SIZE: u64>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.far_return(SIZE, op.imm & 0xffff)
}

fn interrupt_return<const SIZE: u64>(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.interrupt_return(SIZE)
}
