//! Moves between vector registers, general registers and memory.

use iced_x86::{Code, Mnemonic};

use super::{check, either, first, is_vex, is_ymm, second, set};
use crate::x86::cpu::Cpu;
use crate::x86::decode::Lower;
use crate::x86::exception::Exec;
use crate::x86::int::Int;
use crate::x86::op::{Handler, Op};

/// Chooses the handler of a move.
pub fn lower(l: &Lower<'_>) -> Option<Handler> {
    use Mnemonic as M;
    let (vex, aligned) = match l.ins.mnemonic() {
        M::Movaps | M::Movapd | M::Movdqa | M::Movntps | M::Movntpd | M::Movntdqa => (false, true),
        M::Movups | M::Movupd | M::Movdqu | M::Lddqu => (false, false),
        // The MMX unit has no such move; MOVNTQ is another mnemonic.
        M::Movntdq => (false, true),
        M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa => {
            (true, true)
        }
        M::Vmovups | M::Vmovupd | M::Vmovdqu | M::Vlddqu => (true, false),
        _ => return partial(l),
    };
    Some(whole(l, vex, aligned))
}

/// Moves of whole registers.
fn whole(l: &Lower<'_>, vex: bool, aligned: bool) -> Handler {
    let wide = is_ymm(l.ins, 0) || is_ymm(l.ins, 1);
    match (l.is_mem(0), l.is_mem(1), wide, aligned) {
        (true, _, false, true) => either!(vex, store_aligned),
        (true, _, false, false) => either!(vex, store_unaligned),
        (true, _, true, true) => store_ymm::<true>,
        (true, _, true, false) => store_ymm::<false>,
        (_, true, false, true) => either!(vex, load_aligned),
        (_, true, false, false) => either!(vex, load_unaligned),
        (_, true, true, true) => load_ymm::<true>,
        (_, true, true, false) => load_ymm::<false>,
        (_, _, false, _) => either!(vex, copy),
        (_, _, true, _) => copy_ymm,
    }
}

/// Moves of parts of registers.
fn partial(l: &Lower<'_>) -> Option<Handler> {
    use Mnemonic as M;
    let vex = is_vex(l.ins);
    let memory = (l.is_mem(0), l.is_mem(1) || l.is_mem(2));
    Some(match (l.ins.mnemonic(), memory) {
        (M::Movss | M::Vmovss | M::Movntss, (true, _)) => either!(vex, store_32),
        (M::Movss | M::Vmovss, (_, true)) => either!(vex, load_32),
        (M::Movss | M::Vmovss, _) => either!(vex, merge_32),
        (M::Movsd | M::Vmovsd | M::Movntsd, (true, _)) if !is_string(l) => either!(vex, store_low),
        (M::Movsd | M::Vmovsd, (_, true)) if !is_string(l) => either!(vex, load_64),
        (M::Movsd | M::Vmovsd, _) if !is_string(l) => either!(vex, merge_64),
        (M::Movlps | M::Vmovlps | M::Movlpd | M::Vmovlpd, (true, _)) => either!(vex, store_low),
        (M::Movlps | M::Vmovlps | M::Movlpd | M::Vmovlpd, _) => either!(vex, load_low),
        (M::Movhps | M::Vmovhps | M::Movhpd | M::Vmovhpd, (true, _)) => either!(vex, store_high),
        (M::Movhps | M::Vmovhps | M::Movhpd | M::Vmovhpd, _) => either!(vex, load_high),
        (M::Movhlps | M::Vmovhlps, _) => either!(vex, high_to_low),
        (M::Movlhps | M::Vmovlhps, _) => either!(vex, low_to_high),
        _ => return between(l),
    })
}

fn is_string(l: &Lower<'_>) -> bool {
    l.ins.is_string_instruction()
}

/// `MOVD` and `MOVQ` with an XMM register.
fn between(l: &Lower<'_>) -> Option<Handler> {
    let (vex, store, load) = (is_vex(l.ins), l.is_mem(0), l.is_mem(1));
    Some(match l.ins.code() {
        Code::Movd_xmm_rm32 | Code::VEX_Vmovd_xmm_rm32 if load => either!(vex, load_32),
        Code::Movd_xmm_rm32 | Code::VEX_Vmovd_xmm_rm32 => either!(vex, from_gpr_32),
        Code::Movq_xmm_rm64 | Code::VEX_Vmovq_xmm_rm64 if load => either!(vex, load_64),
        Code::Movq_xmm_rm64 | Code::VEX_Vmovq_xmm_rm64 => either!(vex, from_gpr_64),
        Code::Movd_rm32_xmm | Code::VEX_Vmovd_rm32_xmm if store => either!(vex, store_32),
        Code::Movd_rm32_xmm | Code::VEX_Vmovd_rm32_xmm => either!(vex, to_gpr_32),
        Code::Movq_rm64_xmm | Code::VEX_Vmovq_rm64_xmm if store => either!(vex, store_low),
        Code::Movq_rm64_xmm | Code::VEX_Vmovq_rm64_xmm => either!(vex, to_gpr_64),
        Code::Movq_xmm_xmmm64 | Code::VEX_Vmovq_xmm_xmmm64 if load => either!(vex, load_64),
        Code::Movq_xmmm64_xmm | Code::VEX_Vmovq_xmmm64_xmm if store => either!(vex, store_low),
        Code::Movq_xmm_xmmm64
        | Code::VEX_Vmovq_xmm_xmmm64
        | Code::Movq_xmmm64_xmm
        | Code::VEX_Vmovq_xmmm64_xmm => either!(vex, copy_64),
        _ => return None,
    })
}

fn load_aligned<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let linear = cpu.vector_linear(op, 16, true, false)?;
    let value = cpu.load16(linear)?;
    set::<VEX>(cpu, op.dst, value);
    Ok(())
}

fn load_unaligned<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let linear = cpu.vector_linear(op, 16, false, false)?;
    let value = cpu.load16(linear)?;
    set::<VEX>(cpu, op.dst, value);
    Ok(())
}

fn store_aligned<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let linear = cpu.vector_linear(op, 16, true, true)?;
    cpu.store16(linear, cpu.fpu.xmm(op.src))
}

fn store_unaligned<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let linear = cpu.vector_linear(op, 16, false, true)?;
    cpu.store16(linear, cpu.fpu.xmm(op.src))
}

fn load_ymm<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_avx()?;
    let linear = cpu.vector_linear(op, 32, ALIGNED, false)?;
    cpu.fpu.ymm[usize::from(op.dst & 15)] = cpu.load32(linear)?;
    Ok(())
}

fn store_ymm<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_avx()?;
    let linear = cpu.vector_linear(op, 32, ALIGNED, true)?;
    cpu.store32(linear, cpu.fpu.ymm[usize::from(op.src & 15)])
}

fn copy<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let value = cpu.fpu.xmm(op.src);
    set::<VEX>(cpu, op.dst, value);
    Ok(())
}

fn copy_ymm(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_avx()?;
    cpu.fpu.ymm[usize::from(op.dst & 15)] = cpu.fpu.ymm[usize::from(op.src & 15)];
    Ok(())
}

fn copy_64<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let [low, _] = cpu.fpu.xmm(op.src);
    set::<VEX>(cpu, op.dst, [low, 0]);
    Ok(())
}

fn load_32<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let value = cpu.load_mem::<u32>(op)?;
    set::<VEX>(cpu, op.dst, [value.into(), 0]);
    Ok(())
}

fn load_64<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let value = cpu.load_mem::<u64>(op)?;
    set::<VEX>(cpu, op.dst, [value, 0]);
    Ok(())
}

fn store_32<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    cpu.store_mem(op, cpu.fpu.xmm(op.src)[0] as u32)
}

fn store_low<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    cpu.store_mem(op, cpu.fpu.xmm(op.src)[0])
}

fn store_high<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    cpu.store_mem(op, cpu.fpu.xmm(op.src)[1])
}

fn merge_32<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let ([low, high], [new, _]) = (first::<VEX>(cpu, op), second::<VEX>(cpu, op));
    set::<VEX>(cpu, op.dst, [low & !u32::MASK | new & u32::MASK, high]);
    Ok(())
}

fn merge_64<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let ([_, high], [new, _]) = (first::<VEX>(cpu, op), second::<VEX>(cpu, op));
    set::<VEX>(cpu, op.dst, [new, high]);
    Ok(())
}

fn load_low<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let value = cpu.load_mem::<u64>(op)?;
    let [_, high] = first::<VEX>(cpu, op);
    set::<VEX>(cpu, op.dst, [value, high]);
    Ok(())
}

fn load_high<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let value = cpu.load_mem::<u64>(op)?;
    let [low, _] = first::<VEX>(cpu, op);
    set::<VEX>(cpu, op.dst, [low, value]);
    Ok(())
}

fn high_to_low<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let ([_, high], [_, new]) = (first::<VEX>(cpu, op), second::<VEX>(cpu, op));
    set::<VEX>(cpu, op.dst, [new, high]);
    Ok(())
}

fn low_to_high<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let ([low, _], [new, _]) = (first::<VEX>(cpu, op), second::<VEX>(cpu, op));
    set::<VEX>(cpu, op.dst, [low, new]);
    Ok(())
}

fn from_gpr_32<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let value = u32::get(cpu, op.src);
    set::<VEX>(cpu, op.dst, [value.into(), 0]);
    Ok(())
}

fn from_gpr_64<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let value = u64::get(cpu, op.src);
    set::<VEX>(cpu, op.dst, [value, 0]);
    Ok(())
}

fn to_gpr_32<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let [low, _] = cpu.fpu.xmm(op.src);
    u32::set(cpu, op.dst, low as u32);
    Ok(())
}

fn to_gpr_64<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let [low, _] = cpu.fpu.xmm(op.src);
    u64::set(cpu, op.dst, low);
    Ok(())
}
