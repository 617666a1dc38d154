//! An engine whose vCPUs do what a test tells them: each `run` makes the accesses of one script.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use engine::x86::{CpuState as X86State, LapicState, Segment};
use engine::{CpuIo, CpuState, Engine, Error, Exit, Msi, StopHandle, Vcpu, Vm, VmConfig};
use mem::GuestRam;

type Script = Box<dyn FnOnce(&dyn CpuIo) + Send>;

/// What the CPUs of a [`FakeEngine`] saw and will do.
#[derive(Default)]
pub struct Wires {
    pub msis: Mutex<Vec<Msi>>,
    pub extint: Mutex<bool>,
    scripts: Mutex<VecDeque<Script>>,
}

#[derive(Default)]
pub struct FakeEngine {
    pub wires: Arc<Wires>,
}

struct FakeVm(Arc<Wires>);

struct FakeVcpu {
    id: u32,
    wires: Arc<Wires>,
    state: CpuState,
}

struct Nothing;

fn power_on() -> CpuState {
    CpuState::X86(Box::new(X86State {
        gpr: [0x600; 16],
        rip: 0xfff0,
        rflags: 2,
        segments: [Segment::default(); 6],
        ldtr: Segment::default(),
        tr: Segment::default(),
        gdtr: Default::default(),
        idtr: Default::default(),
        cr0: 0x6000_0010,
        cr2: 0,
        cr3: 0,
        cr4: 0,
        pdptes: None,
        cr8: 0,
        dr: [0; 8],
        xcr0: 1,
        xsave: vec![0; engine::x86::XSAVE_AREA_SIZE],
        msrs: vec![(0x10, 0), (0x277, 0x0007_0406_0007_0406)],
        tsc: 0,
        tsc_khz: 0,
        lapic: LapicState { regs: vec![0; 64], base: 0xfee0_0900, tsc_deadline: 0, timer_left_ns: None },
        activity: Default::default(),
        pending: None,
        nmi_pending: false,
        nmi_blocked: false,
        interrupt_shadow: false,
        kvm_clock_ns: 0,
    }))
}

impl Wires {
    /// What the next `run` does.
    pub fn script(&self, script: impl FnOnce(&dyn CpuIo) + Send + 'static) {
        self.scripts.lock().unwrap().push_back(Box::new(script));
    }
}

impl Engine for FakeEngine {
    fn name(&self) -> &'static str {
        "fake"
    }
    fn create_vm(&self, _config: &VmConfig, _memory: GuestRam) -> Result<Arc<dyn Vm>, Error> {
        Ok(Arc::new(FakeVm(self.wires.clone())))
    }
}

impl Vm for FakeVm {
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, Error> {
        Ok(Box::new(FakeVcpu { id, wires: self.0.clone(), state: power_on() }))
    }
    fn send_msi(&self, msi: Msi) {
        self.0.msis.lock().unwrap().push(msi);
    }
    fn set_extint(&self, high: bool) {
        *self.0.extint.lock().unwrap() = high;
    }
    fn send_nmi(&self, _id: u32) {}
}

impl Vcpu for FakeVcpu {
    fn id(&self) -> u32 {
        self.id
    }
    fn run(&mut self, io: &dyn CpuIo) -> Result<Exit, Error> {
        let script = self.wires.scripts.lock().unwrap().pop_front();
        if let Some(script) = script {
            script(io);
        }
        Ok(Exit::Stopped)
    }
    fn stop_handle(&self) -> Arc<dyn StopHandle> {
        Arc::new(Nothing)
    }
    fn save(&self) -> Result<CpuState, Error> {
        Ok(self.state.clone())
    }
    fn restore(&mut self, state: &CpuState) -> Result<(), Error> {
        self.state = state.clone();
        Ok(())
    }
    fn reset(&mut self) -> Result<(), Error> {
        self.state = power_on();
        Ok(())
    }
}

impl StopHandle for Nothing {
    fn stop(&self) {}
}
