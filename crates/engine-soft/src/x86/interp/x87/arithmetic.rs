//! x87 instructions that the host's CPU executes.

#![allow(unsafe_code)] // calls stubs

use engine::x86::bits::rflags;

use super::{real_mode, wait};
use crate::x86::cpu::Cpu;
use crate::x86::decode::Lower;
use crate::x86::exception::Exec;
use crate::x86::fpu::X87_EXCEPTIONS;
use crate::x86::fpu::stub::{self, plan};
use crate::x86::op::{Handler, Op, seg};

/// Invalid operation, overflow, underflow: if one of them is not masked, nothing is stored
/// (SDM 1, 8.5.1, 8.5.4 and 8.5.5).
const NO_STORE: u16 = 1 << 0 | 1 << 3 | 1 << 4;

/// Parts of [`Op::imm`]: the opcode for the opcode register, the operand's size, the plan.
fn pack(opcode: u16, bytes: usize, plan: u32) -> u64 {
    u64::from(opcode) | (bytes as u64) << 16 | u64::from(plan) << 32
}

/// Has a stub made for the instruction.
pub fn lower(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    let made = stub::prepare(l.ins)?;
    op.ext = made.entry;
    op.imm = pack(opcode(l.bytes), l.ins.memory_size().size(), made.plan);
    let usual = made.plan & (plan::LOAD | plan::STORE | plan::FLAGS | plan::FLAGS_IN) == 0;
    Some(if usual { registers } else { anything })
}

/// The low 3 bits of the first opcode byte and the second byte (SDM 1, 8.1.9).
fn opcode(bytes: &[u8]) -> u16 {
    let at = bytes.iter().position(|byte| (0xd8..=0xdf).contains(byte)).unwrap_or(0);
    let byte = |n: usize| u16::from(bytes.get(at + n).copied().unwrap_or(0));
    (byte(0) & 7) << 8 | byte(1)
}

fn registers(cpu: &mut Cpu, op: &Op) -> Exec {
    wait(cpu)?;
    run(cpu, op);
    Ok(())
}

fn anything(cpu: &mut Cpu, op: &Op) -> Exec {
    wait(cpu)?;
    let (bytes, plan) = (op.imm >> 16 & 0xff, (op.imm >> 32) as u32);
    let mut linear = 0;
    if plan & (plan::LOAD | plan::STORE) != 0 {
        linear = cpu.linear(op.mem.seg, cpu.ea(op), bytes, plan & plan::STORE != 0)?;
    }
    if plan & plan::LOAD != 0 {
        load(cpu, linear, bytes)?;
    }
    if plan & plan::STORE != 0 {
        cpu.probe_write(cpu.view(), linear, bytes)?;
    }
    cpu.fpu.flags = cpu.rflags & rflags::STATUS | rflags::FIXED;
    run(cpu, op);
    if plan & plan::FLAGS != 0 {
        cpu.rflags = cpu.rflags & !rflags::STATUS | cpu.fpu.flags & rflags::STATUS;
    }
    if plan & (plan::LOAD | plan::STORE) != 0 {
        let base = if real_mode(cpu) { cpu.segs[usize::from(op.mem.seg & 7).min(5)].base } else { 0 };
        cpu.fpu.pointers.fdp = cpu.ea(op).wrapping_add(base);
    }
    let x87 = &cpu.fpu.x87;
    if plan & plan::STORE != 0 && x87.fsw & !x87.fcw & NO_STORE == 0 {
        store(cpu, linear, bytes)?;
    }
    Ok(())
}

/// Executes the instruction on the guest's registers.
#[inline(always)]
fn run(cpu: &mut Cpu, op: &Op) {
    let control = cpu.fpu.x87.fcw;
    let ignored = cpu.fpu.x87.pending(); // with CR0.NE clear
    if ignored {
        cpu.fpu.x87.fcw |= X87_EXCEPTIONS;
        cpu.fpu.x87.summarize();
    }
    // SAFETY: `lower` put the entry there.
    unsafe { stub::call(&mut cpu.fpu, op.ext, [0; 4]) };
    if ignored {
        cpu.fpu.x87.fcw = control;
        cpu.fpu.x87.summarize();
    }
    let base = if real_mode(cpu) { cpu.segs[usize::from(seg::CS)].base } else { 0 };
    cpu.fpu.pointers.fip = cpu.rip().wrapping_add(base);
    cpu.fpu.pointers.fop = op.imm as u16 & 0x7ff;
}

fn load(cpu: &mut Cpu, linear: u64, bytes: u64) -> Exec {
    let view = cpu.view();
    match bytes {
        2 => cpu.fpu.operand[0] = cpu.load_linear::<u16>(view, linear)?.into(),
        4 => cpu.fpu.operand[0] = cpu.load_linear::<u32>(view, linear)?.into(),
        8 => cpu.fpu.operand[0] = cpu.load_linear::<u64>(view, linear)?,
        _ => {
            cpu.fpu.operand[0] = cpu.load_linear::<u64>(view, linear)?;
            cpu.fpu.operand[1] = cpu.load_linear::<u16>(view, cpu.along(linear, 8))?.into();
        }
    }
    Ok(())
}

fn store(cpu: &mut Cpu, linear: u64, bytes: u64) -> Exec {
    let (view, [low, high, ..]) = (cpu.view(), cpu.fpu.operand);
    match bytes {
        2 => cpu.store_linear(view, linear, low as u16),
        4 => cpu.store_linear(view, linear, low as u32),
        8 => cpu.store_linear(view, linear, low),
        _ => {
            cpu.store_linear(view, linear, low)?;
            cpu.store_linear(view, cpu.along(linear, 8), high as u16)
        }
    }
}
