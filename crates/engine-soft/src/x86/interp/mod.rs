//! The interpreter: one file per family of instructions.
//!
//! Each family has `lower`, which looks at a decoded instruction and names the handler that executes
//! it, and the handlers. A family that does not know the instruction answers `None`; what no family
//! knows is `#UD`.

mod alu;
mod bcd;
mod bits;
mod branch;
mod far;
mod flags;
mod forms;
#[cfg(test)]
mod host;
mod interrupt;
mod io;
mod misc;
mod mov;
mod muldiv;
mod segments;
mod shift;
#[cfg(test)]
mod speed;
mod stack;
mod string;
mod string_bulk;
mod syscall;
mod system;
mod vector;
mod x87;
mod xsave;

use super::decode::Lower;
use super::op::{Handler, Op};

type Family = fn(&Lower<'_>, &mut Op) -> Option<Handler>;

/// The families, the most frequent first.
const FAMILIES: &[Family] = &[
    mov::lower,
    alu::lower,
    branch::lower,
    stack::lower,
    shift::lower,
    bits::lower,
    muldiv::lower,
    string::lower,
    misc::lower,
    bcd::lower,
    interrupt::lower,
    far::lower,
    segments::lower,
    io::lower,
    system::lower,
    syscall::lower,
    xsave::lower,
    vector::lower,
    x87::lower,
];

/// Chooses the handler of an instruction and completes its `op`.
pub fn lower(lower: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    FAMILIES.iter().find_map(|family| {
        // What a family changed before it found that the instruction is not its own is dropped.
        let mut tried = *op;
        family(lower, &mut tried).inspect(|_| *op = tried)
    })
}
