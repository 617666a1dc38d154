//! Operand forms that the integer families share: which operand is a register, which is in memory,
//! which is an immediate, and how wide they are. An instruction is a type that implements [`Unary`]
//! or [`Binary`]; the handlers here are instantiated for it once a form and width, so that nothing
//! of that is looked at when it runs.

use crate::x86::cpu::Cpu;
use crate::x86::decode::Lower;
use crate::x86::exception::Exec;
use crate::x86::int::Int;
use crate::x86::op::{Handler, Op};

/// The instance of a generic handler for an operand width of 8, 16, 32 or 64 bits.
macro_rules! by_width {
    ($bits:expr, $t:ident => $handler:expr) => {{
        use $crate::x86::op::Handler;
        let handler: Handler = match $bits {
            8 => {
                type $t = u8;
                $handler
            }
            16 => {
                type $t = u16;
                $handler
            }
            32 => {
                type $t = u32;
                $handler
            }
            64 => {
                type $t = u64;
                $handler
            }
            _ => return None,
        };
        handler
    }};
}

/// The instance of a generic handler for a width of 16, 32 or 64 bits.
macro_rules! by_word {
    ($bits:expr, $t:ident => $handler:expr) => {{
        use $crate::x86::op::Handler;
        let handler: Handler = match $bits {
            16 => {
                type $t = u16;
                $handler
            }
            32 => {
                type $t = u32;
                $handler
            }
            64 => {
                type $t = u64;
                $handler
            }
            _ => return None,
        };
        handler
    }};
}

/// The instance of a generic handler for one of the 16 conditions.
macro_rules! by_condition {
    ($code:expr, $c:ident => $handler:expr) => {
        by_condition!(@ $code, $c => $handler, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $code:expr, $c:ident => $handler:expr, $($n:literal)*) => {{
        use $crate::x86::op::Handler;
        let handler: Handler = match $code {
            $($n => {
                const $c: u8 = $n;
                $handler
            })*
            _ => return None,
        };
        handler
    }};
}

pub(super) use {by_condition, by_width, by_word};

/// An operation on one operand.
pub trait Unary {
    /// Result and RFLAGS behind it.
    fn eval<T: Int>(a: T, rflags: u64) -> (T, u64);
}

/// An operation on two operands.
pub trait Binary {
    /// Whether the result goes anywhere (not of `CMP` and `TEST`).
    const WRITES: bool = true;
    /// Result and RFLAGS behind it.
    fn eval<T: Int>(a: T, b: T, rflags: u64) -> (T, u64);
}

/// Handler of an instruction with one operand, register or memory.
pub fn unary<O: Unary>(l: &Lower<'_>) -> Option<Handler> {
    Some(by_width!(l.width(0), T => if l.is_mem(0) { unary_m::<T, O> } else { unary_r::<T, O> }))
}

/// Handler of `op r/m, r`, `op r/m, imm` or `op r, m`.
pub fn binary<O: Binary>(l: &Lower<'_>) -> Option<Handler> {
    Some(by_width!(l.width(0), T => match (l.is_mem(0), l.is_mem(1), l.is_imm(1)) {
        (true, _, true) => mi::<T, O>,
        (true, ..) => mr::<T, O>,
        (_, true, _) => rm::<T, O>,
        (_, _, true) => ri::<T, O>,
        _ => rr::<T, O>,
    }))
}

/// Handler of `op r, r/m` with 16 bits or more.
pub fn binary_word<O: Binary>(l: &Lower<'_>) -> Option<Handler> {
    Some(by_word!(l.width(0), T => if l.is_mem(1) { rm::<T, O> } else { rr::<T, O> }))
}

/// Handler of `op r, r/m, r`, `op r, r, r/m` or `op r, r/m, imm`: the first is the destination only.
pub fn ternary<O: Binary>(l: &Lower<'_>) -> Option<Handler> {
    Some(by_word!(l.width(0), T => match (l.is_mem(1), l.is_mem(2), l.is_imm(2)) {
        (true, _, true) => rmi::<T, O>,
        (true, ..) => rmr::<T, O>,
        (_, true, _) => rrm::<T, O>,
        (_, _, true) => rri::<T, O>,
        _ => rrr::<T, O>,
    }))
}

fn unary_r<T: Int, O: Unary>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (result, rflags) = O::eval(T::get(cpu, op.dst), cpu.rflags);
    T::set(cpu, op.dst, result);
    cpu.rflags = rflags;
    Ok(())
}

fn unary_m<T: Int, O: Unary>(cpu: &mut Cpu, op: &Op) -> Exec {
    let before = cpu.rflags;
    let mut rflags = before;
    cpu.rmw::<T>(op, |_, a| {
        let result;
        (result, rflags) = O::eval(a, before);
        result
    })?;
    cpu.rflags = rflags;
    Ok(())
}

fn rr<T: Int, O: Binary>(cpu: &mut Cpu, op: &Op) -> Exec {
    to_register::<T, O>(cpu, op.dst, T::get(cpu, op.dst), T::get(cpu, op.src))
}

fn ri<T: Int, O: Binary>(cpu: &mut Cpu, op: &Op) -> Exec {
    to_register::<T, O>(cpu, op.dst, T::get(cpu, op.dst), T::cut(op.imm))
}

fn rm<T: Int, O: Binary>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = cpu.load_mem(op)?;
    to_register::<T, O>(cpu, op.dst, T::get(cpu, op.dst), b)
}

fn mr<T: Int, O: Binary>(cpu: &mut Cpu, op: &Op) -> Exec {
    to_memory::<T, O>(cpu, op, T::get(cpu, op.src))
}

fn mi<T: Int, O: Binary>(cpu: &mut Cpu, op: &Op) -> Exec {
    to_memory::<T, O>(cpu, op, T::cut(op.imm))
}

fn rrr<T: Int, O: Binary>(cpu: &mut Cpu, op: &Op) -> Exec {
    to_register::<T, O>(cpu, op.dst, T::get(cpu, op.src), T::get(cpu, op.aux))
}

fn rri<T: Int, O: Binary>(cpu: &mut Cpu, op: &Op) -> Exec {
    to_register::<T, O>(cpu, op.dst, T::get(cpu, op.src), T::cut(op.imm))
}

fn rrm<T: Int, O: Binary>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = cpu.load_mem(op)?;
    to_register::<T, O>(cpu, op.dst, T::get(cpu, op.src), b)
}

fn rmr<T: Int, O: Binary>(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = cpu.load_mem(op)?;
    to_register::<T, O>(cpu, op.dst, a, T::get(cpu, op.aux))
}

fn rmi<T: Int, O: Binary>(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = cpu.load_mem(op)?;
    to_register::<T, O>(cpu, op.dst, a, T::cut(op.imm))
}

#[inline(always)]
fn to_register<T: Int, O: Binary>(cpu: &mut Cpu, dst: u8, a: T, b: T) -> Exec {
    let (result, rflags) = O::eval(a, b, cpu.rflags);
    if O::WRITES {
        T::set(cpu, dst, result);
    }
    cpu.rflags = rflags;
    Ok(())
}

#[inline(always)]
fn to_memory<T: Int, O: Binary>(cpu: &mut Cpu, op: &Op, b: T) -> Exec {
    let before = cpu.rflags;
    if !O::WRITES {
        let a = cpu.load_mem(op)?;
        cpu.rflags = O::eval(a, b, before).1;
        return Ok(());
    }
    let mut rflags = before;
    cpu.rmw::<T>(op, |_, a| {
        let result;
        (result, rflags) = O::eval(a, b, before);
        result
    })?;
    cpu.rflags = rflags;
    Ok(())
}
