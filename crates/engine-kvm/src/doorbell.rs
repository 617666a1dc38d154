//! Writes of the guest that signal an event and do not leave the kernel (`KVM_IOEVENTFD`).

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

use crate::vm::Shared;

/// Registered as long as it lives.
pub(crate) struct Doorbell {
    shared: Arc<Shared>,
    address: u64,
    event: EventFd,
}

impl Doorbell {
    /// `None` where KVM has no room for more of them.
    pub(crate) fn new(shared: Arc<Shared>, address: u64, event: EventFd) -> Option<Doorbell> {
        match shared.fd.register_ioevent(&event, &IoEventAddress::Mmio(address), NoDatamatch) {
            Ok(()) => Some(Doorbell { shared, address, event }),
            Err(errno) => {
                log::debug!("no doorbell at {address:#x}: {errno}");
                None
            }
        }
    }
}

impl Drop for Doorbell {
    fn drop(&mut self) {
        let at = IoEventAddress::Mmio(self.address);
        if let Err(errno) = self.shared.fd.unregister_ioevent(&self.event, &at, NoDatamatch) {
            log::error!("KVM keeps the doorbell at {:#x}: {errno}", self.address);
        }
    }
}
