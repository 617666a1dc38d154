//! Shifts and rotates (SDM 2: `SAL/SAR/SHL/SHR`, `RCL/RCR/ROL/ROR`, `SHLD`, `SHRD`; BMI2).
//!
//! Counts are masked to 5 bits (6 for 64-bit operands); a count of 0 changes no flags. OF is only
//! defined for a count of 1; for others it is worked out by the same formula, as CPUs do. AF, undefined,
//! is cleared by shifts.

use engine::x86::bits::rflags::{CF, OF};
use iced_x86::Mnemonic;

use super::flags::{szp, with};
use super::forms::{Binary, by_width, by_word, ternary};
use crate::x86::cpu::Cpu;
use crate::x86::decode::Lower;
use crate::x86::exception::Exec;
use crate::x86::int::Int;
use crate::x86::op::{Handler, Op, reg};

/// Chooses the handler.
pub fn lower(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    match l.ins.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => shift::<Shl>(l, op),
        Mnemonic::Shr => shift::<Shr>(l, op),
        Mnemonic::Sar => shift::<Sar>(l, op),
        Mnemonic::Rol => shift::<Rol>(l, op),
        Mnemonic::Ror => shift::<Ror>(l, op),
        Mnemonic::Rcl => shift::<Rcl>(l, op),
        Mnemonic::Rcr => shift::<Rcr>(l, op),
        Mnemonic::Shld => double::<Shld>(l, op),
        Mnemonic::Shrd => double::<Shrd>(l, op),
        Mnemonic::Rorx => ternary::<Rorx>(l),
        Mnemonic::Sarx => ternary::<Sarx>(l),
        Mnemonic::Shlx => ternary::<Shlx>(l),
        Mnemonic::Shrx => ternary::<Shrx>(l),
        _ => None,
    }
}

fn shift<O: Shift>(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    let width = l.width(0);
    op.imm &= if width == 64 { 63 } else { 31 };
    Some(by_width!(width, T => match (l.is_mem(0), l.is_imm(1)) {
        (false, true) => shift_r::<T, O, false>,
        (false, false) => shift_r::<T, O, true>,
        (true, true) => shift_m::<T, O, false>,
        (true, false) => shift_m::<T, O, true>,
    }))
}

fn double<O: Double>(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    let width = l.width(0);
    op.imm &= if width == 64 { 63 } else { 31 };
    Some(by_word!(width, T => match (l.is_mem(0), l.is_imm(2)) {
        (false, true) => double_r::<T, O, false>,
        (false, false) => double_r::<T, O, true>,
        (true, true) => double_m::<T, O, false>,
        (true, false) => double_m::<T, O, true>,
    }))
}

/// A shift or rotate by a masked count.
trait Shift {
    /// Result and RFLAGS; `count` is not 0.
    fn eval<T: Int>(a: T, count: u32, rflags: u64) -> (T, u64);
}

/// A shift of one operand that takes its new bits from another.
trait Double {
    /// Result and RFLAGS; `count` is not 0.
    fn eval<T: Int>(a: T, b: T, count: u32, rflags: u64) -> (T, u64);
}

#[inline(always)]
fn count<T: Int, const CL: bool>(cpu: &Cpu, op: &Op) -> u32 {
    if !CL {
        return op.imm as u32;
    }
    cpu.regs[usize::from(reg::RCX)] as u32 & if T::BITS == 64 { 63 } else { 31 }
}

fn shift_r<T: Int, O: Shift, const CL: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, count) = (T::get(cpu, op.dst), count::<T, CL>(cpu, op));
    if count == 0 {
        T::set(cpu, op.dst, a); // clears the upper half of a 32-bit operand
        return Ok(());
    }
    let (result, rflags) = O::eval(a, count, cpu.rflags);
    T::set(cpu, op.dst, result);
    cpu.rflags = rflags;
    Ok(())
}

fn shift_m<T: Int, O: Shift, const CL: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (before, count) = (cpu.rflags, count::<T, CL>(cpu, op));
    let mut rflags = before;
    cpu.rmw::<T>(op, |_, a| {
        let mut result = a;
        if count != 0 {
            (result, rflags) = O::eval(a, count, before);
        }
        result
    })?;
    cpu.rflags = rflags;
    Ok(())
}

fn double_r<T: Int, O: Double, const CL: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, b, count) = (T::get(cpu, op.dst), T::get(cpu, op.src), count::<T, CL>(cpu, op));
    let (result, rflags) = if count == 0 { (a, cpu.rflags) } else { O::eval(a, b, count, cpu.rflags) };
    T::set(cpu, op.dst, result);
    cpu.rflags = rflags;
    Ok(())
}

fn double_m<T: Int, O: Double, const CL: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (b, before, count) = (T::get(cpu, op.src), cpu.rflags, count::<T, CL>(cpu, op));
    let mut rflags = before;
    cpu.rmw::<T>(op, |_, a| {
        let mut result = a;
        if count != 0 {
            (result, rflags) = O::eval(a, b, count, before);
        }
        result
    })?;
    cpu.rflags = rflags;
    Ok(())
}

/// The highest bit, as 0 or 1.
#[inline(always)]
fn top<T: Int>(value: T) -> u64 {
    value.zx() >> (T::BITS - 1)
}

/// OF where the two highest bits differ: a shift or rotate to the right by one changed the sign.
#[inline(always)]
fn top_two_differ<T: Int>(value: T) -> u64 {
    ((value.zx() >> (T::BITS - 1) ^ value.zx() >> (T::BITS - 2)) & 1) << 11
}

struct Shl;
impl Shift for Shl {
    #[inline(always)]
    fn eval<T: Int>(a: T, count: u32, rflags: u64) -> (T, u64) {
        let almost = a.zx() << (count - 1);
        let carry = almost >> (T::BITS - 1) & CF;
        let result = T::cut(almost << 1);
        (result, with(rflags, carry | (carry ^ top(result)) << 11 | szp(result)))
    }
}

struct Shr;
impl Shift for Shr {
    #[inline(always)]
    fn eval<T: Int>(a: T, count: u32, rflags: u64) -> (T, u64) {
        let almost = a.zx() >> (count - 1);
        let result = T::cut(almost >> 1);
        (result, with(rflags, almost & CF | top_two_differ(result) | szp(result)))
    }
}

struct Sar;
impl Shift for Sar {
    #[inline(always)]
    fn eval<T: Int>(a: T, count: u32, rflags: u64) -> (T, u64) {
        let almost = a.sx() as i64 >> (count - 1);
        let result = T::cut((almost >> 1) as u64);
        (result, with(rflags, almost as u64 & CF | szp(result)))
    }
}

/// Bits rotated left by `count` below the width.
#[inline(always)]
fn rotated<T: Int>(a: T, count: u32) -> T {
    if T::BITS == 64 {
        return T::cut(a.zx().rotate_left(count));
    }
    T::cut(a.zx() << count | a.zx() >> (T::BITS - count))
}

struct Rol;
impl Shift for Rol {
    #[inline(always)]
    fn eval<T: Int>(a: T, count: u32, rflags: u64) -> (T, u64) {
        let result = rotated(a, count % T::BITS);
        let carry = result.zx() & CF;
        (result, rflags & !(CF | OF) | carry | (carry ^ top(result)) << 11)
    }
}

struct Ror;
impl Shift for Ror {
    #[inline(always)]
    fn eval<T: Int>(a: T, count: u32, rflags: u64) -> (T, u64) {
        let result = rotated(a, (T::BITS - count % T::BITS) % T::BITS);
        (result, rflags & !(CF | OF) | top(result) | top_two_differ(result))
    }
}

/// The operand with CF above it, rotated left; `count` is at most the width.
#[inline(always)]
fn rotated_with_carry<T: Int>(a: T, count: u32, rflags: u64) -> (T, u64) {
    let wide = u128::from(rflags & CF) << T::BITS | u128::from(a.zx());
    let result = wide << count | wide >> (T::BITS + 1 - count);
    (T::cut(result as u64), (result >> T::BITS) as u64 & CF)
}

struct Rcl;
impl Shift for Rcl {
    #[inline(always)]
    fn eval<T: Int>(a: T, count: u32, rflags: u64) -> (T, u64) {
        let (result, carry) = rotated_with_carry(a, count % (T::BITS + 1), rflags);
        (result, rflags & !(CF | OF) | carry | (carry ^ top(result)) << 11)
    }
}

struct Rcr;
impl Shift for Rcr {
    #[inline(always)]
    fn eval<T: Int>(a: T, count: u32, rflags: u64) -> (T, u64) {
        let round = T::BITS + 1;
        let (result, carry) = rotated_with_carry(a, (round - count % round) % round, rflags);
        (result, rflags & !(CF | OF) | carry | top_two_differ(result))
    }
}

/// `a:b:a`, of which a 16-bit double shift by more than 16 (undefined) shows the third part on CPUs.
#[inline(always)]
fn around<T: Int>(a: T, b: T) -> u64 {
    a.zx() << 32 | b.zx() << 16 | a.zx()
}

struct Shld;
impl Double for Shld {
    #[inline(always)]
    fn eval<T: Int>(a: T, b: T, count: u32, rflags: u64) -> (T, u64) {
        let (result, carry) = if T::BITS == 16 {
            let wide = around(a, b);
            (T::cut(wide << count >> 32), wide >> (48 - count))
        } else {
            let rest = T::BITS - count;
            (T::cut(a.zx() << count | b.zx() >> rest), a.zx() >> rest)
        };
        let carry = carry & CF;
        (result, with(rflags, carry | (carry ^ top(result)) << 11 | szp(result)))
    }
}

struct Shrd;
impl Double for Shrd {
    #[inline(always)]
    fn eval<T: Int>(a: T, b: T, count: u32, rflags: u64) -> (T, u64) {
        let wide = if T::BITS == 16 { around(a, b) } else { a.zx() };
        let high = if T::BITS == 16 { 0 } else { b.zx() << (T::BITS - count) };
        let result = T::cut(wide >> count | high);
        let carry = wide >> (count - 1) & CF;
        (result, with(rflags, carry | top_two_differ(result) | szp(result)))
    }
}

macro_rules! flagless {
    ($($name:ident: |$a:ident, $count:ident| $eval:expr;)*) => {
        $(struct $name;
        impl Binary for $name {
            #[inline(always)]
            fn eval<T: Int>($a: T, count: T, rflags: u64) -> (T, u64) {
                let $count = count.zx() as u32 & (T::BITS - 1);
                (T::cut($eval), rflags)
            }
        })*
    };
}

flagless! {
    Rorx: |a, count| rotated(a, (T::BITS - count) % T::BITS).zx();
    Sarx: |a, count| (a.sx() as i64 >> count) as u64;
    Shlx: |a, count| a.zx() << count;
    Shrx: |a, count| a.zx() >> count;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::testing::{DATA, Guest};
    use engine::x86::bits::rflags::{PF, SF, ZF};

    const RAX: usize = reg::RAX as usize;
    const RBX: usize = reg::RBX as usize;
    const RCX: usize = reg::RCX as usize;

    #[test]
    fn a_masked_count_of_zero_changes_no_flags_but_clears_the_upper_half() {
        let mut guest = Guest::new(64, &[0xd3, 0xe0]); // shl eax, cl
        (guest.cpu.regs[RAX], guest.cpu.regs[RCX]) = (0x1_0000_0003, 32);
        guest.cpu.rflags |= CF | OF;
        guest.steps(1).unwrap();
        assert_eq!((guest.cpu.regs[RAX], guest.cpu.rflags), (3, 2 | CF | OF));
    }

    #[test]
    fn shifts_report_the_last_bit_and_the_change_of_sign() {
        // shl al, 1; sar word [DATA], 4; shr rbx, 63
        let code = [0xd0, 0xe0, 0x66, 0xc1, 0x3c, 0x25, 0, 0, 0x10, 0, 4, 0x48, 0xc1, 0xeb, 63];
        let mut guest = Guest::new(64, &code);
        guest.poke(DATA, &0x8008u16.to_le_bytes());
        (guest.cpu.regs[RAX], guest.cpu.regs[RBX]) = (0x40, 1 << 63);
        guest.steps(1).unwrap();
        assert_eq!((guest.cpu.regs[RAX], guest.cpu.rflags), (0x80, 2 | OF | SF));
        guest.steps(1).unwrap();
        assert_eq!(guest.peek(DATA), 0xf800u16.to_le_bytes());
        assert_eq!(guest.cpu.rflags, 2 | CF | SF | PF);
        guest.steps(1).unwrap();
        assert_eq!((guest.cpu.regs[RBX], guest.cpu.flag(CF), guest.cpu.flag(ZF)), (1, false, false));
    }

    #[test]
    fn rotating_through_carry_by_width_plus_one_is_no_change() {
        let mut guest = Guest::new(64, &[0xd2, 0xd0, 0xd2, 0xd8]); // rcl al, cl; rcr al, cl
        (guest.cpu.regs[RAX], guest.cpu.regs[RCX]) = (0xa5, 9);
        guest.cpu.rflags |= CF;
        guest.steps(2).unwrap();
        assert_eq!((guest.cpu.regs[RAX], guest.cpu.flag(CF)), (0xa5, true));
    }

    #[test]
    fn a_double_shift_takes_bits_from_the_other_register() {
        let mut guest = Guest::new(64, &[0x48, 0x0f, 0xa4, 0xd8, 8, 0x0f, 0xad, 0xd8]); // shld, shrd cl
        (guest.cpu.regs[RAX], guest.cpu.regs[RBX], guest.cpu.regs[RCX]) =
            (0x0122_3344_5566_7788, 0xab << 56 | 0xcdef, 12);
        guest.steps(1).unwrap();
        assert_eq!((guest.cpu.regs[RAX], guest.cpu.flag(CF)), (0x2233_4455_6677_88ab, true));
        guest.steps(1).unwrap();
        assert_eq!(guest.cpu.regs[RAX], 0xdef6_6778);
    }

    #[test]
    fn bmi2_shifts_touch_no_flags() {
        // shlx eax, ebx, ecx; rorx rax, rbx, 4
        let code = [0xc4, 0xe2, 0x71, 0xf7, 0xc3, 0xc4, 0xe3, 0xfb, 0xf0, 0xc3, 4];
        let mut guest = Guest::new(64, &code);
        (guest.cpu.regs[RBX], guest.cpu.regs[RCX]) = (0x8000_0001, 33);
        guest.cpu.rflags |= ZF;
        guest.steps(1).unwrap();
        assert_eq!(guest.cpu.regs[RAX], 2);
        guest.steps(1).unwrap();
        assert_eq!((guest.cpu.regs[RAX], guest.cpu.rflags), (0x1000_0000_0800_0000, 2 | ZF));
    }
}
