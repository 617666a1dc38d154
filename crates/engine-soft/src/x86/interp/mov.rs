//! Moves, exchanges, extensions, address computation.

use iced_x86::Mnemonic;

use super::flags::holds;
use super::forms::{by_condition, by_width, by_word};
use crate::x86::cpu::Cpu;
use crate::x86::decode::{Lower, is_cmov, number};
use crate::x86::exception::Exec;
use crate::x86::int::Int;
use crate::x86::op::{Handler, MemRef, Op, flag, reg};

/// Chooses the handler.
pub fn lower(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    Some(match l.ins.mnemonic() {
        Mnemonic::Mov => return mov(l),
        Mnemonic::Movzx => return extend::<false>(l),
        Mnemonic::Movsx | Mnemonic::Movsxd => return extend::<true>(l),
        Mnemonic::Lea => by_word!(l.width(0), T => lea::<T>),
        Mnemonic::Xchg => return xchg(l, op),
        Mnemonic::Bswap => by_word!(l.width(0), T => bswap::<T>),
        Mnemonic::Movbe => {
            by_word!(l.width(0), T => if l.is_mem(0) { movbe_store::<T> } else { movbe_load::<T> })
        }
        Mnemonic::Movnti => by_word!(l.width(1), T => store::<T>),
        Mnemonic::Xlatb => {
            op.mem.seg = number(l.ins.memory_segment());
            xlat
        }
        Mnemonic::Cbw => widen::<u8, u16>,
        Mnemonic::Cwde => widen::<u16, u32>,
        Mnemonic::Cdqe => widen::<u32, u64>,
        Mnemonic::Cwd => spread_sign::<u16>,
        Mnemonic::Cdq => spread_sign::<u32>,
        Mnemonic::Cqo => spread_sign::<u64>,
        _ => return cmov(l),
    })
}

fn mov(l: &Lower<'_>) -> Option<Handler> {
    let general = |n| l.ins.op_register(n).is_gpr();
    let width = l.width(0).max(l.width(1));
    Some(match (l.is_mem(0), l.is_mem(1), l.is_imm(1)) {
        (true, _, true) => by_width!(width, T => store_imm::<T>),
        (true, ..) if general(1) => by_width!(width, T => store::<T>),
        (_, true, _) if general(0) => by_width!(width, T => load::<T>),
        (_, _, true) => by_width!(width, T => mov_imm::<T>),
        (false, false, false) if general(0) && general(1) => by_width!(width, T => mov_reg::<T>),
        _ => return None, // segment, control and debug registers are system instructions
    })
}

fn extend<const SIGNED: bool>(l: &Lower<'_>) -> Option<Handler> {
    Some(by_word!(l.width(0), D => match (l.width(1), l.is_mem(1)) {
        (8, true) => extend_m::<u8, D, SIGNED>,
        (8, false) => extend_r::<u8, D, SIGNED>,
        (16, true) => extend_m::<u16, D, SIGNED>,
        (16, false) => extend_r::<u16, D, SIGNED>,
        (32, true) => extend_m::<u32, D, SIGNED>,
        (32, false) => extend_r::<u32, D, SIGNED>,
        _ => return None,
    }))
}

fn xchg(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    if l.is_mem(1) {
        op.src = op.dst;
    }
    if l.is_mem(0) || l.is_mem(1) {
        op.flags |= flag::LOCK; // implied (SDM 2, XCHG)
        return Some(by_width!(l.width(0), T => xchg_m::<T>));
    }
    Some(by_width!(l.width(0), T => xchg_r::<T>))
}

fn cmov(l: &Lower<'_>) -> Option<Handler> {
    if !is_cmov(l.ins.mnemonic()) {
        return None;
    }
    let condition = (l.ins.condition_code() as u8).wrapping_sub(1);
    Some(by_condition!(condition, C => by_word!(l.width(0), T => {
        if l.is_mem(1) { cmov_m::<T, C> } else { cmov_r::<T, C> }
    })))
}

fn mov_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = T::get(cpu, op.src);
    T::set(cpu, op.dst, value);
    Ok(())
}

fn mov_imm<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    T::set(cpu, op.dst, T::cut(op.imm));
    Ok(())
}

fn load<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.load_mem::<T>(op)?;
    T::set(cpu, op.dst, value);
    Ok(())
}

fn store<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.store_mem(op, T::get(cpu, op.src))
}

fn store_imm<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.store_mem(op, T::cut(op.imm))
}

#[inline(always)]
fn extended<S: Int, const SIGNED: bool>(value: S) -> u64 {
    if SIGNED { value.sx() } else { value.zx() }
}

fn extend_r<S: Int, D: Int, const SIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = extended::<S, SIGNED>(S::get(cpu, op.src));
    D::set(cpu, op.dst, D::cut(value));
    Ok(())
}

fn extend_m<S: Int, D: Int, const SIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = extended::<S, SIGNED>(cpu.load_mem(op)?);
    D::set(cpu, op.dst, D::cut(value));
    Ok(())
}

fn lea<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let address = cpu.ea(op);
    T::set(cpu, op.dst, T::cut(address));
    Ok(())
}

fn xchg_r<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, b) = (T::get(cpu, op.dst), T::get(cpu, op.src));
    T::set(cpu, op.dst, b);
    T::set(cpu, op.src, a);
    Ok(())
}

fn xchg_m<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let new = T::get(cpu, op.src);
    let old = cpu.rmw::<T>(op, |_, _| new)?;
    T::set(cpu, op.src, old);
    Ok(())
}

#[inline(always)]
fn swapped<T: Int>(value: T) -> T {
    T::cut(value.zx().swap_bytes() >> (64 - T::BITS))
}

fn bswap<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    // Of 16 bits it is undefined; CPUs clear them.
    let value = if T::BITS == 16 { T::cut(0) } else { swapped(T::get(cpu, op.dst)) };
    T::set(cpu, op.dst, value);
    Ok(())
}

fn movbe_load<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.load_mem::<T>(op)?;
    T::set(cpu, op.dst, swapped(value));
    Ok(())
}

fn movbe_store<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.store_mem(op, swapped(T::get(cpu, op.src)))
}

fn xlat(cpu: &mut Cpu, op: &Op) -> Exec {
    let MemRef { mask, seg, .. } = op.mem;
    let index = u8::get(cpu, reg::RAX).zx();
    let address = cpu.regs[usize::from(reg::RBX)].wrapping_add(index) & mask;
    let value = cpu.load::<u8>(seg, address)?;
    u8::set(cpu, reg::RAX, value);
    Ok(())
}

fn widen<S: Int, D: Int>(cpu: &mut Cpu, _: &Op) -> Exec {
    let value = S::get(cpu, reg::RAX).sx();
    D::set(cpu, reg::RAX, D::cut(value));
    Ok(())
}

fn spread_sign<T: Int>(cpu: &mut Cpu, _: &Op) -> Exec {
    let sign = if T::get(cpu, reg::RAX).sign() { u64::MAX } else { 0 };
    T::set(cpu, reg::RDX, T::cut(sign));
    Ok(())
}

fn cmov_r<T: Int, const C: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (old, new) = (T::get(cpu, op.dst), T::get(cpu, op.src));
    // Written either way: 32 bits clear the upper half even if the condition is false.
    T::set(cpu, op.dst, if holds::<C>(cpu.rflags) { new } else { old });
    Ok(())
}

fn cmov_m<T: Int, const C: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    let new = cpu.load_mem::<T>(op)?; // faults even if the condition is false
    let old = T::get(cpu, op.dst);
    T::set(cpu, op.dst, if holds::<C>(cpu.rflags) { new } else { old });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::exception::Exception;
    use crate::x86::testing::{DATA, Guest};
    use engine::x86::bits::rflags::ZF;

    const RAX: usize = reg::RAX as usize;
    const RBX: usize = reg::RBX as usize;
    const RDX: usize = reg::RDX as usize;

    #[test]
    fn widths_of_register_writes() {
        // mov al, 1; mov ax, 0x203; mov eax, 4; mov rax, -5
        let code = [0xb0, 1, 0x66, 0xb8, 3, 2, 0xb8, 4, 0, 0, 0, 0x48, 0xc7, 0xc0, 0xfb, 0xff, 0xff, 0xff];
        let mut guest = Guest::new(64, &code);
        guest.cpu.regs[RAX] = u64::MAX;
        for expected in [0xffff_ffff_ffff_ff01, 0xffff_ffff_ffff_0203, 4, -5i64 as u64] {
            guest.steps(1).unwrap();
            assert_eq!(guest.cpu.regs[RAX], expected);
        }
    }

    #[test]
    fn an_absolute_64_bit_address_reaches_memory() {
        // movabs [DATA], rax; movabs al, [DATA + 1]
        let code = [0x48, 0xa3, 0, 0, 0x10, 0, 0, 0, 0, 0, 0xa0, 1, 0, 0x10, 0, 0, 0, 0, 0];
        let mut guest = Guest::new(64, &code);
        guest.cpu.regs[RAX] = 0x1122_3344_5566_7788;
        guest.steps(2).unwrap();
        assert_eq!(guest.peek(DATA), 0x1122_3344_5566_7788u64.to_le_bytes());
        assert_eq!(guest.cpu.regs[RAX], 0x1122_3344_5566_7777);
    }

    #[test]
    fn a_false_conditional_move_still_clears_the_upper_half() {
        let mut guest = Guest::new(64, &[0x0f, 0x44, 0xc3]); // cmove eax, ebx
        (guest.cpu.regs[RAX], guest.cpu.regs[RBX]) = (u64::MAX, 1);
        guest.cpu.rflags &= !ZF;
        guest.steps(1).unwrap();
        assert_eq!(guest.cpu.regs[RAX], 0xffff_ffff);
    }

    #[test]
    fn extensions_take_the_sign_or_not() {
        // movsx eax, byte [DATA]; movzx ebx, word [DATA]; movsxd rdx, eax
        let code =
            [0x0f, 0xbe, 0x04, 0x25, 0, 0, 0x10, 0, 0x0f, 0xb7, 0x1c, 0x25, 0, 0, 0x10, 0, 0x48, 0x63, 0xd0];
        let mut guest = Guest::new(64, &code);
        guest.poke(DATA, &[0x80, 0xff]);
        guest.steps(3).unwrap();
        assert_eq!(guest.cpu.regs[RAX], 0xffff_ff80);
        assert_eq!(guest.cpu.regs[RBX], 0xff80);
        assert_eq!(guest.cpu.regs[RDX], 0xffff_ffff_ffff_ff80);
    }

    #[test]
    fn address_size_cuts_lea_and_a_non_canonical_load_faults() {
        // lea rax, [ebx + 4]; mov al, [rdx]
        let mut guest = Guest::new(64, &[0x67, 0x48, 0x8d, 0x43, 4, 0x8a, 0x02]);
        guest.cpu.regs[RBX] = 0xffff_ffff_ffff_fffe;
        guest.cpu.regs[RDX] = 0x8000_0000_0000_0000;
        guest.steps(1).unwrap();
        assert_eq!(guest.cpu.regs[RAX], 2);
        assert_eq!(guest.step(), Err(Exception::GP0));
        assert_eq!(guest.cpu.regs[RAX], 2);
    }

    #[test]
    fn xlat_and_xchg_and_bswap_and_movbe() {
        // xlat; xchg [DATA], bl; bswap edx; movbe eax, [DATA]
        let code = [0xd7, 0x86, 0x1d, 0, 0, 0x10, 0, 0x0f, 0xca, 0x0f, 0x38, 0xf0, 0x05, 0, 0, 0x10, 0];
        let mut guest = Guest::new(32, &code);
        guest.poke(DATA, &[1, 2, 3, 4]);
        (guest.cpu.regs[RAX], guest.cpu.regs[RBX], guest.cpu.regs[RDX]) = (2, DATA, 0x1122_3344);
        guest.steps(1).unwrap();
        assert_eq!(guest.cpu.regs[RAX], 3);
        guest.steps(3).unwrap();
        assert_eq!(guest.cpu.regs[RBX], DATA | 1);
        assert_eq!(guest.cpu.regs[RDX], 0x4433_2211);
        assert_eq!(guest.cpu.regs[RAX], 0x0002_0304);
    }

    #[test]
    fn sign_spreading() {
        // cwde; cdq; cqo
        let mut guest = Guest::new(64, &[0x98, 0x99, 0x48, 0x99]);
        guest.cpu.regs[RAX] = 0x1234_8000;
        guest.steps(2).unwrap();
        assert_eq!((guest.cpu.regs[RAX], guest.cpu.regs[RDX]), (0xffff_8000, 0xffff_ffff));
        guest.steps(1).unwrap();
        assert_eq!(guest.cpu.regs[RDX], 0);
    }
}
