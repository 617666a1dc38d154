//! What is behind a network card.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{HEADER, Offloads};

/// One end of a network cable. Packets are a [`Header`](crate::Header) and an Ethernet frame
/// (destination first, without checksum), [`MAX_PACKET`](crate::MAX_PACKET) at most.
pub trait Link: Send + Sync {
    /// Sends a packet; `false` where there is no room now: wait for [`Link::readiness`] to be
    /// writable. What the link refuses is lost, as on a wire.
    fn send(&self, packet: &[u8]) -> bool;

    /// Takes the next packet that arrived; its length. One that is longer than `buffer` is cut.
    fn receive(&self, buffer: &mut [u8]) -> Option<usize>;

    /// The descriptor to wait on, a copy of it; none where nothing ever arrives.
    ///
    /// # Errors
    /// The host is short of descriptors.
    fn readiness(&self) -> io::Result<Option<OwnedFd>>;

    /// What may arrive from now on.
    fn set_offloads(&self, offloads: Offloads);
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
    fn send(&self, packet: &[u8]) -> bool {
        let (packets, bytes) = &*self.0.0;
        packets.fetch_add(1, Ordering::Relaxed);
        bytes.fetch_add(packet.len().saturating_sub(HEADER) as u64, Ordering::Relaxed);
        true
    }

    fn receive(&self, _buffer: &mut [u8]) -> Option<usize> {
        None
    }

    fn readiness(&self) -> io::Result<Option<OwnedFd>> {
        Ok(None)
    }

    fn set_offloads(&self, _offloads: Offloads) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_counted_where_the_card_cannot_see() {
        let sink = CountingSink::new();
        let counters = sink.counters();
        let link: Box<dyn Link> = Box::new(sink);
        assert!(link.send(&[0; HEADER + 60]) && link.send(&[0; HEADER + 1514]));
        assert_eq!((counters.packets(), counters.bytes()), (2, 1574));
    }
}
