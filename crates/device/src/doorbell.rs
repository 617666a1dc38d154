//! Doorbells: writes of the guest that need no answer, only somebody who looks.

use vmm_sys_util::eventfd::EventFd;

/// A doorbell that is wired. It is no more once this is dropped.
pub type Doorbell = Box<dyn Send + Sync>;

/// Who can wire doorbells: an engine that notices a write without leaving the kernel.
pub trait DoorbellSink: Send + Sync {
    /// From now on a write of any width and value to guest-physical `address` signals `event` and is no
    /// access on the bus. `None` if that cannot be had: the write is an access then, as any other.
    fn wire(&self, address: u64, event: EventFd) -> Option<Doorbell>;
}
