//! The level-triggered messages that KVM has to know of.
//!
//! A local APIC in the kernel tells the outside of an EOI only for vectors that one of the first 24
//! entries of the GSI routing table carries, level-triggered, to this very vCPU: KVM takes these
//! entries for the pins of the IOAPIC that lives in user space. So every level-triggered message gets
//! an entry before it is sent for the first time. Which entry does not matter; a message that the
//! IOAPIC no longer sends loses its place to a new one.

use engine::Msi;
use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry};

use crate::irqfd::Irqfds;

/// Pins of the IOAPIC, and so messages whose ends are awaited at a time.
pub(crate) const PINS: usize = 24;

/// Message data: trigger mode (SDM 3A, 11.11.2).
const LEVEL: u32 = 1 << 15;
/// Message data: level asserted.
const ASSERT: u32 = 1 << 14;
/// Delivery modes that a local APIC ends with an EOI: fixed and lowest priority.
const MODES_WITH_EOI: [u32; 2] = [0, 1];

#[derive(Clone, Copy)]
struct Route {
    msi: Msi,
    /// Sent, and not ended since.
    in_service: bool,
    /// When it was last sent, in messages.
    last_used: u64,
}

/// The routing table.
#[derive(Default)]
pub(crate) struct Routes {
    routes: Vec<Route>,
    sent: u64,
    /// The messages behind the pins.
    pub(crate) irqfds: Irqfds,
}

/// Whether the outside has to hear of the interrupt's end.
pub(crate) fn wants_eoi(msi: Msi) -> bool {
    msi.data & LEVEL != 0 && MODES_WITH_EOI.contains(&(msi.data >> 8 & 7))
}

/// The message by which a level-triggered interrupt reached one vCPU.
pub(crate) fn level_message(id: u32, vector: u8) -> Msi {
    Msi { address: 0xfee0_0000 | u64::from(id & 0xff) << 12, data: LEVEL | ASSERT | u32::from(vector) }
}

impl Routes {
    /// Notes that `msi` is sent; whether the table has changed.
    pub(crate) fn sending(&mut self, msi: Msi) -> bool {
        self.sent += 1;
        let new = Route { msi, in_service: true, last_used: self.sent };
        if let Some(route) = self.routes.iter_mut().find(|route| route.msi == msi) {
            *route = new;
            return false;
        }
        if self.routes.len() < PINS {
            self.routes.push(new);
        } else if let Some(oldest) = self.routes.iter_mut().min_by_key(|r| (r.in_service, r.last_used)) {
            *oldest = new;
        }
        true
    }

    /// A local APIC has ended this vector.
    pub(crate) fn ended(&mut self, vector: u8) {
        for route in self.routes.iter_mut().filter(|route| route.msi.data as u8 == vector) {
            route.in_service = false;
        }
    }

    /// The table as KVM takes it.
    pub(crate) fn table(&self) -> Result<KvmIrqRouting, kvm_ioctls::Error> {
        let pins = self.routes.iter().enumerate().map(|(pin, route)| entry(pin, route.msi));
        let messages = self.irqfds.messages().enumerate().map(|(place, msi)| entry(PINS + place, msi));
        let entries: Vec<_> = pins.chain(messages).collect();
        KvmIrqRouting::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))
    }
}

fn entry(pin: usize, msi: Msi) -> kvm_irq_routing_entry {
    let mut entry =
        kvm_irq_routing_entry { gsi: pin as u32, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = msi.address as u32;
    entry.u.msi.address_hi = (msi.address >> 32) as u32;
    entry.u.msi.data = msi.data;
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_entered_once() {
        let mut routes = Routes::default();
        assert!(routes.sending(level_message(0, 0x30)));
        assert!(!routes.sending(level_message(0, 0x30)));
        assert!(routes.sending(level_message(1, 0x30)));
        assert_eq!(routes.table().unwrap().as_slice().len(), 2);
        assert_eq!(routes.table().unwrap().as_slice()[1].gsi, 1);
    }

    #[test]
    fn what_is_in_service_keeps_its_place() {
        let mut routes = Routes::default();
        for vector in 0x30..0x30 + PINS as u8 {
            routes.sending(level_message(0, vector));
        }
        routes.ended(0x35);
        routes.ended(0x33);
        routes.sending(level_message(0, 0x33));
        routes.ended(0x33);
        assert!(routes.sending(level_message(0, 0x80)), "a 25th message comes in");
        let has = |routes: &Routes, vector| routes.routes.iter().any(|r| r.msi == level_message(0, vector));
        assert!(!has(&routes, 0x35), "in the place of the one that ended longest ago");
        assert!(has(&routes, 0x80) && has(&routes, 0x33) && has(&routes, 0x30));
    }

    #[test]
    fn edges_and_nmis_have_no_end_to_hear_of() {
        assert!(wants_eoi(level_message(3, 0x41)));
        assert!(!wants_eoi(Msi { address: 0xfee0_0000, data: 0x41 }));
        assert!(!wants_eoi(Msi { address: 0xfee0_0000, data: LEVEL | 4 << 8 }));
    }
}
