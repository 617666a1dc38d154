//! Decimal adjustment (SDM 2: `AAA`, `AAS`, `DAA`, `DAS`). Not in 64-bit code.

use engine::x86::bits::rflags::{AF, CF};
use iced_x86::Mnemonic;

use super::flags::{szp, with};
use crate::x86::cpu::Cpu;
use crate::x86::decode::Lower;
use crate::x86::exception::Exec;
use crate::x86::int::Int;
use crate::x86::op::{Handler, Op, reg};

/// Chooses the handler.
pub fn lower(l: &Lower<'_>, _op: &mut Op) -> Option<Handler> {
    match l.ins.mnemonic() {
        Mnemonic::Daa => Some(packed::<false>),
        Mnemonic::Das => Some(packed::<true>),
        Mnemonic::Aaa => Some(unpacked::<false>),
        Mnemonic::Aas => Some(unpacked::<true>),
        _ => None,
    }
}

/// `DAA` and `DAS`. OF, undefined, is cleared.
fn packed<const SUBTRACT: bool>(cpu: &mut Cpu, _: &Op) -> Exec {
    let al = u8::get(cpu, reg::RAX);
    let low = al & 0xf > 9 || cpu.flag(AF);
    let high = al > 0x99 || cpu.flag(CF);
    let adjust = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
    let result = if SUBTRACT { al.wrapping_sub(adjust) } else { al.wrapping_add(adjust) };
    // `DAS` also reports the borrow of its first step.
    let carry = high || SUBTRACT && low && al < 6;
    u8::set(cpu, reg::RAX, result);
    cpu.rflags = with(cpu.rflags, szp(result) | if low { AF } else { 0 } | u64::from(carry));
    Ok(())
}

/// `AAA` and `AAS`. OF, SF, ZF and PF, undefined, are those of the new AL.
fn unpacked<const SUBTRACT: bool>(cpu: &mut Cpu, _: &Op) -> Exec {
    let mut ax = u16::get(cpu, reg::RAX);
    let adjust = ax & 0xf > 9 || cpu.flag(AF);
    if adjust {
        ax = if SUBTRACT { ax.wrapping_sub(0x106) } else { ax.wrapping_add(0x106) };
    }
    ax &= 0xff0f;
    u16::set(cpu, reg::RAX, ax);
    cpu.rflags = with(cpu.rflags, szp(ax as u8) | if adjust { AF | CF } else { 0 });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::exception::Exception;
    use crate::x86::testing::Guest;

    const RAX: usize = reg::RAX as usize;

    #[test]
    fn packed_decimals_add_and_subtract() {
        let mut guest = Guest::new(32, &[0x04, 0x35, 0x27, 0x2c, 0x47, 0x2f]); // add al, 35; daa; sub al, 47; das
        guest.cpu.regs[RAX] = 0x79;
        guest.steps(2).unwrap();
        assert_eq!((guest.cpu.regs[RAX], guest.cpu.flag(CF)), (0x14, true));
        guest.steps(2).unwrap();
        assert_eq!((guest.cpu.regs[RAX], guest.cpu.flag(CF)), (0x67, true));
    }

    #[test]
    fn unpacked_decimals_carry_into_ah() {
        let mut guest = Guest::new(16, &[0x04, 0x09, 0x37, 0x2c, 0x08, 0x3f]); // add al, 9; aaa; sub al, 8; aas
        guest.cpu.regs[RAX] = 0x0205;
        guest.steps(2).unwrap();
        assert_eq!((guest.cpu.regs[RAX], guest.cpu.flag(CF)), (0x0304, true));
        guest.steps(2).unwrap();
        assert_eq!((guest.cpu.regs[RAX], guest.cpu.flag(CF)), (0x0206, true));
    }

    #[test]
    fn there_are_none_in_64_bit_code() {
        for opcode in [0x27, 0x2f, 0x37, 0x3f, 0xd4, 0xd5] {
            assert_eq!(Guest::new(64, &[opcode, 10]).step(), Err(Exception::UD));
        }
    }
}
