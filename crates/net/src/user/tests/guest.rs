//! A guest: smoltcp on the VM's end of a cable, and raw frames beside it.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, SendFlags, recv, send};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, EthernetProtocol, IpCidr, IpProtocol};

use crate::user::packet::{self, ETHERNET, GATEWAY_MAC, Packet};
use crate::{HEADER, Header, MAX_PACKET, Mac};

pub(super) struct Guest {
    pub(super) mac: Mac,
    pub(super) address: Ipv4Addr,
    /// Dropped, the VM has left.
    pub(super) control: UnixStream,
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    start: std::time::Instant,
    next_port: u16,
}

const MOST_SEEN: usize = 64;

/// The cable. What arrives is for smoltcp, and kept for who looks at frames.
struct Wire {
    cable: OwnedFd,
    seen: VecDeque<Vec<u8>>,
    /// Frames are not smoltcp's.
    raw: bool,
    /// Checksums are not complete.
    offloads: bool,
}

impl Guest {
    pub(super) fn new(cable: OwnedFd, mac: Mac, address: Ipv4Addr, control: UnixStream) -> Guest {
        let mut wire = Wire { cable, seen: VecDeque::new(), raw: false, offloads: false };
        let config = Config::new(EthernetAddress(mac.0).into());
        let mut interface = Interface::new(config, &mut wire, Instant::ZERO);
        interface.update_ip_addrs(|list| list.push(IpCidr::new(IpAddr::V4(address).into(), 16)).unwrap());
        interface.routes_mut().add_default_ipv4_route(super::GATEWAY).unwrap();
        Guest {
            mac,
            address,
            control,
            wire,
            interface,
            sockets: SocketSet::new(Vec::new()),
            start: std::time::Instant::now(),
            next_port: 40000,
        }
    }

    pub(super) fn add_v6(&mut self, address: Ipv6Addr) {
        // On no link, as the router says: everybody is behind the gateway.
        self.interface
            .update_ip_addrs(|list| list.push(IpCidr::new(IpAddr::V6(address).into(), 128)).unwrap());
        self.interface
            .routes_mut()
            .add_default_ipv6_route(super::super::addresses::GATEWAY_LINK_LOCAL)
            .unwrap();
    }

    pub(super) fn poll(&mut self) {
        let now = Instant::from_micros(self.start.elapsed().as_micros() as i64);
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
    }

    fn add(&mut self, buffer: usize) -> SocketHandle {
        let half = || SocketBuffer::new(vec![0; buffer]);
        let mut socket = Socket::new(half(), half());
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        self.sockets.add(socket)
    }

    /// Begins a connection.
    pub(super) fn connect(&mut self, to: impl Into<SocketAddr>, buffer: usize) -> SocketHandle {
        let handle = self.add(buffer);
        self.next_port += 1;
        let socket = self.sockets.get_mut::<Socket<'_>>(handle);
        socket.connect(self.interface.context(), to.into(), self.next_port).unwrap();
        handle
    }

    /// Waits for a connection.
    pub(super) fn listen(&mut self, port: u16, buffer: usize) -> SocketHandle {
        let handle = self.add(buffer);
        self.tcp(handle).listen(port).unwrap();
        handle
    }

    pub(super) fn tcp(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub(super) fn state(&mut self, handle: SocketHandle) -> State {
        self.tcp(handle).state()
    }

    /// From now on checksums need not be complete.
    pub(super) fn take_offloads(&mut self) {
        self.wire.offloads = true;
        // smoltcp asks a device only when it meets it.
        let config = Config::new(EthernetAddress(self.mac.0).into());
        let mut interface = Interface::new(config, &mut self.wire, Instant::ZERO);
        interface.update_ip_addrs(|list| {
            list.push(IpCidr::new(IpAddr::V4(self.address).into(), 16)).unwrap();
        });
        interface.routes_mut().add_default_ipv4_route(super::GATEWAY).unwrap();
        self.interface = interface;
    }

    /// From now on frames are not smoltcp's.
    pub(super) fn be_raw(&mut self) {
        self.wire.raw = true;
    }

    /// Sends a frame with a header before it, as it is.
    pub(super) fn send(&mut self, packet: &[u8]) {
        send(&self.wire.cable, packet, SendFlags::DONTWAIT).unwrap();
    }

    /// Sends what the functions of `packet` have made for a guest as if from it.
    pub(super) fn send_as_ours(&mut self, mut packet: Vec<u8>) {
        packet[HEADER..HEADER + 6].copy_from_slice(&GATEWAY_MAC.0);
        packet[HEADER + 6..HEADER + 12].copy_from_slice(&self.mac.0);
        self.send(&packet);
    }

    /// A datagram from the guest's own address.
    pub(super) fn send_udp(&mut self, from: SocketAddr, to: impl Into<SocketAddr>, data: &[u8]) {
        self.send_as_ours(packet::udp(self.mac, from, to.into(), data));
    }

    /// The next frame that has arrived, with its header.
    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        if self.wire.raw {
            self.wire.fetch();
        }
        self.wire.seen.pop_front()
    }

    /// The next IP packet of `protocol`, among what has arrived: from, to, and what is in it.
    pub(super) fn next_of(&mut self, protocol: IpProtocol) -> Option<(IpAddr, IpAddr, Vec<u8>)> {
        loop {
            let frame = self.next()?;
            let ip = &frame[HEADER + ETHERNET..];
            let kind = EthernetProtocol::from(u16::from_be_bytes([frame[HEADER + 12], frame[HEADER + 13]]));
            let parsed = if kind == EthernetProtocol::Ipv4 { Packet::v4(ip) } else { Packet::v6(ip) };
            if let Some(packet) = parsed.filter(|packet| packet.protocol == protocol) {
                return Some((packet.src, packet.dst, packet.payload.to_vec()));
            }
        }
    }
}

impl Wire {
    fn fetch(&mut self) -> Option<Vec<u8>> {
        let mut packet = vec![0; MAX_PACKET];
        let (length, _) = recv(&self.cable, &mut packet[..], RecvFlags::DONTWAIT).ok()?;
        packet.truncate(length);
        self.seen.push_back(packet.clone());
        if self.seen.len() > MOST_SEEN {
            self.seen.pop_front();
        }
        (length > 0).then_some(packet)
    }
}

pub(super) struct Received(Vec<u8>);
pub(super) struct Sender<'a>(&'a OwnedFd);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0[HEADER..])
    }
}

impl TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut packet = vec![0; HEADER + length];
        packet[..HEADER].copy_from_slice(&Header::default().bytes());
        let result = f(&mut packet[HEADER..]);
        let _ = send(self.0, &packet, SendFlags::DONTWAIT);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received, Sender<'_>)> {
        if self.raw {
            return None;
        }
        let packet = self.fetch()?;
        Some((Received(packet), Sender(&self.cable)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Sender<'_>> {
        (!self.raw).then_some(Sender(&self.cable))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        if self.offloads {
            capabilities.checksum.tcp = Checksum::Tx;
        }
        capabilities
    }
}
