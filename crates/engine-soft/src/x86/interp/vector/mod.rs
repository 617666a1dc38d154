//! MMX, SSE and AVX.
//!
//! Moves and bitwise operations, which are most of what runs, are plain code ([`moves`], [`logic`]);
//! masked and gathered accesses go element by element ([`masked`]); everything else is executed by
//! the host's CPU ([`native`], [`crate::x86::fpu::stub`]).

mod logic;
mod masked;
mod mem;
mod moves;
mod native;

use iced_x86::{EncodingKind, Instruction};

use crate::x86::cpu::Cpu;
use crate::x86::decode::Lower;
use crate::x86::exception::Exec;
use crate::x86::fpu::stub;
use crate::x86::op::{Handler, Op};

/// Chooses the handler of an MMX, SSE or AVX instruction.
pub fn lower(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    if !stub::features_offered(l.ins)
        || !matches!(l.ins.code().encoding(), EncodingKind::Legacy | EncodingKind::VEX)
    {
        return None;
    }
    moves::lower(l)
        .or_else(|| logic::lower(l))
        .or_else(|| masked::lower(l, op))
        .or_else(|| native::lower(l, op))
}

fn is_vex(ins: &Instruction) -> bool {
    ins.code().encoding() == EncodingKind::VEX
}

/// Whether operand `n` is a YMM register.
fn is_ymm(ins: &Instruction, n: u32) -> bool {
    n < ins.op_count() && ins.op_register(n).is_ymm()
}

/// May the instruction execute?
#[inline(always)]
fn check<const VEX: bool>(cpu: &Cpu) -> Exec {
    if VEX { cpu.check_avx() } else { cpu.check_sse() }
}

/// Writes a 128-bit result.
#[inline(always)]
fn set<const VEX: bool>(cpu: &mut Cpu, number: u8, value: [u64; 2]) {
    if VEX { cpu.fpu.set_xmm_clear(number, value) } else { cpu.fpu.set_xmm(number, value) }
}

/// The first source: the destination itself in legacy encoding.
#[inline(always)]
fn first<const VEX: bool>(cpu: &Cpu, op: &Op) -> [u64; 2] {
    cpu.fpu.xmm(if VEX { op.src } else { op.dst })
}

/// The second source, if it is a register.
#[inline(always)]
fn second<const VEX: bool>(cpu: &Cpu, op: &Op) -> [u64; 2] {
    cpu.fpu.xmm(if VEX { op.aux } else { op.src })
}

/// The two instances of a handler: legacy and VEX-encoded.
macro_rules! either {
    ($vex:expr, $handler:ident) => {
        if $vex { $handler::<true> as Handler } else { $handler::<false> as Handler }
    };
}
use either;

#[cfg(test)]
mod tests {
    use crate::x86::exception::{Exception, vector};
    use crate::x86::op::reg;
    use crate::x86::testing::{DATA, Guest};
    use engine::x86::bits::{cr0, cr4, rflags};

    fn guest(code: &[u8]) -> Guest {
        let mut guest = Guest::new(64, code);
        guest.cpu.regs[reg::RDI as usize] = DATA;
        guest
    }

    #[test]
    fn legacy_writes_keep_the_upper_half_and_vex_writes_clear_it() {
        // movdqu xmm9, [rdi]; vmovdqu xmm9, [rdi]; paddw xmm9, xmm9; vpaddw xmm9, xmm9, xmm9
        let mut guest = guest(&[
            0xf3, 0x44, 0x0f, 0x6f, 0x0f, 0xc5, 0x7a, 0x6f, 0x0f, 0x66, 0x45, 0x0f, 0xfd, 0xc9, 0xc4, 0x41,
            0x31, 0xfd, 0xc9,
        ]);
        guest.poke(DATA, &[1; 16]);
        guest.cpu.fpu.ymm[9] = [3; 4];
        let ones = 0x0101_0101_0101_0101;
        guest.step().unwrap();
        assert_eq!(guest.cpu.fpu.ymm[9], [ones, ones, 3, 3]);
        guest.step().unwrap();
        assert_eq!(guest.cpu.fpu.ymm[9], [ones, ones, 0, 0]);
        guest.cpu.fpu.ymm[9][3] = 5;
        guest.step().unwrap();
        assert_eq!(guest.cpu.fpu.ymm[9], [2 * ones, 2 * ones, 0, 5]);
        guest.step().unwrap();
        assert_eq!(guest.cpu.fpu.ymm[9], [4 * ones, 4 * ones, 0, 0]);
    }

    #[test]
    fn operands_across_pages_arrive_whole() {
        // vmovdqu ymm1, [rdi]; vmovdqu [rdi + 0x1000], ymm1; paddb xmm1, [rdi + 4]
        let mut guest = guest(&[
            0xc5, 0xfe, 0x6f, 0x0f, 0xc5, 0xfe, 0x7f, 0x8f, 0, 0x10, 0, 0, 0x66, 0x0f, 0xfc, 0x4f, 0x04,
        ]);
        let bytes: [u8; 32] = std::array::from_fn(|i| i as u8);
        guest.cpu.regs[reg::RDI as usize] = DATA + 0xfec;
        guest.poke(DATA + 0xfec, &bytes);
        guest.steps(2).unwrap();
        assert_eq!(guest.peek::<32>(DATA + 0x1fec), bytes);
        guest.step().unwrap();
        assert_eq!(guest.cpu.fpu.xmm(1)[0].to_le_bytes(), [4, 6, 8, 10, 12, 14, 16, 18]);
    }

    #[test]
    fn legacy_operands_must_be_aligned() {
        // paddw xmm0, [rdi]; movaps xmm0, [rdi]; movaps [rdi], xmm0; vmovdqa ymm0, [rdi]
        let codes: [&[u8]; 4] =
            [&[0x66, 0x0f, 0xfd, 0x07], &[0x0f, 0x28, 0x07], &[0x0f, 0x29, 0x07], &[0xc5, 0xfd, 0x6f, 0x07]];
        for code in codes {
            let mut guest = guest(code);
            guest.cpu.regs[reg::RDI as usize] = DATA + 8;
            assert_eq!(guest.step(), Err(Exception::GP0), "{code:x?}");
        }
        let mut vex = guest(&[0xc5, 0xf9, 0xfd, 0x07]); // vpaddw xmm0, xmm0, [rdi]
        vex.cpu.regs[reg::RDI as usize] = DATA + 8;
        assert_eq!(vex.step(), Ok(()));
    }

    #[test]
    fn the_operating_system_can_forbid_each_register_file() {
        let sse: &[u8] = &[0x66, 0x0f, 0xef, 0xc0];
        let avx: &[u8] = &[0xc5, 0xf9, 0xef, 0xc0];
        let try_with = |code: &[u8], cr0: u64, cr4: u64, xcr0: u64| {
            let mut guest = guest(code);
            guest.cpu.cr0 |= cr0;
            (guest.cpu.cr4, guest.cpu.fpu.xcr0) = (cr4, xcr0);
            guest.step()
        };
        let all = cr4::OSFXSR | cr4::OSXSAVE;
        assert_eq!(try_with(sse, 0, all, 7), Ok(()));
        assert_eq!(try_with(sse, cr0::TS, all, 7), Err(Exception::NM));
        assert_eq!(try_with(sse, cr0::TS | cr0::EM, all, 7), Err(Exception::UD));
        assert_eq!(try_with(sse, 0, cr4::OSXSAVE, 7), Err(Exception::UD));
        assert_eq!(try_with(avx, 0, all, 7), Ok(()));
        assert_eq!(try_with(avx, 0, all, 3), Err(Exception::UD));
        assert_eq!(try_with(avx, cr0::TS, cr4::OSFXSR, 7), Err(Exception::UD));
        assert_eq!(try_with(avx, cr0::TS, all, 7), Err(Exception::NM));
    }

    #[test]
    fn masked_exceptions_leave_flags_and_unmasked_ones_fault() {
        // divss xmm0, xmm1: 1 / 0
        let code = [0xf3, 0x0f, 0x5e, 0xc1];
        let mut masked = guest(&code);
        masked.cpu.fpu.ymm[0][0] = u64::from(1.0f32.to_bits());
        masked.step().unwrap();
        assert_eq!(masked.cpu.fpu.mxcsr, 0x1f84);
        assert_eq!(masked.cpu.fpu.ymm[0][0], u64::from(f32::INFINITY.to_bits()));
        let mut unmasked = guest(&code);
        unmasked.cpu.fpu.ymm[0][0] = u64::from(1.0f32.to_bits());
        unmasked.cpu.fpu.mxcsr = 0x1d80;
        assert_eq!(unmasked.step(), Err(Exception::new(vector::XM)));
        assert_eq!(unmasked.cpu.fpu.mxcsr, 0x1d84);
        assert_eq!(unmasked.cpu.fpu.ymm[0][0], u64::from(1.0f32.to_bits()));
        unmasked.cpu.cr4 &= !cr4::OSXMMEXCPT;
        assert_eq!(unmasked.step(), Err(Exception::UD));
    }

    #[test]
    fn general_registers_and_flags_go_in_and_out() {
        // cvtsi2sd xmm3, r10; cvttsd2si r11d, xmm3; ucomisd xmm3, xmm3; pextrw eax, xmm3, 3
        let mut guest = guest(&[
            0xf2, 0x49, 0x0f, 0x2a, 0xda, 0xf2, 0x44, 0x0f, 0x2c, 0xdb, 0x66, 0x0f, 0x2e, 0xdb, 0x66, 0x0f,
            0xc5, 0xc3, 0x03,
        ]);
        guest.cpu.regs[10] = -7i64 as u64;
        guest.cpu.regs[11] = u64::MAX;
        guest.cpu.rflags |= rflags::CF | rflags::PF | rflags::SF | rflags::DF;
        guest.steps(4).unwrap();
        assert_eq!(guest.cpu.regs[11], u64::from(-7i32 as u32));
        assert_eq!(guest.cpu.rflags & (rflags::STATUS | rflags::DF), rflags::ZF | rflags::DF);
        assert_eq!(guest.cpu.regs[0], (-7.0f64).to_bits() >> 48);
    }

    #[test]
    fn mmx_instructions_take_over_the_x87_registers() {
        // paddb mm1, [rdi]; emms
        let mut guest = guest(&[0x0f, 0xfc, 0x0f, 0x0f, 0x77]);
        guest.poke(DATA, &[1; 8]);
        guest.cpu.fpu.x87.ftw = 0;
        guest.cpu.fpu.x87.set_top(6);
        guest.cpu.fpu.x87.st[3] = [2, 0x4000]; // physical register 1
        guest.step().unwrap();
        assert_eq!((guest.cpu.fpu.x87.top(), guest.cpu.fpu.x87.ftw), (0, 0xff));
        assert_eq!(guest.cpu.fpu.x87.st[1], [0x0101_0101_0101_0103, 0xffff]);
    }

    #[test]
    fn what_is_not_offered_does_not_execute() {
        // vpaddd zmm0, zmm0, zmm0; pfadd mm0, mm1
        for code in [&[0x62, 0xf1, 0x7d, 0x48, 0xfe, 0xc0][..], &[0x0f, 0x0f, 0xc1, 0x9e]] {
            assert_eq!(guest(code).step(), Err(Exception::UD), "{code:x?}");
        }
    }
}
