//! What a device is to the transport and to its worker.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use device::BadState;
use mem::GuestRam;
use pci::Class;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::{Broken, VirtQueue, blk, console, net, rng};

/// What a device type is called and numbered (chapter 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Virtio device ID.
    pub id: u16,
    /// PCI class code.
    pub class: Class,
    /// Its name, for threads and messages.
    pub name: &'static str,
}

/// What is left in a queue after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Everything was taken: the driver is to notify the next time it adds something.
    Drained,
    /// Buffers are left for what will arrive: one of the handler's wake-ups comes first.
    Waiting,
    /// Requests are left for when there is room behind the device: [`WakeOn::Writable`] comes first.
    Full,
    /// Requests are left for then; nothing makes the queue be processed earlier.
    Until(Instant),
}

/// A descriptor that wakes a handler.
pub struct Wake {
    /// The queue to process then.
    pub queue: usize,
    /// When.
    pub on: WakeOn,
}

/// When a handler is woken.
pub enum WakeOn {
    /// More has arrived here. The handler reads until there is nothing left.
    Readable(OwnedFd),
    /// There is room here, after the handler said [`Progress::Full`].
    Writable(OwnedFd),
}

/// The half of a device that works off its queues, on the worker's thread.
pub trait Handler: Send {
    /// Takes chains from queue number `index` while there are any (and work for them). The worker
    /// interrupts the driver afterwards, if that wants it.
    fn process(&mut self, index: usize, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken>;

    /// An event other than the driver's, and the queue to process on it.
    fn wake(&self) -> Option<(EventFd, usize)> {
        None
    }

    /// The queues to process on that event, where it is not always the same one.
    fn woken(&mut self, index: usize) -> Vec<usize> {
        vec![index]
    }

    /// Descriptors that wake it, too.
    fn wakes(&self) -> Vec<Wake> {
        Vec::new()
    }
}

/// Saved state of a device behind the transport, by kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceState {
    /// A disk.
    Blk(blk::BlkState),
    /// A console.
    Console(console::ConsoleState),
    /// A network card.
    Net(net::NetState),
    /// An entropy source.
    Rng(rng::RngState),
}

/// The half of a device that the transport asks.
pub trait VirtioDevice: Send {
    /// What it is.
    fn kind(&self) -> Kind;

    /// The largest size of each queue, a power of two.
    fn queue_sizes(&self) -> &'static [u16];

    /// The device-specific features it offers.
    fn features(&self) -> u64;

    /// The driver and the device have agreed on `features`.
    fn negotiated(&mut self, _features: u64) {}

    /// The device-specific configuration (4.1.4.6).
    fn config(&self) -> Vec<u8>;

    /// The driver's write to the device-specific configuration.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// A handler for a driver that has accepted `features`. At most one is alive at a time.
    fn handler(&self, features: u64) -> io::Result<Box<dyn Handler>>;

    /// Back to the power-on state.
    fn reset(&mut self);

    /// Everything that was given to the device is safe when this returns.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    /// Copies the state out. No handler is at work.
    fn save(&self) -> DeviceState;

    /// Takes a state on, or refuses and changes nothing.
    fn restore(&mut self, state: DeviceState) -> Result<(), BadState>;
}
