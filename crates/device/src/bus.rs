//! A bus: address ranges and the devices behind them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// A device with registers.
///
/// `data.len()` is the width of the access in bytes: 1, 2, 4 or 8 (string instructions and odd
/// guests may produce others; a device that does not know a width ignores the access). Offsets count
/// from the start of the range under which the device was inserted. Nothing a guest does here may panic.
pub trait Device: Send {
    /// Fills `data` with what the guest reads. All ones where the device has nothing to say.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes what the guest writes.
    fn write(&mut self, offset: u64, data: &[u8]);

    /// Back to the power-on state; the guest's wiring (interrupt lines, files behind it) stays.
    fn reset(&mut self);
}

/// A device as a bus holds it: shared, and with whatever lock it needs inside.
pub trait BusDevice: Send + Sync {
    /// See [`Device::read`].
    fn bus_read(&self, offset: u64, data: &mut [u8]);
    /// See [`Device::write`].
    fn bus_write(&self, offset: u64, data: &[u8]);
}

impl<D: Device + ?Sized> BusDevice for Mutex<D> {
    fn bus_read(&self, offset: u64, data: &mut [u8]) {
        locked(self).read(offset, data);
    }

    fn bus_write(&self, offset: u64, data: &[u8]) {
        locked(self).write(offset, data);
    }
}

/// A thread that panicked with the lock has already brought the VM down; its state is still whole.
fn locked<D: ?Sized>(mutex: &Mutex<D>) -> MutexGuard<'_, D> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A range that was to be inserted lies on one that is there already.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("bus range {wanted:#x?} overlaps {taken:#x?}")]
pub struct Overlap {
    /// The range that was asked for.
    pub wanted: Range<u64>,
    /// The range that is in the way.
    pub taken: Range<u64>,
}

struct Entry {
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// Port or memory-mapped I/O space. Devices may come, go and move while vCPUs run.
#[derive(Default)]
pub struct Bus {
    entries: RwLock<BTreeMap<u64, Entry>>,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Bus {
        Bus::default()
    }

    /// Puts a device at `range`.
    pub fn insert(&self, range: Range<u64>, device: Arc<dyn BusDevice>) -> Result<(), Overlap> {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let before = entries.range(..range.end).next_back();
        if let Some((&start, entry)) = before
            && start + entry.len > range.start
        {
            return Err(Overlap { taken: start..start + entry.len, wanted: range });
        }
        entries.insert(range.start, Entry { len: range.end - range.start, device });
        Ok(())
    }

    /// Takes away the device whose range starts at `start`. Accesses under way finish.
    pub fn remove(&self, start: u64) -> bool {
        self.entries.write().unwrap_or_else(PoisonError::into_inner).remove(&start).is_some()
    }

    fn find(&self, addr: u64) -> Option<(u64, Arc<dyn BusDevice>)> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let (&start, entry) = entries.range(..=addr).next_back()?;
        (addr - start < entry.len).then(|| (addr - start, entry.device.clone()))
    }

    /// Reads from whatever is at `addr`. Where nothing is, `data` becomes all ones and the answer is
    /// `false`.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        let Some((offset, device)) = self.find(addr) else { return false };
        device.bus_read(offset, data);
        true
    }

    /// Writes to whatever is at `addr`; `false` where nothing is.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        let Some((offset, device)) = self.find(addr) else { return false };
        device.bus_write(offset, data);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Scratch(u8);

    impl Device for Scratch {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }
        fn write(&mut self, _offset: u64, data: &[u8]) {
            self.0 = data[0];
        }
        fn reset(&mut self) {
            self.0 = 0;
        }
    }

    #[test]
    fn accesses_reach_the_device_by_offset_and_nothing_else_answers() {
        let bus = Bus::new();
        bus.insert(0x60..0x68, Arc::new(Mutex::new(Scratch::default()))).unwrap();
        assert!(bus.write(0x60, &[40]));
        let mut byte = [0];
        assert!(bus.read(0x62, &mut byte));
        assert_eq!(byte, [42]);
        assert!(!bus.read(0x68, &mut byte));
        assert_eq!(byte, [0xff]);
        assert!(bus.remove(0x60) && !bus.read(0x60, &mut byte));
    }

    #[test]
    fn overlapping_ranges_are_refused() {
        let bus = Bus::new();
        let device: Arc<dyn BusDevice> = Arc::new(Mutex::new(Scratch::default()));
        bus.insert(0x100..0x200, device.clone()).unwrap();
        for bad in [0x1ff..0x300, 0x80..0x101, 0x120..0x130, 0x80..0x300] {
            assert_eq!(bus.insert(bad.clone(), device.clone()).unwrap_err().taken, 0x100..0x200, "{bad:x?}");
        }
        bus.insert(0x200..0x201, device.clone()).unwrap();
        bus.insert(0xff..0x100, device).unwrap();
    }
}
