//! The small devices of the board and their lines.

use std::io::Write;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chipset::{
    AcpiPm, AcpiPmState, DebugExit, DualPic, DualPicState, Hpet, HpetLines, HpetState, I8042, I8042State,
    IoApic, IoApicState, IrqRouter, MemorySizes, Pit, PitState, Port61, Port92, Port92State, Post, PostState,
    PowerSink, ResetControl, ResetControlState, Rtc, RtcState, TestDevice, TestDeviceState, Uart, UartState,
};
use device::{Bus, BusDevice, Device, IrqLine, IrqSink, MsiSink, Overlap, Snapshot, Timers};
use engine::Vm;
use serde::{Deserialize, Serialize};

use crate::layout::{self, irq};
use crate::state::same;
use crate::{DeviceInfo, Error};

/// What the chipset is connected to.
pub(crate) struct Wiring<'a> {
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) msi: Arc<dyn MsiSink>,
    pub(crate) power: PowerSink,
    pub(crate) timers: &'a Timers,
    pub(crate) serial_out: Box<dyn Write + Send>,
    pub(crate) memory: MemorySizes,
    pub(crate) cpus: u32,
    pub(crate) ioapic_id: u8,
    pub(crate) hpet: bool,
    pub(crate) test_device: bool,
}

/// Saved state of the chipset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChipsetState {
    /// COM1.
    pub com1: UartState,
    /// Real-time clock.
    pub rtc: RtcState,
    /// Interval timer.
    pub pit: PitState,
    /// 8259A pair.
    pub pic: DualPicState,
    /// I/O APIC.
    pub ioapic: IoApicState,
    /// ACPI power management.
    pub acpi_pm: AcpiPmState,
    /// Keyboard controller.
    pub i8042: I8042State,
    /// System control port A.
    pub port92: Port92State,
    /// POST port.
    pub post: PostState,
    /// Reset control register.
    pub reset_control: ResetControlState,
    /// High precision event timers, on a machine that has them.
    #[serde(default)]
    pub hpet: Option<HpetState>,
    /// Test device, on a machine that has it.
    pub test_device: Option<TestDeviceState>,
}

/// The devices.
pub(crate) struct Chipset {
    pub(crate) pic: Arc<Mutex<DualPic>>,
    pub(crate) ioapic: Arc<Mutex<IoApic>>,
    /// Lines to both interrupt controllers.
    pub(crate) irqs: Arc<dyn IrqSink>,
    pub(crate) com1: Arc<Mutex<Uart>>,
    pub(crate) acpi_pm: Arc<Mutex<AcpiPm>>,
    rtc: Arc<Mutex<Rtc>>,
    pit: Arc<Mutex<Pit>>,
    i8042: Arc<Mutex<I8042>>,
    port92: Arc<Mutex<Port92>>,
    post: Arc<Mutex<Post>>,
    reset_control: Arc<Mutex<ResetControl>>,
    debug_exit: Arc<Mutex<DebugExit>>,
    hpet: Option<Arc<Mutex<Hpet>>>,
    test_device: Option<Arc<Mutex<TestDevice>>>,
}

/// A thread that panicked with the lock has already brought the VM down; the device is still whole.
pub(crate) fn lock<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

fn shared<T>(device: T) -> Arc<Mutex<T>> {
    Arc::new(Mutex::new(device))
}

impl Chipset {
    pub(crate) fn new(wiring: Wiring<'_>) -> Result<Chipset, Error> {
        let Wiring { vm, msi, power, timers, serial_out, memory, cpus, ioapic_id, hpet, test_device } =
            wiring;
        let pic = shared(DualPic::new(move |high| vm.set_extint(high)));
        let ioapic = shared(IoApic::new(ioapic_id, msi));
        let mut irqs: Arc<dyn IrqSink> = Arc::new(IrqRouter::new(pic.clone(), ioapic.clone()));
        let hpet = hpet.then(|| {
            let lines = HpetLines::new(irqs.clone());
            irqs = lines.clone();
            Hpet::new(lines, timers)
        });
        let line = |irq| IrqLine::new(irqs.clone(), irq);
        let com1 = Uart::new(line(irq::COM1), serial_out, timers)
            .map_err(|source| Error::Thread { what: "the serial port", source })?;
        Ok(Chipset {
            com1,
            acpi_pm: AcpiPm::new(line(irq::SCI), power.clone(), timers),
            rtc: Rtc::new(line(irq::RTC), timers, &memory, cpus),
            pit: Pit::new(line(irq::PIT), timers),
            i8042: shared(I8042::new(power.clone())),
            port92: shared(Port92::new(power.clone())),
            post: shared(Post::default()),
            reset_control: shared(ResetControl::new(power.clone())),
            debug_exit: shared(DebugExit::new(power)),
            hpet,
            test_device: test_device.then(|| shared(TestDevice::new(line))),
            pic,
            ioapic,
            irqs,
        })
    }

    /// Puts everything where [`layout`] says.
    pub(crate) fn attach(&self, ports: &Bus, mmio: &Bus) -> Result<(), Overlap> {
        let single: [(Range<u64>, Arc<dyn BusDevice>); 8] = [
            (layout::PIT, self.pit.clone()),
            (layout::PORT61, shared(Port61::new(self.pit.clone()))),
            (layout::RTC, self.rtc.clone()),
            (layout::POST, self.post.clone()),
            (layout::PORT92, self.port92.clone()),
            (layout::DEBUG_EXIT, self.debug_exit.clone()),
            (layout::COM1, self.com1.clone()),
            (layout::RESET_CONTROL, self.reset_control.clone()),
        ];
        let parts = single
            .into_iter()
            .chain(DualPic::at(&self.pic))
            .chain(I8042::at(&self.i8042))
            .chain(AcpiPm::at(&self.acpi_pm, layout::ACPI_PM));
        for (range, device) in parts {
            ports.insert(range, device)?;
        }
        if let Some(hpet) = &self.hpet {
            mmio.insert(layout::HPET, Hpet::at(hpet))?;
        }
        if let Some(test_device) = &self.test_device {
            for (range, device) in TestDevice::ports(test_device, layout::TEST_LATCH, layout::TEST_LINES) {
                ports.insert(range, device)?;
            }
            let (range, device) = TestDevice::memory(test_device, layout::TEST_MEMORY);
            mmio.insert(range, device)?;
        }
        mmio.insert(layout::IOAPIC, self.ioapic.clone())
    }

    /// Everything back to power-on. The interrupt controllers come last: they then see the lines as the
    /// reset devices leave them.
    pub(crate) fn reset(&self) {
        lock(&self.com1).reset();
        lock(&self.rtc).reset();
        lock(&self.pit).reset();
        lock(&self.acpi_pm).reset();
        lock(&self.i8042).reset();
        lock(&self.port92).reset();
        lock(&self.post).reset();
        lock(&self.reset_control).reset();
        if let Some(hpet) = &self.hpet {
            lock(hpet).reset();
        }
        if let Some(test_device) = &self.test_device {
            lock(test_device).reset();
        }
        lock(&self.ioapic).reset();
        lock(&self.pic).reset();
    }

    pub(crate) fn save(&self) -> ChipsetState {
        ChipsetState {
            com1: lock(&self.com1).save(),
            rtc: lock(&self.rtc).save(),
            pit: lock(&self.pit).save(),
            pic: lock(&self.pic).save(),
            ioapic: lock(&self.ioapic).save(),
            acpi_pm: lock(&self.acpi_pm).save(),
            i8042: lock(&self.i8042).save(),
            port92: lock(&self.port92).save(),
            post: lock(&self.post).save(),
            reset_control: lock(&self.reset_control).save(),
            hpet: self.hpet.as_ref().map(|device| lock(device).save()),
            test_device: self.test_device.as_ref().map(|device| lock(device).save()),
        }
    }

    /// Restores the devices; after [`Chipset::reset`], so that no line reaches a vCPU, and before
    /// [`Chipset::restore_controllers`].
    pub(crate) fn restore(&self, state: ChipsetState) -> Result<Controllers, Error> {
        let ChipsetState {
            com1,
            rtc,
            pit,
            pic,
            ioapic,
            acpi_pm,
            i8042,
            port92,
            post,
            reset_control,
            hpet,
            test_device,
        } = state;
        lock(&self.com1).restore(com1)?;
        lock(&self.rtc).restore(rtc)?;
        lock(&self.pit).restore(pit)?;
        lock(&self.acpi_pm).restore(acpi_pm)?;
        lock(&self.i8042).restore(i8042)?;
        lock(&self.port92).restore(port92)?;
        lock(&self.post).restore(post)?;
        lock(&self.reset_control).restore(reset_control)?;
        match (&self.hpet, hpet) {
            (Some(here), Some(saved)) => lock(here).restore(saved)?,
            (here, saved) => same("HPETs", saved.is_some().into(), here.is_some().into())?,
        }
        match (&self.test_device, test_device) {
            (Some(here), Some(saved)) => lock(here).restore(saved)?,
            (here, saved) => same("test devices", saved.is_some().into(), here.is_some().into())?,
        }
        Ok(Controllers { pic, ioapic })
    }

    /// Restores the interrupt controllers once all lines have their levels.
    pub(crate) fn restore_controllers(&self, state: Controllers) -> Result<(), Error> {
        let Controllers { pic, ioapic } = state;
        lock(&self.ioapic).restore(ioapic)?;
        lock(&self.pic).restore(pic)?;
        Ok(())
    }

    pub(crate) fn describe(&self) -> Vec<DeviceInfo> {
        let ports = |name, range: Range<u64>, irq| DeviceInfo::ports(name, range, irq);
        let mut devices = vec![
            ports("8259A interrupt controllers", 0x20..0x22, None),
            ports("8254 timer", layout::PIT, Some(irq::PIT)),
            ports("keyboard controller (reset only)", 0x60..0x65, None),
            ports("real-time clock", layout::RTC, Some(irq::RTC)),
            ports("debug exit", layout::DEBUG_EXIT, None),
            ports("16550A serial port", layout::COM1, Some(irq::COM1)),
            ports("ACPI power management", layout::ACPI_PM..layout::ACPI_PM + 12, Some(irq::SCI)),
            ports("reset control", layout::RESET_CONTROL, None),
            DeviceInfo::memory("I/O APIC", layout::IOAPIC),
            DeviceInfo::memory("local APICs (engine)", layout::LAPIC..layout::LAPIC + 0x1000),
            DeviceInfo::memory("PCI Express configuration", layout::ECAM),
        ];
        if self.hpet.is_some() {
            devices.push(DeviceInfo::memory("HPET", layout::HPET));
        }
        if let Some(test_device) = &self.test_device {
            let [latch, lines] = TestDevice::ports(test_device, layout::TEST_LATCH, layout::TEST_LINES);
            devices.push(ports("test device: a port to write and read", latch.0, None));
            devices.push(ports("test device: interrupt lines", lines.0, None));
            let (memory, _) = TestDevice::memory(test_device, layout::TEST_MEMORY);
            devices.push(DeviceInfo::memory("test device: memory", memory));
        }
        devices
    }
}

/// What [`Chipset::restore`] leaves for the end.
pub(crate) struct Controllers {
    pic: DualPicState,
    ioapic: IoApicState,
}
