//! The arithmetic flags (SDM 1, 3.4.3.1), worked out at once and without branches, and the conditions
//! on them (SDM 1, appendix B).

use engine::x86::bits::rflags::{AF, CF, OF, PF, SF, STATUS, ZF};

use crate::x86::int::Int;

/// PF of a result's low byte.
static PARITY: [u8; 256] = parity();

const fn parity() -> [u8; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = if (byte as u8).count_ones().is_multiple_of(2) { PF as u8 } else { 0 };
        byte += 1;
    }
    table
}

/// `rflags` with the arithmetic flags exchanged for `status`.
#[inline(always)]
pub fn with(rflags: u64, status: u64) -> u64 {
    rflags & !STATUS | status
}

/// SF, ZF and PF of a result.
#[inline(always)]
pub fn szp<T: Int>(result: T) -> u64 {
    let value = result.zx();
    let sign = if T::BITS == 8 { value } else { value >> (T::BITS - 8) } & SF;
    sign | u64::from(value == 0) << 6 | u64::from(PARITY[usize::from(value as u8)])
}

/// All flags of a bitwise result: CF and OF are 0, and so is AF (undefined by the manuals; what CPUs do).
#[inline(always)]
pub fn logic<T: Int>(result: T) -> u64 {
    szp(result)
}

/// `a + b` and its flags.
#[inline(always)]
pub fn add<T: Int>(a: T, b: T) -> (T, u64) {
    // At the top of 64 bits, every width has the carry and overflow of the host's own addition.
    let (a, b, up) = (a.zx(), b.zx(), 64 - T::BITS);
    let (high, carry) = (a << up).overflowing_add(b << up);
    let overflow = ((a << up) as i64).overflowing_add((b << up) as i64).1;
    let sum = high >> up;
    let status = u64::from(carry) | (a ^ b ^ sum) & AF | u64::from(overflow) << 11;
    (T::cut(sum), status | szp(T::cut(sum)))
}

/// `a - b` and its flags.
#[inline(always)]
pub fn sub<T: Int>(a: T, b: T) -> (T, u64) {
    let (a, b, up) = (a.zx(), b.zx(), 64 - T::BITS);
    let (high, borrow) = (a << up).overflowing_sub(b << up);
    let overflow = ((a << up) as i64).overflowing_sub((b << up) as i64).1;
    let difference = high >> up;
    let status = u64::from(borrow) | (a ^ b ^ difference) & AF | u64::from(overflow) << 11;
    (T::cut(difference), status | szp(T::cut(difference)))
}

/// Flags of an addition or subtraction whose carry (borrow) out of each bit is in `carries`.
#[inline(always)]
fn of_carries<T: Int>(carries: u64, result: T) -> u64 {
    let top = T::BITS - 1;
    let carry = carries >> top & CF;
    let overflow = (carries ^ carries << 1) >> top & 1;
    carry | (carries & 8) << 1 | overflow << 11 | szp(result)
}

/// `a + b + CF` and its flags.
#[inline(always)]
pub fn adc<T: Int>(a: T, b: T, rflags: u64) -> (T, u64) {
    let (a, b) = (a.zx(), b.zx());
    let sum = a.wrapping_add(b).wrapping_add(rflags & CF);
    let carries = a & b | (a | b) & !sum;
    (T::cut(sum), of_carries(carries, T::cut(sum)))
}

/// `a - b - CF` and its flags.
#[inline(always)]
pub fn sbb<T: Int>(a: T, b: T, rflags: u64) -> (T, u64) {
    let (a, b) = (a.zx(), b.zx());
    let difference = a.wrapping_sub(b).wrapping_sub(rflags & CF);
    let borrows = !a & b | (!a | b) & difference;
    (T::cut(difference), of_carries(borrows, T::cut(difference)))
}

/// Whether condition `C` (the low four bits of the opcode) holds.
#[inline(always)]
pub fn holds<const C: u8>(rflags: u64) -> bool {
    let less = (rflags >> 7 ^ rflags >> 11) & 1 != 0;
    let plain = match C >> 1 {
        0 => rflags & OF != 0,
        1 => rflags & CF != 0,
        2 => rflags & ZF != 0,
        3 => rflags & (CF | ZF) != 0,
        4 => rflags & SF != 0,
        5 => rflags & PF != 0,
        6 => less,
        _ => less || rflags & ZF != 0,
    };
    plain != (C & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_carry_is_no_overflow_and_an_overflow_no_carry() {
        assert_eq!(add(0xffu8, 1), (0, CF | AF | ZF | PF));
        assert_eq!(add(0x7fu8, 1), (0x80, OF | AF | SF));
        assert_eq!(sub(0u64, 1), (u64::MAX, CF | AF | SF | PF));
        assert_eq!(sub(0x8000_0000u32, 1), (0x7fff_ffff, OF | AF | PF));
        assert_eq!(adc(0xffu8, 0xff, CF), (0xff, CF | AF | SF | PF));
        assert_eq!(sbb(0u16, 0xffff, CF), (0, CF | AF | ZF | PF));
    }

    #[test]
    fn addition_and_subtraction_agree_with_their_carrying_forms_on_all_bytes() {
        for a in 0..=255u8 {
            for b in 0..=255u8 {
                assert_eq!(add(a, b), adc(a, b, 0), "{a:#x} + {b:#x}");
                assert_eq!(sub(a, b), sbb(a, b, 0), "{a:#x} - {b:#x}");
            }
        }
    }

    #[test]
    fn signed_and_unsigned_comparisons_differ() {
        let (_, status) = sub(0xffu8, 1); // 255 or -1, against 1
        assert!(holds::<7>(status), "above");
        assert!(holds::<0xc>(status), "less");
        assert!(holds::<0xe>(status) && !holds::<0xf>(status));
        assert!(holds::<5>(status) && !holds::<4>(status));
    }
}
