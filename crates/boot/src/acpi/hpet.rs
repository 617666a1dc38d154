//! HPET (IA-PC HPET specification 1.0a, 3.2.4): where the event timers are.

use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{Hpet, bytes};

/// Bytes of registers.
pub(super) const SIZE: u32 = 1024;
/// Nothing else is on their page, so that programs may be given it.
const ONE_PAGE: u8 = 1;
/// There is no other block of timers.
const NUMBER: u8 = 0;

pub(super) fn body(hpet: &Hpet) -> Vec<u8> {
    let address = GAS::new(AddressSpace::SystemMemory, 64, 0, AccessSize::Undefined, u64::from(hpet.address));
    let mut body = hpet.id.to_le_bytes().to_vec();
    body.extend(bytes(&address));
    body.push(NUMBER);
    body.extend(hpet.min_ticks.to_le_bytes());
    body.push(ONE_PAGE);
    body
}
