//! The interpreter: one file per family of instructions.
//!
//! Each family has `lower`, which looks at a decoded instruction and names the handler that executes
//! it, and the handlers. A family that does not know the instruction answers `None`; what no family
//! knows is `#UD`.

mod alu;
mod bcd;
mod bits;
mod branch;
mod flags;
mod forms;
#[cfg(test)]
mod host;
mod misc;
mod mov;
mod muldiv;
mod shift;
#[cfg(test)]
mod speed;
mod stack;
mod string;
mod string_bulk;

use super::decode::Lower;
use super::op::{Handler, Op};

mod vector;
mod xsave;

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
    xsave::lower,
    vector::lower,
];

/// Chooses the handler of an instruction and completes its `op`.
pub fn lower(lower: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    FAMILIES.iter().find_map(|family| family(lower, op))
}
