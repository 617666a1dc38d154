//! Common configuration (4.1.4.3).

use super::{F_VERSION_1, VirtioPci, copy_from, status};

/// Length of the registers up to and with `queue_device`.
pub(super) const SIZE: usize = 56;

/// Offsets of the registers.
mod offset {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0;
    pub(super) const DEVICE_FEATURE: usize = 4;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 8;
    pub(super) const DRIVER_FEATURE: u64 = 12;
    pub(super) const CONFIG_VECTOR: u64 = 16;
    pub(super) const NUM_QUEUES: usize = 18;
    pub(super) const STATUS: u64 = 20;
    pub(super) const QUEUE_SELECT: u64 = 22;
    pub(super) const QUEUE_SIZE: u64 = 24;
    pub(super) const QUEUE_VECTOR: u64 = 26;
    pub(super) const QUEUE_ENABLE: u64 = 28;
    pub(super) const QUEUE_NOTIFY_OFFSET: usize = 30;
    pub(super) const QUEUE_DESC: u64 = 32;
    pub(super) const QUEUE_DRIVER: u64 = 40;
    pub(super) const QUEUE_DEVICE: u64 = 48;
}

/// The half of a 64-bit feature word; there is nothing beyond the second.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// `old` with `data` written over it from byte `at` on: 64-bit registers come whole or in halves.
fn overlay(old: u64, at: u64, data: &[u8]) -> u64 {
    let mut bytes = old.to_le_bytes();
    for (at, byte) in (at as usize..8).zip(data) {
        bytes[at] = *byte;
    }
    u64::from_le_bytes(bytes)
}

impl VirtioPci {
    /// All registers as they are now: reading them changes nothing.
    fn common_image(&self) -> [u8; SIZE] {
        let mut image = [0; SIZE];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let common = &self.common;
        put(offset::DEVICE_FEATURE_SELECT as usize, &common.device_feature_select.to_le_bytes());
        put(offset::DEVICE_FEATURE, &half(self.offered(), common.device_feature_select).to_le_bytes());
        put(offset::DRIVER_FEATURE_SELECT as usize, &common.driver_feature_select.to_le_bytes());
        let accepted = half(common.driver_features, common.driver_feature_select);
        put(offset::DRIVER_FEATURE as usize, &accepted.to_le_bytes());
        put(offset::CONFIG_VECTOR as usize, &self.interrupt.get_vector(None).to_le_bytes());
        put(offset::NUM_QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(offset::STATUS as usize, &[self.status()]);
        put(offset::QUEUE_SELECT as usize, &common.queue_select.to_le_bytes());
        let index = usize::from(common.queue_select);
        // A queue that does not exist has size 0 (4.1.4.3.1).
        if let Some(slot) = self.queues.get(index) {
            put(offset::QUEUE_SIZE as usize, &slot.registers.size.to_le_bytes());
            put(offset::QUEUE_VECTOR as usize, &self.interrupt.get_vector(Some(index)).to_le_bytes());
            put(offset::QUEUE_ENABLE as usize, &u16::from(slot.registers.enabled).to_le_bytes());
            put(offset::QUEUE_NOTIFY_OFFSET, &common.queue_select.to_le_bytes());
            put(offset::QUEUE_DESC as usize, &slot.registers.desc.to_le_bytes());
            put(offset::QUEUE_DRIVER as usize, &slot.registers.driver.to_le_bytes());
            put(offset::QUEUE_DEVICE as usize, &slot.registers.device.to_le_bytes());
        }
        image
    }

    pub(super) fn status(&self) -> u8 {
        self.common.status | if self.interrupt.is_broken() { status::NEEDS_RESET } else { 0 }
    }

    pub(super) fn read_common(&self, at: u64, data: &mut [u8]) {
        copy_from(&self.common_image(), at, data);
    }

    pub(super) fn write_common(&mut self, at: u64, data: &[u8]) {
        let value = overlay(0, 0, data);
        match (at, data.len()) {
            (offset::DEVICE_FEATURE_SELECT, 4) => self.common.device_feature_select = value as u32,
            (offset::DRIVER_FEATURE_SELECT, 4) => self.common.driver_feature_select = value as u32,
            (offset::DRIVER_FEATURE, 4) => self.write_driver_feature(value as u32),
            (offset::CONFIG_VECTOR, 2) => self.interrupt.set_vector(None, value as u16),
            (offset::STATUS, 1) => self.write_status(value as u8),
            (offset::QUEUE_SELECT, 2) => self.common.queue_select = value as u16,
            (offset::QUEUE_VECTOR, 2) => {
                self.interrupt.set_vector(Some(self.common.queue_select.into()), value as u16);
            }
            (offset::QUEUE_SIZE | offset::QUEUE_ENABLE, 2) => self.write_queue(at, data),
            (offset::QUEUE_DESC..56, 4 | 8) => self.write_queue(at, data),
            _ => {}
        }
    }

    /// Features are open until FEATURES_OK (3.1.1).
    fn write_driver_feature(&mut self, value: u32) {
        if self.common.status & status::FEATURES_OK != 0 {
            return;
        }
        let features = &mut self.common.driver_features;
        match self.common.driver_feature_select {
            0 => *features = *features & !0xffff_ffff | u64::from(value),
            1 => *features = *features & 0xffff_ffff | u64::from(value) << 32,
            // Bits that we cannot offer: accepting one of them makes the set unacceptable.
            _ if value != 0 => *features |= 1 << 63,
            _ => {}
        }
    }

    /// Queues are set up before they are enabled (4.1.4.3.2), and all before DRIVER_OK.
    fn write_queue(&mut self, at: u64, data: &[u8]) {
        let running = self.common.status & status::DRIVER_OK != 0;
        let Some(slot) = self.queues.get_mut(usize::from(self.common.queue_select)) else { return };
        let (max_size, registers) = (slot.max_size, &mut slot.registers);
        if running || registers.enabled {
            return;
        }
        let value = overlay(0, 0, data);
        match at {
            offset::QUEUE_SIZE => {
                let size = value as u16;
                if size.is_power_of_two() && size <= max_size {
                    registers.size = size;
                }
            }
            offset::QUEUE_ENABLE => registers.enabled = value == 1,
            offset::QUEUE_DESC..offset::QUEUE_DRIVER => {
                registers.desc = overlay(registers.desc, at - offset::QUEUE_DESC, data);
            }
            offset::QUEUE_DRIVER..offset::QUEUE_DEVICE => {
                registers.driver = overlay(registers.driver, at - offset::QUEUE_DRIVER, data);
            }
            _ => registers.device = overlay(registers.device, at - offset::QUEUE_DEVICE, data),
        }
    }

    /// The driver announces its progress (3.1.1), or resets the device with 0.
    fn write_status(&mut self, value: u8) {
        if value == 0 {
            self.reset_device();
            return;
        }
        let old = self.common.status;
        let plain = status::ACKNOWLEDGE | status::DRIVER | status::FAILED;
        let mut new = old | value & plain;
        if value & status::FEATURES_OK != 0
            && old & status::FEATURES_OK == 0
            && self.features_are_acceptable()
        {
            new |= status::FEATURES_OK;
            self.device.negotiated(self.common.driver_features);
        }
        if value & status::DRIVER_OK != 0 && new & status::FEATURES_OK != 0 {
            new |= status::DRIVER_OK;
        }
        self.common.status = new;
        self.update_worker();
    }

    pub(super) fn features_are_acceptable(&self) -> bool {
        let features = self.common.driver_features;
        features & !self.offered() == 0 && features & F_VERSION_1 != 0
    }
}
