//! The x86-64 guest CPU.
//!
//! The way of an instruction: [`run`] finds the block at RIP ([`block`]) or has it read and decoded
//! ([`decode`]), then calls the handlers ([`op`], [`interp`]) one after another. Handlers reach memory
//! through [`access`], which asks the [`tlb`] and, when that misses, the page walker ([`walk`]). An
//! `Err` is an [`exception`], delivered by [`event`] at precisely that instruction.

pub mod access;
pub mod block;
mod control;
pub mod cpu;
pub mod cpuid;
mod debug;
pub mod decode;
mod descriptor;
pub mod event;
pub mod exception;
mod far;
pub mod fast;
pub mod fpu;
pub mod int;
pub mod interp;
pub mod lapic;
pub mod msr;
pub mod native;
pub mod op;
pub mod pvclock;
pub mod run;
mod segment;
mod stack;
pub mod state;
#[cfg(test)]
mod systest;
mod task;
#[doc(hidden)] // for this crate's tests, those in `tests/` too
pub mod testing;
pub mod tlb;
pub mod translate;
pub mod walk;
