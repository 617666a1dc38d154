//! ACPI tables (ACPI Specification 6.5): what a guest learns about the board.
//!
//! The machine says what is where ([`AcpiParams`]); [`build`] makes RSDP, XSDT, FADT, FACS, DSDT, MADT,
//! MCFG and, of a machine that has one, HPET, and writes them into the ROM area, the RSDP first.

mod dsdt;
mod fadt;
mod hpet;
mod madt;
mod table;

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::rsdp::Rsdp;
use mem::{Bytes, GuestAddress, GuestRam};

use crate::layout;
use table::{OEM_ID, table};

/// Why there are no tables.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More vCPUs than the area has room to list.
    #[error("the ACPI tables of {cpus} vCPUs take {bytes} bytes and {limit} is the most; use fewer --cpus")]
    TooLarge {
        /// vCPUs asked for.
        cpus: usize,
        /// What their tables take.
        bytes: usize,
        /// What there is.
        limit: usize,
    },
    /// A window of addresses that is empty or does not fit its descriptor.
    #[error("the {what} window {range:#x?} cannot be described in ACPI")]
    Window {
        /// Which window.
        what: &'static str,
        /// Its addresses.
        range: Range<u64>,
    },
    /// The guest has no memory where the tables go.
    #[error("cannot write ACPI tables to guest memory at {addr:#x}; the guest needs at least 1 MiB")]
    GuestMemory {
        /// Guest-physical address.
        addr: u64,
        /// What guest memory answered.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// What the tables say. Ports and addresses are the machine's; [`AcpiParams::pc`] has the ones of the
/// `pc` board.
#[derive(Clone, Debug)]
pub struct AcpiParams {
    /// APIC id of each vCPU, vCPU 0 first.
    pub apic_ids: Vec<u32>,
    /// Address of the local APICs' registers.
    pub lapic_addr: u32,
    /// IOAPIC id, four bits. It may be that of a local APIC: messages go over the system bus, not an APIC bus.
    pub ioapic_id: u8,
    /// Address of the IOAPIC's registers.
    pub ioapic_addr: u32,
    /// System control interrupt: an ISA interrupt and GSI of the same number, level, active high.
    pub sci_irq: u8,
    /// Port of the PM1a event block: 2 bytes of status, 2 of enables.
    pub pm1a_event: u16,
    /// Port of the PM1a control block (2 bytes). SCI_EN always reads as 1: there is no legacy mode.
    pub pm1a_control: u16,
    /// Port of the 32-bit power-management timer.
    pub pm_timer: u16,
    /// Reset register: port, and the value that resets.
    pub reset: (u16, u8),
    /// SLP_TYP of soft-off.
    pub s5_type: u8,
    /// PCI Express configuration window of segment 0, 1 MiB per bus from bus 0 on.
    pub ecam: Range<u64>,
    /// Window for 32-bit BARs.
    pub mmio32: Range<u64>,
    /// Window for 64-bit BARs.
    pub mmio64: Range<u64>,
    /// INTx pin `p` (0 = A) of slot `s` is GSI `base + (s + p) % count`, level, active low.
    pub intx: Intx,
    /// High precision event timers.
    pub hpet: Option<Hpet>,
    /// First port and IRQ of COM1.
    pub com1: Option<(u16, u8)>,
}

/// Where high precision event timers are, and what they say of themselves.
#[derive(Clone, Copy, Debug)]
pub struct Hpet {
    /// Address of their registers (1 KiB).
    pub address: u32,
    /// The low half of their capabilities register.
    pub id: u32,
    /// The least period that they keep, in ticks.
    pub min_ticks: u16,
}

/// How PCI interrupt pins reach the IOAPIC.
#[derive(Clone, Copy, Debug)]
pub struct Intx {
    /// First GSI.
    pub base: u32,
    /// How many there are.
    pub count: u32,
}

impl Intx {
    /// The GSI of a slot's pin (0 = INTA#).
    pub fn gsi(&self, slot: u32, pin: u32) -> u32 {
        self.base + (slot + pin) % self.count.max(1)
    }
}

impl AcpiParams {
    /// The `pc` board with vCPUs of APIC ids 0 to `cpus` - 1.
    pub fn pc(cpus: u32) -> AcpiParams {
        AcpiParams {
            apic_ids: (0..cpus).collect(),
            lapic_addr: 0xfee0_0000,
            ioapic_id: 0,
            ioapic_addr: 0xfec0_0000,
            sci_irq: 9,
            pm1a_event: 0x600,
            pm1a_control: 0x604,
            pm_timer: 0x608,
            reset: (0xcf9, 0x06),
            s5_type: 5,
            ecam: 0xe000_0000..0xe010_0000, // bus 0; Linux looks at every slot of every bus that is announced
            mmio32: 0xc000_0000..0xe000_0000,
            mmio64: 0x40_0000_0000..0x80_0000_0000,
            intx: Intx { base: 16, count: 8 },
            hpet: None,
            com1: Some((0x3f8, 4)),
        }
    }

    fn check(&self) -> Result<(), Error> {
        let window =
            |what, range: &Range<u64>, limit: u64| match range.start < range.end && range.end <= limit {
                true => Ok(()),
                false => Err(Error::Window { what, range: range.clone() }),
            };
        window("ECAM", &self.ecam, layout::FOUR_GIB)?;
        if self.ecam.end - self.ecam.start > 256 << 20
            || !(self.ecam.end - self.ecam.start).is_multiple_of(1 << 20)
        {
            return Err(Error::Window { what: "ECAM", range: self.ecam.clone() });
        }
        window("32-bit PCI", &self.mmio32, layout::FOUR_GIB)?;
        window("64-bit PCI", &self.mmio64, u64::MAX)
    }

    /// The last bus that ECAM reaches.
    fn last_bus(&self) -> u8 {
        (((self.ecam.end - self.ecam.start) >> 20).saturating_sub(1)) as u8
    }
}

/// Writes the tables into guest memory at [`layout::ACPI`]; returns the RSDP's address.
pub fn build(params: &AcpiParams, ram: &GuestRam) -> Result<u64, Error> {
    params.check()?;
    let image = image(params, layout::ACPI.start);
    let limit = (layout::ACPI.end - layout::ACPI.start) as usize;
    if image.len() > limit {
        return Err(Error::TooLarge { cpus: params.apic_ids.len(), bytes: image.len(), limit });
    }
    let addr = layout::ACPI.start;
    ram.write_slice(&image, GuestAddress(addr)).map_err(|source| Error::GuestMemory { addr, source })?;
    Ok(addr)
}

/// The bytes from the RSDP to the end of the last table, for an image at `base`.
fn image(params: &AcpiParams, base: u64) -> Vec<u8> {
    let mut image = vec![0; Rsdp::len()];
    let facs = place(&mut image, base, &bytes(&FACS::new()));
    let dsdt = place(&mut image, base, &table(b"DSDT", 2, &dsdt::body(params)));
    let mut tables = vec![
        fadt::fadt(params, facs as u32, dsdt as u32),
        table(b"APIC", madt::REVISION, &madt::body(params)),
        table(b"MCFG", 1, &mcfg(params)),
    ];
    tables.extend(params.hpet.map(|hpet| table(b"HPET", 1, &hpet::body(&hpet))));
    let addresses = tables.iter().map(|table| place(&mut image, base, table));
    let pointers: Vec<u8> = addresses.flat_map(|address| address.to_le_bytes()).collect();
    let xsdt = place(&mut image, base, &table(b"XSDT", 1, &pointers));
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    image[..rsdp.len()].copy_from_slice(&rsdp);
    image
}

/// Appends a table at the next multiple of 64, which is what the FACS needs; returns its address.
fn place(image: &mut Vec<u8>, base: u64, table: &[u8]) -> u64 {
    image.resize(image.len().next_multiple_of(64), 0);
    let address = base + image.len() as u64;
    image.extend_from_slice(table);
    address
}

fn bytes(part: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    part.to_aml_bytes(&mut bytes);
    bytes
}

/// PCI Firmware Specification 3.3, table 4-3.
fn mcfg(params: &AcpiParams) -> Vec<u8> {
    let mut body = vec![0; 8];
    body.extend(params.ecam.start.to_le_bytes());
    body.extend([0, 0, 0, params.last_bus(), 0, 0, 0, 0]);
    body
}

#[cfg(test)]
mod tests;
