//! A device whose registers lie in several places: each range of the bus gets a part of it.

use std::sync::{Arc, Mutex};

use device::{BusDevice, Device};

use crate::sync::lock;

struct Part<D> {
    device: Arc<Mutex<D>>,
    first: u64,
}

impl<D: Device> BusDevice for Part<D> {
    fn bus_read(&self, offset: u64, data: &mut [u8]) {
        lock(&self.device).read(self.first + offset, data);
    }

    fn bus_write(&self, offset: u64, data: &[u8]) {
        lock(&self.device).write(self.first + offset, data);
    }
}

/// The device from its register `first` on.
pub(crate) fn part<D: Device + 'static>(device: &Arc<Mutex<D>>, first: u64) -> Arc<dyn BusDevice> {
    Arc::new(Part { device: device.clone(), first })
}

/// Port ranges and what answers there, ready for a bus.
pub type Parts<const N: usize> = [(std::ops::Range<u64>, Arc<dyn BusDevice>); N];
