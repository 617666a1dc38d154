//! The translator against the interpreter.

mod narrow;
pub mod pair;
mod random;
mod stories;
mod x87;
