//! String instructions (SDM 1, 7.3.9) with their repeat prefixes.
//!
//! A repeated instruction keeps its progress in rCX, rSI and rDI, so it may stop anywhere: at a fault,
//! or after [`BUDGET`] for the sake of interrupts – then RIP stays where it is. Copies and fills run as
//! whole stretches of host memory where both sides hit the TLB.

use engine::x86::bits::rflags::{DF, ZF};
use iced_x86::{Code, OpKind};

use super::alu::Cmp;
use super::forms::Binary;
use super::string_bulk;
use crate::x86::cpu::Cpu;
use crate::x86::decode::{Lower, number};
use crate::x86::exception::Exec;
use crate::x86::int::Int;
use crate::x86::op::{Handler, Op, flag, reg, seg};

/// Units of work before interrupts are looked at: one element, or [`UNIT`] bytes of a stretch.
const BUDGET: u64 = 2048;
/// Bytes of a stretch that cost as much as one element on its own.
const UNIT: u64 = 64;

/// Chooses the handler.
pub fn lower(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    use Code::*;
    let code = l.ins.code();
    op.mem.seg = number(l.ins.memory_segment());
    Some(match code {
        Movsb_m8_m8 => repeated::<u8, Movs>(l, op)?,
        Movsw_m16_m16 => repeated::<u16, Movs>(l, op)?,
        Movsd_m32_m32 => repeated::<u32, Movs>(l, op)?,
        Movsq_m64_m64 => repeated::<u64, Movs>(l, op)?,
        Stosb_m8_AL => repeated::<u8, Stos>(l, op)?,
        Stosw_m16_AX => repeated::<u16, Stos>(l, op)?,
        Stosd_m32_EAX => repeated::<u32, Stos>(l, op)?,
        Stosq_m64_RAX => repeated::<u64, Stos>(l, op)?,
        Lodsb_AL_m8 => repeated::<u8, Lods>(l, op)?,
        Lodsw_AX_m16 => repeated::<u16, Lods>(l, op)?,
        Lodsd_EAX_m32 => repeated::<u32, Lods>(l, op)?,
        Lodsq_RAX_m64 => repeated::<u64, Lods>(l, op)?,
        Scasb_AL_m8 => repeated::<u8, Scas>(l, op)?,
        Scasw_AX_m16 => repeated::<u16, Scas>(l, op)?,
        Scasd_EAX_m32 => repeated::<u32, Scas>(l, op)?,
        Scasq_RAX_m64 => repeated::<u64, Scas>(l, op)?,
        Cmpsb_m8_m8 => repeated::<u8, Cmps>(l, op)?,
        Cmpsw_m16_m16 => repeated::<u16, Cmps>(l, op)?,
        Cmpsd_m32_m32 => repeated::<u32, Cmps>(l, op)?,
        Cmpsq_m64_m64 => repeated::<u64, Cmps>(l, op)?,
        Insb_m8_DX => repeated::<u8, Ins>(l, op)?,
        Insw_m16_DX => repeated::<u16, Ins>(l, op)?,
        Insd_m32_DX => repeated::<u32, Ins>(l, op)?,
        Outsb_DX_m8 => repeated::<u8, Outs>(l, op)?,
        Outsw_DX_m16 => repeated::<u16, Outs>(l, op)?,
        Outsd_DX_m32 => repeated::<u32, Outs>(l, op)?,
        _ => return None,
    })
}

/// Address size of the string operands.
fn address_bits(l: &Lower<'_>) -> u32 {
    let wide = |kind| match kind {
        OpKind::MemorySegSI | OpKind::MemoryESDI => 16,
        OpKind::MemorySegESI | OpKind::MemoryESEDI => 32,
        OpKind::MemorySegRSI | OpKind::MemoryESRDI => 64,
        _ => 0,
    };
    wide(l.ins.op0_kind()).max(wide(l.ins.op1_kind()))
}

fn repeated<T: Int, O: Element>(l: &Lower<'_>, op: &Op) -> Option<Handler> {
    use super::forms::by_word;
    Some(by_word!(address_bits(l), A => match (op.has(flag::REPNE), op.has(flag::REP)) {
        (true, _) => repeat::<T, A, O, false>,
        (_, true) => repeat::<T, A, O, true>,
        _ => once::<T, A, O>,
    }))
}

/// One of the instructions, as what it does to one element.
trait Element {
    /// Whether a repetition also ends by ZF.
    const COMPARES: bool = false;

    /// Handles one element and moves the index registers on.
    fn step<T: Int, A: Int>(cpu: &mut Cpu, op: &Op) -> Exec;

    /// Handles a stretch of at most `count` elements upwards and says how many; none if it must go one
    /// by one.
    #[inline(always)]
    fn stretch<T: Int, A: Int>(_: &mut Cpu, _: &Op, _count: u64) -> u64 {
        0
    }
}

fn once<T: Int, A: Int, O: Element>(cpu: &mut Cpu, op: &Op) -> Exec {
    O::step::<T, A>(cpu, op)
}

fn repeat<T: Int, A: Int, O: Element, const WHILE_EQUAL: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let mut count = A::get(cpu, reg::RCX).zx();
    let single = cpu.watched(); // traps behind every element
    let mut budget = if single { 1 } else { BUDGET };
    while count != 0 && budget != 0 {
        let mut done = 0;
        if !single && !cpu.flag(DF) {
            done = O::stretch::<T, A>(cpu, op, count.min(budget * (UNIT / T::BYTES)));
        }
        if done == 0 {
            O::step::<T, A>(cpu, op)?;
            done = 1;
        }
        count -= done;
        budget -= (done * T::BYTES / UNIT).clamp(1, budget);
        A::set(cpu, reg::RCX, A::cut(count));
        if O::COMPARES && cpu.flag(ZF) != WHILE_EQUAL {
            return Ok(());
        }
    }
    if count != 0 {
        cpu.next_rip = cpu.rip();
        cpu.leave_block = true;
    }
    Ok(())
}

#[inline(always)]
fn advance<T: Int, A: Int>(cpu: &mut Cpu, register: u8) {
    let step = if cpu.flag(DF) { T::BYTES.wrapping_neg() } else { T::BYTES };
    let next = A::get(cpu, register).zx().wrapping_add(step);
    A::set(cpu, register, A::cut(next));
}

#[inline(always)]
fn load_source<T: Int, A: Int>(cpu: &mut Cpu, op: &Op) -> Exec<T> {
    cpu.load(op.mem.seg, A::get(cpu, reg::RSI).zx())
}

struct Movs;
impl Element for Movs {
    #[inline(always)]
    fn step<T: Int, A: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
        let value = load_source::<T, A>(cpu, op)?;
        cpu.store(seg::ES, A::get(cpu, reg::RDI).zx(), value)?;
        advance::<T, A>(cpu, reg::RSI);
        advance::<T, A>(cpu, reg::RDI);
        Ok(())
    }

    fn stretch<T: Int, A: Int>(cpu: &mut Cpu, op: &Op, count: u64) -> u64 {
        string_bulk::copy::<T, A>(cpu, op.mem.seg, count)
    }
}

struct Stos;
impl Element for Stos {
    #[inline(always)]
    fn step<T: Int, A: Int>(cpu: &mut Cpu, _: &Op) -> Exec {
        cpu.store(seg::ES, A::get(cpu, reg::RDI).zx(), T::get(cpu, reg::RAX))?;
        advance::<T, A>(cpu, reg::RDI);
        Ok(())
    }

    fn stretch<T: Int, A: Int>(cpu: &mut Cpu, _: &Op, count: u64) -> u64 {
        string_bulk::fill::<T, A>(cpu, count)
    }
}

struct Lods;
impl Element for Lods {
    #[inline(always)]
    fn step<T: Int, A: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
        let value = load_source::<T, A>(cpu, op)?;
        T::set(cpu, reg::RAX, value);
        advance::<T, A>(cpu, reg::RSI);
        Ok(())
    }
}

struct Scas;
impl Element for Scas {
    const COMPARES: bool = true;
    #[inline(always)]
    fn step<T: Int, A: Int>(cpu: &mut Cpu, _: &Op) -> Exec {
        let value = cpu.load::<T>(seg::ES, A::get(cpu, reg::RDI).zx())?;
        cpu.rflags = Cmp::eval(T::get(cpu, reg::RAX), value, cpu.rflags).1;
        advance::<T, A>(cpu, reg::RDI);
        Ok(())
    }
}

struct Cmps;
impl Element for Cmps {
    const COMPARES: bool = true;
    #[inline(always)]
    fn step<T: Int, A: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
        let source = load_source::<T, A>(cpu, op)?;
        let other = cpu.load::<T>(seg::ES, A::get(cpu, reg::RDI).zx())?;
        cpu.rflags = Cmp::eval(source, other, cpu.rflags).1;
        advance::<T, A>(cpu, reg::RSI);
        advance::<T, A>(cpu, reg::RDI);
        Ok(())
    }
}

struct Ins;
impl Element for Ins {
    fn step<T: Int, A: Int>(cpu: &mut Cpu, _: &Op) -> Exec {
        let port = u16::get(cpu, reg::RDX);
        cpu.check_io(port, T::BYTES)?;
        // A read may have effects: nothing is read from the port unless the store will succeed.
        let linear = cpu.linear(seg::ES, A::get(cpu, reg::RDI).zx(), T::BYTES, true)?;
        let view = cpu.view();
        cpu.probe_write(view, linear, T::BYTES)?;
        let value = cpu.port_in::<T>(port);
        cpu.store_linear(view, linear, value)?;
        advance::<T, A>(cpu, reg::RDI);
        Ok(())
    }
}

struct Outs;
impl Element for Outs {
    fn step<T: Int, A: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
        let port = u16::get(cpu, reg::RDX);
        cpu.check_io(port, T::BYTES)?;
        let value = load_source::<T, A>(cpu, op)?;
        cpu.port_out(port, value);
        advance::<T, A>(cpu, reg::RSI);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::exception::Exception;
    use crate::x86::testing::{CODE, DATA, Guest};

    const RAX: usize = reg::RAX as usize;
    const RCX: usize = reg::RCX as usize;
    const RSI: usize = reg::RSI as usize;
    const RDI: usize = reg::RDI as usize;

    fn guest(bits: u8, code: &[u8], rcx: u64, rsi: u64, rdi: u64) -> Guest {
        let mut guest = Guest::new(bits, code);
        (guest.cpu.regs[RCX], guest.cpu.regs[RSI], guest.cpu.regs[RDI]) = (rcx, rsi, rdi);
        guest
    }

    /// Runs the instruction at the start to its end.
    fn finish(guest: &mut Guest) {
        for _ in 0..1000 {
            guest.steps(1).unwrap();
            if guest.cpu.rip() != CODE {
                return;
            }
        }
        panic!("no end");
    }

    #[test]
    fn a_copy_over_pages_arrives_whole() {
        let mut g = guest(64, &[0xf3, 0xa4], 10_000, DATA + 123, DATA + 0x8001); // rep movsb
        let data: Vec<u8> = (0..10_000u32).map(|i| (i * 7 / 8) as u8).collect();
        g.poke(DATA + 123, &data);
        finish(&mut g);
        assert_eq!(g.peek::<10_000>(DATA + 0x8001)[..], data[..]);
        assert_eq!(
            (g.cpu.regs[RCX], g.cpu.regs[RSI], g.cpu.regs[RDI]),
            (0, DATA + 123 + 10_000, DATA + 0x8001 + 10_000)
        );
    }

    #[test]
    fn a_copy_onto_itself_one_further_repeats_the_first_byte() {
        let mut g = guest(64, &[0xf3, 0xa4], 5000, DATA, DATA + 1);
        g.poke(DATA, &[0x5a]);
        finish(&mut g);
        assert_eq!(g.peek::<5001>(DATA), [0x5a; 5001]);
        // and with words at a distance of 3 bytes, as one by one on a real CPU
        let mut g = guest(64, &[0xf3, 0x48, 0xa5], 40, DATA, DATA + 3);
        let mut model = [0; 400];
        model[..11].copy_from_slice(b"hello world");
        g.poke(DATA, &model);
        for i in 0..40 {
            model.copy_within(i * 8..i * 8 + 8, i * 8 + 3);
        }
        finish(&mut g);
        assert_eq!(g.peek::<400>(DATA), model);
    }

    #[test]
    fn downwards_with_the_direction_flag() {
        let mut g = guest(32, &[0xf3, 0xa5], 3, DATA + 8, DATA + 108); // rep movsd
        g.poke(DATA, b"abcdefghijkl");
        g.cpu.rflags |= DF;
        finish(&mut g);
        assert_eq!(&g.peek::<12>(DATA + 100), b"abcdefghijkl");
        assert_eq!(g.cpu.regs[RDI], DATA + 96);
    }

    #[test]
    fn a_fill_is_interruptible_and_goes_on() {
        let count = 0x20_0000 / 8;
        let mut g = guest(64, &[0xf3, 0x48, 0xab], count, 0, DATA); // rep stosq
        g.cpu.regs[RAX] = 0x1122_3344_5566_7788;
        g.steps(1).unwrap();
        assert_eq!(g.cpu.rip(), CODE, "two megabytes take more than one go");
        let left = g.cpu.regs[RCX];
        assert!(left > 0 && left < count);
        assert_eq!(g.cpu.regs[RDI], DATA + (count - left) * 8);
        finish(&mut g);
        assert_eq!(g.peek(DATA + 0x20_0000 - 8), 0x1122_3344_5566_7788u64.to_le_bytes());
        assert_eq!(g.peek(DATA + 0x20_0000), [0; 8]);
    }

    #[test]
    fn a_fault_on_the_way_leaves_what_is_done() {
        let mut g = guest(32, &[0xf3, 0xaa], 0x100, 0, 0x10_0ff0); // rep stosb up to the limit
        g.cpu.segs[usize::from(seg::ES)].limit = 0x10_0fff;
        g.cpu.regs[RAX] = 7;
        assert_eq!(g.step(), Err(Exception::GP0));
        assert_eq!((g.cpu.rip(), g.cpu.regs[RCX], g.cpu.regs[RDI]), (CODE, 0xf0, 0x10_1000));
        assert_eq!(g.peek::<17>(0x10_0ff0), [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0]);
    }

    #[test]
    fn a_search_stops_behind_what_it_found() {
        let mut g = guest(64, &[0xf2, 0xae], u64::MAX, 0, DATA); // repne scasb
        g.poke(DATA, b"length\0");
        finish(&mut g);
        assert_eq!((!g.cpu.regs[RCX] - 1, g.cpu.regs[RDI], g.cpu.flag(ZF)), (6, DATA + 7, true));
    }

    #[test]
    fn a_comparison_stops_behind_the_difference() {
        let mut g = guest(64, &[0xf3, 0xa6], 100, DATA, DATA + 0x100); // repe cmpsb
        g.poke(DATA, b"sameA");
        g.poke(DATA + 0x100, b"sameB");
        finish(&mut g);
        assert_eq!((g.cpu.regs[RCX], g.cpu.regs[RSI], g.cpu.flag(ZF)), (95, DATA + 5, false));
    }

    #[test]
    fn no_count_no_access() {
        let mut g = guest(64, &[0xf3, 0xa4], 0, 1 << 63, 1 << 63);
        finish(&mut g);
        // and the address size says how wide the count is: only ecx
        let mut g = guest(64, &[0x67, 0xf3, 0xaa], 1 << 32 | 2, 0, 1 << 40 | DATA);
        g.cpu.regs[RAX] = 0xee;
        finish(&mut g);
        assert_eq!(g.peek(DATA), [0xee, 0xee, 0]);
        assert_eq!((g.cpu.regs[RCX], g.cpu.regs[RDI]), (0, DATA + 2));
    }

    #[test]
    fn sixteen_bit_indexes_wrap_within_their_segment() {
        let mut g = guest(16, &[0x26, 0xac, 0xf3, 0xaa], 4, 0xffff, 0xfffe); // es lodsb; rep stosb
        g.cpu.segs[usize::from(seg::ES)].base = 0x2_0000;
        g.poke(0x2_ffff, &[0x77]);
        g.steps(2).unwrap();
        assert_eq!((g.cpu.regs[RSI], g.cpu.regs[RDI], g.cpu.regs[RCX]), (0, 2, 0));
        assert_eq!(g.peek(0x2_fffe), [0x77, 0x77]);
        assert_eq!(g.peek(0x2_0000), [0x77, 0x77, 0]);
    }

    #[test]
    fn strings_of_ports() {
        let mut g = guest(32, &[0xf3, 0x6d, 0xf3, 0x6e], 2, DATA, DATA); // rep insd; rep outsb
        finish(&mut g);
        assert_eq!(g.peek(DATA), [0xff; 8]);
        g.cpu.regs[RCX] = 3;
        g.steps(1).unwrap();
        assert_eq!(g.cpu.regs[RSI], DATA + 3);
    }
}
