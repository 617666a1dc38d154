//! Single bits, bit counting, BMI1 and BMI2, `CRC32`.
//!
//! Undefined flags: `BT*` leave them as they were; the scans and BMI1 set PF by the result and clear
//! the rest; the counts clear them.

use engine::x86::bits::rflags::{CF, PF, ZF};
use iced_x86::Mnemonic;

use super::flags::{szp, with};
use super::forms::{Binary, binary_word, by_width, by_word, ternary};
use crate::x86::cpu::Cpu;
use crate::x86::decode::Lower;
use crate::x86::exception::Exec;
use crate::x86::int::Int;
use crate::x86::op::{Handler, Op, flag};

/// Chooses the handler.
pub fn lower(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    match l.ins.mnemonic() {
        Mnemonic::Bt => bit::<Keep>(l, op),
        Mnemonic::Bts => bit::<Set>(l, op),
        Mnemonic::Btr => bit::<Reset>(l, op),
        Mnemonic::Btc => bit::<Complement>(l, op),
        Mnemonic::Bsf => scan::<Bsf>(l),
        Mnemonic::Bsr => scan::<Bsr>(l),
        Mnemonic::Lzcnt => binary_word::<Lzcnt>(l),
        Mnemonic::Tzcnt => binary_word::<Tzcnt>(l),
        Mnemonic::Popcnt => binary_word::<Popcnt>(l),
        Mnemonic::Andn => ternary::<Andn>(l),
        Mnemonic::Blsr => binary_word::<Blsr>(l),
        Mnemonic::Blsmsk => binary_word::<Blsmsk>(l),
        Mnemonic::Blsi => binary_word::<Blsi>(l),
        Mnemonic::Bextr if !l.is_imm(2) => ternary::<Bextr>(l),
        Mnemonic::Bzhi => ternary::<Bzhi>(l),
        Mnemonic::Pdep => ternary::<Pdep>(l),
        Mnemonic::Pext => ternary::<Pext>(l),
        Mnemonic::Crc32 => {
            Some(by_width!(l.width(1), T => if l.is_mem(1) { crc32_m::<T> } else { crc32_r::<T> }))
        }
        _ => None,
    }
}

/// What becomes of the bit that is tested.
trait Change {
    const WRITES: bool = true;
    fn change(value: u64, bit: u64) -> u64;
}

struct Keep;
impl Change for Keep {
    const WRITES: bool = false;
    fn change(value: u64, _: u64) -> u64 {
        value
    }
}

struct Set;
impl Change for Set {
    #[inline(always)]
    fn change(value: u64, bit: u64) -> u64 {
        value | bit
    }
}

struct Reset;
impl Change for Reset {
    #[inline(always)]
    fn change(value: u64, bit: u64) -> u64 {
        value & !bit
    }
}

struct Complement;
impl Change for Complement {
    #[inline(always)]
    fn change(value: u64, bit: u64) -> u64 {
        value ^ bit
    }
}

fn bit<O: Change>(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    let width = l.width(0);
    op.imm &= u64::from(width.wrapping_sub(1));
    Some(by_word!(width, T => match (l.is_mem(0), l.is_imm(1)) {
        (false, true) => bit_r::<T, O, true>,
        (false, false) => bit_r::<T, O, false>,
        (true, true) => bit_m::<T, O, true>,
        (true, false) => bit_m::<T, O, false>,
    }))
}

#[inline(always)]
fn with_carry(rflags: u64, carry: bool) -> u64 {
    rflags & !CF | u64::from(carry)
}

fn bit_r<T: Int, O: Change, const IMM: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let number = if IMM { op.imm } else { cpu.regs[usize::from(op.src & 15)] };
    let bit = 1 << (number & u64::from(T::BITS - 1));
    let value = T::get(cpu, op.dst).zx();
    if O::WRITES {
        T::set(cpu, op.dst, T::cut(O::change(value, bit)));
    }
    cpu.rflags = with_carry(cpu.rflags, value & bit != 0);
    Ok(())
}

/// A bit string in memory: the register form reaches bits far from the operand, in both directions.
fn bit_m<T: Int, O: Change, const IMM: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (mut offset, mut number) = (cpu.ea(op), op.imm);
    if !IMM {
        number = T::get(cpu, op.src).sx();
        let words = number as i64 >> T::BITS.trailing_zeros();
        offset = offset.wrapping_add((words as u64).wrapping_mul(T::BYTES)) & op.mem.mask;
    }
    let bit = 1 << (number & u64::from(T::BITS - 1));
    let old = if O::WRITES {
        let linear = cpu.linear(op.mem.seg, offset, T::BYTES, true)?;
        cpu.rmw_linear::<T>(linear, op.has(flag::LOCK), |_, v| T::cut(O::change(v.zx(), bit)))?
    } else {
        cpu.load::<T>(op.mem.seg, offset)?
    };
    cpu.rflags = with_carry(cpu.rflags, old.zx() & bit != 0);
    Ok(())
}

/// A search for a bit; of zero it finds none and leaves the destination alone.
trait Scan {
    fn find(value: u64) -> u32;
}

struct Bsf;
impl Scan for Bsf {
    #[inline(always)]
    fn find(value: u64) -> u32 {
        value.trailing_zeros()
    }
}

struct Bsr;
impl Scan for Bsr {
    #[inline(always)]
    fn find(value: u64) -> u32 {
        63 - (value | 1).leading_zeros()
    }
}

fn scan<O: Scan>(l: &Lower<'_>) -> Option<Handler> {
    Some(by_word!(l.width(0), T => if l.is_mem(1) { scan_m::<T, O> } else { scan_r::<T, O> }))
}

fn scan_r<T: Int, O: Scan>(cpu: &mut Cpu, op: &Op) -> Exec {
    found::<T, O>(cpu, op, T::get(cpu, op.src))
}

fn scan_m<T: Int, O: Scan>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.load_mem::<T>(op)?;
    found::<T, O>(cpu, op, value)
}

#[inline(always)]
fn found<T: Int, O: Scan>(cpu: &mut Cpu, op: &Op, value: T) -> Exec {
    if value.zx() == 0 {
        cpu.rflags = with(cpu.rflags, ZF | PF);
        return Ok(());
    }
    let result = T::cut(O::find(value.zx()).into());
    T::set(cpu, op.dst, result);
    cpu.rflags = with(cpu.rflags, szp(result) & PF);
    Ok(())
}

/// Flags of a count: CF if there was nothing to count, ZF if the count is zero.
#[inline(always)]
fn counted<T: Int>(count: u32, nothing: bool, rflags: u64) -> (T, u64) {
    let status = u64::from(nothing) | u64::from(count == 0) << 6;
    (T::cut(count.into()), with(rflags, status))
}

macro_rules! binary_ops {
    ($($name:ident: |$a:ident, $b:ident, $rflags:ident| $eval:expr;)*) => {
        $(struct $name;
        impl Binary for $name {
            #[inline(always)]
            fn eval<T: Int>($a: T, $b: T, $rflags: u64) -> (T, u64) {
                let ($a, $b) = ($a.zx(), $b.zx());
                $eval
            }
        })*
    };
}

binary_ops! {
    Lzcnt: |_a, b, rflags| counted((b << (64 - T::BITS)).leading_zeros().min(T::BITS), b == 0, rflags);
    Tzcnt: |_a, b, rflags| counted(b.trailing_zeros().min(T::BITS), b == 0, rflags);
    Popcnt: |_a, b, rflags| (T::cut(b.count_ones().into()), with(rflags, u64::from(b == 0) << 6));
    Andn: |a, b, rflags| masked(!a & b, 0, rflags);
    Blsr: |_a, b, rflags| masked(b & b.wrapping_sub(1), u64::from(b == 0), rflags);
    Blsmsk: |_a, b, rflags| masked(b ^ b.wrapping_sub(1), u64::from(b == 0), rflags);
    Blsi: |_a, b, rflags| masked(b & b.wrapping_neg(), u64::from(b != 0), rflags);
    Bextr: |a, b, rflags| field(low(shifted(a, b as u8), (b >> 8) as u8), rflags);
    Bzhi: |a, b, rflags| masked(low(a, b as u8), u64::from(b & 0xff > u64::from(T::BITS - 1)), rflags);
    Pdep: |a, b, rflags| (T::cut(deposit(a, b)), rflags);
    Pext: |a, b, rflags| (T::cut(extract(a, b)), rflags);
}

/// A result with SF and ZF (and PF, which is undefined) of it, CF as given, the rest cleared.
#[inline(always)]
fn masked<T: Int>(result: u64, carry: u64, rflags: u64) -> (T, u64) {
    let result = T::cut(result);
    (result, with(rflags, szp(result) | carry))
}

/// A result with ZF of it, the rest cleared.
#[inline(always)]
fn field<T: Int>(result: u64, rflags: u64) -> (T, u64) {
    let result = T::cut(result);
    (result, with(rflags, u64::from(result.zx() == 0) << 6))
}

fn shifted(value: u64, by: u8) -> u64 {
    value.checked_shr(by.into()).unwrap_or(0)
}

/// The low `count` bits.
fn low(value: u64, count: u8) -> u64 {
    if count >= 64 { value } else { value & ((1 << count) - 1) }
}

/// The low bits of `value`, laid out where `mask` has ones.
fn deposit(mut value: u64, mut mask: u64) -> u64 {
    let mut result = 0;
    while mask != 0 {
        let bit = mask & mask.wrapping_neg();
        result |= bit & (value & 1).wrapping_neg();
        value >>= 1;
        mask ^= bit;
    }
    result
}

/// The bits of `value` where `mask` has ones, moved together.
fn extract(value: u64, mut mask: u64) -> u64 {
    let (mut result, mut at) = (0, 0);
    while mask != 0 {
        let bit = mask & mask.wrapping_neg();
        result |= u64::from(value & bit != 0) << at;
        at += 1;
        mask ^= bit;
    }
    result
}

/// CRC-32C (polynomial 0x11EDC6F41, reflected) of every byte.
static CRC32C: [u32; 256] = crc32c();

const fn crc32c() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut crc, mut bit) = (byte as u32, 0);
        while bit < 8 {
            crc = if crc & 1 != 0 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
}

fn crc<T: Int>(cpu: &mut Cpu, op: &Op, value: T) {
    let bytes = value.zx().to_le_bytes();
    let start = u32::get(cpu, op.dst);
    let crc = bytes[..T::BYTES as usize]
        .iter()
        .fold(start, |crc, byte| crc >> 8 ^ CRC32C[usize::from(crc as u8 ^ byte)]);
    u32::set(cpu, op.dst, crc);
}

fn crc32_r<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = T::get(cpu, op.src);
    crc(cpu, op, value);
    Ok(())
}

fn crc32_m<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.load_mem::<T>(op)?;
    crc(cpu, op, value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::op::reg;
    use crate::x86::testing::{DATA, Guest};

    const RAX: usize = reg::RAX as usize;
    const RBX: usize = reg::RBX as usize;
    const RCX: usize = reg::RCX as usize;

    #[test]
    fn bit_strings_reach_before_and_behind_their_operand() {
        // bts [DATA], rax; btr dword [DATA], 33 (bit 1); bt [DATA], ax
        let code = [
            0x48, 0x0f, 0xab, 0x04, 0x25, 0, 0, 0x10, 0, 0x0f, 0xba, 0x34, 0x25, 0, 0, 0x10, 0, 33, 0x66,
            0x0f, 0xa3, 0x04, 0x25, 0, 0, 0x10, 0,
        ];
        let mut guest = Guest::new(64, &code);
        guest.poke(DATA, &[2]);
        guest.cpu.regs[RAX] = -65i64 as u64;
        guest.steps(1).unwrap();
        assert_eq!(guest.peek(DATA - 16), (1u128 << 63).to_le_bytes());
        assert!(!guest.cpu.flag(CF));
        guest.steps(1).unwrap();
        assert_eq!((guest.peek(DATA), guest.cpu.flag(CF)), ([0], true));
        guest.steps(1).unwrap();
        assert!(guest.cpu.flag(CF), "bit -65 as 16 bits see it");
    }

    #[test]
    fn a_search_in_zero_leaves_the_destination_alone() {
        let mut guest = Guest::new(64, &[0x0f, 0xbc, 0xc3, 0x48, 0x0f, 0xbd, 0xc1]); // bsf eax, ebx; bsr rax, rcx
        (guest.cpu.regs[RAX], guest.cpu.regs[RCX]) = (77, 1 << 40);
        guest.steps(1).unwrap();
        assert_eq!((guest.cpu.regs[RAX], guest.cpu.flag(ZF)), (77, true));
        guest.steps(1).unwrap();
        assert_eq!((guest.cpu.regs[RAX], guest.cpu.flag(ZF)), (40, false));
    }

    #[test]
    fn counts_know_their_width() {
        // lzcnt ax, bx; tzcnt ecx, ebx; popcnt rax, rbx
        let code = [0x66, 0xf3, 0x0f, 0xbd, 0xc3, 0xf3, 0x0f, 0xbc, 0xcb, 0xf3, 0x48, 0x0f, 0xb8, 0xc3];
        let mut guest = Guest::new(64, &code);
        guest.cpu.regs[RBX] = 0xff << 32;
        guest.steps(1).unwrap();
        assert_eq!((guest.cpu.regs[RAX], guest.cpu.flag(CF)), (16, true));
        guest.steps(1).unwrap();
        assert_eq!((guest.cpu.regs[RCX], guest.cpu.flag(CF)), (32, true));
        guest.steps(1).unwrap();
        assert_eq!((guest.cpu.regs[RAX], guest.cpu.rflags), (8, 2));
    }

    #[test]
    fn deposit_and_extract_undo_each_other() {
        let (value, mask) = (0b1011, 0xf0f0_0000_0000_0001);
        assert_eq!(deposit(value, mask), 1 | 1 << 52 | 1 << 54);
        assert_eq!(extract(deposit(value, mask), mask), value);
        assert_eq!(deposit(0b10, 0x8001), 0x8000);
    }

    #[test]
    fn bmi_masks() {
        // blsr eax, ebx; bextr eax, ebx, ecx; bzhi eax, ebx, ecx; andn eax, ebx, ecx
        let code = [
            0xc4, 0xe2, 0x78, 0xf3, 0xcb, 0xc4, 0xe2, 0x70, 0xf7, 0xc3, 0xc4, 0xe2, 0x70, 0xf5, 0xc3, 0xc4,
            0xe2, 0x60, 0xf2, 0xc1,
        ];
        let mut guest = Guest::new(64, &code);
        (guest.cpu.regs[RBX], guest.cpu.regs[RCX]) = (0x1_0000_abc8, 0x0804);
        for expected in [0xabc0, 0xbc, 0x8, 0x0004] {
            guest.steps(1).unwrap();
            assert_eq!(guest.cpu.regs[RAX], expected);
        }
    }

    #[test]
    fn crc32c_of_the_standard_check_string() {
        let mut guest = Guest::new(64, &[0xf2, 0x48, 0x0f, 0x38, 0xf1, 0xc3, 0xf2, 0x0f, 0x38, 0xf0, 0xc1]);
        guest.cpu.regs[RAX] = 0xffff_ffff;
        guest.cpu.regs[RBX] = u64::from_le_bytes(*b"12345678");
        guest.cpu.regs[RCX] = u64::from(b'9');
        guest.steps(2).unwrap();
        assert_eq!(guest.cpu.regs[RAX] ^ 0xffff_ffff, 0xe306_9283);
    }
}
