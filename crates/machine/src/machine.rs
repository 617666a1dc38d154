//! Build, reset, flush.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use chipset::{PowerEvent, PowerSink, SerialInput};
use device::{Bus, MsiSink, Timers};
use engine::{CpuIo, Engine, Vcpu, VmConfig};
use mem::GuestRam;
use virtio::{ConsoleInput, ConsolePorts};

use crate::chipset::{Chipset, Wiring, lock};
use crate::devices::{self, Devices};
use crate::firmware::Firmware;
use crate::io::{BoardIo, ToEngine};
use crate::{Error, HostIo, VmSpec, entry, memory};

/// APIC ids of vCPUs and I/O APIC fit eight bits, and 255 means all.
const MAX_CPUS: u32 = 254;
/// How long the last words of the guest's serial line may take.
const SERIAL_PATIENCE: Duration = Duration::from_secs(2);

/// A machine of the `pc` board, wired and ready to run.
///
/// Its vCPUs are taken out ([`Machine::take_vcpus`]) and run elsewhere; whoever resets, saves or
/// restores the machine has stopped them and lends them for it.
pub struct Machine {
    pub(crate) spec: VmSpec,
    pub(crate) engine: &'static str,
    pub(crate) ram: GuestRam,
    pub(crate) firmware: Firmware,
    pub(crate) chipset: Chipset,
    pub(crate) devices: Devices,
    io: Arc<BoardIo>,
    vcpus: Vec<Box<dyn Vcpu>>,
    events: Option<Receiver<PowerEvent>>,
    serial: SerialInput,
    /// Keeps the timer thread; the devices' timers are its.
    _timers: Timers,
}

impl Machine {
    /// Builds the machine that `spec` asks for. When it returns, the kernel is in memory and vCPU 0 at
    /// its entry.
    pub fn build(spec: &VmSpec, engine: &dyn Engine, mut host: HostIo) -> Result<Machine, Error> {
        if !(1..=MAX_CPUS).contains(&spec.cpus) {
            return Err(Error::Cpus { cpus: spec.cpus, most: MAX_CPUS });
        }
        let mut laps = Laps::start();
        // The files first: their errors are the most likely ones and cost nothing.
        let firmware = Firmware::open(&spec.boot, spec.cpus, spec.hpet)?;
        laps.done("files");
        let ram = memory::map(spec.memory, spec.memory_backing, engine.memory())?;
        laps.done("memory");
        let config = VmConfig { cpus: spec.cpus, cpu_model: spec.cpu_model };
        let vm = engine.create_vm(&config, ram.clone())?;
        let vcpus = (0..spec.cpus).map(|id| vm.create_vcpu(id)).collect::<Result<_, _>>()?;
        laps.done("engine");
        let timers =
            Timers::start().map_err(|source| Error::Thread { what: "the machine's timers", source })?;
        let (power, events) = power_sink();
        let to_engine = Arc::new(ToEngine(vm.clone()));
        let msi: Arc<dyn MsiSink> = to_engine.clone();
        let chipset = Chipset::new(Wiring {
            vm,
            msi: msi.clone(),
            power,
            timers: &timers,
            serial_out: std::mem::replace(&mut host.serial_out, Box::new(std::io::sink())),
            memory: memory::sizes(&ram),
            cpus: spec.cpus,
            ioapic_id: firmware.ioapic_id(),
            hpet: spec.hpet,
            test_device: spec.test_device,
        })?;
        let (ports, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        chipset.attach(&ports, &mmio)?;
        let irqs = chipset.irqs.clone();
        let wiring = devices::Wiring {
            ports: &ports,
            mmio: &mmio,
            ram: &ram,
            msi,
            doorbells: to_engine.clone(),
            irqs,
        };
        let devices = Devices::new(&wiring, spec, &mut host)?;
        to_engine.defer_writes();
        let io = BoardIo { ports, mmio, pic: chipset.pic.clone(), ioapic: chipset.ioapic.clone() };
        let serial = lock(&chipset.com1).input();
        let mut machine = Machine {
            spec: spec.clone(),
            engine: engine.name(),
            ram,
            firmware,
            chipset,
            devices,
            io: Arc::new(io),
            vcpus,
            events: Some(events),
            serial,
            _timers: timers,
        };
        laps.done("devices");
        let mut vcpus = machine.take_vcpus();
        machine.start(&mut vcpus)?;
        laps.done("kernel");
        laps.tell();
        machine.vcpus = vcpus;
        Ok(machine)
    }

    /// Loads the kernel and puts vCPU 0, fresh from reset, at its entry.
    fn start(&self, vcpus: &mut [Box<dyn Vcpu>]) -> Result<(), Error> {
        let kernel_entry = self.firmware.load(&self.ram)?;
        if let Some(first) = vcpus.iter_mut().find(|vcpu| vcpu.id() == 0) {
            let state = entry::at_entry(first.save()?, &kernel_entry)?;
            first.restore(&state)?;
        }
        Ok(())
    }

    /// Processes of the host that the vCPUs have, by number; before they are taken.
    pub fn processes(&self) -> Vec<u32> {
        self.vcpus.iter().flat_map(|vcpu| vcpu.processes()).collect()
    }

    /// The vCPUs, once: vCPU 0 at the kernel's entry, the others waiting for it to start them.
    pub fn take_vcpus(&mut self) -> Vec<Box<dyn Vcpu>> {
        std::mem::take(&mut self.vcpus)
    }

    /// What the guest says about its power, once. A second call gets a receiver that hears nothing.
    pub fn take_events(&mut self) -> Receiver<PowerEvent> {
        self.events.take().unwrap_or_else(|| mpsc::channel().1)
    }

    /// Where the vCPUs' accesses go.
    pub fn io(&self) -> Arc<dyn CpuIo> {
        self.io.clone()
    }

    /// The keyboard of COM1.
    pub fn serial(&self) -> SerialInput {
        self.serial.clone()
    }

    /// The keyboard of the virtio console, if there is one.
    pub fn console(&self) -> Option<ConsoleInput> {
        self.devices.console().cloned()
    }

    /// The ways to programs in the guest, if they were asked for: its agent, and streams for what the agent
    /// starts.
    pub fn ports(&self) -> Option<ConsolePorts> {
        self.devices.ports().cloned()
    }

    /// The guest's memory.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Presses the power button; a guest that knows ACPI shuts down.
    pub fn press_power_button(&self) {
        lock(&self.chipset.acpi_pm).press_power_button();
    }

    /// Back to power-on, with the kernel loaded anew: all devices, then all vCPUs. None of them runs.
    pub fn reset(&mut self, vcpus: &mut [Box<dyn Vcpu>]) -> Result<(), Error> {
        self.chipset.reset();
        self.devices.reset()?;
        // The vCPUs come last: whatever interrupts the devices' last lines were is gone with their APICs.
        vcpus.iter_mut().try_for_each(|vcpu| vcpu.reset())?;
        self.start(vcpus)
    }

    /// Stops the devices' own threads, requests under way finished: with the vCPUs stopped too, memory and
    /// state stand still.
    pub fn pause(&self) {
        self.devices.pause();
    }

    /// Lets the devices go on after [`Machine::pause`].
    pub fn resume(&self) {
        self.devices.resume();
    }

    /// Makes what the guest wrote durable, and lets the serial line finish.
    pub fn flush(&self) -> Result<(), Error> {
        lock(&self.chipset.com1).flush(SERIAL_PATIENCE);
        self.devices.flush()
    }
}

/// Where the time goes until the guest runs, for `-vv`.
struct Laps {
    last: Instant,
    laps: Vec<(&'static str, Duration)>,
}

impl Laps {
    fn start() -> Laps {
        Laps { last: Instant::now(), laps: Vec::new() }
    }

    fn done(&mut self, what: &'static str) {
        self.laps.push((what, self.last.elapsed()));
        self.last = Instant::now();
    }

    fn tell(&self) {
        let total: Duration = self.laps.iter().map(|(_, lap)| *lap).sum();
        let laps: Vec<_> = self.laps.iter().map(|(what, lap)| format!("{what} {lap:.1?}")).collect();
        log::debug!("built in {total:.1?}: {}", laps.join(", "));
    }
}

fn power_sink() -> (PowerSink, Receiver<PowerEvent>) {
    let (tx, rx) = mpsc::channel();
    let sink = move |event| {
        let _ = tx.send(event); // nobody listens any more: the machine is ending
    };
    (Arc::new(sink), rx)
}
