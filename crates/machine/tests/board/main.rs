//! The board, driven through a vCPU's accesses.

mod disk_driver;
mod fake;
mod hostile;

use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use engine::x86::CpuModel;
use engine::{CpuIo, CpuState, Vcpu};
use fake::FakeEngine;
use machine::{
    BootSpec, DiskSpec, Error, HostIo, Machine, MachineState, MemoryKind, NetSpec, PowerEvent, VmSpec,
};
use mem::{Bytes, GuestAddress};

/// Where the test kernel asks to be loaded.
const LOAD: u32 = 0x10_0000;
const CODE: &[u8] = b"\xfa\xf4"; // CLI, HLT

/// A multiboot kernel: the header and two instructions.
fn multiboot_kernel() -> Vec<u8> {
    let (magic, flags) = (0x1bad_b002u32, 1u32 << 16);
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    let entry = LOAD + 32;
    let header = [magic, flags, checksum, LOAD, LOAD, 0, 0, entry];
    header.iter().flat_map(|word| word.to_le_bytes()).chain(CODE.iter().copied()).collect()
}

#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Bench {
    machine: Machine,
    vcpus: Vec<Box<dyn Vcpu>>,
    engine: FakeEngine,
    screen: Screen,
    dir: tempfile::TempDir,
}

fn spec(dir: &tempfile::TempDir) -> VmSpec {
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, multiboot_kernel()).unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::File::create(&path).unwrap().set_len(3 << 20).unwrap();
    let format = Some(disk::Format::Raw);
    let disk =
        DiskSpec { path, format, base: None, read_only: false, serial: None, limits: Default::default() };
    VmSpec {
        name: "test".into(),
        cpus: 2,
        cpu_model: CpuModel::Host,
        memory: 64 << 20,
        memory_backing: MemoryKind::default(),
        disks: vec![disk],
        boot: BootSpec { kernel, initrd: None, cmdline: "console=ttyS0".into() },
        nets: vec![card(0)],
        hpet: false,
        test_device: false,
        agent: true,
    }
}

fn card(index: u32) -> NetSpec {
    NetSpec { mac: net::Mac::of_card(index), network: "test".into(), limits: Default::default() }
}

fn bench() -> Bench {
    bench_with(|_| {})
}

fn bench_with(change: impl FnOnce(&mut VmSpec)) -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let (engine, screen) = (FakeEngine::default(), Screen::default());
    let host = HostIo {
        serial_out: Box::new(screen.clone()),
        console_out: Some(Box::new(io::sink())),
        links: Vec::new(),
    };
    let mut spec = spec(&dir);
    change(&mut spec);
    let mut machine = Machine::build(&spec, &engine, host).unwrap();
    let vcpus = machine.take_vcpus();
    Bench { machine, vcpus, engine, screen, dir }
}

impl Bench {
    /// The guest does this on vCPU 0.
    fn guest(&mut self, script: impl FnOnce(&dyn CpuIo) + Send + 'static) {
        self.engine.wires.script(script);
        let io = self.machine.io();
        self.vcpus[0].run(&*io).unwrap();
    }
}

fn outb(io: &dyn CpuIo, port: u16, value: u8) {
    io.port_write(port, &[value]);
}

fn inb(io: &dyn CpuIo, port: u16) -> u8 {
    let mut byte = [0];
    io.port_read(port, &mut byte);
    byte[0]
}

fn read32(io: &dyn CpuIo, gpa: u64) -> u32 {
    let mut data = [0; 4];
    io.mmio_read(gpa, &mut data);
    u32::from_le_bytes(data)
}

fn route(io: &dyn CpuIo, pin: u8, entry: u64) {
    for (index, value) in [(0x11 + 2 * pin, (entry >> 32) as u32), (0x10 + 2 * pin, entry as u32)] {
        io.mmio_write(0xfec0_0000, &u32::from(index).to_le_bytes());
        io.mmio_write(0xfec0_0010, &value.to_le_bytes());
    }
}

#[test]
fn vcpu_0_starts_at_the_kernels_entry_and_the_others_wait() {
    let b = bench();
    let CpuState::X86(cpu) = b.vcpus[0].save().unwrap() else { unreachable!() };
    assert_eq!(cpu.rip, u64::from(LOAD) + 32);
    assert_eq!(cpu.gpr[0], 0x2bad_b002, "multiboot's magic number in EAX");
    assert_eq!((cpu.cr0 & 0x8000_0001, cpu.cr4), (1, 0), "protected mode without paging");
    assert_eq!(cpu.segments[1].limit, u32::MAX);
    assert!(cpu.msrs.contains(&(0xc000_0080, 0)) && cpu.msrs.is_sorted());
    let CpuState::X86(other) = b.vcpus[1].save().unwrap() else { unreachable!() };
    assert_eq!(other.rip, 0xfff0);
    let mut code = [0; 2];
    b.machine.ram().read_slice(&mut code, GuestAddress(cpu.rip)).unwrap();
    assert_eq!(code, CODE);
    let mut rsdp = [0; 8];
    b.machine.ram().read_slice(&mut rsdp, GuestAddress(0xe0000)).unwrap();
    assert_eq!(&rsdp, b"RSD PTR ");
}

#[test]
fn the_guest_prints_and_reads_on_com1() {
    let mut b = bench();
    b.machine.serial().send(b"!");
    b.guest(|io| {
        b"hello".iter().for_each(|&byte| outb(io, 0x3f8, byte));
        let start = Instant::now();
        while inb(io, 0x3fd) & 1 == 0 {
            assert!(start.elapsed() < Duration::from_secs(5));
        }
        let typed = inb(io, 0x3f8);
        outb(io, 0x3f8, typed);
    });
    b.machine.flush().unwrap();
    assert_eq!(*b.screen.0.lock().unwrap(), b"hello!");
}

#[test]
fn power_off_reset_and_debug_exit_reach_the_outside() {
    let mut b = bench();
    let events = b.machine.take_events();
    b.guest(|io| {
        io.port_write(0x604, &(5u16 << 10 | 1 << 13).to_le_bytes());
        outb(io, 0xcf9, 0x06);
        outb(io, 0x64, 0xfe);
        outb(io, 0x92, 0x01);
        io.port_write(0xf4, &7u32.to_le_bytes());
    });
    let heard: Vec<_> = events.try_iter().collect();
    let reset = PowerEvent::Reset;
    assert_eq!(heard, [PowerEvent::PowerOff, reset, reset, reset, PowerEvent::DebugExit(7)]);
}

#[test]
fn the_guest_enumerates_pci_by_ports_and_by_ecam() {
    let mut b = bench();
    b.guest(|io| {
        io.port_write(0xcf8, &0x8000_0000u32.to_le_bytes());
        let mut id = [0; 4];
        io.port_read(0xcfc, &mut id);
        assert_eq!(u32::from_le_bytes(id), read32(io, 0xe000_0000));
        assert_eq!(read32(io, 0xe000_0008) >> 16, 0x0600, "the host bridge");
        let functions: Vec<(u64, u32)> = (0..32)
            .map(|slot| (slot, read32(io, 0xe000_0000 + (slot << 15))))
            .filter(|(_, id)| *id != u32::MAX)
            .collect();
        let [rng, console, net, blk] = [0x1044_1af4, 0x1043_1af4, 0x1041_1af4, 0x1042_1af4];
        assert_eq!(functions[1..], [(1, rng), (2, console), (3, net), (8, blk)]);
    });
}

#[test]
fn the_guest_finds_its_disk_behind_the_bar_that_firmware_assigned() {
    let mut b = bench();
    b.guest(|io| {
        let config = 0xe000_0000 + (8 << 15);
        assert_eq!(read32(io, config + 4) & 2, 2, "memory decoding is on");
        let bar = u64::from(read32(io, config + 0x10) & !0xf);
        assert!((0xc000_0000..0xe000_0000).contains(&bar), "{bar:#x}");
        // The device configuration, fourth of the blocks, begins with the capacity in sectors.
        assert_eq!(read32(io, bar + 0x3000), (3 << 20) / 512);
    });
}

impl Bench {
    /// The guest writes to its disk and waits for the interrupt.
    fn write_sector(&mut self, nth: u16, sector: u64, text: &'static [u8]) {
        let ram = self.machine.ram().clone();
        let before = self.engine.wires.msis.lock().unwrap().len();
        self.guest(move |io| disk_driver::write(io, &ram, nth, sector, text));
        let start = Instant::now();
        while self.engine.wires.msis.lock().unwrap().len() == before {
            assert!(start.elapsed() < Duration::from_secs(10), "no interrupt came");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(disk_driver::status(self.machine.ram()), 0);
    }

    fn sector(&self, sector: usize, length: usize) -> Vec<u8> {
        let image = std::fs::read(self.dir.path().join("disk.raw")).unwrap();
        image[sector * 512..][..length].to_vec()
    }
}

#[test]
fn a_disk_write_goes_from_the_guests_memory_to_the_image_and_ends_in_a_message() {
    let mut b = bench();
    b.guest(disk_driver::start);
    b.write_sector(0, 5, b"first");
    b.machine.flush().unwrap();
    assert_eq!(b.sector(5, 5), b"first");
    let message = engine::Msi { address: 0xfee0_0000, data: disk_driver::VECTOR };
    assert_eq!(*b.engine.wires.msis.lock().unwrap(), [message]);
}

#[test]
fn a_saved_machine_writes_to_its_disk_where_it_left_off() {
    let mut b = bench();
    b.guest(disk_driver::start);
    b.write_sector(0, 5, b"first");
    let saved = b.machine.save(&b.vcpus).unwrap();
    let mut memory = vec![0; 0x5000];
    b.machine.ram().read_slice(&mut memory, GuestAddress(0x20_0000)).unwrap();
    let mut other = bench();
    other.machine.ram().write_slice(&memory, GuestAddress(0x20_0000)).unwrap();
    other.machine.restore(saved, &mut other.vcpus).unwrap();
    other.machine.resume();
    other.write_sector(1, 6, b"second");
    assert_eq!(other.sector(6, 6), b"second");
}

#[test]
fn a_reset_stops_the_disk_until_its_driver_starts_it_again() {
    let mut b = bench();
    b.guest(disk_driver::start);
    b.write_sector(0, 5, b"first");
    b.machine.reset(&mut b.vcpus).unwrap();
    b.machine.ram().write_slice(&[0; 0x5000], GuestAddress(0x20_0000)).unwrap();
    b.guest(disk_driver::start);
    b.write_sector(0, 7, b"again");
    assert_eq!(b.sector(7, 5), b"again");
}

#[test]
fn more_devices_than_slots_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = spec(&dir);
    spec.nets = (0..40).map(card).collect();
    let host = HostIo { serial_out: Box::new(io::sink()), console_out: None, links: Vec::new() };
    let error = Machine::build(&spec, &FakeEngine::default(), host).err().unwrap().to_string();
    assert!(error.contains("no PCI slot is left"), "{error}");
}

#[test]
fn an_interrupt_goes_by_message_from_the_ioapic_and_by_wire_from_the_pic() {
    let mut b = bench();
    b.guest(|io| {
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0xef)] {
            outb(io, port, value);
        }
        route(io, 4, 1 << 56 | 0x24);
        outb(io, 0x3fc, 0x08);
        outb(io, 0x3f9, 0x02); // "transmitter empty" interrupt
    });
    let sent = std::mem::take(&mut *b.engine.wires.msis.lock().unwrap());
    assert_eq!(sent, [engine::Msi { address: 0xfee0_1000, data: 0x24 }]);
    assert!(*b.engine.wires.extint.lock().unwrap());
    b.guest(|io| {
        assert_eq!(io.acknowledge_extint(), Some(0x34));
        assert_eq!(io.acknowledge_extint(), None);
    });
    assert!(!*b.engine.wires.extint.lock().unwrap());
}

#[test]
fn the_power_button_raises_a_level_interrupt_that_ends_with_its_eoi() {
    let mut b = bench();
    b.guest(|io| {
        route(io, 9, 1 << 15 | 0x29);
        io.port_write(0x602, &0x100u16.to_le_bytes());
    });
    b.machine.press_power_button();
    let msis = |b: &Bench| b.engine.wires.msis.lock().unwrap().len();
    assert_eq!(msis(&b), 1);
    b.guest(|io| io.end_of_interrupt(0x29));
    assert_eq!(msis(&b), 2, "nobody has cleared the cause");
    b.guest(|io| {
        io.port_write(0x600, &0x100u16.to_le_bytes());
        io.end_of_interrupt(0x29);
    });
    assert_eq!(msis(&b), 2);
}

#[test]
fn an_hpet_that_was_asked_for_takes_the_pits_line_and_travels_with_the_machine() {
    let (mut b, mut other) = (bench_with(|spec| spec.hpet = true), bench_with(|spec| spec.hpet = true));
    b.guest(|io| {
        assert_eq!(read32(io, 0xfed0_0000), 0x8086_a201);
        route(io, 2, 0x22);
        io.mmio_write(0xfed0_0100, &4u64.to_le_bytes()); // timer 0 interrupts
        io.mmio_write(0xfed0_0108, &3_000_000u64.to_le_bytes()); // in 30 ms
        io.mmio_write(0xfed0_0010, &3u64.to_le_bytes()); // on, with the legacy routes
    });
    let saved = b.machine.save(&b.vcpus).unwrap();
    other.machine.restore(saved.clone(), &mut other.vcpus).unwrap();
    for b in [&b, &other] {
        let start = Instant::now();
        while b.engine.wires.msis.lock().unwrap().is_empty() {
            assert!(start.elapsed() < Duration::from_secs(10), "no interrupt came");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(*b.engine.wires.msis.lock().unwrap(), [engine::Msi { address: 0xfee0_0000, data: 0x22 }]);
    }
    b.machine.reset(&mut b.vcpus).unwrap();
    b.guest(|io| assert_eq!(read32(io, 0xfed0_0010), 0));
    let mut without = bench();
    without.guest(|io| assert_eq!(read32(io, 0xfed0_0000), u32::MAX));
    let error = without.machine.restore(saved, &mut without.vcpus).unwrap_err();
    assert!(matches!(error, Error::OtherMachine { what: "HPETs", saved: 1, here: 0 }));
}

#[test]
fn a_reset_brings_back_the_board_and_the_kernel() {
    let mut b = bench();
    b.guest(|io| {
        route(io, 4, 0x24);
        outb(io, 0x3ff, 0xaa);
    });
    let before = b.vcpus[0].save().unwrap();
    b.machine.ram().write_slice(&[0xff; 64], GuestAddress(LOAD.into())).unwrap();
    b.machine.ram().write_slice(&[0xff; 64], GuestAddress(0xe0000)).unwrap();
    b.machine.reset(&mut b.vcpus).unwrap();
    assert_eq!(b.vcpus[0].save().unwrap(), before);
    let mut code = [0; 2];
    b.machine.ram().read_slice(&mut code, GuestAddress(u64::from(LOAD) + 32)).unwrap();
    assert_eq!(code, CODE);
    b.guest(|io| {
        assert_eq!(inb(io, 0x3ff), 0);
        io.mmio_write(0xfec0_0000, &0x18u32.to_le_bytes());
        assert_eq!(read32(io, 0xfec0_0010), 1 << 16);
    });
}

#[test]
fn a_saved_machine_goes_on_in_another_process() {
    let mut b = bench();
    b.guest(|io| {
        route(io, 9, 1 << 15 | 0x29);
        outb(io, 0x3ff, 0xaa);
        outb(io, 0x70, 0x40);
        outb(io, 0x71, 0x55);
        io.port_write(0x602, &0x100u16.to_le_bytes());
    });
    b.machine.press_power_button();
    let saved = b.machine.save(&b.vcpus).unwrap();
    let text = serde_json::to_string(&saved).unwrap();
    let read: MachineState = serde_json::from_str(&text).unwrap();
    let mut other = bench();
    other.machine.restore(read, &mut other.vcpus).unwrap();
    assert!(other.engine.wires.msis.lock().unwrap().is_empty(), "that message was delivered before the save");
    other.guest(|io| {
        assert_eq!(inb(io, 0x3ff), 0xaa);
        outb(io, 0x70, 0x40);
        assert_eq!(inb(io, 0x71), 0x55);
        io.end_of_interrupt(0x29);
    });
    assert_eq!(other.engine.wires.msis.lock().unwrap().len(), 1, "still in service until then");
    other.vcpus.pop();
    let error = other.machine.restore(saved, &mut other.vcpus).unwrap_err();
    assert!(matches!(error, Error::OtherMachine { what: "vCPUs", saved: 2, here: 1 }));
}

#[test]
fn everything_that_was_chosen_is_told() {
    let b = bench();
    let description = b.machine.describe();
    let text = description.to_string();
    for part in [
        "engine fake",
        "vCPUs     2 (model host)",
        "64 MiB",
        "multiboot 1",
        "console=ttyS0",
        "0x3f8-0x3ff, IRQ 4",
        "ospite-0",
        "disk.raw",
    ] {
        assert!(text.contains(part), "{part} is missing in:\n{text}");
    }
    let json = serde_json::to_value(&description).unwrap();
    assert_eq!(json["pci"][0]["slot"], 0);
}

#[test]
fn wishes_that_cannot_be_met_are_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let build = |change: &dyn Fn(&mut VmSpec)| {
        let mut spec = spec(&dir);
        change(&mut spec);
        let host = HostIo { serial_out: Box::new(io::sink()), console_out: None, links: Vec::new() };
        Machine::build(&spec, &FakeEngine::default(), host).err().unwrap().to_string()
    };
    assert!(build(&|s| s.cpus = 0).contains("--cpus takes 1 to"));
    assert!(build(&|s| s.memory = 1).contains("--memory takes"));
    assert!(build(&|s| s.boot.kernel = "/nonexistent".into()).contains("/nonexistent"));
    assert!(build(&|s| s.disks[0].serial = Some("a b".into())).contains("serial number"));
    assert!(build(&|s| s.disks[0].path = "/nonexistent".into()).contains("/nonexistent"));
    assert!(build(&|s| s.boot.initrd = Some("/".into())).contains("directory"));
}
