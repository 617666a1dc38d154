//! What firmware would do before the kernel starts: ACPI tables, memory map, the kernel itself.

use boot::acpi::{self, AcpiParams};
use boot::{Entry, Initrd, Kernel, LoadParams, MemoryMap};
use mem::GuestRam;

use crate::layout::{self, ECAM};
use crate::{BootSpec, Error};

/// Everything that is loaded at power-on and again at each reset. The files were read and checked
/// once.
pub(crate) struct Firmware {
    pub(crate) kernel: Kernel,
    pub(crate) initrd: Option<Initrd>,
    cmdline: String,
    acpi: AcpiParams,
}

impl Firmware {
    pub(crate) fn open(spec: &BootSpec, cpus: u32, hpet: bool) -> Result<Firmware, Error> {
        let hpet = hpet.then_some(acpi::Hpet {
            address: layout::HPET.start as u32,
            id: chipset::Hpet::ID,
            min_ticks: chipset::Hpet::MIN_TICKS,
        });
        Ok(Firmware {
            kernel: Kernel::open(&spec.kernel)?,
            initrd: spec.initrd.as_ref().map(Initrd::open).transpose()?,
            cmdline: spec.cmdline.clone(),
            acpi: AcpiParams { hpet, ..AcpiParams::pc(cpus) },
        })
    }

    /// The ID that the ACPI tables give the I/O APIC.
    pub(crate) fn ioapic_id(&self) -> u8 {
        self.acpi.ioapic_id
    }

    /// Fills guest memory; the state to start vCPU 0 in.
    pub(crate) fn load(&self, ram: &GuestRam) -> Result<Entry, Error> {
        let acpi_rsdp = acpi::build(&self.acpi, ram)?;
        let memory_map = MemoryMap::pc(ram, &[ECAM]);
        let params = LoadParams {
            initrd: self.initrd.as_ref(),
            cmdline: &self.cmdline,
            acpi_rsdp,
            memory_map: &memory_map,
        };
        Ok(self.kernel.load(ram, &params)?)
    }
}
