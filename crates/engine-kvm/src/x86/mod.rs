//! What is x86 in the state of a vCPU and in what it says it is.

pub(crate) mod cpuid;
mod events;
pub(crate) mod lapic;
pub(crate) mod msrs;
mod registers;
pub(crate) mod sregs2;
pub(crate) mod state;
mod tsc;
mod xsave;
