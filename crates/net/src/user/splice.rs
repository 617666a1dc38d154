//! One TCP connection: smoltcp towards the guest, a socket towards the world.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown, sockopt};
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, PacketMeta, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::wire::{EthernetAddress, EthernetFrame, HardwareAddress, IpCidr, IpProtocol};

use super::env::Env;
use super::packet::{ETHERNET, GATEWAY_MAC, MTU, ethertype, pseudo_sum};
use super::poller::Poller;
use super::port::Port;
use crate::offload::{GSO_NONE, GSO_TCPV4, NEEDS_CSUM};
use crate::{HEADER, Header, MAX_PACKET};

/// Each way. Pages are the host's to give only once they are used.
const BUFFER: usize = 256 << 10;
/// A guest that was reset says so when it is asked.
const KEEP_ALIVE: Duration = Duration::from_secs(75);
/// The longest IP packet.
const LONGEST: usize = 65535;
/// Where TCP has its checksum.
const TCP_CHECKSUM: usize = 16;

/// Both ends of a connection.
pub(super) struct Splice {
    host: OwnedFd,
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    readable: bool,
    writable: bool,
    /// The world has no more to say.
    eof: bool,
    /// The guest has no more to say, and the world was told.
    shut: bool,
    failed: bool,
}

impl Splice {
    /// For a guest's connection to `remote`, for which `host` stands. The guest's SYN comes next.
    pub(super) fn from_guest(
        env: &Env,
        port: &mut Port,
        host: OwnedFd,
        remote: SocketAddr,
    ) -> Option<Splice> {
        let mut splice = Splice::new(env, port, host, remote.ip())?;
        splice.socket().listen(remote).ok()?;
        Some(splice)
    }

    /// Connects `host`, whom the guest sees as `source`, to the guest.
    pub(super) fn to_guest(
        env: &Env,
        port: &mut Port,
        host: OwnedFd,
        guest: SocketAddr,
        source: SocketAddr,
    ) -> Option<Splice> {
        let mut splice = Splice::new(env, port, host, source.ip())?;
        let socket = splice.sockets.get_mut::<Socket<'_>>(splice.handle);
        socket.connect(splice.interface.context(), guest, source).ok()?;
        Some(splice)
    }

    fn new(env: &Env, port: &mut Port, host: OwnedFd, local: IpAddr) -> Option<Splice> {
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = random();
        let mut wire = Wire { input: None, port, poller: &env.poller };
        let mut interface = Interface::new(config, &mut wire, now(env));
        interface.update_ip_addrs(|addresses| {
            let _ = addresses.push(IpCidr::new(local.into(), if local.is_ipv4() { 32 } else { 128 })); // has room
        });
        match local {
            IpAddr::V4(v4) => interface.routes_mut().add_default_ipv4_route(v4).ok()?,
            IpAddr::V6(v6) => interface.routes_mut().add_default_ipv6_route(v6).ok()?,
        };
        let buffer = || SocketBuffer::new(vec![0; BUFFER]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.set_keep_alive(Some(KEEP_ALIVE.into()));
        // A packet from the guest may be all that its window has room for, and it waits for our word on that.
        // One word for a whole burst is [`Splice::take`]'s doing.
        socket.set_ack_delay(None);
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        let _ = sockopt::set_tcp_nodelay(&host, true); // the guest has waited long enough, if it wants to
        let (readable, writable) = (true, true);
        Some(Splice {
            host,
            interface,
            sockets,
            handle,
            readable,
            writable,
            eof: false,
            shut: false,
            failed: false,
        })
    }

    fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    /// The host's end has become ready.
    pub(super) fn note(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        self.writable |= writable;
    }

    /// Ends the connection for both.
    pub(super) fn abort(&mut self) {
        self.failed = true;
        self.socket().abort();
    }

    /// Takes a packet from the guest. It is answered by the next step, with all others of its burst.
    pub(super) fn take(&mut self, env: &Env, port: &mut Port, input: &[u8]) {
        let mut wire = Wire { input: Some(input), port, poller: &env.poller };
        self.interface.poll_ingress_single(now(env), &mut wire, &mut self.sockets);
    }

    /// Moves what can be moved, and sends what there is to send; when to come again.
    pub(super) fn step(&mut self, env: &Env, port: &mut Port) -> Option<Instant> {
        let at = now(env);
        let mut wire = Wire { input: None, port, poller: &env.poller };
        self.outwards();
        self.inwards();
        while self.interface.poll_egress(at, &mut wire, &mut self.sockets) == PollResult::SocketStateChanged {
        }
        let full = wire.port.is_full();
        let next = self.interface.poll_at(at, &self.sockets)?;
        // Who cannot send is called when there is room.
        let delay = Duration::from_micros((next - at).total_micros().max(u64::from(full) * 200_000).max(500));
        Some(Instant::now() + delay)
    }

    /// From the guest to the world.
    fn outwards(&mut self) {
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        while self.writable && socket.can_recv() {
            let host = &self.host;
            let sent =
                socket.recv(|bytes| match send(host, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                    Ok(count) => (count, Ok(())),
                    Err(error) => (0, Err(error)),
                });
            match sent {
                Ok(Ok(())) | Ok(Err(Errno::INTR)) => {}
                Ok(Err(Errno::AGAIN)) => self.writable = false,
                Ok(Err(_)) | Err(_) => return self.abort(),
            }
        }
        let finished =
            matches!(socket.state(), State::CloseWait | State::LastAck | State::Closing | State::TimeWait);
        if finished && !self.shut && socket.recv_queue() == 0 {
            self.shut = true;
            let _ = shutdown(&self.host, Shutdown::Write); // or the other end has closed, which is as good
        }
    }

    /// From the world to the guest.
    fn inwards(&mut self) {
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        while self.readable && !self.eof && socket.can_send() {
            let host = &self.host;
            let received = socket.send(|room| match recv(host, room, RecvFlags::DONTWAIT) {
                Ok((count, _)) => (count, Ok(count)),
                Err(error) => (0, Err(error)),
            });
            match received {
                Ok(Ok(0)) => {
                    self.eof = true;
                    socket.close();
                }
                Ok(Ok(_)) | Ok(Err(Errno::INTR)) => {}
                Ok(Err(Errno::AGAIN)) => self.readable = false,
                Ok(Err(_)) | Err(_) => return self.abort(),
            }
        }
    }

    /// Whether there is nothing left to do.
    pub(super) fn is_over(&mut self) -> bool {
        let over = matches!(self.socket().state(), State::Closed | State::TimeWait);
        if over && !(self.eof && self.shut) {
            // The guest has reset the connection, or never answered: the world sees the same.
            let _ = sockopt::set_socket_linger(&self.host, Some(Duration::ZERO));
        }
        over
    }

    /// Whether it may stay as it is for as long as it likes: it is open, at least one way.
    pub(super) fn is_settled(&mut self) -> bool {
        let closing = self.eof && self.shut || self.failed;
        !closing && !matches!(self.socket().state(), State::Listen | State::SynSent | State::SynReceived)
    }
}

fn now(env: &Env) -> smoltcp::time::Instant {
    smoltcp::time::Instant::from_micros(env.start.elapsed().as_micros() as i64)
}

/// For initial sequence numbers.
fn random() -> u64 {
    let mut bytes = [0; 8];
    // So few bytes always come at once.
    let _ = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty());
    u64::from_ne_bytes(bytes)
}

/// The guest's cable as smoltcp sees it: IP packets in, frames out.
struct Wire<'a> {
    input: Option<&'a [u8]>,
    port: &'a mut Port,
    poller: &'a Poller,
}

struct Received<'a>(&'a [u8]);

struct Sender<'a> {
    port: &'a mut Port,
    poller: &'a Poller,
    meta: PacketMeta,
}

impl Device for Wire<'_> {
    type RxToken<'b>
        = Received<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = Sender<'b>
    where
        Self: 'b;

    fn receive(&mut self, _now: smoltcp::time::Instant) -> Option<(Received<'_>, Sender<'_>)> {
        let input = self.input.take()?;
        let sender = Sender { port: self.port, poller: self.poller, meta: PacketMeta::default() };
        Some((Received(input), sender))
    }

    fn transmit(&mut self, _now: smoltcp::time::Instant) -> Option<Sender<'_>> {
        let room = !self.port.is_full();
        room.then_some(Sender { port: self.port, poller: self.poller, meta: PacketMeta::default() })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // The cable is memory: what arrives is what was sent.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = if self.port.offloads.checksum { Checksum::None } else { Checksum::Tx };
        if self.port.offloads.tso4 {
            capabilities.segmentation.tcpv4 = std::num::NonZeroUsize::new(LONGEST);
        }
        capabilities
    }
}

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        thread_local! {
            /// Zeroing a new one for every packet would take as long as filling it.
            static FRAME: std::cell::RefCell<Vec<u8>> = std::cell::RefCell::new(vec![0; MAX_PACKET]);
        }
        FRAME.with_borrow_mut(|buffer| {
            let frame = &mut buffer[..HEADER + ETHERNET + length];
            let result = f(&mut frame[HEADER + ETHERNET..]);
            finish(frame, self.port, self.meta);
            self.port.send(self.poller, frame);
            result
        })
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.meta = meta;
    }
}

/// Writes what stands before the IP packet, and leaves to the guest what it said it would do.
fn finish(frame: &mut [u8], port: &Port, meta: PacketMeta) {
    const IP: usize = HEADER + ETHERNET;
    let v4 = frame[IP] >> 4 == 4;
    let ip_length = if v4 { usize::from(frame[IP] & 15) * 4 } else { 40 };
    let (src, dst) = addresses(&frame[IP..], v4);
    let mut ethernet = EthernetFrame::new_unchecked(&mut frame[HEADER..]);
    ethernet.set_src_addr(EthernetAddress(GATEWAY_MAC.0));
    ethernet.set_dst_addr(EthernetAddress(port.mac.0));
    ethernet.set_ethertype(ethertype(src));
    let mut header = Header::default();
    if port.offloads.checksum {
        header.flags = NEEDS_CSUM;
        header.csum_start = (ETHERNET + ip_length) as u16;
        header.csum_offset = TCP_CHECKSUM as u16;
        let at = IP + ip_length + TCP_CHECKSUM;
        let sum = pseudo_sum(src, dst, IpProtocol::Tcp, frame.len() - IP - ip_length);
        frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }
    let tcp_length = usize::from(frame[IP + ip_length + 12] >> 4) * 4;
    let size = meta
        .segmentation_offload_size
        .filter(|size| frame.len() - IP - ip_length - tcp_length > usize::from(size.get()));
    header.gso_type = size.map_or(GSO_NONE, |_| GSO_TCPV4);
    header.gso_size = size.map_or(0, std::num::NonZero::get);
    header.header_length = (ETHERNET + ip_length + tcp_length) as u16;
    frame[..HEADER].copy_from_slice(&header.bytes());
}

fn addresses(ip: &[u8], v4: bool) -> (IpAddr, IpAddr) {
    fn part<const N: usize>(ip: &[u8], at: usize) -> [u8; N] {
        std::array::from_fn(|i| ip[at + i])
    }
    match v4 {
        true => (part::<4>(ip, 12).into(), part::<4>(ip, 16).into()),
        false => (part::<16>(ip, 8).into(), part::<16>(ip, 24).into()),
    }
}
