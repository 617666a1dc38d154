//! A guest's place at the network.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::addresses::Addresses;
use super::poller::{Poller, Token};
use crate::settings::queue;
use crate::{Cidr, Mac, Offloads};

/// Bytes that wait for a guest before TCP connections to it wait, too.
const FULL: usize = 1 << 20;
/// The same where its card is slow.
const LEAST_FULL: usize = 1 << 16;
/// Bytes beyond that until everything else is lost, as on a wire.
const BURST: usize = 1 << 19;

/// All that are attached, by number.
pub(super) type Ports = HashMap<u64, Port>;

/// A guest's place.
pub(super) struct Port {
    pub(super) number: u64,
    pub(super) name: String,
    pub(super) mac: Mac,
    pub(super) addresses: Addresses,
    /// What it may reach besides the internet.
    pub(super) allow: Vec<Cidr>,
    /// What its driver takes.
    pub(super) offloads: Offloads,
    /// The address that it sends from, once it has.
    pub(super) v6: Option<Ipv6Addr>,
    data: OwnedFd,
    /// Bytes that may wait before connections do.
    full: usize,
    waiting: VecDeque<Vec<u8>>,
    waiting_bytes: usize,
    /// Flows that would have sent more.
    pub(super) blocked: Vec<u64>,
    /// Frames with others' addresses so far.
    pub(super) forged: u64,
}

impl Port {
    pub(super) fn new(
        number: u64,
        (name, mac): (String, Mac),
        addresses: Addresses,
        allow: Vec<Cidr>,
        data: OwnedFd,
        bandwidth: Option<u64>,
    ) -> Port {
        Port {
            number,
            name,
            mac,
            addresses,
            allow,
            offloads: Offloads::default(),
            v6: None,
            data,
            full: queue(bandwidth, LEAST_FULL..=FULL),
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            blocked: Vec::new(),
            forged: 0,
        }
    }

    /// The address of the guest in the family of `other`.
    pub(super) fn address_like(&self, other: IpAddr) -> IpAddr {
        match other {
            IpAddr::V4(_) => self.addresses.v4.into(),
            IpAddr::V6(_) => self.v6.unwrap_or_else(|| self.addresses.v6_of(self.mac)).into(),
        }
    }

    /// Whether who can wait should.
    pub(super) fn is_full(&self) -> bool {
        self.waiting_bytes >= self.full
    }

    /// The next packet from the guest; empty at its end.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> Option<usize> {
        loop {
            match recv(&self.data, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((length, _)) => return Some(length),
                Err(Errno::INTR) => {}
                _ => return None,
            }
        }
    }

    /// Sends a packet to the guest, or keeps it until there is room.
    pub(super) fn send(&mut self, poller: &Poller, packet: &[u8]) {
        if self.waiting.is_empty() && self.try_send(packet) {
            return;
        }
        if self.waiting_bytes + packet.len() > self.full + BURST {
            return;
        }
        if self.waiting.is_empty() {
            poller.want_room(&self.data, Token::Data(self.number), true);
        }
        self.waiting_bytes += packet.len();
        self.waiting.push_back(packet.to_vec());
    }

    /// There is room; the flows that may go on now.
    pub(super) fn flush(&mut self, poller: &Poller) -> Vec<u64> {
        while let Some(packet) = self.waiting.pop_front() {
            if !self.try_send(&packet) {
                self.waiting.push_front(packet);
                return Vec::new();
            }
            self.waiting_bytes -= packet.len();
        }
        poller.want_room(&self.data, Token::Data(self.number), false);
        std::mem::take(&mut self.blocked)
    }

    /// Whether the packet is done with: only what there is no room for is not.
    fn try_send(&self, packet: &[u8]) -> bool {
        loop {
            match send(&self.data, packet, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => return false,
                _ => return true,
            }
        }
    }
}
