//! Instructions that touch only some elements in memory, and those on all registers.

use crate::x86::decode::Lower;
use crate::x86::op::{Handler, Op};

/// Chooses the handler.
pub fn lower(_l: &Lower<'_>, _op: &mut Op) -> Option<Handler> {
    None
}
