//! UDP: a socket of the host for each pair of a guest's and a remote address, and replies through
//! published ports.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, SendFlags, SocketType, recv, send};

use super::env::{Env, dial};
use super::packet;
use super::poller::Token;
use super::port::{Port, Ports};
use super::publish::Published;

/// Flows of one guest.
const MOST: usize = 1024;
/// Quiet time after which one is forgotten (RFC 4787, REQ-5).
const IDLE: Duration = Duration::from_secs(120);
/// Datagrams taken from one socket in a row, so that none starves the others.
const BURST: usize = 32;

/// A guest's and a remote address, as the guest sees them.
pub(super) type Key = (u64, SocketAddr, SocketAddr);

enum Path {
    /// A socket that is connected to the remote.
    Out(OwnedFd),
    /// The published port `publish`; the client's real address.
    In { publish: u64, client: SocketAddr },
}

struct Flow {
    key: Key,
    path: Path,
    used: Instant,
}

/// All flows.
#[derive(Default)]
pub(super) struct Table {
    flows: HashMap<u64, Flow>,
    keys: HashMap<Key, u64>,
}

impl Table {
    /// A datagram from a guest; `false` where it may not go there.
    pub(super) fn outbound(
        &mut self,
        env: &mut Env,
        port: &Port,
        published: &Published,
        (guest, remote): (SocketAddr, SocketAddr),
        data: &[u8],
    ) -> bool {
        let key = (port.number, guest, remote);
        if !self.keys.contains_key(&key) {
            let Some(target) = env.target(port, remote) else { return false };
            self.open(env, key, target);
        }
        let Some(flow) = self.keys.get(&key).and_then(|number| self.flows.get_mut(number)) else {
            return true;
        };
        flow.used = Instant::now();
        match &flow.path {
            // What the host does not take now is lost, as on a wire.
            Path::Out(socket) => drop(send(socket, data, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)),
            Path::In { publish, client } => published.reply(*publish, *client, data),
        }
        true
    }

    fn open(&mut self, env: &mut Env, key: Key, target: SocketAddr) {
        if self.keys.keys().filter(|(port, ..)| *port == key.0).count() >= MOST {
            return;
        }
        let number = env.number();
        let Ok(socket) = dial(target, SocketType::DGRAM, None) else { return };
        if env.poller.watch(&socket, Token::Udp(number)).is_ok() {
            self.insert(number, key, Path::Out(socket));
        }
    }

    fn insert(&mut self, number: u64, key: Key, path: Path) {
        self.flows.insert(number, Flow { key, path, used: Instant::now() });
        self.keys.insert(key, number);
    }

    /// A datagram from outside to a guest's published port.
    pub(super) fn inbound(
        &mut self,
        env: &mut Env,
        port: &mut Port,
        publish: u64,
        (client, source, guest): (SocketAddr, SocketAddr, SocketAddr),
        data: &[u8],
    ) {
        let key = (port.number, guest, source);
        match self.keys.get(&key).and_then(|number| self.flows.get_mut(number)) {
            Some(flow) => flow.used = Instant::now(),
            None if self.keys.keys().filter(|(of, ..)| *of == port.number).count() >= MOST => return,
            None => {
                let number = env.number();
                self.insert(number, key, Path::In { publish, client });
            }
        }
        deliver(env, port, source, guest, data);
    }

    /// A socket has something.
    pub(super) fn ready(&mut self, env: &mut Env, ports: &mut Ports, number: u64) {
        let Some(flow) = self.flows.get_mut(&number) else { return };
        let (number, guest, remote) = flow.key;
        let (Path::Out(socket), Some(port)) = (&flow.path, ports.get_mut(&number)) else { return };
        let mut data = vec![0; 65536];
        for _ in 0..BURST {
            // An error is one that an ICMP message told: the guest's own timeouts see to it.
            let Ok((length, _)) = recv(socket, &mut data[..], RecvFlags::DONTWAIT) else { break };
            flow.used = Instant::now();
            deliver(env, port, remote, guest, &data[..length]);
        }
    }

    /// Forgets what is quiet.
    pub(super) fn expire(&mut self, now: Instant) {
        self.retain(|flow| now.duration_since(flow.used) < IDLE);
    }

    /// A guest has gone.
    pub(super) fn forget(&mut self, port: u64) {
        self.retain(|flow| flow.key.0 != port);
    }

    fn retain(&mut self, keep: impl Fn(&Flow) -> bool) {
        self.flows.retain(|_, flow| keep(flow));
        let flows = &self.flows;
        self.keys.retain(|_, number| flows.contains_key(number));
    }
}

fn deliver(env: &mut Env, port: &mut Port, from: SocketAddr, to: SocketAddr, data: &[u8]) {
    let ident = env.number() as u16;
    for packet in packet::fragments(packet::udp(port.mac, from, to, data), ident) {
        port.send(&env.poller, &packet);
    }
}
