//! Messages that are sent by signalling an event (`KVM_IRQFD`): KVM delivers them in the signal itself, and who
//! has the event needs nothing else.
//!
//! A message that comes often has an event of its own. It costs a change of the routing table, for which the
//! kernel waits until no vCPU looks at the old one; so messages that a guest sends while it sets itself up, or
//! moves to another vCPU every second, go by `KVM_SIGNAL_MSI`.

use std::sync::Arc;

use engine::Msi;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Messages with an event at a time; more than most guests have queues on all their devices.
const MOST: usize = 64;
/// Messages that are counted at a time.
const COUNTED: usize = 2 * MOST;
/// It comes often once it was sent so many times.
const OFTEN: u32 = 16;
/// Message address: the destination is a logical one, or one of several (SDM 3A, 11.11.1).
const LOGICAL_OR_HINT: u64 = 3 << 2;
/// Message data: delivery mode, trigger mode (SDM 3A, 11.11.2). Only fixed ones are zero.
const NOT_FIXED_EDGE: u32 = 7 << 8 | 1 << 15;

/// An event that sends a message. Registered at its place as long as it is known.
#[derive(Debug)]
pub(crate) struct Irqfd {
    pub(crate) msi: Msi,
    pub(crate) event: EventFd,
}

struct Count {
    msi: Msi,
    sent: u32,
}

/// What to do for a message.
#[derive(Debug)]
pub(crate) enum Way {
    /// Signal this event.
    Signal(Arc<Irqfd>),
    /// Send it by an ioctl.
    Plain,
    /// It comes often: give it an event.
    Promote,
}

/// The messages with events, by their places in the routing table.
#[derive(Default)]
pub(crate) struct Irqfds {
    known: Vec<Arc<Irqfd>>,
    counts: Vec<Count>,
    /// The place that is given away next when all are taken.
    next: usize,
    /// The kernel does not want more.
    off: bool,
}

impl Irqfds {
    /// How this message is to be sent.
    pub(crate) fn sending(&mut self, msi: Msi) -> Way {
        if let Some(irqfd) = self.known.iter().find(|irqfd| irqfd.msi == msi) {
            return Way::Signal(irqfd.clone());
        }
        // KVM delivers a message to one vCPU at once; others may wait for a thread of the kernel's, and a
        // machine that is saved meanwhile would lose them.
        if self.off || msi.data & NOT_FIXED_EDGE != 0 || msi.address & LOGICAL_OR_HINT != 0 {
            return Way::Plain;
        }
        let room = self.counts.len() < COUNTED;
        match self.counts.iter_mut().find(|count| count.msi == msi) {
            Some(count) if count.sent >= OFTEN => return Way::Promote,
            Some(count) => count.sent += 1,
            None if room => self.counts.push(Count { msi, sent: 1 }),
            None => self.counts.clear(),
        }
        Way::Plain
    }

    /// Where the next event belongs, and what is there now.
    pub(crate) fn place(&self) -> (usize, Option<Arc<Irqfd>>) {
        match self.known.len() {
            MOST => (self.next, self.known.get(self.next).cloned()),
            free => (free, None),
        }
    }

    /// Gives the message an event at that place; the caller registers it.
    pub(crate) fn promote(&mut self, msi: Msi) -> std::io::Result<Arc<Irqfd>> {
        let irqfd = Arc::new(Irqfd { msi, event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? });
        match self.known.len() {
            MOST => {
                self.known[self.next] = irqfd.clone();
                self.next = (self.next + 1) % MOST;
            }
            _ => self.known.push(irqfd.clone()),
        }
        self.counts.retain(|count| count.msi != msi);
        Ok(irqfd)
    }

    /// All messages go by ioctl from now on.
    pub(crate) fn turn_off(&mut self) {
        *self = Irqfds { off: true, ..Irqfds::default() };
    }

    /// The messages by place.
    pub(crate) fn messages(&self) -> impl Iterator<Item = Msi> + '_ {
        self.known.iter().map(|irqfd| irqfd.msi)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msi(vector: u32) -> Msi {
        Msi { address: 0xfee0_1000 | u64::from(vector >> 8) << 12, data: vector & 0xff }
    }

    fn often(irqfds: &mut Irqfds, msi: Msi) {
        for _ in 0..OFTEN {
            assert!(matches!(irqfds.sending(msi), Way::Plain));
        }
        assert!(matches!(irqfds.sending(msi), Way::Promote));
        irqfds.promote(msi).unwrap();
    }

    #[test]
    fn a_message_that_comes_often_gets_an_event() {
        let mut irqfds = Irqfds::default();
        often(&mut irqfds, msi(0x41));
        assert!(matches!(irqfds.sending(msi(0x41)), Way::Signal(irqfd) if irqfd.msi == msi(0x41)));
        assert!(matches!(irqfds.sending(msi(0x42)), Way::Plain));
        assert_eq!(irqfds.messages().collect::<Vec<_>>(), [msi(0x41)]);
    }

    #[test]
    fn the_oldest_place_is_given_away_when_all_are_taken() {
        let mut irqfds = Irqfds::default();
        for n in 0..MOST {
            assert!(matches!(irqfds.place(), (place, None) if place == n));
            often(&mut irqfds, msi(0x100 + n as u32));
        }
        assert!(matches!(irqfds.place(), (0, Some(old)) if old.msi == msi(0x100)));
        often(&mut irqfds, msi(0x41));
        assert!(matches!(irqfds.place(), (1, Some(_))));
        assert_eq!(irqfds.messages().next(), Some(msi(0x41)));
        assert!(matches!(irqfds.sending(msi(0x100)), Way::Plain));
    }

    #[test]
    fn messages_that_are_not_for_one_vcpu_at_once_have_none() {
        let mut irqfds = Irqfds::default();
        let nmi = Msi { address: 0xfee0_0000, data: 4 << 8 };
        let level = Msi { address: 0xfee0_0000, data: 0x41 | 1 << 15 };
        let lowest = Msi { address: 0xfee0_100c, data: 0x41 };
        for msi in [nmi, level, lowest] {
            for _ in 0..2 * OFTEN {
                assert!(matches!(irqfds.sending(msi), Way::Plain), "{msi:x?}");
            }
        }
    }

    #[test]
    fn however_many_messages_a_guest_makes_up_few_are_remembered() {
        let mut irqfds = Irqfds::default();
        for vector in 0..10_000 {
            irqfds.sending(msi(vector));
        }
        assert!(irqfds.counts.len() <= COUNTED);
    }
}
