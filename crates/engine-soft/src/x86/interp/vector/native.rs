//! Instructions that the host's CPU executes, through a stub.

#![allow(unsafe_code)] // calls stubs

use engine::x86::bits::{cr4, rflags};
use iced_x86::{EncodingKind, OpKind};

use crate::x86::cpu::Cpu;
use crate::x86::decode::Lower;
use crate::x86::exception::{Exception, Exec, vector};
use crate::x86::fpu::stub::{self, plan};
use crate::x86::fpu::{MXCSR_FLAGS, MXCSR_FTZ, MXCSR_MASKS};
use crate::x86::op::reg::{RAX, RCX, RDX};
use crate::x86::op::{Handler, Op};

/// The exceptions that are found before anything is computed: invalid, denormal, divide by zero
/// (SDM 1, 11.5.2). If one of them is not masked, the others are not looked for.
const BEFORE_COMPUTATION: u32 = 0b111;
const UNDERFLOW: u32 = 1 << 4;

/// What [`Op::imm`] holds for these handlers.
#[derive(Clone, Copy)]
struct Wanted(u64);

impl Wanted {
    fn new(plan: u32, bytes: usize, fourth: u8, gprs: [u8; 2]) -> Wanted {
        let parts = [bytes as u8, fourth, gprs[0], gprs[1]];
        Wanted(u64::from(plan) | u64::from(u32::from_le_bytes(parts)) << 32)
    }

    #[inline(always)]
    fn plan(self) -> u32 {
        self.0 as u32
    }

    #[inline(always)]
    fn has(self, bits: u32) -> bool {
        self.plan() & bits != 0
    }

    /// Size of the memory operand.
    #[inline(always)]
    fn bytes(self) -> u64 {
        self.0 >> 32 & 0xff
    }

    #[inline(always)]
    fn fourth(self) -> u8 {
        (self.0 >> 40) as u8
    }

    #[inline(always)]
    fn gpr(self, n: u32) -> usize {
        (self.0 >> (48 + 8 * n) & 15) as usize
    }
}

/// Has a stub made for the instruction.
pub fn lower(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    let made = stub::prepare(l.ins)?;
    if made.plan & plan::X87 != 0 {
        return None;
    }
    let (mut vectors, mut gprs, mut gpr_count) = ([0u8; 4], [0u8; 2], 0);
    for n in 0..l.ins.op_count().min(4) {
        if l.ins.op_kind(n) != OpKind::Register {
            continue;
        }
        let register = l.ins.op_register(n);
        if register.is_gpr() {
            gprs[gpr_count & 1] = register.number() as u8;
            gpr_count += 1;
        } else {
            vectors[n as usize] = register.number() as u8 * 16;
        }
    }
    [op.dst, op.src, op.aux, _] = vectors;
    let bytes = l.ins.memory_size().size();
    let wanted = Wanted::new(made.plan, bytes, vectors[3], gprs);
    (op.ext, op.imm) = (made.entry, wanted.0);
    let vex = l.ins.code().encoding() == EncodingKind::VEX;
    Some(match (wanted.has(plan::UNUSUAL), wanted.has(plan::LOAD), vex) {
        (false, false, false) if wanted.has(plan::SSE) => registers::<false>,
        (false, false, true) => registers::<true>,
        (false, true, false) if wanted.has(plan::SSE) && bytes == 16 => load_16::<false>,
        (false, true, true) if bytes == 16 => load_16::<true>,
        (false, true, true) if bytes == 32 => load_32,
        _ => anything,
    })
}

#[inline(always)]
fn call(cpu: &mut Cpu, op: &Op, wanted: Wanted) {
    // SAFETY: `lower` put the entry there.
    unsafe { stub::call(&mut cpu.fpu, op.ext, [op.dst, op.src, op.aux, wanted.fourth()]) }
}

fn registers<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    super::check::<VEX>(cpu)?;
    call(cpu, op, Wanted(op.imm));
    Ok(())
}

fn load_16<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    super::check::<VEX>(cpu)?;
    let linear = cpu.vector_linear(op, 16, Wanted(op.imm).has(plan::ALIGNED), false)?;
    let value = cpu.load16(linear)?;
    cpu.fpu.operand[..2].copy_from_slice(&value);
    call(cpu, op, Wanted(op.imm));
    Ok(())
}

fn load_32(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_avx()?;
    let linear = cpu.vector_linear(op, 32, false, false)?;
    let value = cpu.load32(linear)?;
    cpu.fpu.operand[..4].copy_from_slice(&value);
    call(cpu, op, Wanted(op.imm));
    Ok(())
}

/// All that an instruction of this kind can want.
fn anything(cpu: &mut Cpu, op: &Op) -> Exec {
    let wanted = Wanted(op.imm);
    admit(cpu, wanted)?;
    let target = operand(cpu, op, wanted)?;
    gprs_in(cpu, wanted);
    if wanted.has(plan::MXCSR) {
        with_mxcsr(cpu, op, wanted)?;
    } else {
        if wanted.has(plan::MMX) {
            cpu.fpu.x87.enter_mmx();
        }
        call(cpu, op, wanted);
    }
    if wanted.has(plan::MMX_OUT) {
        let number = op.dst >> 4;
        let value = cpu.fpu.x87.mm(number);
        cpu.fpu.x87.set_mm(number, value);
    }
    gprs_out(cpu, wanted);
    if wanted.has(plan::FLAGS) {
        cpu.rflags = cpu.rflags & !rflags::STATUS | cpu.fpu.flags & rflags::STATUS;
    }
    match target {
        Some(linear) => store(cpu, linear, wanted.bytes()),
        None => Ok(()),
    }
}

/// Raises `#UD`, `#NM` or `#MF` if the instruction may not execute.
fn admit(cpu: &mut Cpu, wanted: Wanted) -> Exec {
    if wanted.has(plan::AVX) {
        cpu.check_avx()?;
    }
    if wanted.has(plan::SSE) {
        cpu.check_sse()?;
    }
    if wanted.has(plan::MMX) {
        cpu.check_mmx()?;
    }
    Ok(())
}

/// Loads the memory operand, or makes sure that it can be stored; answers where to.
fn operand(cpu: &mut Cpu, op: &Op, wanted: Wanted) -> Exec<Option<u64>> {
    if !wanted.has(plan::LOAD | plan::STORE) {
        return Ok(None);
    }
    let linear = cpu.vector_linear(op, wanted.bytes(), wanted.has(plan::ALIGNED), wanted.has(plan::STORE))?;
    if wanted.has(plan::LOAD) {
        load(cpu, linear, wanted.bytes())?;
    }
    if !wanted.has(plan::STORE) {
        return Ok(None);
    }
    cpu.probe_write(cpu.view(), linear, wanted.bytes())?;
    Ok(Some(linear))
}

fn load(cpu: &mut Cpu, linear: u64, bytes: u64) -> Exec {
    let view = cpu.view();
    let low = match bytes {
        1 => cpu.load_linear::<u8>(view, linear)?.into(),
        2 => cpu.load_linear::<u16>(view, linear)?.into(),
        4 => cpu.load_linear::<u32>(view, linear)?.into(),
        8 => cpu.load_linear::<u64>(view, linear)?,
        16 => {
            let value = cpu.load16(linear)?;
            cpu.fpu.operand[..2].copy_from_slice(&value);
            return Ok(());
        }
        _ => {
            let value = cpu.load32(linear)?;
            cpu.fpu.operand[..4].copy_from_slice(&value);
            return Ok(());
        }
    };
    cpu.fpu.operand[0] = low;
    Ok(())
}

fn store(cpu: &mut Cpu, linear: u64, bytes: u64) -> Exec {
    let (view, [a, b, c, d, ..]) = (cpu.view(), cpu.fpu.operand);
    match bytes {
        1 => cpu.store_linear(view, linear, a as u8),
        2 => cpu.store_linear(view, linear, a as u16),
        4 => cpu.store_linear(view, linear, a as u32),
        8 => cpu.store_linear(view, linear, a),
        16 => cpu.store16(linear, [a, b]),
        _ => cpu.store32(linear, [a, b, c, d]),
    }
}

fn gprs_in(cpu: &mut Cpu, wanted: Wanted) {
    if wanted.has(plan::GPR0_IN) {
        cpu.fpu.gpr[0] = cpu.regs[wanted.gpr(0)];
    }
    if wanted.has(plan::GPR1_IN) {
        cpu.fpu.gpr[1] = cpu.regs[wanted.gpr(1)];
    }
    if wanted.has(plan::STRING_LENGTHS) {
        cpu.fpu.gpr[0] = cpu.regs[usize::from(RAX)];
        cpu.fpu.gpr[1] = cpu.regs[usize::from(RDX)];
    }
}

fn gprs_out(cpu: &mut Cpu, wanted: Wanted) {
    if wanted.has(plan::GPR0_OUT) {
        cpu.regs[wanted.gpr(0)] = cpu.fpu.gpr[0];
    }
    if wanted.has(plan::STRING_INDEX) {
        cpu.regs[usize::from(RCX)] = cpu.fpu.gpr[2];
    }
}

/// Executes with the guest's rounding and denormals, all exceptions masked, and reports those that
/// the guest does not mask; then nothing has changed but the exception flags.
fn with_mxcsr(cpu: &mut Cpu, op: &Op, wanted: Wanted) -> Exec {
    let mxcsr = cpu.fpu.mxcsr;
    if mxcsr & MXCSR_MASKS != MXCSR_MASKS {
        return unmasked(cpu, op, wanted);
    }
    if wanted.has(plan::MMX) {
        cpu.fpu.x87.enter_mmx();
    }
    cpu.fpu.run_mxcsr = mxcsr & !MXCSR_FLAGS;
    call(cpu, op, wanted);
    cpu.fpu.mxcsr |= cpu.fpu.run_mxcsr & MXCSR_FLAGS;
    Ok(())
}

#[cold]
fn unmasked(cpu: &mut Cpu, op: &Op, wanted: Wanted) -> Exec {
    let mxcsr = cpu.fpu.mxcsr;
    let armed = !(mxcsr >> 7) & MXCSR_FLAGS;
    let before = cpu.fpu.clone();
    let run = |cpu: &mut Cpu, control: u32| {
        cpu.fpu = before.clone();
        if wanted.has(plan::MMX) {
            cpu.fpu.x87.enter_mmx();
        }
        cpu.fpu.run_mxcsr = control & !MXCSR_FLAGS | MXCSR_MASKS;
        call(cpu, op, wanted);
        cpu.fpu.run_mxcsr & MXCSR_FLAGS
    };
    // One thing stays unknown: whether the result that an unmasked overflow or underflow would have
    // delivered, with an unbounded exponent, is inexact; PE says it of the masked one.
    //
    // An unmasked underflow is raised for a tiny result even if it is exact, which masked execution
    // does not report – but flushing to zero does. An unmasked underflow turns flushing off.
    let mut control = mxcsr;
    let mut tiny = 0;
    if armed & UNDERFLOW != 0 {
        tiny = run(cpu, mxcsr | MXCSR_FTZ) & UNDERFLOW;
        control &= !MXCSR_FTZ;
    }
    let mut raised = run(cpu, control) | tiny;
    if raised & armed & BEFORE_COMPUTATION != 0 {
        raised &= BEFORE_COMPUTATION;
    }
    if raised & armed == 0 {
        cpu.fpu.mxcsr |= raised;
        return Ok(());
    }
    cpu.fpu = before;
    cpu.fpu.mxcsr |= raised;
    if wanted.has(plan::MMX) {
        cpu.fpu.x87.enter_mmx(); // which comes before the computation
    }
    let known = cpu.cr4 & cr4::OSXMMEXCPT != 0;
    Err(if known { Exception::new(vector::XM) } else { Exception::UD })
}
