//! The PCI root and what is in its slots.

use std::sync::{Arc, Mutex};

use device::Bus;
use pci::{ConfigState, FunctionInfo, HostBridge, PciFunction, PciRoot, Windows};
use serde::{Deserialize, Serialize};

use crate::chipset::lock;
use crate::describe::PciInfo;
use crate::{Error, layout};

/// Saved state of the PCI root and its functions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciState {
    /// The address register at port 0xcf8.
    pub address: u32,
    /// The host bridge.
    pub host_bridge: ConfigState,
}

/// The PCI devices.
pub(crate) struct Devices {
    root: Arc<PciRoot>,
    host_bridge: Arc<Mutex<HostBridge>>,
}

impl Devices {
    pub(crate) fn new(ports: &Arc<Bus>, mmio: &Arc<Bus>) -> Result<Devices, Error> {
        let windows =
            Windows { io: layout::PCI_PORTS, mem32: layout::PCI_MMIO_32, mem64: layout::PCI_MMIO_64 };
        let root = PciRoot::new(mmio.clone(), ports.clone(), windows);
        root.attach(mmio, layout::ECAM.start, ports)?;
        let host_bridge = Arc::new(Mutex::new(HostBridge::new()));
        root.add(0, host_bridge.clone())?;
        root.assign()?;
        Ok(Devices { root, host_bridge })
    }

    pub(crate) fn reset(&self) -> Result<(), Error> {
        Ok(self.root.reset()?)
    }

    pub(crate) fn save(&self) -> PciState {
        PciState {
            address: self.root.config_address().get(),
            host_bridge: lock(&self.host_bridge).config().save(),
        }
    }

    pub(crate) fn restore(&self, state: PciState) -> Result<(), Error> {
        let PciState { address, host_bridge } = state;
        lock(&self.host_bridge).config_mut().restore(host_bridge)?;
        self.root.config_address().set(address);
        self.root.refresh();
        Ok(())
    }

    /// Makes what the guest wrote to its disks durable.
    pub(crate) fn flush(&self) -> Result<(), Error> {
        Ok(())
    }

    pub(crate) fn describe(&self) -> Vec<PciInfo> {
        let name = |function: &FunctionInfo| match function.slot {
            0 => "host bridge".into(),
            slot => format!("slot {slot}"),
        };
        self.root.describe().into_iter().map(|f| PciInfo { name: name(&f), function: f }).collect()
    }
}
