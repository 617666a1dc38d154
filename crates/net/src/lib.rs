//! Network links behind one trait.
//!
//! A network card sends Ethernet frames into a [`Link`] and takes those that arrive from the
//! receiver it registers. The networks themselves (user-mode, tap) come later; [`CountingSink`] is a
//! cable with nobody at its other end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The address of a VM's card number `index`: locally administered, the same at every start.
    pub fn of_card(index: u32) -> Mac {
        let [_, b, c, d] = index.to_be_bytes();
        Mac([0x52, 0x54, 0x00, b, c, d])
    }
}

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Where frames for a network card go. Called on the link's thread; must not wait.
pub trait Receiver: Send + Sync {
    /// Takes a frame, or answers `false` where it has no room: the frame is lost, as on a wire.
    fn receive(&self, frame: &[u8]) -> bool;
}

/// One end of a network cable.
pub trait Link: Send {
    /// Sends an Ethernet frame (destination first, without checksum). Called on the card's thread.
    fn send(&mut self, frame: &[u8]);

    /// Registers where arriving frames go, in place of any earlier receiver.
    fn connect(&mut self, receiver: Arc<dyn Receiver>);

    /// Forgets the receiver; none is called once this returns.
    fn disconnect(&mut self);
}

/// What went down a [`CountingSink`]. Clones see the same counts.
#[derive(Clone, Debug, Default)]
pub struct Counters(Arc<(AtomicU64, AtomicU64)>);

impl Counters {
    /// Frames so far.
    pub fn packets(&self) -> u64 {
        self.0.0.load(Ordering::Relaxed)
    }

    /// Bytes in them.
    pub fn bytes(&self) -> u64 {
        self.0.1.load(Ordering::Relaxed)
    }
}

/// A link that counts frames and drops them; nothing ever arrives from it.
#[derive(Default)]
pub struct CountingSink(Counters);

impl CountingSink {
    /// A new one, with all counts at 0.
    pub fn new() -> CountingSink {
        CountingSink::default()
    }

    /// Its counts, to be read while the card has the link.
    pub fn counters(&self) -> Counters {
        self.0.clone()
    }
}

impl Link for CountingSink {
    fn send(&mut self, frame: &[u8]) {
        let (packets, bytes) = &*self.0.0;
        packets.fetch_add(1, Ordering::Relaxed);
        bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
    }

    fn connect(&mut self, _receiver: Arc<dyn Receiver>) {}

    fn disconnect(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_counted_where_the_card_cannot_see() {
        let sink = CountingSink::new();
        let counters = sink.counters();
        let mut link: Box<dyn Link> = Box::new(sink);
        link.send(&[0; 60]);
        link.send(&[0; 1514]);
        assert_eq!((counters.packets(), counters.bytes()), (2, 1574));
    }

    #[test]
    fn cards_have_addresses_of_their_own() {
        assert_eq!(Mac::of_card(1).to_string(), "52:54:00:00:00:01");
        assert_ne!(Mac::of_card(0), Mac::of_card(256));
    }
}
