//! The translator against the interpreter.

mod pair;
mod random;
mod stories;
