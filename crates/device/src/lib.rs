//! What every device is made of.
//!
//! A device implements [`Device`] and knows nothing of engines, of the machine or of other devices.
//! It is reached through a [`Bus`], raises an [`IrqLine`] or sends an [`Msi`], asks a [`Timer`] to
//! call back, and keeps its guest-visible state in one plain struct ([`Snapshot`]).
//!
//! Lock order: a device's own lock, then the interrupt controllers, then the engine. Interrupt
//! sinks never call back into a device.

mod bus;
mod doorbell;
mod irq;
mod state;
mod thread;
mod timer;

pub use bus::{Bus, BusDevice, Device, Overlap};
pub use doorbell::{Doorbell, DoorbellSink};
pub use irq::{IrqLine, IrqSink, Msi, MsiSink};
pub use state::{BadState, Snapshot};
pub use thread::spawn;
pub use timer::{Timer, Timers};
