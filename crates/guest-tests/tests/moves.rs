//! A Linux that computes is stopped in mid-run, saved, and loaded into another machine on another engine, again
//! and again. It comes to the same sum as the host does.
//!
//! The engines take turns: software and KVM where that is real (`make test-kvm`), else software and software.
//! `OSPITE_TEST_GUESTS` names a folder with `vmlinuz` and `busybox.cpio`, for places where `tools/` is not.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Instant;

use engine::x86::{CpuModel, same_frequency};
use engine::{CpuState, Engine, Exit, Vcpu};
use engine_kvm::KvmEngine;
use engine_soft::SoftEngine;
use guest_tests::artefacts::{Kernel, cloud_kernel};
use guest_tests::patience;
use machine::{BootSpec, DiskSpec, HostIo, Machine, MachineState, MemoryKind, PowerEvent, VmSpec};
use mem::{Bytes, GuestAddress, GuestRam};

/// How long the guest may take from one move to the next.
const PATIENCE: u64 = 120;
/// What guest and host compute: each round hashes the sum so far with a piece of the disk and writes the new
/// sum to the disk, and to a file of which the last round has all.
const ROUNDS: &str = "s=0; for i in 0 1 2 3 4 5 6 7 8 9; do \
s=$( (echo $s; dd if=DISK bs=64k skip=$i count=6 2>/dev/null) | sha256sum | cut -c 1-64); \
echo $s | dd of=DISK bs=64k seek=$((i + 7)) conv=notrunc 2>/dev/null; echo $s >>SUMS; echo round $i; done; \
echo sum $(cat SUMS | sha256sum | cut -c 1-64)";

fn kernel() -> Kernel {
    match std::env::var_os("OSPITE_TEST_GUESTS").map(PathBuf::from) {
        Some(dir) => Kernel { vmlinuz: dir.join("vmlinuz"), initrd: dir.join("busybox.cpio") },
        None => cloud_kernel(),
    }
}

/// What the guest prints.
#[derive(Clone, Default)]
struct Screen(Arc<(Mutex<String>, Condvar)>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.0.lock().unwrap().push_str(&String::from_utf8_lossy(bytes));
        self.0.1.notify_all();
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Screen {
    fn text(&self) -> String {
        self.0.0.lock().unwrap().clone()
    }

    fn wait_for(&self, words: &str) {
        let text = self.0.0.lock().unwrap();
        let (text, timeout) =
            self.0.1.wait_timeout_while(text, patience(PATIENCE), |text| !text.contains(words)).unwrap();
        assert!(!timeout.timed_out(), "no {words:?} in:\n{text}");
    }
}

/// A machine whose vCPUs stand still.
struct Parked {
    machine: Machine,
    vcpus: Vec<Box<dyn Vcpu>>,
    events: Receiver<PowerEvent>,
}

impl Parked {
    fn build(spec: &VmSpec, engine: &dyn Engine, screen: &Screen) -> Parked {
        let io = HostIo { serial_out: Box::new(screen.clone()), console_out: None, links: Vec::new() };
        let mut machine = Machine::build(spec, engine, io).unwrap();
        let (vcpus, events) = (machine.take_vcpus(), machine.take_events());
        Parked { machine, vcpus, events }
    }

    /// Runs until `done` returns.
    fn run(&mut self, done: impl FnOnce(&Receiver<PowerEvent>)) {
        let io = self.machine.io();
        self.machine.resume();
        let stops: Vec<_> = self.vcpus.iter().map(|vcpu| vcpu.stop_handle()).collect();
        thread::scope(|scope| {
            for vcpu in &mut self.vcpus {
                scope.spawn(|| assert_eq!(vcpu.run(&*io).unwrap(), Exit::Stopped));
            }
            done(&self.events);
            stops.iter().for_each(|stop| stop.stop());
        });
    }

    /// Everything there is of it. It is gone then, as its process would be.
    fn save(self) -> (MachineState, Vec<u8>) {
        let state = self.machine.save(&self.vcpus).unwrap();
        self.machine.flush().unwrap();
        (state, memory(self.machine.ram()))
    }

    fn load(&mut self, (state, memory): (MachineState, Vec<u8>)) {
        self.machine.ram().write_slice(&memory, GuestAddress(0)).unwrap();
        self.machine.restore(state, &mut self.vcpus).unwrap();
    }
}

fn memory(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; ram.size() as usize];
    ram.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

fn spec(disk: &Path, cpus: u32) -> VmSpec {
    let Kernel { vmlinuz, initrd } = kernel();
    let run = ROUNDS.replace("DISK", "/dev/vda").replace("SUMS", "/tmp/sums");
    VmSpec {
        name: "traveller".into(),
        cpus,
        cpu_model: CpuModel::V2,
        memory: 128 << 20,
        memory_backing: MemoryKind::default(),
        disks: vec![DiskSpec {
            path: disk.to_owned(),
            format: Some(disk::Format::Raw),
            base: None,
            read_only: false,
            serial: None,
            limits: Default::default(),
        }],
        boot: BootSpec {
            kernel: vmlinuz,
            initrd: Some(initrd),
            cmdline: format!("console=ttyS0 quiet panic=-1 ospite.modules=virtio ospite.run=\"{run}\""),
        },
        nets: Vec::new(),
        hpet: true,
        test_device: false,
        agent: false,
    }
}

/// What the host's own shell comes to.
fn expected(dir: &Path, image: &[u8]) -> String {
    let (disk, sums) = (dir.join("expected.img"), dir.join("sums"));
    fs::write(&disk, image).unwrap();
    let script = ROUNDS.replace("DISK", disk.to_str().unwrap()).replace("SUMS", sums.to_str().unwrap());
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().last().unwrap().to_owned()
}

/// The engines in turn.
fn engines() -> [Box<dyn Engine>; 2] {
    let soft = || Box::new(SoftEngine::new().unwrap());
    match KvmEngine::new() {
        Ok(kvm) => [soft(), Box::new(kvm)],
        Err(error) => {
            eprintln!("software to software: {error}");
            [soft(), soft()]
        }
    }
}

/// Of the vCPUs' time-stamp counters, in kHz.
fn frequencies(cpus: &[CpuState]) -> impl Iterator<Item = u32> {
    cpus.iter().map(|cpu| match cpu {
        CpuState::X86(state) => state.tsc_khz,
        other => panic!("{other:?}"),
    })
}

/// Moves after each of `at`, starting on engine number `first`.
fn moves(cpus: u32, first: usize, at: &[usize]) {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.img");
    let image: Vec<u8> = (0..2u32 << 20).map(|n| (n.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
    fs::write(&disk, &image).unwrap();
    let (engines, screen, spec) = (engines(), Screen::default(), spec(&disk, cpus));
    let start = Instant::now();
    let mut on = Parked::build(&spec, &*engines[first], &screen);
    for (turn, round) in (first + 1..).zip(at) {
        on.run(|_| screen.wait_for(&format!("round {round}\r\n")));
        let saved = on.save();
        let there = &*engines[turn % 2];
        on = Parked::build(&spec, there, &screen);
        let before: Vec<_> = frequencies(&saved.0.cpus).collect();
        on.load(saved);
        let cpus: Vec<_> = on.vcpus.iter().map(|vcpu| vcpu.save().unwrap()).collect();
        let same = frequencies(&cpus)
            .zip(before.iter().copied())
            .all(|(now, then)| now != 0 && same_frequency(now, then));
        assert!(same, "the guest's counters had {before:?} kHz");
        println!("after {:?}: goes on with the {} engine", start.elapsed(), there.name());
    }
    on.run(|events| {
        let end = events.recv_timeout(patience(PATIENCE));
        assert_eq!(end, Ok(PowerEvent::PowerOff), "{}", screen.text());
    });
    on.machine.flush().unwrap();
    let sum = expected(dir.path(), &image);
    assert!(sum.starts_with("sum ") && screen.text().contains(&sum), "no {sum} in:\n{}", screen.text());
    assert!(fs::read(&disk).unwrap() == fs::read(dir.path().join("expected.img")).unwrap(), "disks differ");
}

#[test]
#[ignore = "boots a guest: make guest-test, make test-kvm"]
fn a_linux_of_one_vcpu_that_boots_in_software_moves_to_and_fro() {
    moves(1, 0, &[1, 3, 5, 7]);
}

#[test]
#[ignore = "boots a guest: make guest-test, make test-kvm"]
fn a_linux_of_two_vcpus_that_boots_on_hardware_moves_to_and_fro() {
    moves(2, 1, &[1, 2]); // a round in software takes long where the hardware is emulated
}
