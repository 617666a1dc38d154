//! Drivers that mean harm, against every device through its whole transport: whatever they do, nothing panics,
//! nothing hangs, nothing is written but what a driver gave to be written, and the next driver is served.
//!
//! A seed is a driver. `OSPITE_SEEDS=N` tries N of them for each device; a failure names its seed, and
//! `OSPITE_SEED=S` begins there.

use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use device::Snapshot;
use dice::{Dice, seeds};
use mem::GuestRam;

use crate::pci::status;
use crate::testing::*;
use crate::{Blk, Console, ConsoleInput, ConsolePorts, Net, PortStream, Rng, VirtioDevice, lock};

/// Two ranges without and one with a gap between.
const RAM_RANGES: [std::ops::Range<u64>; 3] = [0..0x40_0000, 0x40_0000..0x50_0000, 0x80_0000..0x90_0000];
/// What the driver gives to be written: nothing else may be. The second one is in two ranges, the others end
/// where memory does.
const OPEN: [std::ops::Range<u64>; 4] =
    [0x28_0000..0x30_0000, 0x3f_f000..0x40_1000, 0x8f_f000..0x90_0000, 0x4f_f000..0x50_0000];
/// Indirect tables, [`TABLE`] bytes each.
const TABLES: u64 = 0x24_0000;
const TABLE: u64 = 0x1000;
/// What drivers name that is no memory: gaps, a BAR, ECAM, a local APIC, the end of all addresses.
const NOWHERE: [u64; 8] =
    [0x4f_fff8, 0x50_0000, 0x7f_ffff, 0xc000_0000, 0xe000_0000, 0xfee0_0000, u64::MAX - 15, 1 << 63];
const STEPS: usize = 150;
const SEEDS: u64 = 10;
/// After which a seed hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// The host's ends of a device, and what goes on there meanwhile.
enum Host {
    Nothing,
    Disk(tempfile::NamedTempFile),
    Console { input: ConsoleInput, ports: ConsolePorts, streams: Vec<PortStream> },
    Cable(std::os::unix::net::UnixDatagram),
}

impl Host {
    fn act(&mut self, dice: &mut Dice) {
        match self {
            Host::Nothing => {}
            Host::Disk(file) => assert_eq!(file.as_file().metadata().unwrap().len(), 1 << 20),
            Host::Console { input, ports, streams } => {
                input.try_send(&vec![b'x'; dice.below(5000) as usize]);
                match dice.below(5) {
                    0 => streams.extend(ports.stream().unwrap()),
                    1 => streams.extend(ports.agent().unwrap()),
                    2 if !streams.is_empty() => {
                        drop(streams.swap_remove(dice.place(streams.len())));
                    }
                    _ => {
                        for stream in streams {
                            stream.send(&[7; 3000]);
                            stream.receive(&mut [0; 9000]);
                            if dice.one_in(8) {
                                stream.close_input();
                            }
                        }
                    }
                }
            }
            Host::Cable(far) => {
                while far.recv(&mut [0; 70000]).is_ok() {}
                let mut packet = vec![0; dice.of(&[0, 1, 11, 12, 26, 60, 1514, 9000, 65000])];
                packet.iter_mut().for_each(|byte| *byte = dice.of(&[0, 0, 0, 1, 4]));
                let _ = far.send(&packet); // or the cable is full
            }
        }
    }
}

fn sample(kind: &str) -> (Box<dyn FnOnce(GuestRam) -> Board>, Host) {
    fn board(device: impl VirtioDevice + 'static) -> Box<dyn FnOnce(GuestRam) -> Board> {
        Box::new(|ram| Board::with_ram(device, ram))
    }
    match kind {
        "rng" => (board(Rng::new()), Host::Nothing),
        "blk" => {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(1 << 20).unwrap();
            let disk = disk::open(file.path(), Some(disk::Format::Raw), false).unwrap();
            (board(Blk::new(disk, "hostile")), Host::Disk(file))
        }
        "console" => {
            let console = Console::new(Some(Box::new(std::io::sink()))).unwrap();
            let (input, ports) = (console.input(), console.ports());
            (board(console), Host::Console { input, ports, streams: Vec::new() })
        }
        _ => {
            let (cable, far) = crate::net::tests::cable();
            far.set_nonblocking(true).unwrap();
            (board(Net::new(net::Mac::of_card(1), Box::new(cable))), Host::Cable(far))
        }
    }
}

struct Attack {
    dice: Dice,
    driver: Driver,
    host: Host,
    queues: u64,
    /// Rings may be anywhere, and the driver writes while the device does: then any memory may be written.
    anywhere: bool,
}

impl Attack {
    fn new(kind: &str, seed: u64, anywhere: bool) -> Attack {
        let (board, host) = sample(kind);
        let mut driver = Driver::find(board(GuestRam::new(&RAM_RANGES).unwrap()));
        driver.board.enable_msix();
        driver.initialize(u64::MAX);
        let dice = Dice::new(seed);
        let queues = u64::from(u16::from_le_bytes(driver.get(18)));
        Attack { dice, driver, host, queues, anywhere }
    }

    /// How often a chain was found to have been given back.
    fn run(mut self) -> usize {
        let mut answers = 0;
        for _ in 0..STEPS {
            // One that was broken, or that is nowhere any more, is of no use.
            if self.driver.status() & status::NEEDS_RESET != 0 || self.dice.one_in(16) {
                let features = if self.dice.one_in(3) { u64::MAX } else { self.dice.roll() | 1 << 32 };
                self.begin(features);
            }
            self.pause(!self.anywhere);
            (0..self.dice.below(6)).for_each(|_| self.prepare());
            self.driver.board.ram.take_dirty();
            self.pause(false);
            (0..self.dice.below(6)).for_each(|_| self.act());
            std::thread::sleep(Duration::from_micros(200));
            if !self.anywhere {
                self.pause(true);
                self.check();
            }
            answers += (0..self.queues).filter(|queue| self.driver.used_index(*queue as usize) != 0).count();
        }
        self.begin(u64::MAX);
        self.serve();
        answers
    }

    fn pause(&self, pause: bool) {
        let mut function = lock(&self.driver.board.function);
        if pause { function.pause() } else { function.resume() }
    }

    /// The device stands still, and the driver has written nothing meanwhile.
    fn check(&self) {
        let used =
            |page: u64| (0..self.queues).any(|queue| page == self.driver.table(queue as usize) + 0x8000);
        let may = |page: &u64| used(*page) || OPEN.iter().any(|open| open.contains(page));
        let written = self.driver.board.ram.take_dirty();
        let strays: Vec<_> = written.into_iter().filter(|page| !may(page)).collect();
        assert!(strays.is_empty(), "the device wrote to {strays:#x?}");
    }

    /// The next driver, which means no harm, is served.
    fn serve(&mut self) {
        let at = OPEN[0].start;
        match &mut self.host {
            Host::Nothing => assert_eq!(self.driver.run(0, &[Buf::In(at, 8)]), 8),
            Host::Disk(_) => {
                self.driver.fill(at, &[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
                let request = [Buf::Out(at, 16), Buf::In(at + 64, 20), Buf::In(at + 128, 1)];
                assert_eq!(self.driver.run(0, &request), 21);
                assert_eq!(self.driver.bytes(at + 64, 7), b"hostile");
            }
            Host::Console { .. } => assert_eq!(self.driver.run(1, &[Buf::Out(at, 8)]), 0),
            Host::Cable(_) => assert_eq!(self.driver.run(1, &[Buf::Out(at, 100)]), 0),
        }
    }

    fn place(&mut self, length: u64, write: bool) -> u64 {
        let open = self.dice.of(&[0, 0, 0, 1, 2, 3]);
        let open = &OPEN[open];
        match self.dice.below(12) {
            0 => self.dice.of(&NOWHERE),
            1 if !write || self.anywhere => self.dice.below(0x90_0000),
            2..5 if length <= open.end - open.start => open.end - length, // to its last byte
            // Past the end of what is open, a buffer is refused only where memory ends.
            _ if length > open.end - open.start => 0x8f_ff00,
            _ => open.start + self.dice.below(open.end - open.start - length + 1),
        }
    }

    fn length(&mut self) -> u32 {
        let any = self.dice.roll() as u32;
        let lengths =
            [0, 1, 2, 8, 12, 15, 16, 17, 20, 512, 1024, 4095, 4096, 0x2000, 0x8_0000, u32::MAX, any];
        self.dice.of(&lengths)
    }

    /// A descriptor that may be bad: address, length, flags, next.
    fn descriptor(&mut self) -> (u64, u32, u16, u16) {
        let flags =
            self.dice.of(&[0, F_NEXT, F_NEXT, F_WRITE, F_NEXT | F_WRITE, F_NEXT | F_WRITE, F_INDIRECT, 7]);
        let next = self.dice.of(&[0, 1, 2, 3, 5, 9, 255, 256, 0xffff]);
        if flags & F_INDIRECT != 0 {
            let table = TABLES + self.dice.below(4) * TABLE;
            let length = self.dice.of(&[0, 16, 32, 160, 4096, 17, 1 << 20, u32::MAX - 15]);
            let indirect = if self.dice.one_in(8) { self.dice.of(&NOWHERE) } else { table };
            return (indirect, length, flags & !F_WRITE, next);
        }
        let length = self.length();
        let write = flags & F_WRITE != 0;
        (self.place(length.into(), write), length, flags, next)
    }

    /// A chain as a driver of some device would make it, or nearly.
    fn chain(&mut self) -> Vec<Buf> {
        let header = OPEN[0].start + 64 * self.dice.below(64);
        let words = [
            self.dice.of(&[0u32, 1, 4, 8, 11, 13, 99]),
            self.dice.roll() as u32,
            self.dice.of(&[0, 1, 2047, 2048, u32::MAX]),
            self.dice.of(&[0, 0, 0, 1, u32::MAX]),
        ];
        for (at, word) in (header..).step_by(4).zip(words) {
            self.driver.fill(at, &word.to_le_bytes());
        }
        // To the console it is a control message.
        if matches!(self.host, Host::Console { .. }) {
            let (port, event, value) = (self.dice.below(16), self.dice.below(8), self.dice.below(2));
            self.driver.fill(header, &(port | event << 32 | value << 48).to_le_bytes());
        }
        let mut chain = Vec::new();
        let readable = self.dice.below(3);
        chain.extend((readable > 0).then_some(Buf::Out(header, self.dice.of(&[16, 16, 16, 8, 3]))));
        for _ in 1..readable.max(1) {
            let length = self.length().min(1 << 19);
            chain.push(Buf::Out(self.place(length.into(), false), length));
        }
        for _ in 0..self.dice.below(4) {
            let length = self.length().min(1 << 19);
            chain.push(Buf::In(self.place(length.into(), true), length));
        }
        if self.dice.one_in(2) {
            chain.push(Buf::In(header + 32, 1));
        }
        chain
    }

    /// Something in memory.
    fn prepare(&mut self) {
        let queue = self.dice.below(self.queues) as usize;
        match self.dice.below(10) {
            0..5 => {
                let chain = self.chain();
                if !chain.is_empty() {
                    self.driver.add(queue, &chain);
                }
            }
            5..9 => {
                for index in 0..self.dice.below(10) as u16 {
                    let (address, length, flags, next) = self.descriptor();
                    let (direct, indirect) = (self.driver.table(queue), TABLES + self.dice.below(4) * TABLE);
                    let table = if self.dice.one_in(2) { direct } else { indirect };
                    self.driver.descriptor(table, index, address, length, flags, next);
                }
                let head = self.dice.of(&[0, 1, 2, 3, 255, 0xffff]);
                self.driver.make_available(queue, head);
            }
            _ => {
                let index = self.dice.of(&[0, 1, 64, 256, 0x7fff, 0xffff]);
                self.driver.set_avail(queue, index);
            }
        }
    }

    /// Something with registers, or in the host.
    fn act(&mut self) {
        match self.dice.below(16) {
            0..5 => self.driver.kick(self.dice.below(self.queues + 4) as usize),
            5 => self.write_registers(),
            6 => self.write_config(),
            7 => {
                let value = self.dice.roll().to_le_bytes();
                let (at, width) = (self.dice.below(70), self.dice.of(&[1, 2, 4, 8]));
                self.driver.set_device_config(at, &value[..width]);
            }
            8 => self.pause(true),
            9 => self.pause(false),
            10 => {
                let mut function = lock(&self.driver.board.function);
                function.pause();
                let state = function.save();
                function.restore(state).unwrap();
                function.resume();
            }
            11 if self.anywhere => self.prepare(),
            _ => self.host.act(&mut self.dice),
        }
    }

    fn write_registers(&mut self) {
        for _ in 0..self.dice.below(8) {
            let register = self.dice.below(64);
            if !self.anywhere && (24..64).contains(&register) {
                continue; // where the rings are
            }
            let some = self.dice.roll();
            let values =
                [0, 1, 2, 3, 4, 8, 15, 64, 128, 0xffff, some, 0x8f_fff0, 0x50_0000, some & 0x8f_fff0];
            let value = self.dice.of(&values);
            let width = self.dice.of(&[1, 1, 2, 2, 3, 4, 8]);
            self.driver.set(register, &value.to_le_bytes()[..width]);
            self.driver.get::<8>(register);
        }
        self.driver.isr();
    }

    /// Configuration space: command, BARs, MSI-X, the window to the registers.
    fn write_config(&mut self) {
        for _ in 0..self.dice.below(6) {
            let some = self.dice.roll();
            let values = [0, 0xffff_ffff, 0xc000_0000, 0xe000_0000, 0xfee0_0000, 7, some, 0x8000_0000];
            let value = self.dice.of(&values);
            let register = self.dice.of(&[4, 16, 20, 24, 64, 65, 66, 112, 4094]);
            let register = register + if register == 4094 { 0 } else { self.dice.below(80) as u16 };
            let width = self.dice.of(&[1, 2, 4]);
            // Through the window, the rings' registers could be reached.
            if self.anywhere || register < 0x40 {
                self.driver.board.set_config(register, &value.to_le_bytes()[..width]);
            }
            self.driver.board.config::<4>(register);
        }
    }

    /// The machine is reset, and a driver starts as it should.
    fn begin(&mut self, features: u64) {
        self.pause(false);
        self.driver.board.root.reset().unwrap();
        self.driver.find_again();
        self.driver.board.enable_msix();
        self.driver.initialize(features);
    }
}

/// Panics of devices' threads so far; their own name is all that tells them from the tests'.
fn panics() -> usize {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if std::thread::current().name().is_some_and(|name| name.starts_with("virtio-")) {
                COUNT.fetch_add(1, Ordering::SeqCst);
            }
            before(info);
        }));
    });
    COUNT.load(Ordering::SeqCst)
}

fn attack(kind: &'static str) {
    let mut answers = 0;
    for seed in seeds(SEEDS) {
        for anywhere in [false, true] {
            let before = panics();
            let (done, ended) = mpsc::channel();
            std::thread::spawn(move || {
                let _ = done.send(Attack::new(kind, seed, anywhere).run());
            });
            let what = format!("virtio-{kind}, OSPITE_SEED={seed}, rings anywhere: {anywhere}");
            answers += ended.recv_timeout(PATIENCE).expect(&what);
            assert_eq!(panics(), before, "{what}");
        }
    }
    assert!(
        answers as u64 > 10 * seeds(SEEDS).count() as u64,
        "it would prove nothing: {answers} steps had an answer"
    );
}

#[test]
fn no_driver_harms_the_entropy_source() {
    attack("rng");
}

#[test]
fn no_driver_harms_the_disk() {
    attack("blk");
}

#[test]
fn no_driver_harms_the_console() {
    attack("console");
}

#[test]
fn no_driver_harms_the_network_card() {
    attack("net");
}
