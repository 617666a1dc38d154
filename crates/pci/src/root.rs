//! The root bus: which function sits in which slot.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use device::{Bus, BusDevice, DoorbellSink, Overlap};
use serde::Serialize;

use crate::bar::Allocator;
use crate::decode::Decode;
use crate::{Bar, BarKind, ConfigAddress, ConfigData, Ecam, SharedFunction, Space, Windows, lock, reg};

const SLOTS: u8 = 32;
/// The registers whose change may move a BAR: command, and the six BARs.
const DECODE_REGISTERS: [std::ops::Range<u16>; 2] =
    [reg::COMMAND..reg::COMMAND + 2, reg::BAR0..reg::BAR0 + 24];

/// Why the root bus could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Two functions for one slot, or a slot past the last.
    #[error("PCI slot {0} is taken or does not exist (there are slots 0 to 31)")]
    Slot(u8),
    /// All slots are taken.
    #[error("no PCI slot is left: a VM has room for 31 devices; ask for fewer disks or network cards")]
    Full,
    /// A BAR fits nowhere.
    #[error("no room for BAR {bar} of PCI slot {slot} ({size:#x} bytes); ask for fewer devices")]
    NoRoom {
        /// The slot.
        slot: u8,
        /// The BAR.
        bar: usize,
        /// Its size in bytes.
        size: u64,
    },
    /// Something is where the configuration space belongs.
    #[error("the PCI configuration space has no place on the bus")]
    Place(#[from] Overlap),
}

/// A BAR and where it is, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BarInfo {
    /// Its number.
    pub bar: usize,
    /// Ports or memory.
    pub space: Space,
    /// Where the guest (or the allocator) has put it; 0 if nowhere.
    pub address: u64,
    /// Size in bytes.
    pub size: u64,
}

/// A function and its BARs, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FunctionInfo {
    /// The slot.
    pub slot: u8,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Base class, sub-class, programming interface.
    pub class: [u8; 3],
    /// Its BARs.
    pub bars: Vec<BarInfo>,
}

/// Bus 0 of segment 0, with one function in each slot.
pub struct PciRoot {
    functions: RwLock<BTreeMap<u8, SharedFunction>>,
    decode: Mutex<Decode>,
    windows: Windows,
    address: ConfigAddress,
}

impl PciRoot {
    /// An empty bus whose functions' BARs appear on `mmio` and `ports`.
    pub fn new(mmio: Arc<Bus>, ports: Arc<Bus>, windows: Windows) -> Arc<PciRoot> {
        Arc::new(PciRoot {
            functions: RwLock::default(),
            decode: Mutex::new(Decode::new(mmio, ports)),
            windows,
            address: ConfigAddress::default(),
        })
    }

    /// Who wires the doorbells of the functions; before [`PciRoot::assign`].
    pub fn set_doorbells(&self, sink: Arc<dyn DoorbellSink>) {
        lock(&self.decode).set_doorbells(sink);
    }

    /// Puts ECAM for 256 buses at `ecam` of `mmio`, and 0xcf8 and 0xcfc on `ports`. The port 0xcf9
    /// stays free for a reset register.
    pub fn attach(self: &Arc<Self>, mmio: &Bus, ecam: u64, ports: &Bus) -> Result<(), Error> {
        mmio.insert(ecam..ecam + (256 << 20), Arc::new(Ecam(Arc::downgrade(self))))?;
        let address: Arc<dyn BusDevice> = Arc::new(self.address.clone());
        ports.insert(0xcf8..0xcf9, address)?;
        let data = ConfigData { root: Arc::downgrade(self), address: self.address.clone() };
        ports.insert(0xcfc..0xd00, Arc::new(data))?;
        Ok(())
    }

    /// Puts a function into a slot.
    pub fn add(&self, slot: u8, function: SharedFunction) -> Result<(), Error> {
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        if slot >= SLOTS || functions.contains_key(&slot) {
            return Err(Error::Slot(slot));
        }
        functions.insert(slot, function);
        Ok(())
    }

    /// The lowest empty slot; the one to wire an interrupt pin for before [`PciRoot::add`].
    pub fn free_slot(&self) -> Result<u8, Error> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        (0..SLOTS).find(|slot| !functions.contains_key(slot)).ok_or(Error::Full)
    }

    /// The port 0xcf8 register, for saved state.
    pub fn config_address(&self) -> &ConfigAddress {
        &self.address
    }

    fn function(&self, bus: u8, devfn: u8) -> Option<(u8, SharedFunction)> {
        if bus != 0 || devfn & 7 != 0 {
            return None;
        }
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.get(&(devfn >> 3)).map(|function| (devfn >> 3, function.clone()))
    }

    fn all(&self) -> Vec<(u8, SharedFunction)> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.iter().map(|(slot, function)| (*slot, function.clone())).collect()
    }

    /// A guest's read of configuration space; all ones where no function is.
    pub fn config_read(&self, bus: u8, devfn: u8, register: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((_, function)) = self.function(bus, devfn) {
            lock(&function).config_read(register, data);
        }
    }

    /// A guest's write to configuration space. BARs have moved when it returns.
    pub fn config_write(&self, bus: u8, devfn: u8, register: u16, data: &[u8]) {
        let Some((slot, function)) = self.function(bus, devfn) else { return };
        lock(&function).config_write(register, data);
        let end = register.saturating_add(data.len().try_into().unwrap_or(u16::MAX));
        if DECODE_REGISTERS.iter().any(|range| register < range.end && range.start < end) {
            lock(&self.decode).update(slot, &function);
        }
    }

    /// Gives every BAR an address and turns decoding on, as firmware does before an operating
    /// system starts. Always the same addresses for the same functions.
    pub fn assign(&self) -> Result<(), Error> {
        let functions = self.all();
        let mut requests: Vec<(u8, usize, Bar, &SharedFunction)> = Vec::new();
        for (slot, function) in &functions {
            requests.extend(lock(function).config().bars().map(|(index, bar)| (*slot, index, bar, function)));
        }
        // Largest first leaves no holes; those that must lie low before those that need not.
        requests.sort_by_key(|(.., bar, _)| (bar.kind == BarKind::Mem64, Reverse(bar.size)));
        let mut allocator = Allocator::new(self.windows.clone());
        for (slot, index, bar, function) in requests {
            let no_room = Error::NoRoom { slot, bar: index, size: bar.size };
            let address = allocator.take(bar).ok_or(no_room)?;
            lock(function).config_mut().set_bar_address(index, address);
        }
        for (_, function) in &functions {
            lock(function).config_mut().enable_decode();
        }
        self.refresh();
        Ok(())
    }

    /// Maps all BARs where the functions' registers say: after [`PciRoot::assign`] or a restore.
    pub fn refresh(&self) {
        let mut decode = lock(&self.decode);
        for (slot, function) in self.all() {
            decode.update(slot, &function);
        }
    }

    /// Resets every function and assigns the BARs anew.
    pub fn reset(&self) -> Result<(), Error> {
        self.address.set(0);
        for (_, function) in self.all() {
            lock(&function).reset();
        }
        self.refresh();
        self.assign()
    }

    /// What is in the slots.
    pub fn describe(&self) -> Vec<FunctionInfo> {
        self.all().iter().map(|(slot, function)| describe(*slot, function)).collect()
    }
}

fn describe(slot: u8, function: &SharedFunction) -> FunctionInfo {
    let function = lock(function);
    let config = function.config();
    let (vendor, device, class) = config.identity();
    let bars = config.bars().map(|(bar, kind)| BarInfo {
        bar,
        space: kind.space(),
        address: config.bar_address(bar),
        size: kind.size,
    });
    FunctionInfo { slot, vendor, device, class, bars: bars.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Class, ConfigSpace, HostBridge, Identity, PciFunction};
    use device::Doorbell;
    use vmm_sys_util::eventfd::EventFd;

    const ECAM: u64 = 0xe000_0000;

    /// Every byte of its BARs reads as the BAR's number.
    struct Echo {
        config: ConfigSpace,
        written: Vec<(usize, u64)>,
    }

    impl Echo {
        fn shared(size: u64) -> Arc<Mutex<Echo>> {
            let class = Class { base: 0xff, sub: 0, interface: 0 };
            let identity = Identity {
                vendor: 0x1234,
                device: 0x5678,
                revision: 0,
                class,
                subsystem_vendor: 0,
                subsystem: 0,
            };
            let config = ConfigSpace::new(identity)
                .with_bar(0, Bar { kind: BarKind::Mem64, size })
                .with_bar(2, Bar { kind: BarKind::Io, size: 16 });
            Arc::new(Mutex::new(Echo { config, written: Vec::new() }))
        }
    }

    impl PciFunction for Echo {
        fn config(&self) -> &ConfigSpace {
            &self.config
        }
        fn config_mut(&mut self) -> &mut ConfigSpace {
            &mut self.config
        }
        fn bar_read(&mut self, bar: usize, _offset: u64, data: &mut [u8]) {
            data.fill(bar as u8);
        }
        fn bar_write(&mut self, bar: usize, offset: u64, _data: &[u8]) {
            self.written.push((bar, offset));
        }
        fn doorbell(&self, bar: usize, offset: u64) -> Option<EventFd> {
            (bar == 0 && offset == 0x10).then(|| EventFd::new(0).unwrap())
        }
        fn reset(&mut self) {
            self.config.reset();
        }
    }

    /// The addresses that are wired.
    #[derive(Clone, Default)]
    struct Wires(Arc<Mutex<Vec<u64>>>);

    struct Wire(Wires, u64);

    impl DoorbellSink for Wires {
        fn wire(&self, address: u64, _event: EventFd) -> Option<Doorbell> {
            lock(&self.0).push(address);
            Some(Box::new(Wire(self.clone(), address)))
        }
    }

    impl Drop for Wire {
        fn drop(&mut self) {
            lock(&self.0.0).retain(|address| *address != self.1);
        }
    }

    #[test]
    fn a_doorbell_is_wired_when_it_is_used_and_moves_with_its_bar() {
        let (board, wires) = (Board::new(), Wires::default());
        board.root.set_doorbells(Arc::new(wires.clone()));
        board.root.add(1, Echo::shared(0x1000)).unwrap();
        board.root.assign().unwrap();
        let wired = || lock(&wires.0).clone();
        let bar = u64::from(board.ecam(1, 0x10) & !0xf);
        board.mmio.write(bar + 0x14, &[0]);
        assert!(wired().is_empty(), "that is no doorbell");
        board.mmio.write(bar + 0x10, &[0]);
        board.mmio.write(bar + 0x10, &[0]);
        board.ecam_write(1, 0x3c, 7);
        board.ecam_write(1, 4, 3);
        assert_eq!(wired(), [bar + 0x10]);
        board.ecam_write(1, 0x10, 0xd000_0000);
        assert!(wired().is_empty());
        board.mmio.write(0xd000_0010, &[0]);
        assert_eq!(wired(), [0xd000_0010]);
    }

    struct Board {
        mmio: Arc<Bus>,
        ports: Arc<Bus>,
        root: Arc<PciRoot>,
    }

    impl Board {
        fn new() -> Board {
            let (mmio, ports) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
            let windows = Windows {
                io: 0xc000..0x1_0000,
                mem32: 0xc000_0000..0xe000_0000,
                mem64: 0x40_0000_0000..0x80_0000_0000,
            };
            let root = PciRoot::new(mmio.clone(), ports.clone(), windows);
            root.attach(&mmio, ECAM, &ports).unwrap();
            root.add(0, Arc::new(Mutex::new(HostBridge::new()))).unwrap();
            Board { mmio, ports, root }
        }

        fn ecam(&self, slot: u64, register: u64) -> u32 {
            let mut data = [0; 4];
            assert!(self.mmio.read(ECAM + (slot << 15) + register, &mut data));
            u32::from_le_bytes(data)
        }

        fn ecam_write(&self, slot: u64, register: u64, value: u32) {
            assert!(self.mmio.write(ECAM + (slot << 15) + register, &value.to_le_bytes()));
        }

        fn port_config(&self, address: u32) -> u32 {
            let mut data = [0; 4];
            self.ports.write(0xcf8, &address.to_le_bytes());
            self.ports.read(0xcfc, &mut data);
            u32::from_le_bytes(data)
        }
    }

    #[test]
    fn both_ways_lead_to_the_same_function_and_nowhere_reads_all_ones() {
        let board = Board::new();
        board.root.add(5, Echo::shared(0x1000)).unwrap();
        assert_eq!(board.ecam(0, 0), 0x0008_1b36);
        assert_eq!(board.ecam(5, 0), 0x5678_1234);
        assert_eq!(board.port_config(0x8000_0000 | 5 << 11), 0x5678_1234);
        assert_eq!(board.port_config(5 << 11), u32::MAX, "not enabled");
        assert_eq!(board.port_config(0x8000_0000 | 5 << 11 | 1 << 8), u32::MAX, "function 1");
        assert_eq!(board.port_config(0x8001_0000 | 5 << 11), u32::MAX, "bus 1");
        assert_eq!(board.ecam(6, 0), u32::MAX);
        let mut byte = [0];
        board.ports.write(0xcf8, &(0x8000_0000u32 | 5 << 11).to_le_bytes());
        board.ports.read(0xcff, &mut byte);
        assert_eq!(byte, [0x56]);
        assert!(!board.ports.read(0xcf9, &mut byte), "the reset register's port is free");
        assert!(matches!(board.root.add(5, Echo::shared(16)), Err(Error::Slot(5))));
        assert_eq!(board.root.free_slot().unwrap(), 1);
    }

    #[test]
    fn bars_follow_the_guest_and_come_back_on_reset() {
        let board = Board::new();
        let echo = Echo::shared(0x1000);
        board.root.add(1, echo.clone()).unwrap();
        board.root.assign().unwrap();
        let bar = &board.root.describe()[1].bars[0];
        assert_eq!((bar.address, bar.size), (0xc000_0000, 0x1000));
        let mut byte = [9];
        assert!(board.mmio.read(0xc000_0fff, &mut byte) && byte == [0]);
        assert!(board.ports.read(0xc00f, &mut byte) && byte == [2]);

        board.ecam_write(1, 0x10, 0x1000);
        board.ecam_write(1, 0x14, 0x41);
        assert!(!board.mmio.read(0xc000_0fff, &mut byte));
        assert!(board.mmio.write(0x41_0000_1008, &[1]));
        assert_eq!(lock(&echo).written, [(0, 8)]);
        board.ecam_write(1, 4, u32::from(reg::COMMAND_IO));
        assert!(!board.mmio.write(0x41_0000_1008, &[1]) && board.ports.write(0xc000, &[1]));

        board.root.reset().unwrap();
        assert!(board.mmio.read(0xc000_0000, &mut byte) && !board.mmio.read(0x41_0000_1008, &mut byte));
    }

    #[test]
    fn sizing_with_decoding_on_and_bars_on_top_of_each_other_do_no_harm() {
        let board = Board::new();
        board.root.add(1, Echo::shared(0x1000)).unwrap();
        board.root.add(2, Echo::shared(0x1000)).unwrap();
        board.root.assign().unwrap();
        let home = board.ecam(2, 0x10);
        board.ecam_write(2, 0x10, u32::MAX);
        board.ecam_write(2, 0x14, u32::MAX);
        assert_eq!(board.ecam(2, 0x10), 0xffff_f004);
        board.ecam_write(2, 0x14, 0);
        board.ecam_write(2, 0x10, board.ecam(1, 0x10)); // on top of slot 1
        assert!(!lock(&board.root.decode).is_mapped(2, 0));
        board.ecam_write(1, 0x10, home); // which moves away: slot 2 appears where it was
        assert!(lock(&board.root.decode).is_mapped(2, 0) && lock(&board.root.decode).is_mapped(1, 0));
        let mut byte = [9];
        board.ecam_write(1, 0x10, ECAM as u32); // on top of the configuration space itself
        assert_eq!(board.ecam(0, 0), 0x0008_1b36);
        board.ecam_write(1, 0x10, home);
        assert!(board.mmio.read(u64::from(home & !0xf), &mut byte) && byte == [0]);
    }

    #[test]
    fn a_root_and_its_functions_are_dropped_with_the_machine() {
        let board = Board::new();
        let echo = Echo::shared(0x1000);
        board.root.add(1, echo.clone()).unwrap();
        board.root.assign().unwrap();
        drop(board);
        assert_eq!(Arc::strong_count(&echo), 1);
    }

    #[test]
    fn functions_that_do_not_fit_are_named() {
        let board = Board::new();
        for slot in 1..4 {
            board.root.add(slot, Echo::shared(1 << 37)).unwrap();
        }
        assert!(matches!(board.root.assign(), Err(Error::NoRoom { slot: 3, bar: 0, .. })));
    }

    #[test]
    fn vcpus_may_move_bars_and_use_them_at_once() {
        let board = Board::new();
        board.root.add(1, Echo::shared(0x1000)).unwrap();
        board.root.add(2, Echo::shared(0x1000)).unwrap();
        board.root.assign().unwrap();
        std::thread::scope(|scope| {
            for slot in 1..3u32 {
                let board = &board;
                scope.spawn(move || {
                    for i in 0..2000u32 {
                        board.ecam_write(slot.into(), 0x10, 0xc000_0000 + (i * 7 + slot) % 16 * 0x1000);
                        let mut data = [0; 4];
                        board.mmio.read(0xc000_0000 + u64::from(i % 16) * 0x1000, &mut data);
                    }
                });
            }
        });
        board.ecam_write(1, 0x10, 0xd000_0000);
        board.ecam_write(2, 0x10, 0xd100_0000);
        let mut byte = [9];
        assert!(board.mmio.read(0xd000_0000, &mut byte) && board.mmio.read(0xd100_0000, &mut byte));
    }
}
