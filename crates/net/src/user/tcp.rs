//! TCP: every connection of a guest ends here, at a stack of its own, and goes on in a socket of the host.
//!
//! The guest is answered only when the host's connection stands, so that a closed port looks closed. From
//! then on bytes are moved between the two ends' buffers; neither takes more than the other gives room for.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::net::{SocketType, sockopt};
use smoltcp::wire::{IpProtocol, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber};

use super::env::{Env, dial};
use super::packet::{self, Packet};
use super::poller::Token;
use super::port::{Port, Ports};
use super::splice::Splice;
use crate::user::publish;

/// Connections of one guest.
const MOST: usize = 2048;
/// How long either end may take to open or, once both have said that they have no more, to close.
const PATIENCE: Duration = Duration::from_secs(60);

/// A guest's and a remote address, as the guest sees them.
type Key = (u64, SocketAddr, SocketAddr);

enum State {
    /// The host connects; the guest's SYN waits.
    Connecting { host: OwnedFd, syn: Vec<u8> },
    /// Both ends are there.
    Open(Box<Splice>),
}

struct Flow {
    key: Key,
    state: State,
    /// Opening or closing must be over by then.
    deadline: Option<Instant>,
    timer: Option<Instant>,
    /// It is among those that wait for [`Table::settle`].
    pending: bool,
    /// It is among those that wait for room at the guest's end.
    blocked: bool,
}

/// All connections.
#[derive(Default)]
pub(super) struct Table {
    flows: HashMap<u64, Flow>,
    keys: HashMap<Key, u64>,
    counts: HashMap<u64, usize>,
    timers: BTreeSet<(Instant, u64)>,
    /// Flows that have got packets and were not stepped since, each once.
    pending: Vec<u64>,
}

impl Table {
    /// A packet from a guest; `false` where it may not go there. What it brings about is for
    /// [`Table::settle`].
    pub(super) fn outbound(&mut self, env: &mut Env, port: &mut Port, packet: &Packet<'_>) -> bool {
        let Some((guest, remote)) = packet.ports() else { return true };
        let key = (port.number, guest, remote);
        if let Some(&number) = self.keys.get(&key) {
            self.take_in(env, port, number, packet.ip);
            return true;
        }
        let Ok(tcp) = TcpPacket::new_checked(packet.payload) else { return true };
        if tcp.rst() {
            return true;
        }
        if !tcp.syn() || tcp.ack() {
            reset(env, port, packet);
            return true;
        }
        let Some(target) = env.target(port, remote) else { return false };
        if !self.connect(env, key, target, packet.ip) {
            reset(env, port, packet);
        }
        true
    }

    fn take_in(&mut self, env: &Env, port: &mut Port, number: u64, packet: &[u8]) {
        let Some(flow) = self.flows.get_mut(&number) else { return };
        // The same SYN again: the host is still at it.
        let State::Open(splice) = &mut flow.state else { return };
        splice.take(env, port, packet);
        if !std::mem::replace(&mut flow.pending, true) {
            self.pending.push(number);
        }
    }

    /// The burst of packets from the guest at `port` is over: all flows that got some go on.
    pub(super) fn settle(&mut self, env: &mut Env, port: &mut Port) {
        for number in std::mem::take(&mut self.pending) {
            self.step(env, port, number);
        }
    }

    fn connect(&mut self, env: &mut Env, key: Key, target: SocketAddr, syn: &[u8]) -> bool {
        if self.counts.get(&key.0).is_some_and(|&count| count >= MOST) {
            return false;
        }
        let Ok(host) = dial(target, SocketType::STREAM, None) else { return false };
        let number = env.number();
        if env.poller.watch_edges(&host, Token::Tcp(number)).is_err() {
            return false;
        }
        self.insert(number, key, State::Connecting { host, syn: syn.to_vec() });
        true
    }

    /// A client has come to a published port.
    pub(super) fn inbound(
        &mut self,
        env: &mut Env,
        port: &mut Port,
        client: SocketAddr,
        to: u16,
        host: OwnedFd,
    ) {
        if self.counts.get(&port.number).is_some_and(|&count| count >= MOST) {
            return;
        }
        let (mut source, guest) = publish::seen_as(&env.plan, port, client);
        let guest = SocketAddr::new(guest, to);
        // Clients that look alike to the guest get ports of their own.
        while self.keys.contains_key(&(port.number, guest, source)) {
            source.set_port(1024 + (env.number() % 60000) as u16);
        }
        let number = env.number();
        if env.poller.watch_edges(&host, Token::Tcp(number)).is_err() {
            return;
        }
        let Some(splice) = Splice::to_guest(env, port, host, guest, source) else { return };
        self.insert(number, (port.number, guest, source), State::Open(Box::new(splice)));
        self.step(env, port, number);
    }

    fn insert(&mut self, number: u64, key: Key, state: State) {
        let deadline = Some(Instant::now() + PATIENCE);
        self.flows.insert(number, Flow { key, state, deadline, timer: None, pending: false, blocked: false });
        self.keys.insert(key, number);
        *self.counts.entry(key.0).or_default() += 1;
        self.set_timer(number, deadline);
    }

    /// The host's end is ready.
    pub(super) fn ready(
        &mut self,
        env: &mut Env,
        ports: &mut Ports,
        number: u64,
        readable: bool,
        writable: bool,
    ) {
        let Some(flow) = self.flows.get_mut(&number) else { return };
        let Some(port) = ports.get_mut(&flow.key.0) else { return };
        match &mut flow.state {
            State::Open(splice) => splice.note(readable, writable),
            State::Connecting { .. } if writable => return self.connected(env, port, number),
            State::Connecting { .. } => return,
        }
        self.step(env, port, number);
    }

    /// The host's connection stands, or never will.
    fn connected(&mut self, env: &mut Env, port: &mut Port, number: u64) {
        let Some(mut flow) = self.take(number) else { return };
        let State::Connecting { host, syn } = flow.state else { return };
        let stands = matches!(sockopt::socket_error(&host), Ok(Ok(())));
        let splice = stands.then(|| Splice::from_guest(env, port, host, flow.key.2)).flatten();
        let Some(splice) = splice else {
            let parsed = if flow.key.1.is_ipv4() { Packet::v4 } else { Packet::v6 };
            if let Some(packet) = parsed(&syn) {
                reset(env, port, &packet);
            }
            return;
        };
        flow.state = State::Open(Box::new(splice));
        self.insert(number, flow.key, flow.state);
        self.take_in(env, port, number, &syn);
        self.settle(env, port);
    }

    /// There is room at the guest's end again.
    pub(super) fn unblock(&mut self, env: &mut Env, port: &mut Port, number: u64) {
        if let Some(flow) = self.flows.get_mut(&number) {
            flow.blocked = false;
        }
        self.step(env, port, number);
    }

    /// Moves what can be moved.
    fn step(&mut self, env: &mut Env, port: &mut Port, number: u64) {
        let Some(flow) = self.flows.get_mut(&number) else { return };
        flow.pending = false;
        let State::Open(splice) = &mut flow.state else { return };
        let next = splice.step(env, port);
        if port.is_full() && !std::mem::replace(&mut flow.blocked, true) {
            port.blocked.push(number);
        }
        if splice.is_over() {
            self.take(number);
            return;
        }
        flow.deadline = match splice.is_settled() {
            true => None,
            false => flow.deadline.or_else(|| Some(Instant::now() + PATIENCE)),
        };
        let timer = next.into_iter().chain(flow.deadline).min();
        self.set_timer(number, timer);
    }

    fn set_timer(&mut self, number: u64, timer: Option<Instant>) {
        let Some(flow) = self.flows.get_mut(&number) else { return };
        if flow.timer == timer {
            return;
        }
        if let Some(old) = std::mem::replace(&mut flow.timer, timer) {
            self.timers.remove(&(old, number));
        }
        self.timers.extend(timer.map(|timer| (timer, number)));
    }

    /// Serves the timers that are due; when the next one is.
    pub(super) fn expire(&mut self, env: &mut Env, ports: &mut Ports, now: Instant) -> Option<Instant> {
        while let Some(&(due, number)) = self.timers.first().filter(|(due, _)| *due <= now) {
            self.timers.remove(&(due, number));
            let Some(flow) = self.flows.get_mut(&number) else { continue };
            flow.timer = None;
            let Some(port) = ports.get_mut(&flow.key.0) else { continue };
            let late = flow.deadline.is_some_and(|deadline| deadline <= now);
            match &mut flow.state {
                State::Open(splice) if late => splice.abort(),
                State::Connecting { .. } if late => {
                    self.take(number);
                    continue;
                }
                _ => {}
            }
            self.step(env, port, number);
        }
        self.timers.first().map(|(due, _)| *due)
    }

    fn take(&mut self, number: u64) -> Option<Flow> {
        let flow = self.flows.remove(&number)?;
        self.keys.remove(&flow.key);
        if let Some(timer) = flow.timer {
            self.timers.remove(&(timer, number));
        }
        if let Some(count) = self.counts.get_mut(&flow.key.0) {
            *count -= 1;
        }
        Some(flow)
    }

    /// Connections, in whichever state.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.flows.len()
    }

    /// A guest has gone.
    pub(super) fn forget(&mut self, port: u64) {
        let gone: Vec<u64> =
            self.flows.iter().filter(|(_, flow)| flow.key.0 == port).map(|(&n, _)| n).collect();
        gone.into_iter().for_each(|number| drop(self.take(number)));
        self.counts.remove(&port);
    }
}

/// Answers a segment that belongs to nothing (RFC 9293, 3.10.7.1).
fn reset(env: &Env, port: &mut Port, packet: &Packet<'_>) {
    let Ok(tcp) = TcpPacket::new_checked(packet.payload) else { return };
    let (seq_number, ack_number) = match tcp.ack() {
        true => (tcp.ack_number(), None),
        false => (TcpSeqNumber(0), Some(tcp.seq_number() + tcp.segment_len())),
    };
    let repr = TcpRepr {
        src_port: tcp.dst_port(),
        dst_port: tcp.src_port(),
        control: TcpControl::Rst,
        seq_number,
        ack_number,
        window_len: 0,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let (src, dst): (IpAddr, IpAddr) = (packet.dst, packet.src);
    let reply = packet::ip(port.mac, (src, dst), IpProtocol::Tcp, None, repr.buffer_len(), |payload| {
        let mut packet = TcpPacket::new_unchecked(payload);
        repr.emit(&mut packet, &src.into(), &dst.into(), &smoltcp::phy::ChecksumCapabilities::default());
    });
    port.send(&env.poller, &reply);
}
