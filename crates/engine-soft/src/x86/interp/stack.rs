//! Push, pop, near calls and returns, stack frames.

use iced_x86::{Code, Mnemonic};

use super::branch::{checked, direct, target_bits};
use super::forms::by_word;
use crate::x86::cpu::Cpu;
use crate::x86::decode::Lower;
use crate::x86::exception::Exec;
use crate::x86::int::Int;
use crate::x86::op::{Handler, Op, flag, reg, seg};

/// The instance of a generic handler for the width `T` of what is pushed and `S` of the stack pointer.
macro_rules! by_stack {
    ($l:expr, $bits:expr, $t:ident, $s:ident => $handler:expr) => {
        match $l.stack_bits {
            64 => {
                type $s = u64;
                by_word!($bits, $t => $handler)
            }
            32 => {
                type $s = u32;
                by_word!($bits, $t => $handler)
            }
            _ => {
                type $s = u16;
                by_word!($bits, $t => $handler)
            }
        }
    };
}

/// Chooses the handler.
pub fn lower(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    match l.ins.mnemonic() {
        Mnemonic::Push => push(l),
        Mnemonic::Pop => pop(l),
        Mnemonic::Call => call(l, op),
        Mnemonic::Ret => ret(l, op),
        Mnemonic::Enter => enter(l, op),
        Mnemonic::Leave => Some(by_stack!(l, frame_bits(l), T, S => leave_frame::<T, S>)),
        Mnemonic::Pusha | Mnemonic::Pushad => {
            Some(by_stack!(l, if l.ins.code() == Code::Pushaw { 16 } else { 32 }, T, S => push_all::<T, S>))
        }
        Mnemonic::Popa | Mnemonic::Popad => {
            Some(by_stack!(l, if l.ins.code() == Code::Popaw { 16 } else { 32 }, T, S => pop_all::<T, S>))
        }
        _ => None,
    }
}

/// Width of what a `PUSH` or `POP` moves.
fn moved_bits(l: &Lower<'_>) -> u32 {
    l.ins.stack_pointer_increment().unsigned_abs() * 8
}

fn push(l: &Lower<'_>) -> Option<Handler> {
    let bits = moved_bits(l);
    Some(if l.is_mem(0) {
        by_stack!(l, bits, T, S => push_m::<T, S>)
    } else if l.is_imm(0) {
        by_stack!(l, bits, T, S => push_i::<T, S>)
    } else if l.ins.op_register(0).is_segment_register() {
        by_stack!(l, bits, T, S => push_segment::<T, S>)
    } else {
        by_stack!(l, bits, T, S => push_r::<T, S>)
    })
}

fn pop(l: &Lower<'_>) -> Option<Handler> {
    let bits = moved_bits(l);
    if l.is_mem(0) {
        return Some(by_stack!(l, bits, T, S => pop_m::<T, S>));
    }
    if l.ins.op_register(0).is_segment_register() {
        return None; // loads a descriptor
    }
    Some(by_stack!(l, bits, T, S => pop_r::<T, S>))
}

fn call(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    op.flags |= flag::ENDS_BLOCK;
    match l.ins.code() {
        Code::Call_rel16 | Code::Call_rel32_32 | Code::Call_rel32_64 => {
            Some(by_stack!(l, target_bits(l), T, S => call_direct::<T, S>))
        }
        Code::Call_rm16 | Code::Call_rm32 | Code::Call_rm64 => Some(by_stack!(l, l.width(0), T, S => {
            if l.is_mem(0) { call_memory::<T, S> } else { call_register::<T, S> }
        })),
        _ => None, // to another segment
    }
}

fn ret(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    op.flags |= flag::ENDS_BLOCK;
    let bits = match l.ins.code() {
        Code::Retnw | Code::Retnw_imm16 => 16,
        Code::Retnd | Code::Retnd_imm16 => 32,
        _ => 64,
    };
    Some(by_stack!(l, bits, T, S => ret_near::<T, S>))
}

fn frame_bits(l: &Lower<'_>) -> u32 {
    match l.ins.code() {
        Code::Enterw_imm16_imm8 | Code::Leavew => 16,
        Code::Enterd_imm16_imm8 | Code::Leaved => 32,
        _ => 64,
    }
}

fn enter(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    op.imm = l.ins.immediate16().into();
    op.ext = u32::from(l.ins.immediate8_2nd()) % 32;
    Some(by_stack!(l, frame_bits(l), T, S => enter_frame::<T, S>))
}

/// The stack pointer, as wide as the stack.
#[inline(always)]
fn pointer<S: Int>(cpu: &Cpu) -> u64 {
    S::get(cpu, reg::RSP).zx()
}

#[inline(always)]
fn set_pointer<S: Int>(cpu: &mut Cpu, value: u64) {
    S::set(cpu, reg::RSP, S::cut(value));
}

/// Stores below `top` and returns the new top; the stack pointer is the caller's business.
#[inline(always)]
fn store_below<T: Int, S: Int>(cpu: &mut Cpu, top: u64, value: T) -> Exec<u64> {
    let top = top.wrapping_sub(T::BYTES) & S::MASK;
    cpu.store(seg::SS, top, value)?;
    Ok(top)
}

/// Pushes a value.
#[inline(always)]
fn push_value<T: Int, S: Int>(cpu: &mut Cpu, value: T) -> Exec {
    let top = store_below::<T, S>(cpu, pointer::<S>(cpu), value)?;
    set_pointer::<S>(cpu, top);
    Ok(())
}

fn push_r<T: Int, S: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    push_value::<T, S>(cpu, T::get(cpu, op.dst))
}

fn push_i<T: Int, S: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    push_value::<T, S>(cpu, T::cut(op.imm))
}

fn push_m<T: Int, S: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.load_mem::<T>(op)?;
    push_value::<T, S>(cpu, value)
}

/// The selector, zero-extended (SDM 2, `PUSH`: one of the two ways that CPUs do it).
fn push_segment<T: Int, S: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let selector = cpu.segs[usize::from(op.dst & 7).min(5)].selector;
    push_value::<T, S>(cpu, T::cut(selector.into()))
}

fn pop_r<T: Int, S: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let top = pointer::<S>(cpu);
    let value = cpu.load::<T>(seg::SS, top)?;
    set_pointer::<S>(cpu, top.wrapping_add(T::BYTES));
    T::set(cpu, op.dst, value); // last: of `POP rSP` the value stays
    Ok(())
}

fn pop_m<T: Int, S: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (before, top) = (cpu.regs[usize::from(reg::RSP)], pointer::<S>(cpu));
    let value = cpu.load::<T>(seg::SS, top)?;
    // An address relative to rSP is relative to rSP behind the pop (SDM 2, `POP`).
    set_pointer::<S>(cpu, top.wrapping_add(T::BYTES));
    cpu.store_mem(op, value).inspect_err(|_| cpu.regs[usize::from(reg::RSP)] = before)
}

#[inline(always)]
fn call_to<T: Int, S: Int>(cpu: &mut Cpu, target: u64) -> Exec {
    push_value::<T, S>(cpu, T::cut(cpu.next_rip))?;
    cpu.next_rip = target;
    Ok(())
}

fn call_direct<T: Int, S: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let target = direct::<T>(cpu, op)?;
    call_to::<T, S>(cpu, target)
}

fn call_register<T: Int, S: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let target = checked::<T>(cpu, T::get(cpu, op.dst).zx())?;
    call_to::<T, S>(cpu, target)
}

fn call_memory<T: Int, S: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let target = cpu.load_mem::<T>(op)?.zx();
    let target = checked::<T>(cpu, target)?;
    call_to::<T, S>(cpu, target)
}

fn ret_near<T: Int, S: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let top = pointer::<S>(cpu);
    let target = cpu.load::<T>(seg::SS, top)?.zx();
    cpu.next_rip = checked::<T>(cpu, target)?;
    set_pointer::<S>(cpu, top.wrapping_add(T::BYTES).wrapping_add(op.imm & 0xffff));
    Ok(())
}

/// `ENTER` (SDM 2): the nesting level, 0-31, is in `ext`.
fn enter_frame<T: Int, S: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let frame_pointer = T::get(cpu, reg::RBP);
    let frame = store_below::<T, S>(cpu, pointer::<S>(cpu), frame_pointer)?;
    let mut top = frame;
    if op.ext > 0 {
        let mut outer = S::get(cpu, reg::RBP).zx();
        for _ in 1..op.ext {
            outer = outer.wrapping_sub(T::BYTES) & S::MASK;
            let pointer = cpu.load::<T>(seg::SS, outer)?;
            top = store_below::<T, S>(cpu, top, pointer)?;
        }
        top = store_below::<T, S>(cpu, top, T::cut(frame))?;
    }
    top = top.wrapping_sub(op.imm) & S::MASK;
    // The new top must be writable, though nothing is written.
    let linear = cpu.linear(seg::SS, top, T::BYTES, true)?;
    cpu.probe_write(cpu.view(), linear, T::BYTES)?;
    T::set(cpu, reg::RBP, T::cut(frame));
    set_pointer::<S>(cpu, top);
    Ok(())
}

fn leave_frame<T: Int, S: Int>(cpu: &mut Cpu, _: &Op) -> Exec {
    let frame = S::get(cpu, reg::RBP).zx();
    let value = cpu.load::<T>(seg::SS, frame)?;
    set_pointer::<S>(cpu, frame.wrapping_add(T::BYTES));
    T::set(cpu, reg::RBP, value);
    Ok(())
}

fn push_all<T: Int, S: Int>(cpu: &mut Cpu, _: &Op) -> Exec {
    let mut top = pointer::<S>(cpu);
    for register in reg::RAX..=reg::RDI {
        top = store_below::<T, S>(cpu, top, T::get(cpu, register))?;
    }
    set_pointer::<S>(cpu, top);
    Ok(())
}

fn pop_all<T: Int, S: Int>(cpu: &mut Cpu, _: &Op) -> Exec {
    let mut top = pointer::<S>(cpu);
    let mut values = [T::cut(0); 8];
    for value in values.iter_mut().rev() {
        *value = cpu.load(seg::SS, top)?;
        top = top.wrapping_add(T::BYTES) & S::MASK;
    }
    for (register, value) in (reg::RAX..=reg::RDI).zip(values) {
        if register != reg::RSP {
            T::set(cpu, register, value);
        }
    }
    set_pointer::<S>(cpu, top);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::exception::Exception;
    use crate::x86::op::RIP;
    use crate::x86::testing::{CODE, DATA, Guest, STACK};

    const RAX: usize = reg::RAX as usize;
    const RBX: usize = reg::RBX as usize;
    const RSP: usize = reg::RSP as usize;
    const RBP: usize = reg::RBP as usize;

    #[test]
    fn pushes_and_pops_of_the_stack_pointer_itself() {
        let mut guest = Guest::new(64, &[0x54, 0x58, 0x53, 0x5c]); // push rsp; pop rax; push rbx; pop rsp
        guest.cpu.regs[RBX] = 0x1234;
        guest.steps(2).unwrap();
        assert_eq!((guest.cpu.regs[RAX], guest.cpu.regs[RSP]), (STACK, STACK));
        guest.steps(2).unwrap();
        assert_eq!(guest.cpu.regs[RSP], 0x1234);
    }

    #[test]
    fn immediates_are_sign_extended_to_the_operand_size() {
        let mut guest = Guest::new(64, &[0x6a, 0xff, 0x66, 0x6a, 0xfe, 0x68, 0, 0, 0, 0x80]);
        guest.steps(3).unwrap();
        assert_eq!(guest.cpu.regs[RSP], STACK - 18);
        assert_eq!(guest.peek(STACK - 8), u64::MAX.to_le_bytes());
        assert_eq!(guest.peek(STACK - 10), 0xfffeu16.to_le_bytes());
        assert_eq!(guest.peek(STACK - 18), 0xffff_ffff_8000_0000u64.to_le_bytes());
    }

    #[test]
    fn a_pop_to_memory_sees_the_new_stack_pointer_and_keeps_the_old_on_a_fault() {
        let mut guest = Guest::new(64, &[0x8f, 0x04, 0x24, 0x8f, 0x00]); // pop [rsp]; pop [rax]
        guest.cpu.regs[RSP] = STACK - 16;
        guest.poke(STACK - 16, &[7; 8]);
        guest.steps(1).unwrap();
        assert_eq!(guest.peek(STACK - 8), [7; 8]);
        guest.cpu.regs[RAX] = 1 << 47;
        assert_eq!(guest.step(), Err(Exception::GP0));
        assert_eq!(guest.cpu.regs[RSP], STACK - 8);
    }

    #[test]
    fn a_call_comes_back_and_drops_its_arguments() {
        let mut guest = Guest::new(32, &[0xe8, 1, 0, 0, 0, 0x90, 0xc2, 8, 0]); // call +1; nop; ret 8
        guest.steps(1).unwrap();
        assert_eq!((guest.cpu.rip(), guest.cpu.regs[RSP]), (CODE + 6, STACK - 4));
        guest.steps(1).unwrap();
        assert_eq!((guest.cpu.rip(), guest.cpu.regs[RSP]), (CODE + 5, STACK + 8));
    }

    #[test]
    fn a_return_to_nowhere_faults_before_anything_moves() {
        let mut guest = Guest::new(64, &[0xc3]);
        guest.cpu.regs[RSP] = STACK - 8;
        guest.poke(STACK - 8, &(1u64 << 63).to_le_bytes());
        assert_eq!(guest.step(), Err(Exception::GP0));
        assert_eq!((guest.cpu.rip(), guest.cpu.regs[RSP]), (CODE, STACK - 8));
    }

    #[test]
    fn a_16_bit_stack_wraps_and_keeps_the_upper_half_of_its_pointer() {
        let mut guest = Guest::new(16, &[0x50, 0x66, 0x50]); // push ax; push eax
        (guest.cpu.regs[RAX], guest.cpu.regs[RSP]) = (0x1122_3344, 0xabcd_0000);
        guest.steps(2).unwrap();
        assert_eq!(guest.cpu.regs[RSP], 0xabcd_fffa);
        assert_eq!(guest.peek(0xfffa), [0x44, 0x33, 0x22, 0x11, 0x44, 0x33]);
    }

    #[test]
    fn all_registers_go_and_come_back() {
        let mut guest = Guest::new(32, &[0x60, 0x61]); // pushad; popad
        for register in 0..8 {
            if register != RSP {
                guest.cpu.regs[register] = 0x1000 + register as u64;
            }
        }
        let before = guest.cpu.regs;
        guest.steps(1).unwrap();
        assert_eq!(guest.peek(STACK - 4), 0x1000u32.to_le_bytes());
        assert_eq!(guest.peek(STACK - 20), (STACK as u32).to_le_bytes());
        guest.cpu.regs[RAX] = 0;
        guest.steps(1).unwrap();
        assert_eq!(guest.cpu.regs[..8], before[..8]);
    }

    #[test]
    fn nested_frames_copy_the_display() {
        // enter 16, 2; leave
        let mut guest = Guest::new(64, &[0xc8, 16, 0, 2, 0xc9]);
        guest.cpu.regs[RBP] = DATA;
        guest.poke(DATA - 8, &5u64.to_le_bytes());
        guest.steps(1).unwrap();
        assert_eq!((guest.cpu.regs[RBP], guest.cpu.regs[RSP]), (STACK - 8, STACK - 24 - 16));
        assert_eq!(guest.peek(STACK - 8), DATA.to_le_bytes());
        assert_eq!(guest.peek(STACK - 16), 5u64.to_le_bytes());
        assert_eq!(guest.peek(STACK - 24), (STACK - 8).to_le_bytes());
        guest.steps(1).unwrap();
        assert_eq!((guest.cpu.regs[RBP], guest.cpu.regs[RSP]), (DATA, STACK));
    }

    #[test]
    fn selectors_are_pushed_zero_extended() {
        let mut guest = Guest::new(32, &[0x1e, 0x66, 0x06]); // push ds; push es (16 bits)
        guest.poke(STACK - 4, &[0xff; 4]);
        guest.steps(2).unwrap();
        assert_eq!(guest.peek(STACK - 6), [0x10, 0, 0x10, 0, 0, 0]);
        assert_eq!(guest.cpu.regs[usize::from(RIP)], CODE + 3);
    }
}
