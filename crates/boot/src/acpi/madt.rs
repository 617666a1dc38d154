//! MADT (ACPI 6.5, 5.2.12): the interrupt controllers and how ISA interrupts reach them.

use super::AcpiParams;

pub(super) const REVISION: u8 = 5;

/// A PC's pair of 8259s exists.
const PCAT_COMPAT: u32 = 1;
const ENABLED: u32 = 1;
/// APIC ids from here on only fit the x2APIC structures.
const FIRST_X2APIC_ID: u32 = 255;

// MPS INTI flags (table 5.26).
const BUS_DEFAULT: u16 = 0;
const ACTIVE_HIGH_LEVEL: u16 = 0b1101;

/// The ISA timer interrupt is wired to pin 2.
const PIT: (u8, u32) = (0, 2);
const ALL_PROCESSORS: u8 = 0xff;
const LINT1: u8 = 1;

pub(super) fn body(params: &AcpiParams) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(params.lapic_addr.to_le_bytes());
    body.extend(PCAT_COMPAT.to_le_bytes());
    for (uid, id) in (0u32..).zip(&params.apic_ids) {
        processor(&mut body, uid, *id);
    }
    // I/O APIC
    body.extend([1, 12, params.ioapic_id, 0]);
    body.extend(params.ioapic_addr.to_le_bytes());
    body.extend(0u32.to_le_bytes());
    source_override(&mut body, PIT.0, PIT.1, BUS_DEFAULT);
    source_override(&mut body, params.sci_irq, params.sci_irq.into(), ACTIVE_HIGH_LEVEL);
    // Local APIC NMI
    body.extend([4, 6, ALL_PROCESSORS, 0, 0, LINT1]);
    if params.apic_ids.iter().any(|id| *id >= FIRST_X2APIC_ID) {
        // Local x2APIC NMI
        body.extend([0xa, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, LINT1, 0, 0, 0]);
    }
    body
}

fn processor(body: &mut Vec<u8>, uid: u32, id: u32) {
    match (u8::try_from(uid), u8::try_from(id)) {
        (Ok(uid), Ok(short)) if id < FIRST_X2APIC_ID => {
            body.extend([0, 8, uid, short]); // processor local APIC
            body.extend(ENABLED.to_le_bytes());
        }
        _ => {
            body.extend([9, 16, 0, 0]); // processor local x2APIC
            body.extend(id.to_le_bytes());
            body.extend(ENABLED.to_le_bytes());
            body.extend(uid.to_le_bytes());
        }
    }
}

fn source_override(body: &mut Vec<u8>, irq: u8, gsi: u32, flags: u16) {
    body.extend([2, 10, 0, irq]);
    body.extend(gsi.to_le_bytes());
    body.extend(flags.to_le_bytes());
}
