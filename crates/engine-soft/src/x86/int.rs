//! The integers that general registers and memory operands hold.

use mem::HostInt;

use super::cpu::Cpu;
use super::op::HIGH;

/// An operand of 8, 16, 32 or 64 bits.
pub trait Int: HostInt + Into<u64> + std::fmt::LowerHex {
    /// Width in bits.
    const BITS: u32;
    /// Width in bytes.
    const BYTES: u64;
    /// All ones, as `u64`.
    const MASK: u64;
    /// The low bits of `value`.
    fn cut(value: u64) -> Self;
    /// Reads general register `number` (with [`HIGH`] for AH..BH if 8 bits wide).
    fn get(cpu: &Cpu, number: u8) -> Self;
    /// Writes a general register: 32 bits clear the upper half, 8 and 16 keep the rest.
    fn set(cpu: &mut Cpu, number: u8, value: Self);

    /// Zero-extended.
    #[inline(always)]
    fn zx(self) -> u64 {
        self.into()
    }
    /// Sign-extended.
    #[inline(always)]
    fn sx(self) -> u64 {
        let shift = 64 - Self::BITS;
        ((self.zx() << shift) as i64 >> shift) as u64
    }
    /// The sign bit.
    #[inline(always)]
    fn sign(self) -> bool {
        self.zx() >> (Self::BITS - 1) & 1 != 0
    }
}

impl Int for u8 {
    const BITS: u32 = 8;
    const BYTES: u64 = 1;
    const MASK: u64 = 0xff;
    #[inline(always)]
    fn cut(value: u64) -> u8 {
        value as u8
    }
    #[inline(always)]
    fn get(cpu: &Cpu, number: u8) -> u8 {
        let shift = (number & HIGH) >> 2; // HIGH is 32: a shift by 8 bits
        (cpu.regs[(number & 15) as usize] >> shift) as u8
    }
    #[inline(always)]
    fn set(cpu: &mut Cpu, number: u8, value: u8) {
        let shift = (number & HIGH) >> 2;
        let reg = &mut cpu.regs[(number & 15) as usize];
        *reg = *reg & !(0xff << shift) | u64::from(value) << shift;
    }
}

impl Int for u16 {
    const BITS: u32 = 16;
    const BYTES: u64 = 2;
    const MASK: u64 = 0xffff;
    #[inline(always)]
    fn cut(value: u64) -> u16 {
        value as u16
    }
    #[inline(always)]
    fn get(cpu: &Cpu, number: u8) -> u16 {
        cpu.regs[(number & 15) as usize] as u16
    }
    #[inline(always)]
    fn set(cpu: &mut Cpu, number: u8, value: u16) {
        let reg = &mut cpu.regs[(number & 15) as usize];
        *reg = *reg & !0xffff | u64::from(value);
    }
}

impl Int for u32 {
    const BITS: u32 = 32;
    const BYTES: u64 = 4;
    const MASK: u64 = 0xffff_ffff;
    #[inline(always)]
    fn cut(value: u64) -> u32 {
        value as u32
    }
    #[inline(always)]
    fn get(cpu: &Cpu, number: u8) -> u32 {
        cpu.regs[(number & 15) as usize] as u32
    }
    #[inline(always)]
    fn set(cpu: &mut Cpu, number: u8, value: u32) {
        cpu.regs[(number & 15) as usize] = value.into();
    }
}

impl Int for u64 {
    const BITS: u32 = 64;
    const BYTES: u64 = 8;
    const MASK: u64 = u64::MAX;
    #[inline(always)]
    fn cut(value: u64) -> u64 {
        value
    }
    #[inline(always)]
    fn get(cpu: &Cpu, number: u8) -> u64 {
        cpu.regs[(number & 15) as usize]
    }
    #[inline(always)]
    fn set(cpu: &mut Cpu, number: u8, value: u64) {
        cpu.regs[(number & 15) as usize] = value;
    }
}
