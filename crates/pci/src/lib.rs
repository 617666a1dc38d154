//! PCI as a guest sees it: one root bus with PCI Express' configuration space, and conventional functions.
//!
//! A function implements [`PciFunction`] around a [`ConfigSpace`]; [`PciRoot`] finds it by slot, for
//! the memory-mapped configuration space (ECAM) and the ports 0xcf8/0xcfc alike, and keeps its BARs
//! on the machine's buses where the guest programs them. Interrupts leave through [`Msix`] or, for
//! guests without it, [`Intx`].
//!
//! Lock order: the root's decode table, then a function, then its [`Msix`] or [`Intx`], then the
//! interrupt controllers. A bus is locked only for the moment of a look-up or a change, never while
//! a device is called. A function never calls its root or a bus; so a guest may move a BAR from
//! inside anything.

mod access;
mod bar;
mod config;
mod decode;
mod host_bridge;
mod intx;
mod msix;
mod root;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

pub use access::{ConfigAddress, ConfigData, Ecam};
pub use bar::{Bar, BarKind, Space, Windows};
pub use config::{Class, ConfigSpace, ConfigState, Identity, reg};
pub use host_bridge::HostBridge;
pub use intx::{Intx, IntxRouter, Pin};
pub use msix::{Msix, MsixEntry, MsixState};
pub use root::{BarInfo, Error, FunctionInfo, PciRoot};

/// One PCI function.
///
/// The root holds it in a mutex and calls it with that held; it must not call back into the root
/// or a bus. Offsets and widths come from the guest unchecked.
pub trait PciFunction: Send {
    /// Its configuration space.
    fn config(&self) -> &ConfigSpace;

    /// Its configuration space, to change.
    fn config_mut(&mut self) -> &mut ConfigSpace;

    /// A guest's read of configuration space.
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    /// A guest's write to configuration space.
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config_mut().write(offset, data);
    }

    /// A guest's read inside BAR `bar`; `data` is all ones already.
    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]);

    /// A guest's write inside BAR `bar`.
    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]);

    /// The event that a write at `offset` of BAR `bar` does no more than signal, if it is such a place and in
    /// use.
    fn doorbell(&self, _bar: usize, _offset: u64) -> Option<EventFd> {
        None
    }

    /// Back to the power-on state, configuration space included.
    fn reset(&mut self);
}

/// A function as the root and the machine share it.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// A thread that panicked with the lock has already brought the VM down; what it guards is whole.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
