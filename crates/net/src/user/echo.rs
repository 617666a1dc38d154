//! Pings to the world, through sockets of the host (ICMP echo only).

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, SendFlags, SocketType, ipproto, recv, send};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, Icmpv6Repr, IpProtocol};

use super::env::{Env, dial};
use super::local;
use super::packet::Packet;
use super::poller::Token;
use super::port::{Port, Ports};

/// Remotes that one guest pings at a time.
const MOST: usize = 64;
const IDLE: Duration = Duration::from_secs(30);

type Key = (u64, IpAddr, u16);

struct Flow {
    key: Key,
    guest: IpAddr,
    socket: OwnedFd,
    /// A raw socket gets everybody's replies; this identifier is ours alone. An unprivileged one's is the
    /// kernel's.
    raw: Option<u16>,
    used: Instant,
}

/// All pings under way.
#[derive(Default)]
pub(super) struct Table {
    flows: HashMap<u64, Flow>,
    told: bool,
}

/// An echo request or reply.
struct Echo<'a> {
    request: bool,
    ident: u16,
    sequence: u16,
    data: &'a [u8],
}

impl Echo<'_> {
    fn v4(bytes: &[u8]) -> Option<Echo<'_>> {
        let packet = Icmpv4Packet::new_checked(bytes).ok()?;
        match Icmpv4Repr::parse(&packet, &ChecksumCapabilities::ignored()).ok()? {
            Icmpv4Repr::EchoRequest { ident, seq_no, data } => {
                Some(Echo { request: true, ident, sequence: seq_no, data })
            }
            Icmpv4Repr::EchoReply { ident, seq_no, data } => {
                Some(Echo { request: false, ident, sequence: seq_no, data })
            }
            _ => None,
        }
    }

    /// ICMPv6 has the same fields at the same places under other types (RFC 4443, 4.1).
    fn v6(bytes: &[u8]) -> Option<Echo<'_>> {
        let word = |at: usize| Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
        let request = match bytes.first()? {
            128 => true,
            129 => false,
            _ => return None,
        };
        Some(Echo { request, ident: word(4)?, sequence: word(6)?, data: bytes.get(8..)? })
    }

    fn of(protocol: IpProtocol, bytes: &[u8]) -> Option<Echo<'_>> {
        if protocol == IpProtocol::Icmp { Echo::v4(bytes) } else { Echo::v6(bytes) }
    }

    /// A request for the host to send; an ICMPv6 checksum is the kernel's.
    fn request_bytes(&self, v4: bool, ident: u16) -> Vec<u8> {
        if v4 {
            let repr = Icmpv4Repr::EchoRequest { ident, seq_no: self.sequence, data: self.data };
            let mut bytes = vec![0; repr.buffer_len()];
            repr.emit(&mut Icmpv4Packet::new_unchecked(&mut bytes[..]), &ChecksumCapabilities::default());
            return bytes;
        }
        let mut bytes = vec![128, 0, 0, 0];
        bytes.extend(ident.to_be_bytes());
        bytes.extend(self.sequence.to_be_bytes());
        bytes.extend(self.data);
        bytes
    }
}

impl Table {
    /// An ICMP message from a guest to the world; `false` where it may not go there.
    pub(super) fn outbound(&mut self, env: &mut Env, port: &Port, packet: &Packet<'_>) -> bool {
        let Some(echo) = Echo::of(packet.protocol, packet.payload).filter(|echo| echo.request) else {
            return true;
        };
        let Some(target) = env.target(port, SocketAddr::new(packet.dst, 7)) else { return false };
        let key = (port.number, packet.dst, echo.ident);
        if !self.flows.values().any(|flow| flow.key == key) {
            self.open(env, key, packet.src, target.ip());
        }
        if let Some(flow) = self.flows.values_mut().find(|flow| flow.key == key) {
            flow.used = Instant::now();
            let bytes = echo.request_bytes(target.is_ipv4(), flow.raw.unwrap_or(echo.ident));
            let _ = send(&flow.socket, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL); // or is lost
        }
        true
    }

    fn open(&mut self, env: &mut Env, key: Key, guest: IpAddr, target: IpAddr) {
        if self.flows.values().filter(|flow| flow.key.0 == key.0).count() >= MOST {
            return;
        }
        let number = env.number();
        let to = SocketAddr::new(target, 0);
        let protocol = Some(if target.is_ipv4() { ipproto::ICMP } else { ipproto::ICMPV6 });
        let unprivileged = dial(to, SocketType::DGRAM, protocol).map(|socket| (socket, None));
        let raw = || dial(to, SocketType::RAW, protocol).map(|socket| (socket, Some(number as u16)));
        match unprivileged.or_else(|_| raw()) {
            Ok((socket, raw)) => {
                if env.poller.watch(&socket, Token::Echo(number)).is_ok() {
                    self.flows.insert(number, Flow { key, guest, socket, raw, used: Instant::now() });
                }
            }
            Err(error) if !self.told => {
                self.told = true;
                log::warn!(
                    "guests cannot ping the world: the host gives us no ICMP socket ({error}); \
                     sysctl net.ipv4.ping_group_range='0 2147483647' lets everybody have one"
                );
            }
            Err(_) => {}
        }
    }

    /// A socket has something.
    pub(super) fn ready(&mut self, env: &mut Env, ports: &mut Ports, number: u64) {
        let Some(flow) = self.flows.get(&number) else { return };
        let Some(port) = ports.get_mut(&flow.key.0) else { return };
        let mut bytes = vec![0; 65536];
        while let Ok((length, _)) = recv(&flow.socket, &mut bytes[..], RecvFlags::DONTWAIT) {
            flow.answer(env, port, &bytes[..length]);
        }
    }

    /// Forgets what is quiet.
    pub(super) fn expire(&mut self, now: Instant) {
        self.flows.retain(|_, flow| now.duration_since(flow.used) < IDLE);
    }

    /// A guest has gone.
    pub(super) fn forget(&mut self, port: u64) {
        self.flows.retain(|_, flow| flow.key.0 != port);
    }
}

impl Flow {
    fn answer(&self, env: &Env, port: &mut Port, bytes: &[u8]) {
        let (_, remote, ident) = self.key;
        let (protocol, raw_v4) = match remote {
            IpAddr::V4(_) => (IpProtocol::Icmp, self.raw.is_some()),
            IpAddr::V6(_) => (IpProtocol::Icmpv6, false),
        };
        // A raw IPv4 socket's packets come with their IP headers (raw(7)).
        let start = if raw_v4 { usize::from(bytes.first().unwrap_or(&0) & 15) * 4 } else { 0 };
        let Some(echo) = bytes.get(start..).and_then(|bytes| Echo::of(protocol, bytes)) else { return };
        if echo.request || self.raw.is_some_and(|raw| raw != echo.ident) {
            return;
        }
        let (sequence, data) = (echo.sequence, echo.data);
        let packet = match (remote, self.guest) {
            (IpAddr::V6(remote), IpAddr::V6(guest)) => {
                let repr = Icmpv6Repr::EchoReply { ident, seq_no: sequence, data };
                local::icmp_v6_packet(port, (remote, guest), None, &repr)
            }
            _ => {
                let repr = Icmpv4Repr::EchoReply { ident, seq_no: sequence, data };
                local::icmp_v4_packet(port, remote, self.guest, &repr)
            }
        };
        port.send(&env.poller, &packet);
    }
}
