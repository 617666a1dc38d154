//! DSDT: the PCI root with its windows and interrupt routing, the motherboard's reservations, COM1,
//! RTC, HPET and soft-off.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If,
    Memory32Fixed, Method, Name, NotEqual, ONE, Or, Package, PackageBuilder, Path, ResourceTemplate, Return,
    Uuid, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::{AcpiParams, bytes, hpet};

const PCI_SLOTS: u32 = 32;
const PCI_PINS: u32 = 4;
/// CONFIG_ADDRESS and CONFIG_DATA.
const PCI_CONFIG_PORT: u16 = 0xcf8;
const RTC_PORT: u16 = 0x70;
const RTC_IRQ: u8 = 8;

pub(super) fn body(params: &AcpiParams) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(pci_root(params));
    body.extend(motherboard(params));
    if let Some((port, irq)) = params.com1 {
        body.extend(isa_device("_SB_.COM1", "PNP0501", port, 8, irq));
    }
    body.extend(isa_device("_SB_.RTC_", "PNP0B00", RTC_PORT, 2, RTC_IRQ));
    if let Some(hpet) = params.hpet {
        body.extend(memory_device("_SB_.HPET", "PNP0103", hpet.address, hpet::SIZE));
    }
    let s5 = params.s5_type;
    body.extend(bytes(&Name::new("\\_S5_".into(), &Package::new(vec![&s5, &s5, &ZERO, &ZERO]))));
    body
}

/// PCI Express host bridge (PCI Firmware Specification 3.3, 4.3).
fn pci_root(params: &AcpiParams) -> Vec<u8> {
    bytes(&Device::new(
        "_SB_.PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_CRS".into(), &pci_windows(params)),
            &Name::new("_PRT".into(), &interrupt_routing(params)),
            &osc(),
        ],
    ))
}

fn pci_windows(params: &AcpiParams) -> Encoded {
    let (mmio32, mmio64) = (&params.mmio32, &params.mmio64);
    let no_cache = AddressSpaceCacheable::NotCacheable;
    Encoded::new(&ResourceTemplate::new(vec![
        &AddressSpace::new_bus_number(0, u16::from(params.last_bus())),
        &IO::new(PCI_CONFIG_PORT, PCI_CONFIG_PORT, 1, 8),
        &AddressSpace::new_io(0u16, PCI_CONFIG_PORT - 1, None),
        &AddressSpace::new_io(PCI_CONFIG_PORT + 8, 0xffff, None),
        &AddressSpace::new_memory(no_cache, true, mmio32.start as u32, (mmio32.end - 1) as u32, None),
        &AddressSpace::new_memory(
            AddressSpaceCacheable::PreFetchable,
            true,
            mmio64.start,
            mmio64.end - 1,
            None,
        ),
    ]))
}

/// One entry per slot and pin: address, pin, no link device, GSI (ACPI 6.5, 6.2.13). Such interrupts
/// are level-triggered and active low, as PCI's are.
fn interrupt_routing(params: &AcpiParams) -> PackageBuilder {
    let mut routing = PackageBuilder::new();
    for slot in 0..PCI_SLOTS {
        for pin in 0..PCI_PINS {
            let address = slot << 16 | 0xffff; // all functions
            let gsi = params.intx.gsi(slot, pin);
            routing.add_element(&Package::new(vec![&address, &(pin as u8), &ZERO, &gsi]));
        }
    }
    routing
}

/// `_OSC` (PCI Firmware Specification 3.3, 4.5.1) that grants the guest whatever it asks for: there is
/// no firmware that would handle hot-plug, PME or errors itself.
fn osc() -> Encoded {
    let (status, query) = (Path::new("CDW1"), Arg(3));
    let unknown_revision: &dyn Aml = &Or::new(&status, &status, &8u8);
    let unknown_uuid: &dyn Aml = &Or::new(&status, &status, &4u8);
    let control = Path::new("CDW3");
    Encoded::new(&Method::new(
        "_OSC".into(),
        4,
        true,
        vec![
            &CreateDWordField::new(&status, &query, &ZERO),
            &If::new(
                &Equal::new(&Arg(0), &Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766")),
                vec![
                    &CreateDWordField::new(&control, &query, &8u8),
                    // Hot-plug, SHPC, PME, AER, PCIe capability structure
                    &And::new(&control, &control, &0x1fu8),
                    &If::new(&NotEqual::new(&Arg(1), &ONE), vec![unknown_revision]),
                ],
            ),
            &Else::new(vec![unknown_uuid]),
            &Return::new(&query),
        ],
    ))
}

/// Addresses that belong to the board: Linux uses ECAM only if somebody reserved it.
fn motherboard(params: &AcpiParams) -> Vec<u8> {
    let (ecam, pm) = (&params.ecam, params.pm1a_event);
    bytes(&Device::new(
        "_SB_.MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, ecam.start as u32, (ecam.end - ecam.start) as u32),
                    &IO::new(pm, pm, 1, 12),
                ]),
            ),
        ],
    ))
}

fn isa_device(path: &str, hid: &str, port: u16, ports: u8, irq: u8) -> Vec<u8> {
    bytes(&Device::new(
        path.into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new(hid)),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(port, port, 1, ports), &IsaIrq(irq)]),
            ),
        ],
    ))
}

fn memory_device(path: &str, hid: &str, address: u32, size: u32) -> Vec<u8> {
    bytes(&Device::new(
        path.into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new(hid)),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&Memory32Fixed::new(true, address, size)])),
        ],
    ))
}

/// IRQ descriptor without flags: edge-triggered, active high, exclusive (ACPI 6.5, 6.4.2.1).
struct IsaIrq(u8);

impl Aml for IsaIrq {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.byte(0x22);
        sink.word(1u16.checked_shl(self.0.into()).unwrap_or(0));
    }
}

/// AML made already, to outlive what it was made of.
struct Encoded(Vec<u8>);

impl Encoded {
    fn new(part: &dyn Aml) -> Encoded {
        Encoded(bytes(part))
    }
}

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}
