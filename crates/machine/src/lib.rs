//! A machine specification becomes a wired machine.
//!
//! This is the only crate that knows all parts. [`Machine::build`] makes guest memory, asks an engine
//! for a VM and its vCPUs, puts the chipset and the PCI devices on the buses, loads the kernel and
//! leaves vCPU 0 at its entry; who calls it runs the vCPUs with [`Machine::io`] and listens to
//! [`Machine::take_events`].
//!
//! | what                         | file           |
//! |------------------------------|----------------|
//! | where everything is          | `layout.rs`    |
//! | guest memory and its hole    | `memory.rs`    |
//! | the chipset and its lines    | `chipset.rs`   |
//! | PCI devices                  | `devices.rs`   |
//! | a vCPU's accesses            | `io.rs`        |
//! | kernel, ACPI tables, entry   | `firmware.rs`, `entry.rs` |
//! | build, reset, flush          | `machine.rs`   |
//! | saved state                  | `state.rs`     |
//! | what was chosen, for people  | `describe.rs`  |
//!
//! A new device goes into its own crate; here it gets a line in `chipset.rs` or `devices.rs`: how it is
//! made, where it is, its reset and its state.

mod chipset;
mod describe;
mod devices;
mod entry;
mod error;
mod firmware;
mod io;
pub mod layout;
mod machine;
mod memory;
mod spec;
mod state;

pub use ::chipset::{PowerEvent, SerialInput};
pub use ::device::spawn;
pub use ::mem::Kind as MemoryKind;
pub use chipset::ChipsetState;
pub use describe::{Description, DeviceInfo, KernelInfo, PciInfo};
pub use devices::PciState;
pub use error::Error;
pub use machine::Machine;
pub use spec::{BootSpec, DiskSpec, HostIo, NetSpec, VmSpec};
pub use state::MachineState;
pub use virtio::{ConsoleInput, ConsolePorts, PortStream};
