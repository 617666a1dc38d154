//! Addition, subtraction, bitwise operations, comparison, and the exchanges built on them.

#![allow(unsafe_code)] // the locked 16-byte exchange on a host address

use engine::x86::bits::rflags::{CF, ZF};
use iced_x86::Mnemonic;
use mem::HostInt;

use super::flags::{self, with};
use super::forms::{Binary, Unary, binary, by_width, unary};
use crate::x86::cpu::Cpu;
use crate::x86::decode::Lower;
use crate::x86::exception::{Exception, Exec};
use crate::x86::int::Int;
use crate::x86::op::{Handler, Op, reg};

/// Chooses the handler.
pub fn lower(l: &Lower<'_>, _op: &mut Op) -> Option<Handler> {
    match l.ins.mnemonic() {
        Mnemonic::Add => binary::<Add>(l),
        Mnemonic::Or => binary::<Or>(l),
        Mnemonic::Adc => binary::<Adc>(l),
        Mnemonic::Sbb => binary::<Sbb>(l),
        Mnemonic::And => binary::<And>(l),
        Mnemonic::Sub => binary::<Sub>(l),
        Mnemonic::Xor => binary::<Xor>(l),
        Mnemonic::Cmp => binary::<Cmp>(l),
        Mnemonic::Test => binary::<Test>(l),
        Mnemonic::Inc => unary::<Inc>(l),
        Mnemonic::Dec => unary::<Dec>(l),
        Mnemonic::Neg => unary::<Neg>(l),
        Mnemonic::Not => unary::<Not>(l),
        Mnemonic::Adcx => binary::<CarryChain<0>>(l),
        Mnemonic::Adox => binary::<CarryChain<11>>(l),
        Mnemonic::Xadd => {
            Some(by_width!(l.width(0), T => if l.is_mem(0) { xadd_m::<T> } else { xadd_r::<T> }))
        }
        Mnemonic::Cmpxchg => {
            Some(by_width!(l.width(0), T => if l.is_mem(0) { cmpxchg_m::<T> } else { cmpxchg_r::<T> }))
        }
        Mnemonic::Cmpxchg8b => Some(cmpxchg8b),
        Mnemonic::Cmpxchg16b => Some(cmpxchg16b),
        _ => None,
    }
}

macro_rules! binary_ops {
    ($($name:ident: |$a:ident, $b:ident, $rflags:ident| $eval:expr;)*) => {
        $(struct $name;
        impl Binary for $name {
            #[inline(always)]
            fn eval<T: Int>($a: T, $b: T, $rflags: u64) -> (T, u64) {
                let (result, status) = $eval;
                (result, with($rflags, status))
            }
        })*
    };
}

binary_ops! {
    Add: |a, b, rflags| flags::add(a, b);
    Sub: |a, b, rflags| flags::sub(a, b);
    Adc: |a, b, rflags| flags::adc(a, b, rflags);
    Sbb: |a, b, rflags| flags::sbb(a, b, rflags);
    And: |a, b, rflags| logic(T::cut(a.zx() & b.zx()));
    Or: |a, b, rflags| logic(T::cut(a.zx() | b.zx()));
    Xor: |a, b, rflags| logic(T::cut(a.zx() ^ b.zx()));
}

#[inline(always)]
fn logic<T: Int>(result: T) -> (T, u64) {
    (result, flags::logic(result))
}

pub(super) struct Cmp;
impl Binary for Cmp {
    const WRITES: bool = false;
    #[inline(always)]
    fn eval<T: Int>(a: T, b: T, rflags: u64) -> (T, u64) {
        Sub::eval(a, b, rflags)
    }
}

struct Test;
impl Binary for Test {
    const WRITES: bool = false;
    #[inline(always)]
    fn eval<T: Int>(a: T, b: T, rflags: u64) -> (T, u64) {
        And::eval(a, b, rflags)
    }
}

/// `ADCX` and `ADOX`: an addition that takes its carry from one flag, and changes only that one.
struct CarryChain<const FLAG: u32>;
impl<const FLAG: u32> Binary for CarryChain<FLAG> {
    #[inline(always)]
    fn eval<T: Int>(a: T, b: T, rflags: u64) -> (T, u64) {
        let (sum, status) = flags::adc(a, b, rflags >> FLAG & CF);
        (sum, rflags & !(1 << FLAG) | (status & CF) << FLAG)
    }
}

struct Inc;
impl Unary for Inc {
    #[inline(always)]
    fn eval<T: Int>(a: T, rflags: u64) -> (T, u64) {
        let (result, status) = flags::add(a, T::cut(1));
        (result, with(rflags, status & !CF | rflags & CF))
    }
}

struct Dec;
impl Unary for Dec {
    #[inline(always)]
    fn eval<T: Int>(a: T, rflags: u64) -> (T, u64) {
        let (result, status) = flags::sub(a, T::cut(1));
        (result, with(rflags, status & !CF | rflags & CF))
    }
}

struct Neg;
impl Unary for Neg {
    #[inline(always)]
    fn eval<T: Int>(a: T, rflags: u64) -> (T, u64) {
        Sub::eval(T::cut(0), a, rflags)
    }
}

struct Not;
impl Unary for Not {
    #[inline(always)]
    fn eval<T: Int>(a: T, rflags: u64) -> (T, u64) {
        (T::cut(!a.zx()), rflags)
    }
}

fn xadd_r<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (dst, src) = (T::get(cpu, op.dst), T::get(cpu, op.src));
    let (sum, rflags) = Add::eval(dst, src, cpu.rflags);
    T::set(cpu, op.src, dst);
    T::set(cpu, op.dst, sum); // last: of `XADD r, r` the sum stays
    cpu.rflags = rflags;
    Ok(())
}

fn xadd_m<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let src = T::get(cpu, op.src);
    let old = cpu.rmw::<T>(op, |_, a| flags::add(a, src).0)?;
    cpu.rflags = Add::eval(old, src, cpu.rflags).1;
    T::set(cpu, op.src, old);
    Ok(())
}

fn cmpxchg_r<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (dst, src, acc) = (T::get(cpu, op.dst), T::get(cpu, op.src), T::get(cpu, reg::RAX));
    if dst == acc {
        T::set(cpu, op.dst, src);
    } else {
        // A register, unlike memory, is not written: its upper half stays.
        T::set(cpu, reg::RAX, dst);
    }
    cpu.rflags = Sub::eval(acc, dst, cpu.rflags).1;
    Ok(())
}

fn cmpxchg_m<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (src, acc) = (T::get(cpu, op.src), T::get(cpu, reg::RAX));
    // The destination is written either way, as on a real CPU.
    let old = cpu.rmw::<T>(op, |_, old| if old == acc { src } else { old })?;
    if old != acc {
        T::set(cpu, reg::RAX, old);
    }
    cpu.rflags = Sub::eval(acc, old, cpu.rflags).1;
    Ok(())
}

fn cmpxchg8b(cpu: &mut Cpu, op: &Op) -> Exec {
    let pair = |cpu: &Cpu, high, low| u32::get(cpu, high).zx() << 32 | u32::get(cpu, low).zx();
    let expected = pair(cpu, reg::RDX, reg::RAX);
    let new = pair(cpu, reg::RCX, reg::RBX);
    let old = cpu.rmw::<u64>(op, |_, old| if old == expected { new } else { old })?;
    if old == expected {
        cpu.rflags |= ZF;
    } else {
        cpu.rflags &= !ZF;
        u32::set(cpu, reg::RAX, old as u32);
        u32::set(cpu, reg::RDX, (old >> 32) as u32);
    }
    Ok(())
}

fn cmpxchg16b(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = cpu.linear(op.mem.seg, cpu.ea(op), 16, true)?;
    if linear % 16 != 0 {
        return Err(Exception::GP0);
    }
    let pair = |cpu: &Cpu, high: u8, low: u8| {
        u128::from(cpu.regs[usize::from(high)]) << 64 | u128::from(cpu.regs[usize::from(low)])
    };
    let expected = pair(cpu, reg::RDX, reg::RAX);
    let new = pair(cpu, reg::RCX, reg::RBX);
    // SAFETY: the CPU checked that 16 bytes at this aligned address of guest RAM may be written.
    let exchange = |host| unsafe { u128::compare_exchange(host, expected, new) };
    let exchanged = if std::arch::is_x86_feature_detected!("cmpxchg16b") {
        cpu.store_through(linear, exchange)?
    } else {
        None
    };
    let old = match exchanged {
        Some(Ok(old) | Err(old)) => old,
        None => exchange16_slow(cpu, linear, expected, new)?,
    };
    if old == expected {
        cpu.rflags |= ZF;
    } else {
        cpu.rflags &= !ZF;
        cpu.regs[usize::from(reg::RAX)] = old as u64;
        cpu.regs[usize::from(reg::RDX)] = (old >> 64) as u64;
    }
    Ok(())
}

/// The exchange on device memory, which is one after another but not one access to the device.
fn exchange16_slow(cpu: &mut Cpu, linear: u64, expected: u128, new: u128) -> Exec<u128> {
    let shared = cpu.vm.clone();
    let _guard = shared.split_lock();
    let view = cpu.view();
    cpu.probe_write(view, linear, 16)?;
    let mut bytes = [0; 16];
    cpu.read_linear(view, linear, &mut bytes[..8])?;
    cpu.read_linear(view, linear + 8, &mut bytes[8..])?;
    let old = u128::from_le_bytes(bytes);
    let bytes = if old == expected { new } else { old }.to_le_bytes();
    cpu.write_linear(view, linear, &bytes[..8])?;
    cpu.write_linear(view, linear + 8, &bytes[8..])?;
    Ok(old)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::testing::{CODE, DATA, Guest};
    use engine::x86::bits::rflags::{AF, OF, PF, SF};

    const RAX: usize = reg::RAX as usize;
    const RBX: usize = reg::RBX as usize;
    const RCX: usize = reg::RCX as usize;
    const RDX: usize = reg::RDX as usize;

    #[test]
    fn a_32_bit_sum_clears_the_upper_half_and_a_byte_sum_keeps_the_rest() {
        // add eax, ebx; add ch, 1
        let mut guest = Guest::new(64, &[0x01, 0xd8, 0x80, 0xc5, 0x01]);
        guest.cpu.regs[RAX] = 0xffff_ffff_ffff_ffff;
        guest.cpu.regs[RBX] = 1;
        guest.cpu.regs[RCX] = 0x1234_7f56;
        guest.steps(1).unwrap();
        assert_eq!(guest.cpu.regs[RAX], 0);
        assert_eq!(guest.cpu.rflags, 2 | CF | ZF | PF | AF);
        guest.steps(1).unwrap();
        assert_eq!(guest.cpu.regs[RCX], 0x1234_8056);
        assert_eq!(guest.cpu.rflags, 2 | OF | SF | AF);
    }

    #[test]
    fn inc_and_dec_leave_the_carry_alone() {
        // inc dword [DATA]; dec al (32-bit code)
        let mut guest = Guest::new(32, &[0xff, 0x05, 0, 0, 0x10, 0, 0xfe, 0xc8]);
        guest.poke(DATA, &[0xff; 4]);
        guest.cpu.rflags |= CF;
        guest.steps(1).unwrap();
        assert_eq!(guest.peek(DATA), [0; 4]);
        assert_eq!(guest.cpu.rflags, 2 | CF | ZF | PF | AF);
        guest.steps(1).unwrap();
        assert_eq!(guest.cpu.regs[RAX], 0xff);
        assert_eq!(guest.cpu.rflags, 2 | CF | SF | PF | AF);
    }

    #[test]
    fn cmpxchg_swaps_on_a_match_and_reports_the_value_otherwise() {
        // lock cmpxchg [rdx], ebx, twice
        let mut guest = Guest::new(64, &[0xf0, 0x0f, 0xb1, 0x1a, 0xf0, 0x0f, 0xb1, 0x1a]);
        guest.poke(DATA, &7u32.to_le_bytes());
        (guest.cpu.regs[RDX], guest.cpu.regs[RAX], guest.cpu.regs[RBX]) = (DATA, 7, 9);
        guest.steps(1).unwrap();
        assert_eq!(guest.peek(DATA), 9u32.to_le_bytes());
        assert!(guest.cpu.flag(ZF));
        guest.steps(1).unwrap();
        assert_eq!((guest.cpu.regs[RAX], guest.cpu.flag(ZF)), (9, false));
    }

    #[test]
    fn cmpxchg16b_exchanges_16_aligned_bytes_and_faults_on_others() {
        let mut guest = Guest::new(64, &[0xf0, 0x48, 0x0f, 0xc7, 0x0e]); // lock cmpxchg16b [rsi]
        let rsi = usize::from(reg::RSI);
        guest.poke(DATA, &[0x11; 16]);
        let ones = u64::from_le_bytes([0x11; 8]);
        guest.cpu.regs[rsi] = DATA;
        (guest.cpu.regs[RAX], guest.cpu.regs[RDX]) = (ones, ones);
        (guest.cpu.regs[RBX], guest.cpu.regs[RCX]) = (3, 4);
        guest.steps(1).unwrap();
        assert!(guest.cpu.flag(ZF));
        assert_eq!(guest.peek(DATA), (4u128 << 64 | 3).to_le_bytes());
        guest.cpu.regs[usize::from(crate::x86::op::RIP)] = CODE;
        guest.steps(1).unwrap();
        assert!(!guest.cpu.flag(ZF));
        assert_eq!((guest.cpu.regs[RAX], guest.cpu.regs[RDX]), (3, 4));
        guest.cpu.regs[usize::from(crate::x86::op::RIP)] = CODE;
        guest.cpu.regs[rsi] = DATA + 8;
        assert_eq!(guest.step(), Err(Exception::GP0));
    }

    #[test]
    fn xadd_of_a_register_with_itself_doubles_it() {
        let mut guest = Guest::new(64, &[0x48, 0x0f, 0xc1, 0xc0]); // xadd rax, rax
        guest.cpu.regs[RAX] = 21;
        guest.steps(1).unwrap();
        assert_eq!(guest.cpu.regs[RAX], 42);
    }

    #[test]
    fn the_two_carry_chains_do_not_meet() {
        // adcx eax, ebx; adox eax, ebx
        let code = [0x66, 0x0f, 0x38, 0xf6, 0xc3, 0xf3, 0x0f, 0x38, 0xf6, 0xc3];
        let mut guest = Guest::new(64, &code);
        (guest.cpu.regs[RAX], guest.cpu.regs[RBX]) = (0xffff_ffff, 0);
        guest.cpu.rflags |= CF | SF;
        guest.steps(1).unwrap();
        assert_eq!((guest.cpu.regs[RAX], guest.cpu.rflags), (0, 2 | CF | SF));
        guest.cpu.rflags |= OF;
        guest.steps(1).unwrap();
        assert_eq!((guest.cpu.regs[RAX], guest.cpu.rflags), (1, 2 | CF | SF));
    }
}
