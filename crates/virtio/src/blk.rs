//! Block device (5.2).
//!
//! The way of a guest's disk write, hop by hop:
//!
//! 1. the guest kicks: it writes its queue's notification address → [`VirtioPci`], or KVM
//!    signals the queue's event (`kick` in `pci.rs`);
//! 2. the event wakes the device's thread, which begins a round (`worker.rs`);
//! 3. [`Handler::process`] of `Work` in `blk/io.rs` takes every chain that is there
//!    ([`VirtQueue::pop`] checks each);
//! 4. `Request::parse` in `blk/request.rs` makes of a chain a request that cannot be bad; where the disk has
//!    limits and their time has not come, it goes back into the ring with all that is behind it;
//! 5. `Work::perform` hands its buffers, which are guest memory, to [`Disk::write_vectored_at`];
//! 6. `Work::finish` sets status and counters and puts the chain into the used ring;
//! 7. the worker ends the round with one interrupt, if the driver wants it ([`Interrupt`]).
//!
//! A flush is the same with [`Disk::flush`] in the fifth step: when the guest sees its status, all
//! that was written before it is on stable storage. With the write cache off (CONFIG_WCE, or a
//! driver that knows no FLUSH) each write is flushed before its status is set.
//!
//! [`VirtioPci`]: crate::VirtioPci
//! [`VirtQueue::pop`]: crate::VirtQueue::pop
//! [`Interrupt`]: crate::Interrupt
//! [`Handler::process`]: crate::Handler::process

mod io;
mod request;
#[cfg(test)]
mod tests;

use std::io::Result;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use device::BadState;
use disk::{Disk, SECTOR};
use pci::Class;
use serde::{Deserialize, Serialize};
use throttle::{DiskLimits, Throttle};

use crate::{DeviceState, Handler, Kind, VirtioDevice};
use request::{ID_LEN, Limits};

const QUEUE_SIZES: [u16; 1] = [256];

/// Feature bits (5.2.3).
mod feature {
    pub(super) const SIZE_MAX: u64 = 1 << 1;
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const TOPOLOGY: u64 = 1 << 10;
    pub(super) const CONFIG_WCE: u64 = 1 << 11;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// Bytes in one buffer of a request; only a hint to drivers.
const SIZE_MAX: u32 = 1 << 22;
/// Buffers in a request: what the queue has room for besides header and status.
const SEG_MAX: u32 = QUEUE_SIZES[0] as u32 - 2;
/// Offset of `writeback` in the configuration.
const WRITEBACK: u64 = 32;

/// What the driver has set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkState {
    /// The `writeback` field: whether writes may wait for a flush.
    pub writeback: bool,
}

/// What a disk has done. Clones see the same counts.
#[derive(Clone, Debug, Default)]
pub struct Counters(Arc<[AtomicU64; 5]>);

/// What [`Counters`] count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// Requests done.
    Requests,
    /// Requests answered with an error.
    Errors,
    /// Flushes done.
    Flushes,
    /// Bytes read.
    BytesRead,
    /// Bytes written.
    BytesWritten,
}

impl Counters {
    /// A count so far.
    pub fn get(&self, count: Count) -> u64 {
        self.0[count as usize].load(Ordering::Relaxed)
    }

    fn add(&self, count: Count, value: u64) {
        self.0[count as usize].fetch_add(value, Ordering::Relaxed);
    }
}

/// A disk.
pub struct Blk {
    disk: Arc<dyn Disk>,
    serial: [u8; ID_LEN],
    writeback: Arc<AtomicBool>,
    counters: Counters,
    /// Here, since a driver that resets the device must not get a new one. Only the handler locks it.
    throttle: Option<Arc<Mutex<Throttle>>>,
}

impl Blk {
    /// A disk with the contents of `disk` and a serial number, of which the first 20 bytes count.
    pub fn new(disk: Box<dyn Disk>, serial: &str) -> Blk {
        let mut id = [0; ID_LEN];
        let length = serial.len().min(ID_LEN);
        id[..length].copy_from_slice(&serial.as_bytes()[..length]);
        Blk {
            disk: disk.into(),
            serial: id,
            writeback: Arc::new(AtomicBool::new(true)),
            counters: Counters::default(),
            throttle: None,
        }
    }

    /// Holds it to `limits`. A flush and each range that is discarded is a request without bytes; zeroes
    /// count as if they were written.
    pub fn limited(mut self, limits: &DiskLimits) -> Blk {
        self.throttle = limits.throttle().map(|throttle| Arc::new(Mutex::new(throttle)));
        self
    }

    /// What it has done.
    pub fn counters(&self) -> Counters {
        self.counters.clone()
    }

    fn limits(&self) -> Limits {
        Limits { size: self.disk.size(), read_only: self.disk.description().read_only }
    }
}

impl VirtioDevice for Blk {
    fn kind(&self) -> Kind {
        Kind { id: 2, class: Class { base: 0x01, sub: 0x00, interface: 0 }, name: "blk" }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let always =
            feature::SIZE_MAX | feature::SEG_MAX | feature::BLK_SIZE | feature::TOPOLOGY | feature::FLUSH;
        let kind = match self.limits().read_only {
            true => feature::RO,
            false => feature::CONFIG_WCE | feature::DISCARD | feature::WRITE_ZEROES,
        };
        always | kind
    }

    /// 5.2.6.2: a driver that can switch the cache but not flush it starts with it off.
    fn negotiated(&mut self, features: u64) {
        let no_flush = features & feature::FLUSH == 0;
        self.writeback.store(!no_flush, Ordering::Relaxed);
    }

    /// 5.2.4, up to `write_zeroes_may_unmap` and what fills its word.
    fn config(&self) -> Vec<u8> {
        let granularity = self.disk.discard_granularity();
        let mut config = Vec::with_capacity(60);
        config.extend((self.disk.size() / SECTOR).to_le_bytes());
        config.extend(SIZE_MAX.to_le_bytes());
        config.extend(SEG_MAX.to_le_bytes());
        config.extend([0; 4]); // geometry is not offered
        config.extend((SECTOR as u32).to_le_bytes());
        let block = (granularity / SECTOR).clamp(1, 8);
        let exponent = block.ilog2() as u8;
        config.extend([exponent, 0]); // physical block size, alignment offset
        config.extend((1u16 << exponent).to_le_bytes()); // minimum I/O size
        config.extend(0u32.to_le_bytes()); // optimal I/O size
        config.extend([u8::from(self.writeback.load(Ordering::Relaxed)), 0]);
        config.extend(1u16.to_le_bytes()); // num_queues
        let (sectors, segments) = (request::MAX_RANGE_SECTORS, request::MAX_RANGES as u32);
        config.extend(sectors.to_le_bytes());
        config.extend(segments.to_le_bytes());
        config.extend(((granularity / SECTOR).max(1) as u32).to_le_bytes()); // discard alignment
        config.extend(sectors.to_le_bytes());
        config.extend(segments.to_le_bytes());
        config.extend([1, 0, 0, 0]); // writing zeroes may unmap
        config
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (WRITEBACK, [value], false) = (offset, data, self.limits().read_only) {
            self.writeback.store(*value != 0, Ordering::Relaxed);
        }
    }

    fn handler(&self, _features: u64) -> Result<Box<dyn Handler>> {
        Ok(Box::new(io::Work {
            disk: self.disk.clone(),
            limits: self.limits(),
            serial: self.serial,
            writeback: self.writeback.clone(),
            counters: self.counters.clone(),
            throttle: self.throttle.clone(),
        }))
    }

    fn reset(&mut self) {
        self.writeback.store(true, Ordering::Relaxed);
    }

    fn flush(&self) -> Result<()> {
        self.disk.flush()
    }

    fn save(&self) -> DeviceState {
        DeviceState::Blk(BlkState { writeback: self.writeback.load(Ordering::Relaxed) })
    }

    fn restore(&mut self, state: DeviceState) -> std::result::Result<(), BadState> {
        let DeviceState::Blk(BlkState { writeback }) = state else {
            return Err(BadState::new("virtio-blk", "it is another device's"));
        };
        self.writeback.store(writeback, Ordering::Relaxed);
        Ok(())
    }
}
