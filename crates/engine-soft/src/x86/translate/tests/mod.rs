//! The translator against the interpreter.

pub mod pair;
mod random;
mod stories;
