//! x87 control, status and environment (SDM 1, 8.1; figures 8-9 to 8-12 for the layouts).

use engine::x86::bits::cr0;
use iced_x86::{Code, Mnemonic};

use super::{real_mode, wait};
use crate::x86::cpu::Cpu;
use crate::x86::decode::Lower;
use crate::x86::exception::{Exception, Exec};
use crate::x86::fpu::{self, Pointers, X87, X87_EXCEPTIONS};
use crate::x86::int::Int;
use crate::x86::op::reg::RAX;
use crate::x86::op::{Handler, Op};

/// Words of an environment.
const WORDS: usize = 7;

/// Chooses the handler of a control instruction.
pub fn lower(l: &Lower<'_>, _op: &mut Op) -> Option<Handler> {
    use Mnemonic as M;
    let wide = matches!(
        l.ins.code(),
        Code::Fldenv_m28byte | Code::Fnstenv_m28byte | Code::Fnsave_m108byte | Code::Frstor_m108byte
    );
    Some(match l.ins.mnemonic() {
        M::Wait => fwait,
        M::Fnop => fnop,
        M::Fninit => fninit,
        M::Fnclex => fnclex,
        // Instructions of the 287, without effect since.
        M::Fneni | M::Fndisi | M::Fnsetpm => ignored,
        M::Fldcw => fldcw,
        M::Fnstcw => fnstcw,
        M::Fnstsw if l.is_mem(0) => fnstsw,
        M::Fnstsw => fnstsw_ax,
        M::Fldenv if wide => fldenv::<u32>,
        M::Fldenv => fldenv::<u16>,
        M::Fnstenv if wide => fnstenv::<u32>,
        M::Fnstenv => fnstenv::<u16>,
        M::Fnsave if wide => fnsave::<u32>,
        M::Fnsave => fnsave::<u16>,
        M::Frstor if wide => frstor::<u32>,
        M::Frstor => frstor::<u16>,
        _ => return None,
    })
}

fn fwait(cpu: &mut Cpu, _op: &Op) -> Exec {
    if cpu.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS {
        return Err(Exception::NM);
    }
    cpu.check_pending_x87()
}

fn fnop(cpu: &mut Cpu, _op: &Op) -> Exec {
    wait(cpu)
}

fn ignored(cpu: &mut Cpu, _op: &Op) -> Exec {
    cpu.check_x87()
}

fn fninit(cpu: &mut Cpu, _op: &Op) -> Exec {
    cpu.check_x87()?;
    reset(cpu);
    Ok(())
}

fn reset(cpu: &mut Cpu) {
    cpu.fpu.x87.reset();
    cpu.fpu.pointers = Pointers::default();
}

fn fnclex(cpu: &mut Cpu, _op: &Op) -> Exec {
    cpu.check_x87()?;
    cpu.fpu.x87.fsw &= 0x7f00;
    Ok(())
}

fn fldcw(cpu: &mut Cpu, op: &Op) -> Exec {
    wait(cpu)?;
    let value: u16 = cpu.load_mem(op)?;
    cpu.fpu.x87.fcw = fpu::control(value);
    cpu.fpu.x87.summarize();
    Ok(())
}

fn fnstcw(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_x87()?;
    cpu.store_mem(op, cpu.fpu.x87.fcw)
}

fn fnstsw(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_x87()?;
    cpu.store_mem(op, cpu.fpu.x87.fsw)
}

fn fnstsw_ax(cpu: &mut Cpu, _op: &Op) -> Exec {
    cpu.check_x87()?;
    u16::set(cpu, RAX, cpu.fpu.x87.fsw);
    Ok(())
}

/// The two-bit tags of the physical registers (SDM 1, 8.1.7).
fn tags(x87: &X87) -> u16 {
    let tag = |physical: usize| {
        let [mantissa, exponent] = x87.st[physical.wrapping_sub(x87.top()) & 7];
        match (x87.ftw >> physical & 1, exponent & 0x7fff, mantissa) {
            (0, ..) => 3,
            (_, 0, 0) => 1,
            (_, 0 | 0x7fff, _) => 2,
            (_, _, mantissa) if mantissa >> 63 == 0 => 2,
            _ => 0,
        }
    };
    (0..8).fold(0, |word, physical| word | tag(physical) << (2 * physical))
}

/// A bit per register that is in use.
fn in_use(tags: u16) -> u8 {
    (0..8).fold(0, |bits, physical| bits | u8::from(tags >> (2 * physical) & 3 != 3) << physical)
}

/// The environment as `FNSTENV` stores it; narrow words are cut.
fn environment(cpu: &Cpu) -> [u32; WORDS] {
    let (x87, Pointers { fip, fdp, fop }) = (&cpu.fpu.x87, cpu.fpu.pointers);
    let [control, status, tags] = [x87.fcw, x87.fsw, tags(x87)].map(|word| 0xffff_0000 | u32::from(word));
    if real_mode(cpu) {
        let low = |pointer: u64| 0xffff_0000 | pointer as u32 & 0xffff;
        let high = |pointer: u64| (pointer >> 16 << 12) as u32 & 0x0fff_f000;
        return [control, status, tags, low(fip), high(fip) | u32::from(fop), low(fdp), high(fdp)];
    }
    [control, status, tags, fip as u32, u32::from(fop) << 16, fdp as u32, 0xffff_0000]
}

fn set_environment<T: Int>(cpu: &mut Cpu, words: [u32; WORDS]) {
    let [control, status, tags, ip, code, dp, data] = words;
    let x87 = &mut cpu.fpu.x87;
    x87.set_top(usize::from(status as u16 >> 11 & 7));
    (x87.fcw, x87.fsw, x87.ftw) = (fpu::control(control as u16), status as u16, in_use(tags as u16));
    x87.summarize();
    cpu.fpu.pointers = if real_mode(cpu) {
        let linear = |low: u32, high: u32| u64::from(low & 0xffff | (high & 0x0fff_f000) << 4);
        Pointers { fip: linear(ip, code), fdp: linear(dp, data), fop: code as u16 & 0x7ff }
    } else {
        // The 16-bit layout has no opcode.
        Pointers {
            fip: ip.into(),
            fdp: dp.into(),
            fop: if T::BITS == 32 { (code >> 16) as u16 & 0x7ff } else { 0 },
        }
    };
}

fn store_environment<T: Int>(cpu: &mut Cpu, linear: u64) -> Exec {
    for (i, word) in (0u64..).zip(environment(cpu)) {
        cpu.store_linear(cpu.view(), cpu.along(linear, i * T::BYTES), T::cut(word.into()))?;
    }
    Ok(())
}

fn load_environment<T: Int>(cpu: &mut Cpu, linear: u64) -> Exec<[u32; WORDS]> {
    let mut words = [0; WORDS];
    for (i, word) in (0u64..).zip(&mut words) {
        let loaded: T = cpu.load_linear(cpu.view(), cpu.along(linear, i * T::BYTES))?;
        *word = loaded.zx() as u32;
    }
    Ok(words)
}

/// Bytes of an environment in words of `T`.
fn environment_bytes<T: Int>() -> u64 {
    WORDS as u64 * T::BYTES
}

fn fnstenv<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_x87()?;
    let bytes = environment_bytes::<T>();
    let linear = cpu.linear(op.mem.seg, cpu.ea(op), bytes, true)?;
    cpu.probe_write(cpu.view(), linear, bytes)?;
    store_environment::<T>(cpu, linear)?;
    cpu.fpu.x87.fcw |= X87_EXCEPTIONS;
    cpu.fpu.x87.summarize();
    Ok(())
}

fn fldenv<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    wait(cpu)?;
    let linear = cpu.linear(op.mem.seg, cpu.ea(op), environment_bytes::<T>(), false)?;
    let words = load_environment::<T>(cpu, linear)?;
    set_environment::<T>(cpu, words);
    Ok(())
}

fn fnsave<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_x87()?;
    let bytes = environment_bytes::<T>() + 80;
    let linear = cpu.linear(op.mem.seg, cpu.ea(op), bytes, true)?;
    cpu.probe_write(cpu.view(), linear, bytes)?;
    store_environment::<T>(cpu, linear)?;
    for (i, [mantissa, exponent]) in (0u64..).zip(cpu.fpu.x87.st) {
        let at = cpu.along(linear, environment_bytes::<T>() + 10 * i);
        cpu.store_linear(cpu.view(), at, mantissa)?;
        cpu.store_linear(cpu.view(), cpu.along(at, 8), exponent as u16)?;
    }
    reset(cpu);
    Ok(())
}

fn frstor<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    wait(cpu)?;
    let bytes = environment_bytes::<T>() + 80;
    let linear = cpu.linear(op.mem.seg, cpu.ea(op), bytes, false)?;
    let words = load_environment::<T>(cpu, linear)?;
    let mut registers = [[0; 2]; 8];
    for (i, [mantissa, exponent]) in (0u64..).zip(&mut registers) {
        let at = cpu.along(linear, environment_bytes::<T>() + 10 * i);
        *mantissa = cpu.load_linear(cpu.view(), at)?;
        *exponent = cpu.load_linear::<u16>(cpu.view(), cpu.along(at, 8))?.into();
    }
    set_environment::<T>(cpu, words);
    cpu.fpu.x87.st = registers;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::exception::vector;
    use crate::x86::op::reg;
    use crate::x86::testing::{CODE, DATA, Guest};

    fn guest(bits: u8, code: &[u8]) -> Guest {
        let mut guest = Guest::new(bits, code);
        guest.cpu.cr0 |= cr0::NE;
        guest.cpu.regs[usize::from(reg::RDI)] = if bits == 16 { 0x100 } else { DATA };
        guest
    }

    fn word(guest: &Guest, at: u64) -> u32 {
        u32::from_le_bytes(guest.peek(at))
    }

    #[test]
    fn arithmetic_runs_on_the_stack_and_stores_its_result() {
        // fninit; fld1; fldpi; faddp; fstp qword [rdi]
        let mut guest = guest(64, &[0xdb, 0xe3, 0xd9, 0xe8, 0xd9, 0xeb, 0xde, 0xc1, 0xdd, 0x1f]);
        guest.steps(5).unwrap();
        assert_eq!(f64::from_le_bytes(guest.peek(DATA)), 1.0 + std::f64::consts::PI);
        assert_eq!((guest.cpu.fpu.x87.ftw, guest.cpu.fpu.x87.top()), (0, 0));
        let Pointers { fip, fdp, fop } = guest.cpu.fpu.pointers;
        assert_eq!((fip, fdp, fop), (CODE + 8, DATA, 0x51f));
    }

    #[test]
    fn an_unmasked_exception_is_reported_by_the_next_instruction_that_waits() {
        // fninit; fldcw [rdi]; fldz; fld1; fdivrp (1/0); fnstsw ax; fld1
        let code = [0xdb, 0xe3, 0xd9, 0x2f, 0xd9, 0xee, 0xd9, 0xe8, 0xde, 0xf1, 0xdf, 0xe0, 0xd9, 0xe8];
        let mut guest = guest(64, &code);
        guest.poke(DATA, &0x37bu16.to_le_bytes());
        guest.steps(6).unwrap();
        assert_eq!(guest.cpu.regs[0] & 0x80ff, 0x8084);
        assert_eq!(guest.step(), Err(Exception::new(vector::MF)));
        guest.cpu.cr0 &= !cr0::NE;
        assert_eq!(guest.step(), Ok(()), "ignored without CR0.NE");
        assert!(guest.cpu.fpu.x87.pending());
        assert_eq!(guest.cpu.fpu.x87.fcw, 0x37b);
    }

    #[test]
    fn comparisons_and_conditional_moves_use_the_flags() {
        // fninit; fldz; fld1; fcomi st1; fcmovb st0, st1 (not below: no move)
        let mut guest = guest(64, &[0xdb, 0xe3, 0xd9, 0xee, 0xd9, 0xe8, 0xdb, 0xf1, 0xda, 0xc1]);
        guest.cpu.rflags |= 1;
        guest.steps(5).unwrap();
        assert_eq!(guest.cpu.rflags & 0x45, 0);
        assert_eq!(guest.cpu.fpu.x87.st[0], [1 << 63, 0x3fff]);
    }

    #[test]
    fn environments_come_back_in_every_layout() {
        // fnstenv [rdi]; fninit; fldenv [rdi] – in 16-bit code [bx] with the operand size of the mode
        for (bits, code) in [
            (64, &[0xd9, 0x37, 0xdb, 0xe3, 0xd9, 0x27][..]),
            (32, &[0xd9, 0x37, 0xdb, 0xe3, 0xd9, 0x27]),
            (16, &[0xd9, 0x35, 0xdb, 0xe3, 0xd9, 0x25]),
            (32, &[0x66, 0xd9, 0x37, 0xdb, 0xe3, 0x66, 0xd9, 0x27]),
        ] {
            let mut guest = guest(bits, code);
            let x87 = &mut guest.cpu.fpu.x87;
            (x87.fcw, x87.fsw, x87.ftw) = (0x27f, 0x1800, 0x18);
            x87.st[0] = [1 << 63, 0x3fff];
            guest.cpu.fpu.pointers = Pointers { fip: 0x1234, fdp: 0x5678, fop: 0x123 };
            guest.steps(3).unwrap();
            let x87 = &guest.cpu.fpu.x87;
            assert_eq!((x87.fcw, x87.fsw, x87.ftw), (0x27f, 0x1800, 0x18), "{bits}");
            assert_eq!(x87.st[0], [1 << 63, 0x3fff]);
            let Pointers { fip, fdp, .. } = guest.cpu.fpu.pointers;
            assert_eq!((fip, fdp), (0x1234, 0x5678));
            if bits == 64 {
                assert_eq!(word(&guest, DATA + 8), 0xffff_fd3f, "register 3 valid, 4 zero, the rest empty");
            }
        }
    }

    #[test]
    fn fnsave_and_frstor_carry_the_registers() {
        // fninit; fldpi; fnsave [rdi]; frstor [rdi]
        let mut guest = guest(64, &[0xdb, 0xe3, 0xd9, 0xeb, 0xdd, 0x37, 0xdd, 0x27]);
        guest.steps(2).unwrap();
        let pi = guest.cpu.fpu.x87.st[0];
        guest.step().unwrap();
        assert_eq!(guest.cpu.fpu.x87.ftw, 0);
        guest.step().unwrap();
        assert_eq!((guest.cpu.fpu.x87.st[0], guest.cpu.fpu.x87.top()), (pi, 7));
    }
}
