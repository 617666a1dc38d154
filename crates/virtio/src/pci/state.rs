//! Saved state of the transport and the device behind it.

use device::{BadState, Snapshot};
use pci::{ConfigState, MsixState};
use serde::{Deserialize, Serialize};

use super::{Common, F_VERSION_1, QueueState, VirtioPci, status};
use crate::DeviceState;

/// One queue as its driver has set it up, and how far it got.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    /// Entries of each ring.
    pub size: u16,
    /// Whether the driver uses it.
    pub enabled: bool,
    /// Guest-physical address of the descriptor table.
    pub desc: u64,
    /// Guest-physical address of the available ring.
    pub driver: u64,
    /// Guest-physical address of the used ring.
    pub device: u64,
    /// The next entry of the available ring to take.
    pub next_avail: u16,
    /// The next entry of the used ring to fill.
    pub next_used: u16,
}

impl QueueRegisters {
    pub(super) fn power_on(size: u16) -> QueueRegisters {
        QueueRegisters { size, enabled: false, desc: 0, driver: 0, device: 0, next_avail: 0, next_used: 0 }
    }

    pub(super) fn to_queue_state(&self, max_size: u16, event_idx: bool) -> QueueState {
        let QueueRegisters { size, enabled, desc, driver, device, next_avail, next_used } = *self;
        QueueState {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled: event_idx,
            size,
            ready: enabled,
            desc_table: desc,
            avail_ring: driver,
            used_ring: device,
        }
    }
}

/// Everything a guest can observe of a virtio function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioState {
    /// Configuration space.
    pub config: ConfigState,
    /// MSI-X table and pending bits.
    pub msix: MsixState,
    /// Device status, with DEVICE_NEEDS_RESET.
    pub status: u8,
    /// Which half of the offered features is shown.
    pub device_feature_select: u32,
    /// Which half of the accepted features is shown.
    pub driver_feature_select: u32,
    /// The features that the driver accepts.
    pub driver_features: u64,
    /// Which queue's registers are shown.
    pub queue_select: u16,
    /// ISR status.
    pub isr: u8,
    /// Vector of configuration changes.
    pub config_vector: u16,
    /// Vector of each queue.
    pub queue_vectors: Vec<u16>,
    /// The queues.
    pub queues: Vec<QueueRegisters>,
    /// The device behind the transport.
    pub device: DeviceState,
}

fn bad(what: impl Into<String>) -> BadState {
    BadState::new("virtio", what)
}

impl VirtioPci {
    fn check(&self, state: &VirtioState) -> Result<(), BadState> {
        let known = status::ACKNOWLEDGE
            | status::DRIVER
            | status::DRIVER_OK
            | status::FEATURES_OK
            | status::NEEDS_RESET
            | status::FAILED;
        let has = |bit: u8| state.status & bit != 0;
        if state.status & !known != 0 || has(status::DRIVER_OK) && !has(status::FEATURES_OK) {
            return Err(bad(format!("status {:#x} cannot be", state.status)));
        }
        let foreign = state.driver_features & !self.offered() != 0;
        if has(status::FEATURES_OK) && (foreign || state.driver_features & F_VERSION_1 == 0) {
            return Err(bad(format!("features {:#x} cannot be agreed on", state.driver_features)));
        }
        if state.queues.len() != self.queues.len() || state.queue_vectors.len() != self.queues.len() {
            return Err(bad(format!("{} queues instead of {}", state.queues.len(), self.queues.len())));
        }
        for (registers, slot) in state.queues.iter().zip(&self.queues) {
            if !registers.size.is_power_of_two() || registers.size > slot.max_size {
                return Err(bad(format!("a queue of size {}", registers.size)));
            }
        }
        let mut vectors = state.queue_vectors.iter().chain([&state.config_vector]);
        match vectors.find(|&&vector| !self.interrupt.is_vector(vector)) {
            Some(vector) => Err(bad(format!("vector {vector} of {}", self.msix.vectors()))),
            None => Ok(()),
        }
    }

    /// Takes on a state that was checked as far as [`VirtioPci::check`] can.
    fn apply(&mut self, state: VirtioState) -> Result<(), BadState> {
        let VirtioState {
            config,
            msix,
            status,
            device_feature_select,
            driver_feature_select,
            driver_features,
            queue_select,
            isr,
            config_vector,
            queue_vectors,
            queues,
            device,
        } = state;
        self.device.restore(device)?;
        self.msix.restore(msix)?;
        self.config.restore(config)?;
        self.common = Common {
            device_feature_select,
            driver_feature_select,
            driver_features,
            status: status & !status::NEEDS_RESET,
            queue_select,
        };
        self.interrupt.set_broken(status & status::NEEDS_RESET != 0);
        self.interrupt.set_isr(isr);
        self.interrupt.set_vector(None, config_vector);
        for (index, vector) in queue_vectors.into_iter().enumerate() {
            self.interrupt.set_vector(Some(index), vector);
        }
        for (slot, registers) in self.queues.iter_mut().zip(queues) {
            slot.registers = registers;
        }
        Ok(())
    }
}

/// Save a device that is paused: only then do memory and state belong together.
impl Snapshot for VirtioPci {
    type State = VirtioState;

    fn save(&self) -> VirtioState {
        let vector = |index| self.interrupt.get_vector(Some(index));
        VirtioState {
            config: self.config.save(),
            msix: self.msix.save(),
            status: self.status(),
            device_feature_select: self.common.device_feature_select,
            driver_feature_select: self.common.driver_feature_select,
            driver_features: self.common.driver_features,
            queue_select: self.common.queue_select,
            isr: self.interrupt.isr(),
            config_vector: self.interrupt.get_vector(None),
            queue_vectors: (0..self.queues.len()).map(vector).collect(),
            queues: self.queues.iter().map(super::QueueSlot::current).collect(),
            device: self.device.save(),
        }
    }

    fn restore(&mut self, state: VirtioState) -> Result<(), BadState> {
        self.check(&state)?;
        self.stop();
        let before = self.save();
        let restored = self.apply(state);
        if restored.is_err() {
            // It was in this state a moment ago.
            let _ = self.apply(before);
        }
        self.update_worker();
        restored
    }
}
