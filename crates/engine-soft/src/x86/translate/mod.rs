//! Tier 1: a translator from x86 to x86-64.
//!
//! The way of an instruction: [`translator`] looks for the unit at RIP and has it made if there is none.
//! [`insn`] decodes and classifies, [`build`] walks the instructions and emits host code: [`plain`],
//! [`branch`], [`memory`], [`strings`], [`vector`] and [`x87`] know the kinds of instructions, [`raw`] takes
//! instructions apart and puts them together with other registers, [`asm`] is the assembler, [`regs`] says
//! which register is where. The code goes to the [`cache`]; [`stubs`] is the code around it. What translated code cannot do
//! itself it hands to [`helpers`] at a [`site`]: misses of the TLB, and instructions that only the
//! interpreter knows; [`links`] says where jumps go. While it runs, the stack pointer is at the [`frame`].
//! [`mode`] is what of the CPU's mode all of that depends on.
//!
//! # Design
//!
//! - **Units are keyed by physical address and mode**, as the interpreter's blocks, and independent of
//!   where they are mapped: the linear address of the current page is in a slot
//!   ([`frame::Frame::page`]), and what depends on RIP is computed from it. So code survives
//!   address-space switches, and shared libraries are translated once.
//! - **Jumps are chained within a page only.** All of a page's units go at once when the page is written,
//!   so links need no back pointers. Jumps across pages, calls and returns go through the jump cache
//!   ([`super::fast::JumpCache`]), which is forgotten with the translations it depends on. Returns and
//!   indirect jumps look at its latest entries inline.
//! - **Flags** stay in the host's; see [`build`]. A flag that will be overwritten before anything reads it
//!   may be stale in RFLAGS at a fault or interrupt in between. Single-stepping is interpreted and exact.
//! - **Attention** is looked at where a loop must come by: at targets of backward jumps, and of jumps that
//!   go through the jump cache.
//! - **32-bit code** ([`mode::NARROW`]) with flat segments is translated, of compatibility and of protected
//!   mode. Addresses are computed to 32 bits before anything is added to them, so what is above them in
//!   registers never matters. What 64-bit code has no encoding for its handler executes, and 16-bit code
//!   and segments that are not flat are the interpreter's.
//! - **Misses run the interpreter's handler** for the whole instruction if the page is not in the
//!   [`Tlb`](super::tlb::Tlb): faults are raised by the oracle itself, with registers and RIP as they are
//!   in front of the instruction.

pub mod asm;
pub mod branch;
pub mod build;
pub mod cache;
pub mod frame;
pub mod groups;
pub mod helpers;
pub mod insn;
pub mod links;
pub mod lockstep;
pub mod memory;
pub mod mode;
pub mod plain;
pub mod raw;
pub mod regs;
pub mod site;
pub mod stats;
pub mod strings;
pub mod stubs;
pub mod supervisor;
pub mod translator;
pub mod vector;
pub mod x87;

#[cfg(test)]
mod tests;
