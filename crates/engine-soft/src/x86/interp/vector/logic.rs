//! The integer operations that string functions and copies are made of, without a stub.
//!
//! All work on 128-bit lanes, so the 256-bit forms do the same twice.

#![allow(unsafe_code)] // between [u64; 2] and __m128i

use std::arch::x86_64::*;

use iced_x86::Mnemonic;

use super::{check, first, is_vex, is_ymm, second, set};
use crate::x86::cpu::Cpu;
use crate::x86::decode::Lower;
use crate::x86::exception::Exec;
use crate::x86::fpu::Ymm;
use crate::x86::op::{Handler, Op};

/// An operation on 128-bit lanes.
trait Lane {
    fn lane(a: __m128i, b: __m128i) -> __m128i;

    #[inline(always)]
    fn apply(a: [u64; 2], b: [u64; 2]) -> [u64; 2] {
        // SAFETY: all are 16 bytes without invalid values.
        unsafe {
            let wide = std::mem::transmute::<[u64; 2], __m128i>;
            std::mem::transmute::<__m128i, [u64; 2]>(Self::lane(wide(a), wide(b)))
        }
    }

    #[inline(always)]
    fn apply_ymm([a, b, c, d]: Ymm, [e, f, g, h]: Ymm) -> Ymm {
        let ([a, b], [c, d]) = (Self::apply([a, b], [e, f]), Self::apply([c, d], [g, h]));
        [a, b, c, d]
    }
}

/// Where the second source is, and how wide both are.
#[derive(Clone, Copy)]
struct Form {
    vex: bool,
    wide: bool,
    memory: bool,
}

fn handler<L: Lane>(form: Form) -> Handler {
    match (form.vex, form.wide, form.memory) {
        (false, _, false) => registers::<L, false>,
        (false, _, true) => memory::<L, false>,
        (true, false, false) => registers::<L, true>,
        (true, false, true) => memory::<L, true>,
        (true, true, false) => registers_ymm::<L>,
        (true, true, true) => memory_ymm::<L>,
    }
}

fn registers<L: Lane, const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let value = L::apply(first::<VEX>(cpu, op), second::<VEX>(cpu, op));
    set::<VEX>(cpu, op.dst, value);
    Ok(())
}

fn memory<L: Lane, const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let linear = cpu.vector_linear(op, 16, !VEX, false)?;
    let loaded = cpu.load16(linear)?;
    let value = L::apply(first::<VEX>(cpu, op), loaded);
    set::<VEX>(cpu, op.dst, value);
    Ok(())
}

fn registers_ymm<L: Lane>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_avx()?;
    let ymm = &mut cpu.fpu.ymm;
    ymm[usize::from(op.dst & 15)] =
        L::apply_ymm(ymm[usize::from(op.src & 15)], ymm[usize::from(op.aux & 15)]);
    Ok(())
}

fn memory_ymm<L: Lane>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_avx()?;
    let linear = cpu.vector_linear(op, 32, false, false)?;
    let loaded = cpu.load32(linear)?;
    let ymm = &mut cpu.fpu.ymm;
    ymm[usize::from(op.dst & 15)] = L::apply_ymm(ymm[usize::from(op.src & 15)], loaded);
    Ok(())
}

/// Names the lane operation of each mnemonic.
macro_rules! lanes {
    ($($name:ident: $($mnemonic:ident)|+ => $intrinsic:ident;)*) => {
        $(
            struct $name;
            impl Lane for $name {
                #[inline(always)]
                fn lane(a: __m128i, b: __m128i) -> __m128i {
                    // SAFETY: SSE2, which every x86-64 CPU has.
                    unsafe { $intrinsic(a, b) }
                }
            }
        )*

        fn binary(mnemonic: Mnemonic, form: Form) -> Option<Handler> {
            match mnemonic {
                $($(Mnemonic::$mnemonic)|+ => Some(handler::<$name>(form)),)*
                _ => None,
            }
        }
    };
}

lanes! {
    Xor: Pxor | Vpxor | Xorps | Vxorps | Xorpd | Vxorpd => _mm_xor_si128;
    Or: Por | Vpor | Orps | Vorps | Orpd | Vorpd => _mm_or_si128;
    And: Pand | Vpand | Andps | Vandps | Andpd | Vandpd => _mm_and_si128;
    AndNot: Pandn | Vpandn | Andnps | Vandnps | Andnpd | Vandnpd => _mm_andnot_si128;
    EqualBytes: Pcmpeqb | Vpcmpeqb => _mm_cmpeq_epi8;
    EqualWords: Pcmpeqw | Vpcmpeqw => _mm_cmpeq_epi16;
    EqualDwords: Pcmpeqd | Vpcmpeqd => _mm_cmpeq_epi32;
    GreaterBytes: Pcmpgtb | Vpcmpgtb => _mm_cmpgt_epi8;
    GreaterDwords: Pcmpgtd | Vpcmpgtd => _mm_cmpgt_epi32;
    MinBytes: Pminub | Vpminub => _mm_min_epu8;
    MaxBytes: Pmaxub | Vpmaxub => _mm_max_epu8;
    AddBytes: Paddb | Vpaddb => _mm_add_epi8;
    AddDwords: Paddd | Vpaddd => _mm_add_epi32;
    AddQwords: Paddq | Vpaddq => _mm_add_epi64;
    SubBytes: Psubb | Vpsubb => _mm_sub_epi8;
    SubDwords: Psubd | Vpsubd => _mm_sub_epi32;
    SubQwords: Psubq | Vpsubq => _mm_sub_epi64;
    UnpackBytes: Punpcklbw | Vpunpcklbw => _mm_unpacklo_epi8;
    UnpackWords: Punpcklwd | Vpunpcklwd => _mm_unpacklo_epi16;
    UnpackDwords: Punpckldq | Vpunpckldq => _mm_unpacklo_epi32;
    UnpackQwords: Punpcklqdq | Vpunpcklqdq => _mm_unpacklo_epi64;
    UnpackHighQwords: Punpckhqdq | Vpunpckhqdq => _mm_unpackhi_epi64;
}

/// Chooses the handler of a bitwise or byte operation; not for MMX registers.
pub fn lower(l: &Lower<'_>) -> Option<Handler> {
    let (vex, wide) = (is_vex(l.ins), is_ymm(l.ins, 0) || is_ymm(l.ins, 1));
    if matches!(l.ins.mnemonic(), Mnemonic::Pmovmskb | Mnemonic::Vpmovmskb) && !l.ins.op1_register().is_mm() {
        return Some(match (vex, wide) {
            (_, true) => byte_mask_ymm,
            (true, _) => byte_mask::<true>,
            (false, _) => byte_mask::<false>,
        });
    }
    if !wide && !l.ins.op0_register().is_xmm() {
        return None;
    }
    binary(l.ins.mnemonic(), Form { vex, wide, memory: l.is_mem(1) || l.is_mem(2) })
}

#[inline(always)]
fn mask_of(value: [u64; 2]) -> u64 {
    // SAFETY: both are 16 bytes without invalid values; the instruction is of SSE2.
    let mask = unsafe { _mm_movemask_epi8(std::mem::transmute::<[u64; 2], __m128i>(value)) };
    u64::from(mask as u32)
}

fn byte_mask<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    cpu.regs[usize::from(op.dst & 15)] = mask_of(cpu.fpu.xmm(op.src));
    Ok(())
}

fn byte_mask_ymm(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_avx()?;
    let [a, b, c, d] = cpu.fpu.ymm[usize::from(op.src & 15)];
    cpu.regs[usize::from(op.dst & 15)] = mask_of([a, b]) | mask_of([c, d]) << 16;
    Ok(())
}
