//! Multiplication and division (SDM 2: `MUL`, `IMUL`, `MULX`, `DIV`, `IDIV`, `AAM`, `AAD`).
//!
//! Undefined flags: multiplications leave SF, ZF, AF and PF as they were, divisions all six.

use engine::x86::bits::rflags::{CF, OF};
use iced_x86::Mnemonic;

use super::flags::{szp, with};
use super::forms::{Binary, binary_word, by_width, by_word, ternary};
use crate::x86::cpu::Cpu;
use crate::x86::decode::Lower;
use crate::x86::exception::{Exception, Exec};
use crate::x86::int::Int;
use crate::x86::op::{HIGH, Handler, Op, reg};

/// Chooses the handler.
pub fn lower(l: &Lower<'_>, _op: &mut Op) -> Option<Handler> {
    Some(match l.ins.mnemonic() {
        Mnemonic::Imul if l.ins.op_count() == 2 => return binary_word::<Imul>(l),
        Mnemonic::Imul if l.ins.op_count() == 3 => return ternary::<Imul>(l),
        Mnemonic::Mul => {
            by_width!(l.width(0), T => if l.is_mem(0) { mul::<T, true> } else { mul::<T, false> })
        }
        Mnemonic::Imul => {
            by_width!(l.width(0), T => if l.is_mem(0) { imul::<T, true> } else { imul::<T, false> })
        }
        Mnemonic::Div => {
            by_width!(l.width(0), T => if l.is_mem(0) { div::<T, true> } else { div::<T, false> })
        }
        Mnemonic::Idiv => {
            by_width!(l.width(0), T => if l.is_mem(0) { idiv::<T, true> } else { idiv::<T, false> })
        }
        Mnemonic::Mulx => {
            by_word!(l.width(0), T => if l.is_mem(2) { mulx::<T, true> } else { mulx::<T, false> })
        }
        Mnemonic::Aam => aam,
        Mnemonic::Aad => aad,
        _ => return None,
    })
}

/// The one operand of the instruction.
#[inline(always)]
fn operand<T: Int, const MEM: bool>(cpu: &mut Cpu, op: &Op, register: u8) -> Exec<T> {
    if MEM { cpu.load_mem(op) } else { Ok(T::get(cpu, register)) }
}

/// Number of the register that holds the upper half: AH or rDX.
#[inline(always)]
fn upper<T: Int>() -> u8 {
    if T::BITS == 8 { HIGH | reg::RAX } else { reg::RDX }
}

#[inline(always)]
fn set_pair<T: Int>(cpu: &mut Cpu, high: T, low: T) {
    T::set(cpu, reg::RAX, low);
    T::set(cpu, upper::<T>(), high);
}

#[inline(always)]
fn truncated(rflags: u64, lost: bool) -> u64 {
    rflags & !(CF | OF) | if lost { CF | OF } else { 0 }
}

struct Imul;
impl Binary for Imul {
    #[inline(always)]
    fn eval<T: Int>(a: T, b: T, rflags: u64) -> (T, u64) {
        let (a, b) = (a.sx() as i64, b.sx() as i64);
        let (product, lost) = a.overflowing_mul(b);
        let result = T::cut(product as u64);
        (result, truncated(rflags, lost || result.sx() != product as u64))
    }
}

fn mul<T: Int, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = operand::<T, MEM>(cpu, op, op.dst)?;
    let product = u128::from(T::get(cpu, reg::RAX).zx()) * u128::from(b.zx());
    let high = T::cut((product >> T::BITS) as u64);
    set_pair(cpu, high, T::cut(product as u64));
    cpu.rflags = truncated(cpu.rflags, high.zx() != 0);
    Ok(())
}

fn imul<T: Int, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = operand::<T, MEM>(cpu, op, op.dst)?;
    let product = i128::from(T::get(cpu, reg::RAX).sx() as i64) * i128::from(b.sx() as i64);
    let low = T::cut(product as u64);
    set_pair(cpu, T::cut((product >> T::BITS) as u64), low);
    cpu.rflags = truncated(cpu.rflags, i128::from(low.sx() as i64) != product);
    Ok(())
}

fn mulx<T: Int, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = operand::<T, MEM>(cpu, op, op.aux)?;
    let product = u128::from(T::get(cpu, reg::RDX).zx()) * u128::from(b.zx());
    T::set(cpu, op.src, T::cut(product as u64));
    T::set(cpu, op.dst, T::cut((product >> T::BITS) as u64)); // last: it wins if both are the same
    Ok(())
}

fn div<T: Int, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let divisor = operand::<T, MEM>(cpu, op, op.dst)?.zx();
    let (high, low) = (T::get(cpu, upper::<T>()).zx(), T::get(cpu, reg::RAX).zx());
    if high >= divisor {
        return Err(Exception::DE); // also a divisor of zero
    }
    let (quotient, remainder) = if T::BITS < 64 || high == 0 {
        let dividend = if T::BITS < 64 { high << (T::BITS % 64) | low } else { low };
        (dividend / divisor, dividend % divisor)
    } else {
        let (dividend, divisor) = (u128::from(high) << 64 | u128::from(low), u128::from(divisor));
        ((dividend / divisor) as u64, (dividend % divisor) as u64)
    };
    set_pair(cpu, T::cut(remainder), T::cut(quotient));
    Ok(())
}

fn idiv<T: Int, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let divisor = operand::<T, MEM>(cpu, op, op.dst)?.sx() as i64;
    let (high, low) = (T::get(cpu, upper::<T>()), T::get(cpu, reg::RAX));
    if divisor == 0 {
        return Err(Exception::DE);
    }
    let (quotient, remainder) = if T::BITS < 64 {
        let dividend = ((high.sx() << (T::BITS % 64)) | low.zx()) as i64;
        // Only 32 bits reach i64::MIN / -1; its wrapped quotient does not fit and faults below.
        (dividend.wrapping_div(divisor), dividend.wrapping_rem(divisor))
    } else if high.zx() == (low.sx() as i64 >> 63) as u64 && divisor != -1 {
        let dividend = low.zx() as i64;
        (dividend / divisor, dividend % divisor)
    } else {
        let dividend = (u128::from(high.zx()) << 64 | u128::from(low.zx())) as i128;
        let divisor = i128::from(divisor);
        let quotient = i64::try_from(dividend.wrapping_div(divisor)).map_err(|_| Exception::DE)?;
        (quotient, dividend.wrapping_rem(divisor) as i64)
    };
    let result = T::cut(quotient as u64);
    if result.sx() != quotient as u64 {
        return Err(Exception::DE);
    }
    set_pair(cpu, T::cut(remainder as u64), result);
    Ok(())
}

fn aam(cpu: &mut Cpu, op: &Op) -> Exec {
    let (base, al) = (op.imm as u8, u8::get(cpu, reg::RAX));
    if base == 0 {
        return Err(Exception::DE);
    }
    set_pair(cpu, al / base, al % base);
    cpu.rflags = with(cpu.rflags, szp(al % base)); // CF, OF and AF are undefined
    Ok(())
}

fn aad(cpu: &mut Cpu, op: &Op) -> Exec {
    let (ah, al) = (u8::get(cpu, HIGH | reg::RAX), u8::get(cpu, reg::RAX));
    let result = al.wrapping_add(ah.wrapping_mul(op.imm as u8));
    set_pair(cpu, 0, result);
    cpu.rflags = with(cpu.rflags, szp(result)); // CF, OF and AF are undefined
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::testing::{CODE, Guest};

    const RAX: usize = reg::RAX as usize;
    const RBX: usize = reg::RBX as usize;
    const RDX: usize = reg::RDX as usize;

    fn guest(bits: u8, code: &[u8], rax: u64, rdx: u64, rbx: u64) -> Guest {
        let mut guest = Guest::new(bits, code);
        (guest.cpu.regs[RAX], guest.cpu.regs[RDX], guest.cpu.regs[RBX]) = (rax, rdx, rbx);
        guest
    }

    #[test]
    fn full_products_fill_two_registers() {
        let mut g = guest(64, &[0x48, 0xf7, 0xe3], u64::MAX, 7, u64::MAX); // mul rbx
        g.steps(1).unwrap();
        assert_eq!((g.cpu.regs[RDX], g.cpu.regs[RAX]), (u64::MAX - 1, 1));
        assert!(g.cpu.flag(CF) && g.cpu.flag(OF));
        let mut g = guest(64, &[0xf6, 0xeb], 0xffff, 7, 0xfe); // imul bl: -1 * -2
        g.steps(1).unwrap();
        assert_eq!((g.cpu.regs[RDX], g.cpu.regs[RAX]), (7, 2));
        assert!(!g.cpu.flag(CF) && !g.cpu.flag(OF));
    }

    #[test]
    fn short_products_tell_what_they_lost() {
        let mut g = guest(64, &[0x6b, 0xc3, 0xff, 0x0f, 0xaf, 0xc3], 0, 0, 0x8000_0000); // imul eax, ebx, -1
        g.steps(1).unwrap();
        assert_eq!((g.cpu.regs[RAX], g.cpu.flag(OF)), (0x8000_0000, true));
        g.cpu.regs[RBX] = 0;
        g.steps(1).unwrap();
        assert_eq!((g.cpu.regs[RAX], g.cpu.flag(OF)), (0, false));
    }

    #[test]
    fn division_faults_on_zero_and_on_what_does_not_fit_and_changes_nothing() {
        let div = [0x48, 0xf7, 0xf3];
        let idiv = [0x48, 0xf7, 0xfb];
        for (code, rax, rdx, rbx) in [
            (div, 5, 0, 0),
            (div, 0, 3, 3),
            (idiv, 5, 0, 0),
            (idiv, 1 << 63, u64::MAX, u64::MAX),
            (idiv, 0, 1 << 63, u64::MAX),
        ] {
            let mut g = guest(64, &code, rax, rdx, rbx);
            assert_eq!(g.step(), Err(Exception::DE));
            assert_eq!((g.cpu.regs[RAX], g.cpu.regs[RDX], g.cpu.rip()), (rax, rdx, CODE));
        }
        let mut g = guest(64, &[0xf7, 0xfb], 0, 0x8000_0000, 0xffff_ffff); // idiv ebx: i64::MIN / -1
        assert_eq!(g.step(), Err(Exception::DE));
    }

    #[test]
    fn quotients_and_remainders() {
        let mut g = guest(64, &[0x48, 0xf7, 0xf3], 5, 2, 3); // div rbx: 2^65 + 5
        g.steps(1).unwrap();
        let dividend = (2u128 << 64) + 5;
        assert_eq!(u128::from(g.cpu.regs[RAX]), dividend / 3);
        assert_eq!(u128::from(g.cpu.regs[RDX]), dividend % 3);
        let mut g = guest(64, &[0x48, 0xf7, 0xfb], -7i64 as u64, u64::MAX, 2); // idiv rbx
        g.steps(1).unwrap();
        assert_eq!((g.cpu.regs[RAX] as i64, g.cpu.regs[RDX] as i64), (-3, -1));
        let mut g = guest(64, &[0xf6, 0xfb], 0xff80, 0, 1); // idiv bl: -128 / 1
        g.steps(1).unwrap();
        assert_eq!(g.cpu.regs[RAX], 0x0080);
    }

    #[test]
    fn unpacked_decimals() {
        let mut g = guest(32, &[0xd4, 10, 0xd5, 10, 0xd4, 0], 87, 0, 0);
        g.steps(1).unwrap();
        assert_eq!(g.cpu.regs[RAX], 0x0807);
        g.steps(1).unwrap();
        assert_eq!(g.cpu.regs[RAX], 87);
        assert_eq!(g.step(), Err(Exception::DE));
    }
}
