//! The PCI transport (4.1): a PCI function around a device.
//!
//! BAR 0 has the four register blocks, each on a page of its own; BAR 2 has MSI-X. It is a conventional
//! function on the root bus, as QEMU's is there: of a PCI Express one Linux reads a hundred registers more,
//! each an exit, and finds nothing of use.

mod common;
mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex};

use device::MsiSink;
use mem::GuestRam;
use pci::{Bar, BarKind, ConfigSpace, Identity, Intx, Msix, PciFunction, reg};
use virtio_queue::QueueState;
use vmm_sys_util::eventfd::EventFd;

pub use state::{QueueRegisters, VirtioState};

use crate::worker::{Live, Worker, event};
use crate::{Interrupt, VirtQueue, VirtioDevice, lock};

/// Device-independent features (chapter 6).
pub(crate) const F_INDIRECT_DESC: u64 = 1 << 28;
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
pub(crate) const F_VERSION_1: u64 = 1 << 32;
const TRANSPORT_FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

/// Device status (2.1).
pub(crate) mod status {
    pub(crate) const ACKNOWLEDGE: u8 = 1;
    pub(crate) const DRIVER: u8 = 2;
    pub(crate) const DRIVER_OK: u8 = 4;
    pub(crate) const FEATURES_OK: u8 = 8;
    pub(crate) const NEEDS_RESET: u8 = 64;
    pub(crate) const FAILED: u8 = 128;
}

/// 4.1.2: vendor, and device IDs from the virtio device ID up.
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;
/// 4.1.2.1: subsystem IDs of non-transitional devices start here.
const SUBSYSTEM: u16 = 0x1100;

const REGISTERS_BAR: usize = 0;
const MSIX_BAR: usize = 2;
const BLOCK: u64 = 0x1000;
/// Bytes between the notification addresses of two queues.
const NOTIFY_STEP: u32 = 4;

/// The register blocks in the order of their `cfg_type` (4.1.4), which is that of their pages too.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Block {
    Common = 1,
    Notify = 2,
    Isr = 3,
    Device = 4,
}

const BLOCKS: [Block; 4] = [Block::Common, Block::Notify, Block::Isr, Block::Device];
/// `cfg_type` of the window in configuration space (4.1.4.9).
const CFG_TYPE_PCI: u8 = 5;
/// Offsets in that capability.
const WINDOW_BAR: u16 = 4;
const WINDOW_OFFSET: u16 = 8;
const WINDOW_LENGTH: u16 = 12;
const WINDOW_DATA: u16 = 16;

/// One queue's registers, and the queue itself while the device runs.
struct QueueSlot {
    max_size: u16,
    registers: QueueRegisters,
    kick: EventFd,
    live: Option<Arc<Mutex<VirtQueue>>>,
}

impl QueueSlot {
    /// The registers with the current positions in the rings.
    fn current(&self) -> QueueRegisters {
        let mut registers = self.registers.clone();
        if let Some(queue) = &self.live {
            (registers.next_avail, registers.next_used) = lock(queue).position();
        }
        registers
    }
}

/// Common configuration apart from the queues.
#[derive(Default)]
struct Common {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    status: u8,
    queue_select: u16,
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    name: String,
    config: ConfigSpace,
    msix: Msix,
    interrupt: Arc<Interrupt>,
    /// Offset of the capability with the window.
    window: u16,
    common: Common,
    queues: Vec<QueueSlot>,
    ram: GuestRam,
    paused: bool,
    // Before the device, so that it stops first.
    worker: Option<Worker>,
    device: Box<dyn VirtioDevice>,
}

impl VirtioPci {
    /// A function around `device`. Messages go to `msi`; guests that do not use them get `intx`.
    pub fn new(
        device: impl VirtioDevice + 'static,
        ram: GuestRam,
        msi: Arc<dyn MsiSink>,
        intx: Option<Intx>,
    ) -> io::Result<VirtioPci> {
        let kind = device.kind();
        let sizes = device.queue_sizes();
        let msix = Msix::new(sizes.len() as u16 + 1, msi);
        let (config, window) = config_space(&device, &msix, intx.as_ref());
        let queues = sizes.iter().map(|&max_size| {
            let registers = QueueRegisters::power_on(max_size);
            Ok(QueueSlot { max_size, registers, kick: event()?, live: None })
        });
        Ok(VirtioPci {
            name: format!("virtio-{}", kind.name),
            config,
            interrupt: Arc::new(Interrupt::new(msix.clone(), intx, sizes.len())),
            msix,
            window,
            common: Common::default(),
            queues: queues.collect::<io::Result<_>>()?,
            ram,
            paused: false,
            worker: None,
            device: Box::new(device),
        })
    }

    /// `virtio-blk` and the like.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device behind the transport.
    pub fn device(&self) -> &dyn VirtioDevice {
        &*self.device
    }

    /// Lets requests under way finish and starts none until [`VirtioPci::resume`].
    pub fn pause(&mut self) {
        self.paused = true;
        self.update_worker();
    }

    /// Goes on after [`VirtioPci::pause`].
    pub fn resume(&mut self) {
        self.paused = false;
        self.update_worker();
    }

    /// Everything that was given to the device is safe when this returns.
    pub fn flush(&self) -> io::Result<()> {
        self.device.flush()
    }

    /// Starts or stops the worker, as the driver and the machine want it: a device must not touch
    /// memory before DRIVER_OK (2.1.2), nor while it is no bus master.
    fn update_worker(&mut self) {
        let live = self.common.status & status::DRIVER_OK != 0 && self.config.bus_master();
        let wanted = live && !self.paused && !self.interrupt.is_broken();
        if wanted && self.worker.is_none() {
            if let Err(error) = self.start() {
                log::warn!("{}: cannot start: {error}; waiting for a reset", self.name);
                self.interrupt.break_device();
            }
        } else if !wanted {
            self.stop();
        }
    }

    fn start(&mut self) -> Result<(), Box<dyn std::error::Error>> {
        let features = self.common.driver_features;
        let handler = self.device.handler(features)?;
        let mut live = Vec::new();
        for (index, slot) in self.queues.iter().enumerate().filter(|(_, slot)| slot.registers.enabled) {
            let state = slot.registers.to_queue_state(slot.max_size, features & F_EVENT_IDX != 0);
            let queue = Arc::new(Mutex::new(VirtQueue::new(state, &self.ram)?));
            live.push(Live { index, queue, kick: slot.kick.try_clone()? });
        }
        for Live { index, queue, .. } in &live {
            self.queues[*index].live = Some(queue.clone());
        }
        let (ram, interrupt) = (self.ram.clone(), self.interrupt.clone());
        let started = Worker::start(&self.name, handler, live, ram, interrupt);
        self.worker =
            Some(started.inspect_err(|_| self.queues.iter_mut().for_each(|slot| slot.live = None))?);
        Ok(())
    }

    fn stop(&mut self) {
        self.worker = None;
        for slot in &mut self.queues {
            slot.registers = slot.current();
            slot.live = None;
        }
    }

    /// The driver has written 0 to the status (2.4), or the machine is reset.
    fn reset_device(&mut self) {
        self.common = Common::default();
        self.stop();
        self.interrupt.reset();
        for slot in &mut self.queues {
            slot.registers = QueueRegisters::power_on(slot.max_size);
        }
        self.device.reset();
    }

    fn offered(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn read_registers(&mut self, offset: u64, data: &mut [u8]) {
        let within = offset % BLOCK;
        match block_at(offset) {
            Some(Block::Common) => self.read_common(within, data),
            Some(Block::Isr) if within == 0 && !data.is_empty() => {
                data.fill(0);
                data[0] = self.interrupt.take_isr();
            }
            Some(Block::Device) => copy_from(&self.device.config(), within, data),
            Some(Block::Notify | Block::Isr) | None => data.fill(0),
        }
    }

    fn write_registers(&mut self, offset: u64, data: &[u8]) {
        let within = offset % BLOCK;
        match block_at(offset) {
            Some(Block::Common) => self.write_common(within, data),
            Some(Block::Notify) => self.kick(within / u64::from(NOTIFY_STEP)),
            Some(Block::Device) => self.device.write_config(within, data),
            Some(Block::Isr) | None => {}
        }
    }

    fn kick(&self, index: u64) {
        let slot = usize::try_from(index).ok().and_then(|index| self.queues.get(index));
        if let Some(slot) = slot.filter(|slot| slot.live.is_some()) {
            let _ = slot.kick.write(1); // fails only if the counter is full, which is as good
        }
    }

    /// The access that the window in configuration space stands for, if it is a sound one.
    fn window_target(&self) -> Option<(usize, u64, usize)> {
        let mut bytes = [0; 12];
        self.config.read(self.window + WINDOW_BAR, &mut bytes);
        let u32_at = |at: u16| {
            let at = usize::from(at - WINDOW_BAR);
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let (offset, length) = (u32_at(WINDOW_OFFSET), u32_at(WINDOW_LENGTH));
        let sound = matches!(length, 1 | 2 | 4) && offset % length == 0;
        sound.then_some((bytes[0].into(), offset.into(), length as usize))
    }

    fn touches_window(&self, offset: u16, length: usize) -> bool {
        let data = self.window + WINDOW_DATA;
        usize::from(offset) + length > data.into() && offset < data + 4
    }
}

/// Fills `data` from byte `at` of `source` on, with zeroes past its end.
fn copy_from(source: &[u8], at: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(at).ok().and_then(|at| source.get(at..)).unwrap_or_default();
    let count = rest.len().min(data.len());
    data[..count].copy_from_slice(&rest[..count]);
}

fn block_offset(block: Block) -> u64 {
    (block as u64 - 1) * BLOCK
}

fn block_at(offset: u64) -> Option<Block> {
    BLOCKS.into_iter().find(|block| block_offset(*block) == offset / BLOCK * BLOCK)
}

fn config_space(device: &dyn VirtioDevice, msix: &Msix, intx: Option<&Intx>) -> (ConfigSpace, u16) {
    let kind = device.kind();
    let identity = Identity {
        vendor: VENDOR,
        device: FIRST_DEVICE + kind.id,
        revision: 1,
        class: kind.class,
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
    };
    let mut config = ConfigSpace::new(identity)
        .with_bar(REGISTERS_BAR, Bar { kind: BarKind::Mem64, size: BLOCK * BLOCKS.len() as u64 })
        .with_bar(MSIX_BAR, Bar { kind: BarKind::Mem32, size: msix.bar_size() });
    config.add_msix(MSIX_BAR as u8, msix);
    for block in BLOCKS {
        let length = match block {
            Block::Common => common::SIZE as u32,
            Block::Notify => device.queue_sizes().len() as u32 * NOTIFY_STEP,
            Block::Isr => 1,
            Block::Device => device.config().len() as u32,
        };
        if length > 0 {
            let step = (block == Block::Notify).then_some(NOTIFY_STEP);
            let body = capability(block as u8, block_offset(block) as u32, length, step);
            config.add_capability(reg::CAP_VENDOR, &body, &[]);
        }
    }
    let mut writable = [0; 18];
    writable[2] = 0xff; // bar
    writable[6..].fill(0xff); // offset, length and data
    let window = config.add_capability(reg::CAP_VENDOR, &capability(CFG_TYPE_PCI, 0, 0, Some(0)), &writable);
    if let Some(intx) = intx {
        config.add_intx(intx);
    }
    (config, window)
}

/// What follows ID and link of a virtio capability (4.1.4); `extra` for the longer ones.
fn capability(cfg_type: u8, offset: u32, length: u32, extra: Option<u32>) -> Vec<u8> {
    let cap_len = if extra.is_some() { 20 } else { 16 };
    let mut body = vec![cap_len, cfg_type, REGISTERS_BAR as u8, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(extra.map(u32::to_le_bytes).into_iter().flatten());
    body
}

impl PciFunction for VirtioPci {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if self.touches_window(offset, data.len())
            && let Some((bar, at, length)) = self.window_target()
        {
            let mut value = [0; 4];
            self.bar_read(bar, at, &mut value[..length]);
            self.config.write(self.window + WINDOW_DATA, &value);
        }
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        if self.touches_window(offset, data.len())
            && let Some((bar, at, length)) = self.window_target()
        {
            let mut value = [0; 4];
            self.config.read(self.window + WINDOW_DATA, &mut value);
            self.bar_write(bar, at, &value[..length]);
        }
        self.update_worker();
    }

    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        match bar {
            REGISTERS_BAR => self.read_registers(offset, data),
            MSIX_BAR => self.msix.bar_read(offset, data),
            _ => {}
        }
    }

    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        match bar {
            REGISTERS_BAR => self.write_registers(offset, data),
            MSIX_BAR => self.msix.bar_write(offset, data),
            _ => {}
        }
    }

    fn doorbell(&self, bar: usize, offset: u64) -> Option<EventFd> {
        let within = offset.checked_sub(block_offset(Block::Notify)).filter(|within| *within < BLOCK)?;
        let index = within / u64::from(NOTIFY_STEP);
        let slot = self.queues.get(usize::try_from(index).ok()?)?;
        let fits = bar == REGISTERS_BAR && within % u64::from(NOTIFY_STEP) == 0 && slot.live.is_some();
        fits.then(|| slot.kick.try_clone().ok()).flatten()
    }

    fn reset(&mut self) {
        self.reset_device();
        self.config.reset();
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.stop();
        if let Err(error) = self.device.flush() {
            log::error!("{}: the last flush failed: {error}", self.name);
        }
    }
}
