//! The user-mode network: a process that stands between guests and the host's own sockets.
//!
//! It switches nothing. A guest's neighbour on its cable is the gateway alone, which answers for everybody
//! (`local.rs`), hands out addresses (`dhcp.rs`, router advertisements) and names (`dns.rs`), and passes
//! IP packets on: to the world by sockets of the host (`tcp.rs` and `splice.rs`, `udp.rs`, `echo.rs`) where
//! `policy.rs` lets it, and to other guests of the same network. A packet whose source is not its sender's
//! is dropped before anybody looks at it ([`Network::route`]), so that no guest can speak for another.
//!
//! One thread, one epoll. What a guest can make it hold is bounded: connections, flows, questions, bytes
//! that wait for a guest. What cannot be had at once is waited for (TCP) or lost as on a wire (the rest).

mod addresses;
mod dhcp;
mod dns;
mod echo;
mod env;
mod local;
mod members;
mod packet;
mod policy;
mod poller;
mod port;
mod publish;
mod splice;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::net::{SocketFlags, accept_with};
use smoltcp::wire::{EthernetFrame, EthernetProtocol, IpProtocol};

use crate::{HEADER, Header, MAX_PACKET};
use addresses::Plan;
pub use dns::RESOLV_CONF;
use env::Env;
use members::{Members, News};
use packet::Packet;
use poller::{Poller, Token};
use port::{Port, Ports};
use publish::{Arrival, Published};

/// Packets taken from one guest in a row, so that none starves the others.
const BURST: usize = 64;
/// How often what is quiet is forgotten, and guests hear that there is a router.
const HOUSEKEEPING: Duration = Duration::from_secs(10);
const ADVERTISE: Duration = Duration::from_secs(300);
/// How long a shared network waits for its first VM, or for another one after the last has left.
const LINGER: Duration = Duration::from_secs(3);

/// Where VMs come from.
pub enum Door {
    /// A VM's control connection: the network is its own, and ends with it.
    Private(OwnedFd),
    /// A listening socket: everybody of the same user.
    Shared {
        /// The socket.
        listener: OwnedFd,
        /// The network's name.
        name: String,
    },
}

/// Runs a network until its last VM has left.
///
/// # Errors
/// The host would not give what it needs.
pub fn run(door: Door) -> io::Result<()> {
    Network::new(door)?.run()
}

struct Network {
    env: Env,
    ports: Ports,
    members: Members,
    published: Published,
    listener: Option<OwnedFd>,
    tcp: tcp::Table,
    udp: udp::Table,
    echo: echo::Table,
    dns: dns::Relay,
    /// When what is quiet is next forgotten.
    housekeeping: Instant,
    /// When guests next hear that there is a router.
    advertise: Instant,
    /// When somebody was last attached.
    alone_since: Instant,
}

impl Network {
    fn new(door: Door) -> io::Result<Network> {
        let name = match &door {
            Door::Private(_) => "",
            Door::Shared { name, .. } => name,
        };
        let now = Instant::now();
        let mut network = Network {
            env: Env::new(Poller::new()?, Plan::new(name)),
            ports: Ports::new(),
            members: Members::default(),
            published: Published::default(),
            listener: None,
            tcp: tcp::Table::default(),
            udp: udp::Table::default(),
            echo: echo::Table::default(),
            dns: dns::Relay::default(),
            housekeeping: now,
            advertise: now,
            alone_since: now,
        };
        match door {
            Door::Private(control) => network.members.admit(&mut network.env, control)?,
            Door::Shared { listener, .. } => {
                rustix::io::ioctl_fionbio(&listener, true)?;
                network.env.poller.watch(&listener, Token::Listener)?;
                network.listener = Some(listener);
            }
        }
        Ok(network)
    }

    fn run(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; MAX_PACKET];
        while self.turn(&mut buffer, LINGER)? {}
        Ok(())
    }

    /// Does what is due, then waits for events, for `patience` at most, and serves them; `false` once nobody
    /// is left.
    fn turn(&mut self, buffer: &mut [u8], patience: Duration) -> io::Result<bool> {
        let now = Instant::now();
        if !self.members.is_empty() {
            self.alone_since = now;
        } else if self.listener.is_none() || now - self.alone_since > LINGER {
            return Ok(false);
        }
        if now >= self.housekeeping {
            self.housekeeping = now + HOUSEKEEPING;
            self.udp.expire(now);
            self.echo.expire(now);
        }
        if now >= self.advertise {
            self.advertise = now + ADVERTISE;
            self.ports.values_mut().for_each(|port| welcome(&self.env, port));
        }
        let next =
            [self.tcp.expire(&mut self.env, &mut self.ports, now), self.dns.expire(&mut self.env, now)];
        let next = next.into_iter().flatten().min();
        let patience = next.map_or(patience, |next| next.saturating_duration_since(now).min(patience));
        for ready in self.env.poller.wait(patience.as_micros().div_ceil(1000) as u64)? {
            self.serve(ready, buffer);
        }
        Ok(true)
    }

    fn serve(&mut self, ready: poller::Ready, buffer: &mut [u8]) {
        let poller::Ready { token, readable, writable } = ready;
        match token {
            Token::Listener => self.accept(),
            Token::Control(number) => self.hear(number),
            Token::Data(number) => {
                if writable {
                    self.unblock(number);
                }
                if readable {
                    self.receive(number, buffer);
                }
            }
            Token::Publish(number) => self.arrivals(number),
            Token::Tcp(number) => self.tcp.ready(&mut self.env, &mut self.ports, number, readable, writable),
            Token::Udp(number) => self.udp.ready(&mut self.env, &mut self.ports, number),
            Token::Echo(number) => self.echo.ready(&mut self.env, &mut self.ports, number),
            Token::Dns(number) => self.dns.answered(&mut self.env, &mut self.ports, number),
        }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        while let Ok(socket) = accept_with(listener, SocketFlags::CLOEXEC) {
            if let Err(error) = self.members.admit(&mut self.env, socket) {
                log::warn!("a VM was not let into the network: {error}");
            }
        }
    }

    fn hear(&mut self, number: u64) {
        let alone = self.listener.is_none();
        let news = self.members.hear(&mut self.env, &mut self.ports, &mut self.published, alone, number);
        for news in news {
            match news {
                News::Met | News::Came => {}
                News::Offloads(offloads) => {
                    if let Some(port) = self.ports.get_mut(&number) {
                        port.offloads = offloads;
                        welcome(&self.env, port);
                    }
                }
                News::Left => self.forget(number),
            }
        }
    }

    fn forget(&mut self, number: u64) {
        self.tcp.forget(number);
        self.udp.forget(number);
        self.echo.forget(number);
        self.dns.forget(number);
        self.published.forget(number);
        self.ports.remove(&number);
    }

    /// A guest's end of its cable has room again.
    fn unblock(&mut self, number: u64) {
        let Some(port) = self.ports.get_mut(&number) else { return };
        for flow in port.flush(&self.env.poller) {
            self.tcp.unblock(&mut self.env, port, flow);
        }
    }

    fn arrivals(&mut self, number: u64) {
        for incoming in self.published.take(number) {
            let Some(port) = self.ports.get_mut(&incoming.port) else { continue };
            match incoming.arrival {
                Arrival::Connection(host) => {
                    self.tcp.inbound(&mut self.env, port, incoming.client, incoming.guest, host);
                }
                Arrival::Datagram(data) => {
                    let (source, guest) = publish::seen_as(&self.env.plan, port, incoming.client);
                    let who = (incoming.client, source, SocketAddr::new(guest, incoming.guest));
                    self.udp.inbound(&mut self.env, port, number, who, &data);
                }
            }
        }
    }

    fn receive(&mut self, number: u64, buffer: &mut [u8]) {
        for _ in 0..BURST {
            let Some(length) = self.ports.get(&number).and_then(|port| port.receive(buffer)) else { break };
            // Its end, which would be there to be read for ever.
            if length == 0 {
                self.members.remove(number);
                return self.forget(number);
            }
            self.route(number, &mut buffer[..length]);
        }
        if let Some(port) = self.ports.get_mut(&number) {
            self.tcp.settle(&mut self.env, port);
        }
    }

    /// A packet from a guest: nothing in it is true before it was checked.
    fn route(&mut self, number: u64, bytes: &mut [u8]) -> Option<()> {
        let port = self.ports.get_mut(&number)?;
        let frame = EthernetFrame::new_checked(bytes.get(HEADER..)?).ok()?;
        if frame.src_addr().0 != port.mac.0 {
            return forged(port, "Ethernet", frame.src_addr());
        }
        let packet = match frame.ethertype() {
            EthernetProtocol::Arp => return self.arp(number, HEADER + packet::ETHERNET, bytes),
            EthernetProtocol::Ipv4 => Packet::v4(bytes.get(HEADER + packet::ETHERNET..)?)?,
            EthernetProtocol::Ipv6 => Packet::v6(bytes.get(HEADER + packet::ETHERNET..)?)?,
            _ => return None,
        };
        let unspecified = packet.src.is_unspecified();
        let local = matches!(packet.src, IpAddr::V6(v6) if v6.is_unicast_link_local());
        if !port.addresses.contains(packet.src) && !unspecified && !local {
            return forged(port, "IP", packet.src);
        }
        if let (IpAddr::V6(v6), false, false) = (packet.src, unspecified, local) {
            port.v6 = Some(v6);
        }
        let for_us = self.env.plan.is_gateway(packet.dst) || is_for_all(packet.dst);
        match (for_us, unspecified || local) {
            (true, _) => self.answer(number, &packet),
            // Without an address of its own it can talk to the gateway alone.
            (false, true) => None,
            (false, false) if self.env.plan.contains(packet.dst) => {
                let (dst, header) = (packet.dst, packet.vouched(&Header::parse(bytes)?)?);
                bytes[..HEADER].copy_from_slice(&header.bytes());
                self.hand_over(number, dst, bytes)
            }
            (false, false) => self.send_out(number, &packet),
        }
    }

    fn arp(&mut self, number: u64, start: usize, bytes: &[u8]) -> Option<()> {
        let port = self.ports.get(&number)?;
        let taken = |address: Ipv4Addr| self.ports.values().any(|port| port.addresses.v4 == address);
        let reply = local::arp(port, &self.env.plan, bytes.get(start..)?, taken)?;
        self.reply(number, &reply)
    }

    fn reply(&mut self, number: u64, packet: &[u8]) -> Option<()> {
        self.ports.get_mut(&number)?.send(&self.env.poller, packet);
        Some(())
    }

    fn answer(&mut self, number: u64, packet: &Packet<'_>) -> Option<()> {
        let port = self.ports.get(&number)?;
        let plan = &self.env.plan;
        let reply = match packet.protocol {
            IpProtocol::Icmp if plan.is_gateway(packet.dst) => local::icmp_v4(port, packet)?,
            IpProtocol::Icmpv6 => local::icmp_v6(port, plan, packet)?,
            IpProtocol::Udp => {
                let (_, to) = packet.ports()?;
                match to.port() {
                    dhcp::SERVER => dhcp::answer(port, plan, packet.datagram()?)?,
                    _ if packet.src.is_unspecified() => return None,
                    dns::PORT => {
                        let (env, ports) = (&mut self.env, &mut self.ports);
                        self.dns.ask(env, ports, number, packet.ports()?, packet.datagram()?);
                        return Some(());
                    }
                    _ => return self.send_out(number, packet),
                }
            }
            IpProtocol::Tcp if !packet.src.is_unspecified() => return self.send_out(number, packet),
            _ => return None,
        };
        self.reply(number, &reply)
    }

    /// To another guest of the network, whose cable it enters as from the gateway. What its header asks for
    /// was vouched for.
    fn hand_over(&mut self, number: u64, dst: IpAddr, bytes: &mut [u8]) -> Option<()> {
        let neighbour =
            self.ports.values_mut().find(|port| port.addresses.contains(dst) && port.number != number)?;
        if !Header::parse(bytes)?.suits(neighbour.offloads) {
            if Header::parse(bytes)?.gso_type != 0 {
                return None;
            }
            packet::complete_checksum(bytes)?;
        }
        if dst.is_ipv6() {
            packet::leave_link(bytes)?;
        }
        let mac = neighbour.mac;
        let mut frame = EthernetFrame::new_unchecked(bytes.get_mut(HEADER..)?);
        frame.set_src_addr(smoltcp::wire::EthernetAddress(packet::GATEWAY_MAC.0));
        frame.set_dst_addr(smoltcp::wire::EthernetAddress(mac.0));
        neighbour.send(&self.env.poller, bytes);
        Some(())
    }

    fn send_out(&mut self, number: u64, packet: &Packet<'_>) -> Option<()> {
        let port = self.ports.get_mut(&number)?;
        let env = &mut self.env;
        let permitted = match packet.protocol {
            IpProtocol::Tcp => self.tcp.outbound(env, port, packet),
            IpProtocol::Udp => {
                self.udp.outbound(env, port, &self.published, packet.ports()?, packet.datagram()?)
            }
            IpProtocol::Icmp | IpProtocol::Icmpv6 => self.echo.outbound(env, port, packet),
            _ => false,
        };
        if permitted || is_for_all(packet.dst) {
            return Some(());
        }
        let refusal = local::prohibited(port, &self.env.plan, packet)?;
        self.reply(number, &refusal)
    }
}

/// Tells a guest that there is a router, before it asks.
fn welcome(env: &Env, port: &mut Port) {
    let advertisement = local::advertisement(port, &env.plan);
    port.send(&env.poller, &advertisement);
}

fn is_for_all(address: IpAddr) -> bool {
    address.is_multicast() || address == packet::BROADCAST
}

/// Counts a frame with an address that is not its sender's. The first one is told.
fn forged(port: &mut Port, layer: &str, address: impl std::fmt::Display) -> Option<()> {
    if port.forged == 0 {
        log::warn!(
            "{} sends with the {layer} source address {address}, which is not its own: dropped",
            port.name
        );
    }
    port.forged += 1;
    None
}
