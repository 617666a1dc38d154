//! A machine with one virtio device, and a driver that finds and runs it as an operating system
//! would: over ECAM, BARs, capabilities, MSI-X and rings in guest memory.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use ::pci::{IntxRouter, PciRoot, Pin, Windows, reg};
use device::{Bus, IrqSink, Msi, MsiSink};
use mem::{Bytes, GuestAddress, GuestRam};

use crate::pci::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, status};
use crate::{VirtioDevice, VirtioPci, lock};

pub(crate) const RAM: u64 = 4 << 20;
/// Where tests keep their buffers.
pub(crate) const DATA: u64 = 1 << 20;
const ECAM: u64 = 0xe000_0000;
const SLOT: u8 = 3;
/// Rings of queue `n` are here plus `n` × this.
const RINGS: u64 = 0x1_0000;
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const F_NEXT: u16 = 1;
pub(crate) const F_WRITE: u16 = 2;
pub(crate) const F_INDIRECT: u16 = 4;

/// What interrupts arrived.
#[derive(Default)]
pub(crate) struct Interrupts {
    messages: Mutex<Vec<Msi>>,
    arrived: Condvar,
    pub(crate) line: Mutex<bool>,
}

impl MsiSink for Interrupts {
    fn send(&self, msi: Msi) {
        lock(&self.messages).push(msi);
        self.arrived.notify_all();
    }
}

impl IrqSink for Interrupts {
    fn set_level(&self, _pin: u32, high: bool) {
        *lock(&self.line) = high;
    }
}

impl Interrupts {
    /// Waits for the message with `data` and takes it out.
    pub(crate) fn wait(&self, data: u32) {
        let start = Instant::now();
        let mut messages = lock(&self.messages);
        while start.elapsed() < PATIENCE {
            if let Some(at) = messages.iter().position(|msi| msi.data == data) {
                messages.remove(at);
                return;
            }
            messages = self.arrived.wait_timeout(messages, Duration::from_millis(50)).unwrap().0;
        }
        panic!("no message {data:#x} came, only {messages:?}");
    }

    pub(crate) fn count(&self, data: u32) -> usize {
        lock(&self.messages).iter().filter(|msi| msi.data == data).count()
    }
}

pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub(crate) struct Board {
    pub(crate) ram: GuestRam,
    pub(crate) mmio: Arc<Bus>,
    pub(crate) root: Arc<PciRoot>,
    pub(crate) interrupts: Arc<Interrupts>,
    pub(crate) function: Arc<Mutex<VirtioPci>>,
}

impl Board {
    pub(crate) fn new(device: impl VirtioDevice + 'static) -> Board {
        Board::with_ram(device, GuestRam::new(&[0..RAM]).unwrap())
    }

    pub(crate) fn with_ram(device: impl VirtioDevice + 'static, ram: GuestRam) -> Board {
        let interrupts = Arc::new(Interrupts::default());
        let (mmio, ports) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let windows = Windows {
            io: 0xc000..0x1_0000,
            mem32: 0xc000_0000..0xe000_0000,
            mem64: 0x40_0000_0000..0x80_0000_0000,
        };
        let root = PciRoot::new(mmio.clone(), ports.clone(), windows);
        root.attach(&mmio, ECAM, &ports).unwrap();
        let intx = IntxRouter::new(interrupts.clone()).intx(SLOT, Pin::A);
        let function = VirtioPci::new(device, ram.clone(), interrupts.clone(), Some(intx)).unwrap();
        let function = Arc::new(Mutex::new(function));
        root.add(SLOT, function.clone()).unwrap();
        root.assign().unwrap();
        Board { ram, mmio, root, interrupts, function }
    }

    pub(crate) fn config<const N: usize>(&self, register: u16) -> [u8; N] {
        let mut data = [0; N];
        self.mmio.read(ECAM + (u64::from(SLOT) << 15) + u64::from(register), &mut data);
        data
    }

    pub(crate) fn set_config(&self, register: u16, data: &[u8]) {
        self.mmio.write(ECAM + (u64::from(SLOT) << 15) + u64::from(register), data);
    }

    pub(crate) fn capabilities(&self) -> Vec<(u8, u16)> {
        let mut at = u16::from(self.config::<1>(reg::CAPABILITIES)[0]);
        let mut found = Vec::new();
        while at != 0 {
            let [id, next] = self.config(at);
            found.push((id, at));
            assert!(found.len() < 48, "the capabilities form a loop");
            at = next.into();
        }
        found
    }

    /// Address and length of the register block with this `cfg_type`.
    pub(crate) fn block(&self, cfg_type: u8) -> (u64, u32) {
        let is_it = |(id, at): &(u8, u16)| *id == reg::CAP_VENDOR && self.config::<1>(at + 3)[0] == cfg_type;
        let (_, at) = *self.capabilities().iter().find(|cap| is_it(cap)).expect("a virtio capability");
        let bar = u16::from(self.config::<1>(at + 4)[0]);
        let base = u64::from_le_bytes(self.config(reg::BAR0 + 4 * bar)) & !0xf;
        (base + u64::from(u32::from_le_bytes(self.config(at + 8))), u32::from_le_bytes(self.config(at + 12)))
    }

    /// Switches MSI-X on with data 0x40 + vector.
    pub(crate) fn enable_msix(&self) {
        let caps = self.capabilities();
        let (_, at) = *caps.iter().find(|(id, _)| *id == reg::CAP_MSIX).expect("MSI-X");
        let vectors = u16::from_le_bytes(self.config(at + 2)) + 1;
        let table = u32::from_le_bytes(self.config(at + 4));
        let base = u32::from_le_bytes(self.config(reg::BAR0 + 4 * (table & 7) as u16)) & !0xf;
        for vector in 0..vectors {
            let entry = u64::from(base + (table & !7)) + 16 * u64::from(vector);
            self.mmio.write(entry, &0xfee0_0000u64.to_le_bytes());
            self.mmio.write(entry + 8, &(0x40 + u32::from(vector)).to_le_bytes());
            self.mmio.write(entry + 12, &0u32.to_le_bytes());
        }
        self.set_config(at + 2, &((vectors - 1) | 0x8000).to_le_bytes());
    }
}

pub(crate) enum Buf {
    /// Address and length of what the device reads.
    Out(u64, u32),
    /// Address and length of what the device writes.
    In(u64, u32),
}

struct Ring {
    size: u16,
    base: u64,
    next_desc: u16,
    avail: u16,
    used: u16,
}

/// A driver of the device on a board.
pub(crate) struct Driver {
    pub(crate) board: Board,
    common: u64,
    notify: u64,
    isr: u64,
    device: u64,
    rings: Vec<Ring>,
}

impl Driver {
    /// Finds the device and runs it with every feature it has.
    pub(crate) fn start(device: impl VirtioDevice + 'static) -> Driver {
        let mut driver = Driver::find(Board::new(device));
        driver.board.enable_msix();
        driver.initialize(u64::MAX);
        driver
    }

    pub(crate) fn find(board: Board) -> Driver {
        board.set_config(reg::COMMAND, &(reg::COMMAND_MEMORY | reg::COMMAND_BUS_MASTER).to_le_bytes());
        let at = |cfg_type| board.block(cfg_type).0;
        let no_config = lock(&board.function).device().config().is_empty();
        let device = if no_config { 0 } else { at(4) };
        Driver { common: at(1), notify: at(2), isr: at(3), device, rings: Vec::new(), board }
    }

    /// The same after the machine's reset, which has put the BARs where they were.
    pub(crate) fn find_again(&mut self) {
        let command = reg::COMMAND_MEMORY | reg::COMMAND_BUS_MASTER;
        self.board.set_config(reg::COMMAND, &command.to_le_bytes());
    }

    /// 3.1.1, with those of `features` that are offered.
    pub(crate) fn initialize(&mut self, features: u64) {
        self.set(20, &[0]);
        self.set(20, &[status::ACKNOWLEDGE]);
        self.set(20, &[status::ACKNOWLEDGE | status::DRIVER]);
        let features = self.features() & features;
        assert!(features & F_VERSION_1 != 0);
        self.accept(features);
        let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.set(20, &[ready]);
        assert_eq!(self.status(), ready);
        let count = u16::from_le_bytes(self.get(18));
        self.rings = (0..count).map(|index| self.set_up(index)).collect();
        self.set(16, &0u16.to_le_bytes());
        self.set(20, &[ready | status::DRIVER_OK]);
    }

    fn set_up(&self, index: u16) -> Ring {
        self.set(22, &index.to_le_bytes());
        let size = u16::from_le_bytes(self.get(24));
        let base = RINGS + u64::from(index) * RINGS;
        self.board.ram.write_slice(&[0; RINGS as usize], GuestAddress(base)).unwrap();
        self.set(26, &(index + 1).to_le_bytes());
        assert_eq!(self.get(26), (index + 1).to_le_bytes());
        for (register, offset) in [(32, 0), (40, 0x4000), (48, 0x8000)] {
            self.set(register, &((base + offset) as u32).to_le_bytes());
            self.set(register + 4, &0u32.to_le_bytes());
        }
        self.set(28, &1u16.to_le_bytes());
        Ring { size, base, next_desc: 0, avail: 0, used: 0 }
    }

    pub(crate) fn get<const N: usize>(&self, register: u64) -> [u8; N] {
        let mut data = [0; N];
        self.board.mmio.read(self.common + register, &mut data);
        data
    }

    pub(crate) fn set(&self, register: u64, data: &[u8]) {
        self.board.mmio.write(self.common + register, data);
    }

    pub(crate) fn status(&self) -> u8 {
        self.get::<1>(20)[0]
    }

    pub(crate) fn features(&self) -> u64 {
        let half = |select: u32| {
            self.set(0, &select.to_le_bytes());
            u64::from(u32::from_le_bytes(self.get(4)))
        };
        half(0) | half(1) << 32
    }

    pub(crate) fn accept(&self, features: u64) {
        for select in 0..2u32 {
            self.set(8, &select.to_le_bytes());
            self.set(12, &((features >> (32 * select)) as u32).to_le_bytes());
        }
    }

    pub(crate) fn isr(&self) -> u8 {
        let mut data = [0];
        self.board.mmio.read(self.isr, &mut data);
        data[0]
    }

    pub(crate) fn device_config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.board.mmio.read(self.device + offset, &mut data);
        data
    }

    pub(crate) fn set_device_config(&self, offset: u64, data: &[u8]) {
        self.board.mmio.write(self.device + offset, data);
    }

    pub(crate) fn fill(&self, at: u64, data: &[u8]) {
        self.board.ram.write_slice(data, GuestAddress(at)).unwrap();
    }

    pub(crate) fn bytes(&self, at: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.board.ram.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }

    pub(crate) fn descriptor(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.fill(table + 16 * u64::from(index), &bytes);
    }

    pub(crate) fn table(&self, queue: usize) -> u64 {
        self.rings[queue].base
    }

    /// Makes a chain available; its head.
    pub(crate) fn add(&mut self, queue: usize, bufs: &[Buf]) -> u16 {
        let (table, size) = (self.rings[queue].base, self.rings[queue].size);
        let head = self.rings[queue].next_desc;
        for (i, buf) in bufs.iter().enumerate() {
            let (addr, len, flags) = match *buf {
                Buf::Out(addr, len) => (addr, len, 0),
                Buf::In(addr, len) => (addr, len, F_WRITE),
            };
            let index = self.rings[queue].next_desc;
            let next = (index + 1) % size;
            let more = if i + 1 < bufs.len() { F_NEXT } else { 0 };
            self.descriptor(table, index, addr, len, flags | more, next);
            self.rings[queue].next_desc = next;
        }
        self.make_available(queue, head);
        head
    }

    pub(crate) fn make_available(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let at = ring.base + 0x4000;
        let slot = at + 4 + 2 * u64::from(ring.avail % ring.size);
        ring.avail = ring.avail.wrapping_add(1);
        let avail = ring.avail;
        self.fill(slot, &head.to_le_bytes());
        self.set_avail(queue, avail);
    }

    pub(crate) fn set_avail(&self, queue: usize, index: u16) {
        let order = std::sync::atomic::Ordering::SeqCst;
        self.board.ram.store(index, GuestAddress(self.rings[queue].base + 0x4002), order).unwrap();
    }

    pub(crate) fn kick(&self, queue: usize) {
        self.board.mmio.write(self.notify + 4 * queue as u64, &(queue as u16).to_le_bytes());
    }

    pub(crate) fn used_index(&self, queue: usize) -> u16 {
        let order = std::sync::atomic::Ordering::SeqCst;
        self.board.ram.load(GuestAddress(self.rings[queue].base + 0x8002), order).unwrap()
    }

    /// Waits for the next used chain: head and bytes written.
    pub(crate) fn wait_used(&mut self, queue: usize) -> (u32, u32) {
        let seen = self.rings[queue].used;
        eventually("the device uses no chain", || self.used_index(queue) != seen);
        let ring = &mut self.rings[queue];
        let at = ring.base + 0x8004 + 8 * u64::from(ring.used % ring.size);
        ring.used = ring.used.wrapping_add(1);
        let bytes = self.bytes(at, 8);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        (word(0), word(4))
    }

    /// Adds a chain, kicks and waits for it; how many bytes were written.
    pub(crate) fn run(&mut self, queue: usize, bufs: &[Buf]) -> u32 {
        let head = self.add(queue, bufs);
        self.kick(queue);
        let (id, written) = self.wait_used(queue);
        assert_eq!(id, u32::from(head));
        written
    }

    /// Runs the same driver on a device that took the state over.
    pub(crate) fn move_to(self, board: Board) -> Driver {
        let (rings, mut moved) = (self.rings, Driver::find(board));
        moved.rings = rings;
        moved
    }
}

/// Features that every device offers.
pub(crate) const TRANSPORT: u64 = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC;
