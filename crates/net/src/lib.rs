//! Network links behind one trait, and what users say about networks.
//!
//! A network card sends Ethernet frames into a [`Link`] and takes those that arrive from the
//! receiver it registers. [`CountingSink`] is a cable with nobody at its other end.

mod cidr;
mod mac;
mod publish;
mod settings;
mod text;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use cidr::{BadCidr, Cidr};
pub use mac::Mac;
pub use publish::{BadPublish, Protocol, Publish};
pub use settings::{BadNetwork, NetworkMode, NetworkSettings};

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
}
