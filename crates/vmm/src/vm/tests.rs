//! Whole lives of VMs on a fake board: its vCPUs do what a script says.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use engine::{CpuIo, CpuState, Exit, StopHandle, Vcpu};
use machine::PowerEvent;

use super::*;
use crate::board::Cause;

/// What a fake vCPU does each time it starts from power-on.
#[derive(Clone, Copy, PartialEq)]
enum Script {
    /// Runs until it is stopped.
    Spin,
    TripleFault,
    Panic,
    Fail,
    /// Does not listen to stop requests, like one that waits for a dead file server.
    Stuck,
}

#[derive(Default)]
struct Stop {
    asked: Mutex<bool>,
    changed: Condvar,
}

impl StopHandle for Stop {
    fn stop(&self) {
        *self.asked.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

struct FakeVcpu {
    id: u32,
    script: Script,
    stop: Arc<Stop>,
    running: Arc<AtomicU32>,
}

impl FakeVcpu {
    fn spin(&self) {
        self.running.fetch_add(1, Ordering::SeqCst);
        let mut asked = self.stop.asked.lock().unwrap();
        while !*asked {
            asked = self.stop.changed.wait(asked).unwrap();
        }
        *asked = false;
        self.running.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Vcpu for FakeVcpu {
    fn id(&self) -> u32 {
        self.id
    }

    fn run(&mut self, _io: &dyn CpuIo) -> Result<Exit, engine::Error> {
        match self.script {
            Script::Spin => {
                self.spin();
                Ok(Exit::Stopped)
            }
            Script::TripleFault => Ok(Exit::Shutdown),
            Script::Panic => panic!("no such opcode"),
            Script::Fail => Err(engine::Error::BadState("upside down".into())),
            Script::Stuck => loop {
                thread::park();
            },
        }
    }

    fn stop_handle(&self) -> Arc<dyn StopHandle> {
        self.stop.clone()
    }

    fn save(&self) -> Result<CpuState, engine::Error> {
        Err(engine::Error::BadState("a fake has none".into()))
    }

    fn restore(&mut self, _state: &CpuState) -> Result<(), engine::Error> {
        Ok(())
    }

    fn reset(&mut self) -> Result<(), engine::Error> {
        self.script = Script::Spin;
        Ok(())
    }
}

struct NoIo;

impl CpuIo for NoIo {
    fn port_read(&self, _port: u16, _data: &mut [u8]) {}
    fn port_write(&self, _port: u16, _data: &[u8]) {}
    fn mmio_read(&self, _gpa: u64, _data: &mut [u8]) {}
    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
    fn acknowledge_extint(&self) -> Option<u8> {
        None
    }
    fn end_of_interrupt(&self, _vector: u8) {}
}

/// A board, and the outside's view of it.
#[derive(Clone, Default)]
struct Seen {
    running: Arc<AtomicU32>,
    resets: Arc<AtomicU32>,
    flushes: Arc<AtomicU32>,
    disk_is_full: Arc<AtomicBool>,
    /// The devices stand still, too.
    still: Arc<AtomicBool>,
}

struct FakeBoard {
    vcpus: Vec<Box<dyn Vcpu>>,
    events: Option<Receiver<PowerEvent>>,
    guest: Sender<PowerEvent>,
    seen: Seen,
}

impl Board for FakeBoard {
    fn take_vcpus(&mut self) -> Vec<Box<dyn Vcpu>> {
        std::mem::take(&mut self.vcpus)
    }

    fn take_events(&mut self) -> Receiver<PowerEvent> {
        self.events.take().unwrap()
    }

    fn io(&self) -> Arc<dyn CpuIo> {
        Arc::new(NoIo)
    }

    /// A guest that listens to its power button.
    fn press_power_button(&mut self) {
        self.guest.send(PowerEvent::PowerOff).unwrap();
    }

    fn pause(&mut self) {
        self.seen.still.store(true, Ordering::SeqCst);
    }

    fn resume(&mut self) {
        assert_eq!(self.seen.running.load(Ordering::SeqCst), 0, "devices come before vCPUs");
        self.seen.still.store(false, Ordering::SeqCst);
    }

    fn reset(&mut self, vcpus: &mut [Box<dyn Vcpu>]) -> Result<(), Cause> {
        assert_eq!(self.seen.running.load(Ordering::SeqCst), 0, "reset while a vCPU runs");
        self.seen.resets.fetch_add(1, Ordering::SeqCst);
        vcpus.iter_mut().try_for_each(|vcpu| vcpu.reset()).map_err(Into::into)
    }

    fn flush(&mut self) -> Result<(), Cause> {
        assert!(self.seen.still.load(Ordering::SeqCst), "a flush while devices write");
        self.seen.flushes.fetch_add(1, Ordering::SeqCst);
        if self.seen.disk_is_full.load(Ordering::SeqCst) { Err("no space left".into()) } else { Ok(()) }
    }
}

/// A VM with these vCPUs; `guest` is the guest's hand on the power registers.
struct Life {
    control: Control,
    ending: Arc<Ending>,
    guest: Sender<PowerEvent>,
    seen: Seen,
}

impl Life {
    fn begin(scripts: &[Script], options: Options) -> Life {
        let seen = Seen::default();
        let (guest, events) = mpsc::channel();
        let vcpu = |(id, &script): (usize, &Script)| -> Box<dyn Vcpu> {
            let (stop, running) = (Arc::new(Stop::default()), seen.running.clone());
            Box::new(FakeVcpu { id: id as u32, script, stop, running })
        };
        let vcpus = scripts.iter().enumerate().map(vcpu).collect();
        let board = FakeBoard { vcpus, events: Some(events), guest: guest.clone(), seen: seen.clone() };
        let (control, ending) = launch(board, options).unwrap();
        Life { control, ending, guest, seen }
    }

    fn request(&self, request: Request) -> Status {
        self.control.request(request).unwrap()
    }

    fn end(&self) -> End {
        wait(&self.ending)
    }

    /// vCPUs start and stop on threads of their own: give them the time they need.
    fn until(&self, what: &str, done: impl Fn(&Seen) -> bool) {
        let limit = std::time::Instant::now() + Duration::from_secs(20);
        while !done(&self.seen) {
            assert!(std::time::Instant::now() < limit, "{what} takes too long");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn running(&self, count: u32) {
        self.until("starting", |seen| seen.running.load(Ordering::SeqCst) == count);
    }
}

const NO_REBOOT: Options = Options { no_reboot: true };
const REBOOT: Options = Options { no_reboot: false };

#[test]
fn a_guest_that_powers_off_ends_the_vm_with_its_disks_flushed() {
    let life = Life::begin(&[Script::Spin, Script::Spin], REBOOT);
    life.running(2);
    life.guest.send(PowerEvent::PowerOff).unwrap();
    assert_eq!(life.end(), End::PoweredOff);
    assert_eq!(life.seen.running.load(Ordering::SeqCst), 0);
    assert_eq!(life.seen.flushes.load(Ordering::SeqCst), 1);
    assert!(life.control.request(Request::Status).is_err(), "nobody answers for a VM that has ended");
}

#[test]
fn a_disk_that_cannot_be_flushed_is_not_passed_over_in_silence() {
    let life = Life::begin(&[Script::Spin], REBOOT);
    life.seen.disk_is_full.store(true, Ordering::SeqCst);
    life.guest.send(PowerEvent::PowerOff).unwrap();
    assert_eq!(life.end(), End::Failed("cannot write the guest's disks: no space left".into()));
}

#[test]
fn the_debug_exit_value_reaches_whoever_waits() {
    let life = Life::begin(&[Script::Spin], REBOOT);
    life.guest.send(PowerEvent::DebugExit(0x2a)).unwrap();
    assert_eq!(life.end(), End::DebugExit(0x2a));
}

#[test]
fn a_reset_by_the_guest_restarts_all_vcpus_from_a_standstill() {
    let life = Life::begin(&[Script::Spin, Script::Spin, Script::Spin], REBOOT);
    life.running(3);
    for count in 1..=20 {
        life.guest.send(PowerEvent::Reset).unwrap();
        life.until("the reset", |seen| seen.resets.load(Ordering::SeqCst) == count);
    }
    life.running(3);
    assert_eq!(life.request(Request::Status).resets, 20);
    assert_eq!(life.request(Request::Kill).state, State::Paused);
    assert_eq!(life.end(), End::Killed);
}

#[test]
fn a_reset_with_no_reboot_ends_the_vm() {
    let life = Life::begin(&[Script::Spin], NO_REBOOT);
    life.guest.send(PowerEvent::Reset).unwrap();
    assert_eq!(life.end(), End::Reset);
}

#[test]
fn a_triple_fault_restarts_the_guest() {
    let life = Life::begin(&[Script::Spin, Script::TripleFault], REBOOT);
    life.until("the reset", |seen| seen.resets.load(Ordering::SeqCst) == 1);
    life.running(2);
    life.request(Request::Kill);
    assert_eq!(life.end(), End::Killed);
}

#[test]
fn a_triple_fault_with_no_reboot_ends_the_vm_and_names_the_vcpu() {
    let life = Life::begin(&[Script::Spin, Script::TripleFault], NO_REBOOT);
    let End::TripleFault { cpu, registers } = life.end() else { panic!("{:?}", life.end()) };
    assert_eq!(cpu, 1);
    assert!(registers.contains("a fake has none"), "{registers}");
}

#[test]
fn the_power_button_reaches_the_guest_which_powers_off() {
    let life = Life::begin(&[Script::Spin], REBOOT);
    life.request(Request::PowerButton);
    assert_eq!(life.end(), End::PoweredOff);
}

#[test]
fn a_paused_vm_stands_still_until_it_is_resumed() {
    let life = Life::begin(&[Script::Spin, Script::Spin], REBOOT);
    life.running(2);
    for _ in 0..20 {
        assert_eq!(life.request(Request::Pause).state, State::Paused);
        assert_eq!(life.seen.running.load(Ordering::SeqCst), 0);
        assert!(life.seen.still.load(Ordering::SeqCst));
        assert_eq!(life.request(Request::Resume).state, State::Running);
        life.running(2);
        assert!(!life.seen.still.load(Ordering::SeqCst));
    }
    assert_eq!(life.request(Request::Pause).state, State::Paused);
    assert_eq!(life.request(Request::Reset).state, State::Paused, "a reset does not start a paused VM");
    assert_eq!(life.seen.running.load(Ordering::SeqCst), 0);
    life.request(Request::Kill);
    assert_eq!(life.end(), End::Killed);
}

#[test]
fn a_defect_in_the_engine_ends_the_vm_instead_of_hanging_it() {
    let life = Life::begin(&[Script::Spin, Script::Panic], REBOOT);
    assert_eq!(life.end(), End::Failed("vCPU 1 failed by a defect in ospite: no such opcode".into()));
    let life = Life::begin(&[Script::Fail], REBOOT);
    assert_eq!(life.end(), End::Failed("vCPU 0: saved CPU state: upside down".into()));
}

#[test]
fn a_vcpu_that_never_stops_cannot_keep_the_vm_from_ending() {
    let life = Life::begin(&[Script::Stuck], REBOOT);
    life.request(Request::Kill);
    assert_eq!(life.end(), End::Killed);
    assert_eq!(life.seen.flushes.load(Ordering::SeqCst), 1);
}
