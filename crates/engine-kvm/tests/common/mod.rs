//! A machine of 2 MiB with recorded ports, MMIO and a PIC of one line, for guests of some instructions.
#![allow(dead_code)] // each test file uses its part

use std::collections::VecDeque;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use engine::x86::bits::{cr0, cr4, efer, msr};
use engine::x86::{Activity, CpuModel, CpuState as X86State, DescriptorTable, Segment};
use engine::{CpuIo, CpuState, Engine, Exit, StopHandle, Vcpu, Vm, VmConfig};
use engine_kvm::KvmEngine;
use mem::{Bytes, GuestAddress, GuestRam};

/// Where the guest's code is, in all modes.
pub const CODE: u64 = 0x1000;
/// Top of its stack.
pub const STACK: u64 = 0x9000;
/// A page for results.
pub const DATA: u64 = 0xa000;
/// Page tables: identity, 2 MiB pages, 4 GiB.
const PML4: u64 = 0x1_0000;
/// Global descriptors: null, 64-bit code (8), data (16), TSS (24, 32).
pub const GDT: u64 = 0x1_6000;
/// Interrupt descriptors, 64-bit.
pub const IDT: u64 = 0x1_7000;
/// Task state segment.
const TSS: u64 = 0x1_8000;
/// Guest memory, in bytes.
pub const SIZE: u64 = 0x20_0000;
/// How long a guest may take, where `OSPITE_PATIENCE` does not say how many times as long.
const PATIENCE: Duration = Duration::from_secs(20);
/// The guest writes here when it is done.
pub const END_PORT: u16 = 0xf4;

/// Assembles guest code into the constant function `$name`, which returns its bytes.
#[macro_export]
macro_rules! guest {
    ($name:ident, $($line:literal),+ $(,)?) => {
        core::arch::global_asm!(
            ".pushsection .rodata, \"a\"",
            ".balign 0x1000", // as it will be in the guest
            concat!(".globl guest_", stringify!($name), "_start"),
            concat!(".globl guest_", stringify!($name), "_end"),
            concat!("guest_", stringify!($name), "_start:"),
            $($line,)+
            ".code64",
            concat!("guest_", stringify!($name), "_end:"),
            ".popsection",
        );
        pub(crate) fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = concat!("guest_", stringify!($name), "_start")]
                static START: u8;
                #[link_name = concat!("guest_", stringify!($name), "_end")]
                static END: u8;
            }
            // SAFETY: the two labels enclose the bytes assembled above.
            unsafe {
                let (start, end) = (&raw const START, &raw const END);
                std::slice::from_raw_parts(start, end.offset_from(start) as usize)
            }
        }
    };
}

/// What the guest did to the outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    In(u16, usize),
    Out(u16, Vec<u8>),
    Load(u64, usize),
    Store(u64, Vec<u8>),
    Acknowledge,
    EndOfInterrupt(u8),
}

/// The outside.
#[derive(Default)]
pub struct Outside {
    pub log: Mutex<Vec<Access>>,
    /// What port and MMIO reads get, byte by byte; then 0xff.
    pub input: Mutex<VecDeque<u8>>,
    /// Vectors of the PIC.
    pub pic: Mutex<VecDeque<u8>>,
    /// Called at each access, with its number.
    #[allow(clippy::type_complexity)]
    pub hook: Mutex<Option<Box<dyn Fn(&Access) + Send>>>,
    stop: Mutex<Option<Arc<dyn StopHandle>>>,
    pub ended: AtomicBool,
    vm: Mutex<Option<Arc<dyn Vm>>>,
}

impl Outside {
    fn note(&self, access: Access) {
        if let Some(hook) = &*self.hook.lock().unwrap() {
            hook(&access);
        }
        self.log.lock().unwrap().push(access);
    }

    fn fill(&self, data: &mut [u8]) {
        let mut input = self.input.lock().unwrap();
        data.fill_with(|| input.pop_front().unwrap_or(0xff));
    }

    pub fn log(&self) -> Vec<Access> {
        self.log.lock().unwrap().clone()
    }

    /// Bytes written to a port.
    pub fn written(&self, port: u16) -> Vec<u8> {
        let log = self.log();
        let bytes = log.iter().filter_map(|a| match a {
            Access::Out(p, data) if *p == port => Some(data.clone()),
            _ => None,
        });
        bytes.flatten().collect()
    }
}

impl CpuIo for Outside {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.note(Access::In(port, data.len()));
        self.fill(data);
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.note(Access::Out(port, data.to_vec()));
        if port == END_PORT {
            self.ended.store(true, Ordering::SeqCst);
            self.stop.lock().unwrap().as_ref().unwrap().stop();
        }
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.note(Access::Load(gpa, data.len()));
        self.fill(data);
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.note(Access::Store(gpa, data.to_vec()));
    }

    fn acknowledge_extint(&self) -> Option<u8> {
        self.note(Access::Acknowledge);
        let mut pic = self.pic.lock().unwrap();
        let vector = pic.pop_front();
        if pic.is_empty() {
            self.vm.lock().unwrap().as_ref().unwrap().set_extint(false);
        }
        vector
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.note(Access::EndOfInterrupt(vector));
    }
}

/// A guest on an engine.
pub struct Guest {
    model: CpuModel,
    pub ram: GuestRam,
    pub vm: Arc<dyn Vm>,
    pub cpus: Vec<Box<dyn Vcpu>>,
    pub io: Arc<Outside>,
}

/// The engine on this host's `/dev/kvm`, whatever is behind it. Says so if there is none.
pub fn kvm() -> Option<KvmEngine> {
    match KvmEngine::any() {
        Ok(engine) => Some(engine),
        Err(error) => {
            skipped(&error.to_string());
            None
        }
    }
}

/// Past the test harness, which shows nothing of tests that pass.
pub fn skipped(why: &str) {
    let name = thread::current().name().unwrap_or("a test").to_owned();
    let _ = writeln!(std::io::stderr(), "SKIPPED {name}: {why}");
}

/// Whether there is hardware behind `/dev/kvm`. Says so where a test needs it and there is none: what
/// emulates KVM without it does not show all of its state.
pub fn hardware() -> bool {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let there = engine_kvm::extension(&cpuinfo).is_some();
    if !there {
        skipped("there is no hardware behind /dev/kvm; `make test-kvm` has some");
    }
    there
}

impl Guest {
    /// `cpus` vCPUs and 2 MiB with `code` in it.
    pub fn new(engine: &dyn Engine, cpus: u32, code: &[u8]) -> Guest {
        Guest::of_model(engine, cpus, CpuModel::Host, code)
    }

    /// The same, with vCPUs of a model.
    pub fn of_model(engine: &dyn Engine, cpus: u32, cpu_model: CpuModel, code: &[u8]) -> Guest {
        let ram = GuestRam::new(&[0..SIZE]).unwrap();
        ram.write_slice(code, GuestAddress(CODE)).unwrap();
        let vm = engine.create_vm(&VmConfig { cpus, cpu_model }, ram.clone()).unwrap();
        let cpus: Vec<_> = (0..cpus).map(|id| vm.create_vcpu(id).unwrap()).collect();
        let io = Arc::new(Outside::default());
        *io.stop.lock().unwrap() = Some(cpus[0].stop_handle());
        *io.vm.lock().unwrap() = Some(vm.clone());
        Guest { model: cpu_model, ram, vm, cpus, io }
    }

    pub fn state(&self) -> X86State {
        match self.cpus[0].save().unwrap() {
            CpuState::X86(state) => *state,
            other => panic!("{other:?}"),
        }
    }

    pub fn set(&mut self, state: X86State) {
        self.cpus[0].restore(&CpuState::X86(Box::new(state))).unwrap();
    }

    /// vCPU 0 at [`CODE`] in real mode.
    pub fn real_mode(engine: &dyn Engine, code: &[u8]) -> Guest {
        let mut guest = Guest::new(engine, 1, code);
        let mut state = guest.state();
        let flat = |access| Segment { selector: 0, base: 0, limit: 0xffff, access, unusable: false };
        state.segments = [flat(0x93); 6];
        state.segments[1] = flat(0x9b);
        (state.rip, state.gpr[4]) = (CODE, STACK);
        guest.set(state);
        guest
    }

    /// vCPU 0 at [`CODE`] in 64-bit mode, with the first 4 GiB mapped as they are.
    pub fn long_mode(engine: &dyn Engine, code: &[u8]) -> Guest {
        let mut guest = Guest::new(engine, 1, code);
        guest.enter_long_mode();
        guest
    }

    /// The same of a model.
    pub fn long_mode_of(engine: &dyn Engine, model: CpuModel, code: &[u8]) -> Guest {
        let mut guest = Guest::of_model(engine, 1, model, code);
        guest.enter_long_mode();
        guest
    }

    pub fn enter_long_mode(&mut self) {
        self.write(PML4, &[PML4 + 0x1007]);
        for gib in 0..4 {
            let directory = PML4 + 0x2000 + gib * 0x1000;
            self.write(PML4 + 0x1000 + gib * 8, &[directory | 7]);
            let pages: Vec<u64> = (0..512).map(|page| gib << 30 | page << 21 | 0x87).collect();
            self.write(directory, &pages);
        }
        let tss = 0x0000_8900_0000_0067 | (TSS & 0xff_ffff) << 16;
        self.write(GDT, &[0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, tss, 0]);
        let mut state = self.state();
        let data = Segment { selector: 16, base: 0, limit: 0xffff_ffff, access: 0xc093, unusable: false };
        state.segments = [data; 6];
        state.segments[1] = Segment { selector: 8, access: 0xa09b, ..data };
        state.tr = Segment { selector: 24, base: TSS, limit: 0x67, access: 0x8b, unusable: false };
        state.ldtr = Segment { unusable: true, ..Segment::default() };
        state.gdtr = DescriptorTable { base: GDT, limit: 5 * 8 - 1 };
        state.idtr = DescriptorTable { base: IDT, limit: 0xfff };
        state.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
        state.cr3 = PML4;
        state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
        set_msr(&mut state, msr::EFER, efer::LME | efer::LMA | efer::SCE);
        (state.rip, state.gpr[4]) = (CODE, STACK);
        self.set(state);
    }

    /// The 64-bit handler of `vector` is at `address`.
    pub fn handle(&self, vector: u8, address: u64) {
        let gate = 0x8e00_0008_0000 | address & 0xffff | (address >> 16 & 0xffff) << 48;
        self.write(IDT + u64::from(vector) * 16, &[gate & !0xffff_0000 | 8 << 16, address >> 32]);
    }

    pub fn write(&self, gpa: u64, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.ram.write_slice(&bytes, GuestAddress(gpa)).unwrap();
    }

    pub fn read(&self, gpa: u64) -> u64 {
        self.ram.read_obj(GuestAddress(gpa)).unwrap()
    }

    /// Runs until it writes to [`END_PORT`], which must not take long.
    pub fn run_to_end(&mut self) {
        let (done, wait) = mpsc::channel::<()>();
        let stop = self.cpus[0].stop_handle();
        let watchdog = thread::spawn(move || {
            if wait.recv_timeout(patience()) == Err(mpsc::RecvTimeoutError::Timeout) {
                stop.stop();
            }
        });
        let exit = self.cpus[0].run(&*self.io).unwrap();
        drop(done);
        watchdog.join().unwrap();
        assert_eq!(exit, Exit::Stopped);
        if !self.io.ended.load(Ordering::SeqCst) {
            panic!("not at its end: {:x?}, {:x?}", self.io.log(), self.state());
        }
    }

    /// Runs for a while and is stopped then, if it has not stopped before.
    pub fn stop_after(&mut self, time: Duration) {
        let stop = self.cpus[0].stop_handle();
        let stopper = thread::spawn(move || {
            thread::sleep(time);
            stop.stop();
        });
        assert_eq!(self.cpus[0].run(&*self.io).unwrap(), Exit::Stopped);
        stopper.join().unwrap();
    }

    /// All of its memory.
    pub fn memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; SIZE as usize];
        self.ram.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    /// This guest's CPU and memory on another engine, or in another VM of the same.
    pub fn move_to(&self, engine: &dyn Engine) -> Guest {
        let mut there = Guest::of_model(engine, self.cpus.len() as u32, self.model, &[]);
        there.ram.write_slice(&self.memory(), GuestAddress(0)).unwrap();
        for (from, to) in self.cpus.iter().zip(&mut there.cpus) {
            to.restore(&from.save().unwrap()).unwrap();
        }
        there.io.input.lock().unwrap().extend(self.io.input.lock().unwrap().iter());
        there.io.pic.lock().unwrap().extend(self.io.pic.lock().unwrap().iter());
        there
    }
}

fn patience() -> Duration {
    PATIENCE * std::env::var("OSPITE_PATIENCE").ok().and_then(|times| times.parse().ok()).unwrap_or(1)
}

pub fn set_msr(state: &mut X86State, index: u32, value: u64) {
    match state.msrs.binary_search_by_key(&index, |(index, _)| *index) {
        Ok(at) => state.msrs[at].1 = value,
        Err(at) => state.msrs.insert(at, (index, value)),
    }
}

pub fn activity(state: &X86State) -> Activity {
    state.activity
}
