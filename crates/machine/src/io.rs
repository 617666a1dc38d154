//! Where a vCPU's accesses go, and how interrupts come back.

use std::sync::{Arc, Mutex, PoisonError};

use chipset::{DualPic, IoApic};
use device::{Bus, Doorbell, DoorbellSink, Msi, MsiSink};
use engine::{CpuIo, Register, Vm};
use vmm_sys_util::eventfd::EventFd;

use crate::layout;

/// The board as a vCPU sees it. It has no lock of its own: several vCPUs call at once.
pub(crate) struct BoardIo {
    pub(crate) ports: Arc<Bus>,
    pub(crate) mmio: Arc<Bus>,
    pub(crate) pic: Arc<Mutex<DualPic>>,
    pub(crate) ioapic: Arc<Mutex<IoApic>>,
}

impl CpuIo for BoardIo {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        if !self.ports.read(port.into(), data) {
            log::trace!("read of {} bytes from port {port:#x}, where nothing is", data.len());
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        if !self.ports.write(port.into(), data) {
            log::trace!("write of {data:02x?} to port {port:#x}, where nothing is");
        }
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        if !self.mmio.read(gpa, data) {
            log::trace!("read of {} bytes from {gpa:#x}, where nothing is", data.len());
        }
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        if !self.mmio.write(gpa, data) {
            log::trace!("write of {data:02x?} to {gpa:#x}, where nothing is");
        }
    }

    fn acknowledge_extint(&self) -> Option<u8> {
        self.pic.lock().unwrap_or_else(PoisonError::into_inner).acknowledge()
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.ioapic.lock().unwrap_or_else(PoisonError::into_inner).end_of_interrupt(vector);
    }
}

/// Messages of devices and of the I/O APIC go to the engine, and doorbells are wired by it.
pub(crate) struct ToEngine(pub(crate) Arc<dyn Vm>);

impl ToEngine {
    /// Tells the engine of the registers that choose what the next access is about.
    pub(crate) fn defer_writes(&self) {
        self.0.defer_writes(Register::Memory(layout::IOAPIC.start), 4);
        self.0.defer_writes(Register::Port(layout::PCI_ADDRESS), 4);
        self.0.defer_writes(Register::Port(layout::RTC.start as u16), 1);
    }
}

impl DoorbellSink for ToEngine {
    fn wire(&self, address: u64, event: EventFd) -> Option<Doorbell> {
        self.0.doorbell(address, event)
    }
}

impl MsiSink for ToEngine {
    fn send(&self, msi: Msi) {
        self.0.send_msi(engine::Msi { address: msi.address, data: msi.data });
    }
}
