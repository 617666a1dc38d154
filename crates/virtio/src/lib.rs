//! Virtio devices over PCI (Virtual I/O Device specification 1.2, "the specification" here).
//!
//! A device is two halves. [`VirtioDevice`] is what the transport asks about features and
//! configuration; it makes a [`Handler`], which works off the queues on a thread of its own
//! (`worker.rs`) while the driver runs the device. [`VirtioPci`] is the transport and the PCI
//! function: modern registers only, MSI-X with a vector for each queue, split queues.
//!
//! A guest that breaks a queue (loops, addresses outside of its memory, indices that run ahead)
//! breaks its device: the device stops, sets DEVICE_NEEDS_RESET and tells the driver (2.1.2).
//!
//! Lock order: the function (which the PCI root locks), then a queue, then [`Interrupt`] and what is
//! below it. A worker never takes the function's lock, so that the transport may wait for it.

pub mod blk;
pub mod console;
mod device;
#[cfg(test)]
mod hostile;
mod interrupt;
pub mod net;
mod pci;
mod queue;
pub mod rng;
#[cfg(test)]
mod testing;
mod worker;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use blk::Blk;
pub use console::{Console, ConsoleInput, ConsolePorts, PortStream};
pub use device::{DeviceState, Handler, Kind, Progress, VirtioDevice, Wake, WakeOn};
pub use interrupt::Interrupt;
pub use net::Net;
pub use pci::{QueueRegisters, VirtioPci, VirtioState};
pub use queue::{Broken, Chain, Slices, VirtQueue};
pub use rng::Rng;

/// A piece of guest memory.
pub type Slice<'a> = vm_memory::VolatileSlice<'a, mem::PageLog>;

/// A thread that panicked with the lock has already brought the VM down; what it guards is whole.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
