//! Names: those of the network's VMs are answered here, all others by the host's resolvers.

use std::collections::HashMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant, SystemTime};

use rustix::net::{RecvFlags, SendFlags, SocketType, recv, send};
use smoltcp::wire::{DnsFlags, DnsOpcode, DnsPacket, DnsQueryType};

use super::dhcp::DOMAIN;
use super::env::{Env, dial};
use super::packet;
use super::poller::Token;
use super::port::{Port, Ports};

/// The well-known port.
pub(super) const PORT: u16 = 53;
/// What says which resolvers the host has.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";
/// How often the host's resolvers are looked up.
const FRESH: Duration = Duration::from_secs(5);
/// How long one of them may take before the next is asked.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often a question is asked in all.
const TRIES: usize = 4;
/// Questions under way, for each guest.
const MOST: usize = 128;
/// Seconds that a VM's address may be remembered.
const TTL: u32 = 10;
/// The gateway's own name.
const GATEWAY: &str = "gateway";

const TYPE_PTR: u16 = 12;
/// Response codes (RFC 1035, 4.1.1).
const NO_ERROR: u8 = 0;
const NAME_ERROR: u8 = 3;
const HEADER: usize = 12;

/// The host's resolvers (resolv.conf(5)).
pub(super) struct Resolvers {
    servers: Vec<SocketAddr>,
    looked: Option<Instant>,
    changed: Option<SystemTime>,
}

impl Resolvers {
    pub(super) fn new() -> Resolvers {
        Resolvers { servers: Vec::new(), looked: None, changed: None }
    }

    /// These, until the host's file changes.
    #[cfg(test)]
    pub(super) fn these(servers: Vec<SocketAddr>) -> Resolvers {
        let changed = fs::metadata(RESOLV_CONF).and_then(|file| file.modified()).ok();
        Resolvers { servers, looked: Some(Instant::now()), changed }
    }

    pub(super) fn first(&mut self) -> Option<SocketAddr> {
        self.nth(0)
    }

    fn nth(&mut self, index: usize) -> Option<SocketAddr> {
        if self.looked.is_none_or(|looked| looked.elapsed() > FRESH) {
            self.looked = Some(Instant::now());
            self.look();
        }
        let count = self.servers.len();
        (count > 0).then(|| self.servers[index % count])
    }

    fn look(&mut self) {
        let changed = fs::metadata(RESOLV_CONF).and_then(|file| file.modified()).ok();
        if changed.is_some() && changed == self.changed {
            return;
        }
        // Where it cannot be read, what it said last stands.
        if let Ok(text) = fs::read_to_string(RESOLV_CONF) {
            (self.servers, self.changed) = (servers(&text), changed);
        }
    }
}

fn servers(text: &str) -> Vec<SocketAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        let address = words.next().filter(|&word| word == "nameserver").and(words.next())?;
        // A link-local one names its interface, which needs a number that we do not have.
        Some(SocketAddr::new(address.parse().ok()?, PORT))
    };
    text.lines().filter_map(server).take(3).collect()
}

/// What is asked: a name in lower case without its last dot, and a type.
struct Question<'a> {
    name: String,
    kind: u16,
    /// Header and question, as they begin an answer.
    start: &'a [u8],
}

fn parse(message: &[u8]) -> Option<Question<'_>> {
    let packet = DnsPacket::new_checked(message).ok()?;
    let query = !packet.flags().contains(DnsFlags::RESPONSE) && packet.opcode() == DnsOpcode::Query;
    if !query || packet.question_count() != 1 {
        return None;
    }
    let mut name = String::new();
    let mut at = HEADER;
    loop {
        let length = usize::from(*message.get(at)?);
        if length == 0 {
            break;
        }
        // Longer ones are pointers, for which a lone question has no use.
        let label = message.get(at + 1..at + 1 + length).filter(|_| length < 64)?;
        if !name.is_empty() {
            name.push('.');
        }
        name.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
        at += 1 + length;
    }
    let rest: &[u8; 4] = message.get(at + 1..at + 5)?.try_into().ok()?;
    let internet = rest[2..] == [0, 1];
    internet.then(|| Question {
        name,
        kind: u16::from_be_bytes([rest[0], rest[1]]),
        start: &message[..at + 5],
    })
}

/// An answer of our own.
fn reply(question: &Question<'_>, code: u8, records: &[Vec<u8>]) -> Vec<u8> {
    let mut reply = question.start.to_vec();
    reply[2] = 0x84 | (reply[2] & 1); // response, authoritative; "recursion desired" as it came
    reply[3] = 0x80 | code; // recursion available
    reply[4..HEADER].copy_from_slice(&[0, 1, 0, records.len() as u8, 0, 0, 0, 0]);
    for data in records {
        reply.extend([0xc0, HEADER as u8]); // the name in the question
        reply.extend(question.kind.to_be_bytes());
        reply.extend([0, 1]);
        reply.extend(TTL.to_be_bytes());
        reply.extend((data.len() as u16).to_be_bytes());
        reply.extend(data);
    }
    reply
}

/// The answer to a question about the network itself; nothing where it is about the world.
fn own(question: &Question<'_>, env: &Env, ports: &Ports) -> Option<Vec<u8>> {
    if let Some(address) = reverse(&question.name).filter(|&address| env.plan.contains(address)) {
        let port = ports.values().find(|port| port.addresses.contains(address));
        let name = port.map(|port| port.name.as_str()).or(env.plan.is_gateway(address).then_some(GATEWAY));
        let record = name.filter(|_| question.kind == TYPE_PTR).map(wire_name);
        let code = if name.is_some() { NO_ERROR } else { NAME_ERROR };
        return Some(reply(question, code, record.as_slice()));
    }
    let (name, inside) = match question.name.strip_suffix(DOMAIN).and_then(|name| name.strip_suffix('.')) {
        Some(name) => (name, true),
        None => (question.name.as_str(), question.name == DOMAIN),
    };
    let port = ports.values().find(|port| port.name == name);
    if port.is_none() && name != GATEWAY {
        return inside.then(|| reply(question, NAME_ERROR, &[]));
    }
    let v6 = port.map_or(Some(env.plan.gateway_v6()), |port| port.v6);
    let v4 = port.map_or(env.plan.gateway_v4(), |port| port.addresses.v4);
    let record = match DnsQueryType::from(question.kind) {
        DnsQueryType::A => Some(v4.octets().to_vec()),
        DnsQueryType::Aaaa => v6.map(|v6| v6.octets().to_vec()),
        _ => None,
    };
    Some(reply(question, NO_ERROR, record.as_slice()))
}

fn wire_name(name: &str) -> Vec<u8> {
    let mut wire = Vec::new();
    for label in [name, DOMAIN] {
        wire.push(label.len() as u8);
        wire.extend(label.as_bytes());
    }
    wire.push(0);
    wire
}

/// The address that a name in in-addr.arpa or ip6.arpa stands for.
fn reverse(name: &str) -> Option<IpAddr> {
    if let Some(v4) = name.strip_suffix(".in-addr.arpa") {
        let parts: Vec<u8> = v4.rsplit('.').map(str::parse).collect::<Result<_, _>>().ok()?;
        return <[u8; 4]>::try_from(parts).ok().map(IpAddr::from);
    }
    let nibbles = name.strip_suffix(".ip6.arpa")?;
    let digits: String = nibbles.rsplit('.').collect();
    let whole = nibbles.len() == 63 && digits.len() == 32;
    whole.then(|| u128::from_str_radix(&digits, 16).ok().map(|bits| IpAddr::V6(bits.into())))?
}

/// A question under way.
struct Pending {
    port: u64,
    guest: SocketAddr,
    gateway: SocketAddr,
    question: Vec<u8>,
    socket: OwnedFd,
    tries: usize,
    deadline: Instant,
}

/// The questions under way.
#[derive(Default)]
pub(super) struct Relay(HashMap<u64, Pending>);

impl Relay {
    /// A guest asks.
    pub(super) fn ask(
        &mut self,
        env: &mut Env,
        ports: &mut Ports,
        port: u64,
        (guest, gateway): (SocketAddr, SocketAddr),
        message: &[u8],
    ) {
        let Some(question) = parse(message) else { return };
        if let Some(answer) = own(&question, env, ports) {
            if let Some(port) = ports.get_mut(&port) {
                deliver(env, port, (gateway, guest), &answer);
            }
            return;
        }
        if self.0.values().filter(|pending| pending.port == port).count() >= MOST {
            return;
        }
        let number = env.number();
        if let Some((socket, deadline)) = forward(env, number, message, 0) {
            let question = message.to_vec();
            self.0.insert(number, Pending { port, guest, gateway, question, socket, tries: 1, deadline });
        }
    }

    /// A resolver has answered, or cannot.
    pub(super) fn answered(&mut self, env: &mut Env, ports: &mut Ports, number: u64) {
        let Some(pending) = self.0.get(&number) else { return };
        let mut answer = vec![0; 65536];
        match recv(&pending.socket, &mut answer[..], RecvFlags::DONTWAIT) {
            Ok((length, _)) => answer.truncate(length),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
            Err(_) => return self.again(env, number),
        }
        // The socket is connected, so that nobody else's answer gets here; a stray one is waited out.
        if answer.get(..2) != pending.question.get(..2) || answer.len() < HEADER {
            return;
        }
        if let Some(port) = ports.get_mut(&pending.port) {
            deliver(env, port, (pending.gateway, pending.guest), &answer);
        }
        self.0.remove(&number);
    }

    /// Asks others where one takes too long; when to look again.
    pub(super) fn expire(&mut self, env: &mut Env, now: Instant) -> Option<Instant> {
        let due: Vec<u64> = self.0.iter().filter(|(_, p)| p.deadline <= now).map(|(&n, _)| n).collect();
        due.into_iter().for_each(|number| self.again(env, number));
        self.0.values().map(|pending| pending.deadline).min()
    }

    fn again(&mut self, env: &mut Env, number: u64) {
        let Some(mut pending) = self.0.remove(&number) else { return };
        if pending.tries >= TRIES {
            return;
        }
        let number = env.number();
        if let Some((socket, deadline)) = forward(env, number, &pending.question, pending.tries) {
            (pending.socket, pending.deadline) = (socket, deadline);
            pending.tries += 1;
            self.0.insert(number, pending);
        }
    }

    /// A guest has gone.
    pub(super) fn forget(&mut self, port: u64) {
        self.0.retain(|_, pending| pending.port != port);
    }
}

/// Asks the host's resolver number `index`, from a socket of the question's own: its random port is part
/// of what a forger would have to guess.
fn forward(env: &mut Env, number: u64, question: &[u8], index: usize) -> Option<(OwnedFd, Instant)> {
    let server = env.resolvers.nth(index)?;
    let socket = dial(server, SocketType::DGRAM, None).ok()?;
    send(&socket, question, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).ok()?;
    env.poller.watch(&socket, Token::Dns(number)).ok()?;
    Some((socket, Instant::now() + PATIENCE))
}

fn deliver(env: &mut Env, port: &mut Port, (from, to): (SocketAddr, SocketAddr), answer: &[u8]) {
    let ident = env.number() as u16;
    for packet in packet::fragments(packet::udp(port.mac, from, to, answer), ident) {
        port.send(&env.poller, &packet);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_are_read_as_the_manual_says() {
        let text = "# nameserver 1.1.1.1\nsearch example.org\nnameserver 10.0.0.1\n nameserver\t::1 \nnameserver fe80::1%2\n\
                    nameserver 9.9.9.9\nnameserver 8.8.8.8";
        let found: Vec<_> = servers(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.0.0.1:53", "[::1]:53", "9.9.9.9:53"]);
    }

    #[test]
    fn names_of_addresses_are_read() {
        assert_eq!(reverse("2.0.200.10.in-addr.arpa"), Some("10.200.0.2".parse().unwrap()));
        let v6 = "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa";
        assert_eq!(reverse(v6), Some("fd00::1".parse().unwrap()));
        for bad in ["200.10.in-addr.arpa", "x.0.200.10.in-addr.arpa", "1.ip6.arpa", "example.org"] {
            assert_eq!(reverse(bad), None, "{bad}");
        }
    }

    #[test]
    fn questions_that_lie_about_their_length_are_none() {
        let mut message = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 3, b'W', b'e', b'b', 0, 0, 1, 0, 1];
        let question = parse(&message).unwrap();
        assert_eq!((question.name.as_str(), question.kind, question.start.len()), ("web", 1, message.len()));
        for length in 0..message.len() {
            assert!(parse(&message[..length]).is_none());
        }
        message[12] = 0xc0; // a pointer
        assert!(parse(&message).is_none());
        message[12] = 60;
        assert!(parse(&message).is_none());
    }
}
