//! The traits that every engine implements, and the CPU state that all engines share.
//!
//! An engine runs vCPUs and nothing else. A vCPU *calls in*: [`Vcpu::run`] goes on until there is a
//! reason to stop, and every access that leaves the CPU (port, MMIO, interrupt acknowledge) is a
//! call on [`CpuIo`] in mid-instruction. A software engine needs the value before it can go on; a
//! KVM exit maps onto the same calls.
//!
//! Interrupts come in as messages ([`Vm::send_msi`]) and as the one legacy line of a PIC
//! ([`Vm::set_extint`]); the local APIC belongs to the vCPU and so to the engine. The IOAPIC is a
//! device that sends messages and learns of their end through [`CpuIo::end_of_interrupt`]
//! (what KVM calls a split irqchip).

mod options;
mod statistics;
mod traits;
pub mod x86;

pub use options::Options;
pub use statistics::{Count, Hits, Statistics, Table, Time};
pub use traits::{CpuIo, CpuState, Engine, Error, Exit, Msi, Register, StopHandle, Vcpu, Vm, VmConfig};
