//! One VM: its life, its threads, its end.
//!
//! [`Vm::start`] builds the machine and starts two kinds of threads: one per vCPU, which does
//! nothing but `Vcpu::run`, and one supervisor, which owns the machine and decides everything. A
//! vCPU is either with its thread, running, or with the supervisor, parked; it travels between the
//! two through channels, so nobody can touch a running one and no lock guards it.
//!
//! Whatever happens to the VM arrives at the supervisor as a message: a vCPU came back, the guest
//! wrote a power register, somebody sent a [`Request`]. It ends in exactly one [`End`].

mod board;
mod chain;
pub mod engines;
pub mod guest_ports;
mod supervisor;
mod vcpu;
mod vm;

pub use chain::chain;
pub use vm::{Control, End, Error, Gone, Options, Request, State, Status, Vm, describe};
