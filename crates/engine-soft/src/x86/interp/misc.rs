//! Flags by themselves, hints, fences, cache lines, random numbers, `BOUND`.

use engine::x86::bits::rflags::{AF, CF, DF, PF, SF, STATUS, ZF};
use iced_x86::Mnemonic;

use super::forms::by_word;
use crate::x86::cpu::Cpu;
use crate::x86::decode::Lower;
use crate::x86::exception::{Exception, Exec, vector};
use crate::x86::int::Int;
use crate::x86::op::{HIGH, Handler, Op, reg};
use crate::x86::walk::Intent;

/// What `LAHF` and `SAHF` move.
const LOW: u64 = SF | ZF | AF | PF | CF;

/// Chooses the handler.
pub fn lower(l: &Lower<'_>, _op: &mut Op) -> Option<Handler> {
    use Mnemonic::*;
    Some(match l.ins.mnemonic() {
        Nop | Reservednop | Pause | Endbr32 | Endbr64 => nop,
        Prefetch | Prefetchw | Prefetchwt1 | Prefetchnta | Prefetcht0 | Prefetcht1 | Prefetcht2 => nop,
        Prefetchit0 | Prefetchit1 | Cldemote => nop,
        // Without shadow stacks and without MPX these are hints that do nothing (SDM 1, 17.1.2; SDM 2).
        Rdsspd | Rdsspq | Bndmk | Bndcl | Bndcu | Bndcn | Bndmov | Bndldx | Bndstx => nop,
        Lfence | Sfence => nop,
        Mfence => mfence,
        Clflush | Clflushopt | Clwb => cache_line,
        Clc => clc,
        Stc => stc,
        Cmc => cmc,
        Cld => cld,
        Std => std,
        Lahf => lahf,
        Sahf => sahf,
        Salc => salc,
        Rdrand | Rdseed => by_word!(l.width(0), T => random::<T>),
        Bound => by_word!(l.width(0), T => bound::<T>),
        _ => return None,
    })
}

fn nop(_: &mut Cpu, _: &Op) -> Exec {
    Ok(())
}

fn mfence(_: &mut Cpu, _: &Op) -> Exec {
    // The host orders loads and stores as the guest's CPU does, but for a store before a load.
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(())
}

/// `CLFLUSH` and its kin: nothing to do but the checks of a load (SDM 2, `CLFLUSH`).
fn cache_line(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = cpu.linear(op.mem.seg, cpu.ea(op), 1, false)?;
    let view = cpu.view();
    if cpu.tlb.read(view, linear).is_none() {
        cpu.translate(view, linear, Intent::Read)?;
    }
    Ok(())
}

fn clc(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.rflags &= !CF;
    Ok(())
}

fn stc(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.rflags |= CF;
    Ok(())
}

fn cmc(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.rflags ^= CF;
    Ok(())
}

fn cld(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.rflags &= !DF;
    Ok(())
}

fn std(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.rflags |= DF;
    Ok(())
}

fn lahf(cpu: &mut Cpu, _: &Op) -> Exec {
    let low = (cpu.rflags & LOW | 2) as u8;
    u8::set(cpu, HIGH | reg::RAX, low);
    Ok(())
}

fn sahf(cpu: &mut Cpu, _: &Op) -> Exec {
    let ah = u8::get(cpu, HIGH | reg::RAX).zx();
    cpu.rflags = cpu.rflags & !LOW | ah & LOW;
    Ok(())
}

fn salc(cpu: &mut Cpu, _: &Op) -> Exec {
    let al = if cpu.flag(CF) { 0xff } else { 0 };
    u8::set(cpu, reg::RAX, al);
    Ok(())
}

/// `RDRAND` and `RDSEED`, from the host kernel's generator; CF tells whether there was a number.
fn random<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let mut bytes = [0u8; 8];
    let read = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::NONBLOCK);
    let good = read == Ok(bytes.len());
    let value = if good { u64::from_le_bytes(bytes) } else { 0 };
    T::set(cpu, op.dst, T::cut(value));
    cpu.rflags = cpu.rflags & !STATUS | u64::from(good);
    Ok(())
}

fn bound<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let offset = cpu.ea(op);
    let low = cpu.load::<T>(op.mem.seg, offset)?;
    let high = cpu.load::<T>(op.mem.seg, offset.wrapping_add(T::BYTES) & op.mem.mask)?;
    let index = T::get(cpu, op.dst).sx() as i64;
    if index < low.sx() as i64 || index > high.sx() as i64 {
        return Err(Exception::new(vector::BR));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::testing::{CODE, DATA, Guest};

    const RAX: usize = reg::RAX as usize;
    const RBX: usize = reg::RBX as usize;

    #[test]
    fn flags_go_to_ah_and_back() {
        let mut guest = Guest::new(64, &[0xf9, 0xfd, 0x9f, 0xf5, 0xfc, 0x9e]); // stc std lahf cmc cld sahf
        guest.cpu.rflags |= ZF;
        guest.steps(3).unwrap();
        assert_eq!(guest.cpu.regs[RAX], 0x4300);
        assert_eq!(guest.cpu.rflags, 2 | CF | ZF | DF);
        guest.steps(2).unwrap();
        assert_eq!(guest.cpu.rflags, 2 | ZF);
        guest.cpu.regs[RAX] = 0xff00;
        guest.steps(1).unwrap();
        assert_eq!(guest.cpu.rflags, 2 | LOW);
    }

    #[test]
    fn hints_do_nothing_at_any_length() {
        // nop [rax+rax]; endbr64; pause; prefetcht0 [rax]; rdsspq rax; mfence
        let code = [
            0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0, 0xf3, 0x0f, 0x1e, 0xfa, 0xf3, 0x90, 0x0f, 0x18,
            0x08, 0xf3, 0x48, 0x0f, 0x1e, 0xc8, 0x0f, 0xae, 0xf0,
        ];
        let mut guest = Guest::new(64, &code);
        guest.cpu.regs[RAX] = 1 << 63;
        let before = guest.cpu.regs[..16].to_vec();
        guest.steps(6).unwrap();
        assert_eq!(guest.cpu.rip(), CODE + code.len() as u64);
        assert_eq!(guest.cpu.regs[..16], before[..]);
    }

    #[test]
    fn flushing_a_line_checks_its_address() {
        let mut guest = Guest::new(64, &[0x0f, 0xae, 0x38, 0x0f, 0xae, 0x38]); // clflush [rax]
        guest.cpu.regs[RAX] = DATA;
        guest.steps(1).unwrap();
        guest.cpu.regs[RAX] = 1 << 63;
        assert_eq!(guest.step(), Err(Exception::GP0));
    }

    #[test]
    fn random_numbers_differ() {
        let mut guest = Guest::new(64, &[0x48, 0x0f, 0xc7, 0xf0, 0x48, 0x0f, 0xc7, 0xfb]); // rdrand rax; rdseed rbx
        guest.cpu.rflags |= ZF;
        guest.steps(2).unwrap();
        assert_ne!(guest.cpu.regs[RAX], guest.cpu.regs[RBX]);
        assert_eq!(guest.cpu.rflags, 2 | CF);
    }

    #[test]
    fn bounds_are_inclusive_and_signed() {
        let code = [0x62, 0x05, 0, 0, 0x10, 0]; // bound eax, [DATA]
        let mut limits = (-1i32).to_le_bytes().to_vec();
        limits.extend(5i32.to_le_bytes());
        for (index, fits) in [(5u32, true), (u32::MAX, true), (6, false), (u32::MAX - 1, false)] {
            let mut guest = Guest::new(32, &code);
            guest.poke(DATA, &limits);
            guest.cpu.regs[RAX] = index.into();
            let expected = if fits { Ok(()) } else { Err(Exception::new(vector::BR)) };
            assert_eq!(guest.step(), expected, "{index}");
        }
    }

    #[test]
    fn undefined_by_definition() {
        for code in [[0x0f, 0x0b, 0xc0], [0x0f, 0xb9, 0xc0], [0x0f, 0xff, 0xc0]] {
            assert_eq!(Guest::new(64, &code).step(), Err(Exception::UD));
        }
    }
}
