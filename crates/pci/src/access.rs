//! How a guest reaches configuration space: ECAM (PCI Express 5.0, 7.2.2) and the ports of
//! configuration mechanism #1 (PCI Local Bus 3.0, 3.2.2.3.2).
//!
//! These sit on the buses that the root also changes, so they hold it weakly.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use device::BusDevice;

use crate::PciRoot;

/// The memory-mapped configuration space, 1 MiB for each bus.
pub struct Ecam(pub(crate) Weak<PciRoot>);

/// Bus, device-and-function and register of an offset into ECAM.
fn ecam_target(offset: u64) -> (u8, u8, u16) {
    ((offset >> 20) as u8, (offset >> 12) as u8, (offset & 0xfff) as u16)
}

impl BusDevice for Ecam {
    fn bus_read(&self, offset: u64, data: &mut [u8]) {
        let (bus, devfn, register) = ecam_target(offset);
        if let Some(root) = self.0.upgrade() {
            root.config_read(bus, devfn, register, data);
        }
    }

    fn bus_write(&self, offset: u64, data: &[u8]) {
        let (bus, devfn, register) = ecam_target(offset);
        if let Some(root) = self.0.upgrade() {
            root.config_write(bus, devfn, register, data);
        }
    }
}

const ENABLE: u32 = 1 << 31;
/// Enable bit, bus, device, function and register; the rest reads as zero.
const ADDRESS_BITS: u32 = 0x80ff_fffc;

/// Port 0xcf8: takes whole 32-bit accesses only, as the specification wants. It occupies one port
/// of the bus, so that the reset register at 0xcf9 can be a device of its own.
#[derive(Clone, Default)]
pub struct ConfigAddress(Arc<AtomicU32>);

impl ConfigAddress {
    /// The register's value, for saved state.
    pub fn get(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    /// Sets the register.
    pub fn set(&self, address: u32) {
        self.0.store(address & ADDRESS_BITS, Ordering::Relaxed);
    }
}

impl BusDevice for ConfigAddress {
    fn bus_read(&self, offset: u64, data: &mut [u8]) {
        if let (0, 4) = (offset, data.len()) {
            data.copy_from_slice(&self.get().to_le_bytes());
        }
    }

    fn bus_write(&self, offset: u64, data: &[u8]) {
        if let (0, Ok(bytes)) = (offset, data.try_into()) {
            self.set(u32::from_le_bytes(bytes));
        }
    }
}

/// Ports 0xcfc to 0xcff: the register that [`ConfigAddress`] points to.
pub struct ConfigData {
    pub(crate) root: Weak<PciRoot>,
    pub(crate) address: ConfigAddress,
}

impl ConfigData {
    fn target(&self, offset: u64) -> Option<(Arc<PciRoot>, u8, u8, u16)> {
        let address = self.address.get();
        if address & ENABLE == 0 {
            return None;
        }
        let register = (address & 0xfc) as u16 + (offset & 3) as u16;
        Some((self.root.upgrade()?, (address >> 16) as u8, (address >> 8) as u8, register))
    }
}

impl BusDevice for ConfigData {
    fn bus_read(&self, offset: u64, data: &mut [u8]) {
        if let Some((root, bus, devfn, register)) = self.target(offset) {
            root.config_read(bus, devfn, register, data);
        }
    }

    fn bus_write(&self, offset: u64, data: &[u8]) {
        if let Some((root, bus, devfn, register)) = self.target(offset) {
            root.config_write(bus, devfn, register, data);
        }
    }
}
