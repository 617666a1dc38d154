//! The host bridge: the function in slot 0 that stands for the root complex itself.

use crate::{Class, ConfigSpace, Identity, PciFunction};

/// A host bridge without registers of its own; operating systems look for its class.
pub struct HostBridge {
    config: ConfigSpace,
}

impl HostBridge {
    /// The IDs are those of the generic PCI Express host bridge that guests know from virtual
    /// machines (1b36:0008), for want of a vendor ID of our own; no driver binds to them. The subsystem,
    /// which would name a product that this is not, is left out.
    pub fn new() -> HostBridge {
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: Class { base: 0x06, sub: 0x00, interface: 0x00 },
            subsystem_vendor: 0,
            subsystem: 0,
        };
        HostBridge { config: ConfigSpace::new(identity) }
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        HostBridge::new()
    }
}

impl PciFunction for HostBridge {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn bar_read(&mut self, _bar: usize, _offset: u64, _data: &mut [u8]) {}

    fn bar_write(&mut self, _bar: usize, _offset: u64, _data: &[u8]) {}

    fn reset(&mut self) {
        self.config.reset();
    }
}
