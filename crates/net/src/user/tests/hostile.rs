//! Random and mutated packets from a guest that means harm. Whatever it sends, the network goes on, holds no
//! more than it says, and nobody hears it speak for another.
//!
//! `OSPITE_SEEDS=N` tries N seeds; a failure names its own, and `OSPITE_SEED=S` begins there.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use dice::{Dice, seeds};
use smoltcp::wire::{IpProtocol, TcpPacket};

use super::*;
use crate::offload::{GSO_ECN, GSO_TCPV4, GSO_TCPV6, NEEDS_CSUM};
use crate::user::packet::{ETHERNET, GATEWAY_MAC};

const SEEDS: u64 = 8;
const PACKETS: usize = 3000;
const IP: usize = HEADER + ETHERNET;

/// Two guests of one network, of whom the second means harm and may reach the host's loopback address.
fn office(publish: &[&str]) -> World {
    let mut world = World::shared();
    world.join("web", &[]).unwrap();
    let control = UnixStream::connect(world.door.as_ref().unwrap()).unwrap();
    world.attach(control, "mallory", publish, &["127.0.0.0/8", "::1"]).unwrap();
    world.guests.iter_mut().for_each(Guest::be_raw);
    world
}

fn prefix(world: &World, name: &str) -> u64 {
    world.network.ports.values().find(|port| port.name == name).unwrap().addresses.v6
}

/// An address of the guest's IPv6 network.
fn v6(world: &World, name: &str, interface: u64) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from_bits(u128::from(prefix(world, name)) << 64 | u128::from(interface)))
}

/// What stands in the packet before the frame, and makes no sense.
fn offload(dice: &mut Dice, packet: &mut [u8]) {
    let near_header = dice.place(60) as u16;
    let any = dice.roll() as u16;
    let header = Header {
        flags: dice.of(&[0, 0, NEEDS_CSUM, NEEDS_CSUM, 2, 4, 0xff]),
        gso_type: dice.of(&[0, 0, 0, 0, GSO_TCPV4, GSO_TCPV6, GSO_TCPV4 | GSO_ECN, 3, 5, 0x80, 0xff]),
        header_length: dice.of(&[0, 54, any]),
        gso_size: dice.of(&[0, 1, 536, 1448, 0xffff, any]),
        csum_start: dice.of(&[0, 14, 34, 54, near_header, near_header, any, 0xffff]),
        csum_offset: dice.of(&[0, 6, 16, near_header, any, 0xffff]),
    };
    packet[..HEADER].copy_from_slice(&header.bytes());
}

/// What comes to the guest that does nothing is its neighbour's word, or the gateway's to everybody.
fn is_honest(world: &World, frame: &[u8]) -> Result<(), String> {
    let (web, mallory) = (&world.guests[0], &world.guests[1]);
    let port = world.network.ports.values().find(|port| port.name == "web").unwrap();
    if frame[HEADER..HEADER + 6] != web.mac.0 || frame[HEADER + 6..HEADER + 12] != GATEWAY_MAC.0 {
        return Err("not from the gateway to its guest".into());
    }
    let (v4, v6) = (Packet::v4(&frame[IP..]), Packet::v6(&frame[IP..]));
    let Some(packet) = v4.or(v6) else { return Err("not IP".into()) };
    if packet.src == IpAddr::from(crate::user::addresses::GATEWAY_LINK_LOCAL) {
        let advertised = packet.protocol == IpProtocol::Icmpv6 && packet.payload[0] == 134;
        return if advertised { Ok(()) } else { Err("as from the gateway".into()) };
    }
    let ours = |address: IpAddr, name: &str, v4: Ipv4Addr| match address {
        IpAddr::V4(address) => address == v4,
        IpAddr::V6(address) => (address.to_bits() >> 64) as u64 == prefix(world, name),
    };
    if !ours(packet.src, "mallory", mallory.address) || !ours(packet.dst, "web", web.address) {
        return Err(format!("from {} to {}", packet.src, packet.dst));
    }
    if packet.src.is_ipv6() && frame[IP + 7] == 255 {
        return Err("as over no router, which only a neighbour can send".into());
    }
    let header = Header::parse(frame).unwrap();
    let start = usize::from(header.csum_start);
    let sum = start + usize::from(header.csum_offset);
    let before_payload = packet.payload.as_ptr() as usize - frame[HEADER..].as_ptr() as usize;
    if !header.suits(port.offloads) || header.flags & !NEEDS_CSUM != 0 {
        return Err(format!("with a header that its driver does not take: {header:?}"));
    }
    if header.flags != 0 && (start < before_payload || sum + 2 > frame.len() - HEADER) {
        return Err(format!("with a checksum elsewhere than in what IP carries: {header:?}"));
    }
    let family = if packet.src.is_ipv4() { GSO_TCPV4 } else { GSO_TCPV6 };
    let cut = header.gso_type & !GSO_ECN;
    if header.gso_type != 0 && (cut != family || packet.protocol != IpProtocol::Tcp || header.gso_size == 0) {
        return Err(format!("to be cut into pieces that cannot be: {header:?}"));
    }
    Ok(())
}

/// A packet to the neighbour: sound but for what is random in it.
fn to_neighbour(dice: &mut Dice, world: &World) -> Vec<u8> {
    let (web, mallory) = (world.guests[0].address, world.guests[1].address);
    let length = dice.of(&[0, 8, 20, 32, 64, 1400]);
    let data = dice.bytes(length);
    let protocol = dice.of(&[
        IpProtocol::Udp,
        IpProtocol::Tcp,
        IpProtocol::Icmp,
        IpProtocol::Icmpv6,
        IpProtocol::HopByHop,
    ]);
    let addresses = match dice.one_in(2) {
        true => (mallory.into(), web.into()),
        false => (v6(world, "mallory", 7), v6(world, "web", 9)),
    };
    let mac = world.guests[1].mac;
    let hops = dice.of(&[0, 1, 64, 255]);
    let mut packet = packet::ip(mac, addresses, protocol, Some(hops), data.len(), |payload| {
        payload.copy_from_slice(&data);
        if protocol == IpProtocol::Icmpv6 && payload.len() >= 24 {
            payload[0] = 133 + data[0] % 5; // neighbour discovery
        }
    });
    packet[HEADER..HEADER + 6].copy_from_slice(&GATEWAY_MAC.0);
    packet[HEADER + 6..HEADER + 12].copy_from_slice(&mac.0);
    offload(dice, &mut packet);
    for _ in 0..dice.of(&[0, 0, 1, 3]) {
        let at = dice.of(&[HEADER + 12, IP]) + dice.place(44);
        if let Some(byte) = packet.get_mut(at) {
            *byte = dice.roll() as u8;
        }
    }
    packet
}

#[test]
fn a_neighbour_hears_only_what_can_be_true() {
    for seed in seeds(SEEDS) {
        let (mut dice, mut world) = (Dice::new(seed), office(&[]));
        if seed % 2 == 0 {
            let all = Offloads { checksum: true, tso4: true, tso6: true };
            say(&world.guests[0].control, &FromVm::Offloads(all), None).unwrap();
        }
        world.turns(2);
        let mut heard = 0;
        for _ in 0..PACKETS {
            let packet = to_neighbour(&mut dice, &world);
            world.guests[1].send(&packet);
            world.network.turn(&mut world.buffer, Duration::ZERO).unwrap();
            while let Some(frame) = world.guests[0].next() {
                let honest = is_honest(&world, &frame);
                assert_eq!(honest, Ok(()), "OSPITE_SEED={seed}: {:02x?}", &frame[..frame.len().min(100)]);
                heard += 1;
            }
            while world.guests[1].next().is_some() {}
        }
        assert!(heard > PACKETS / 20, "it would prove nothing: {heard}");
    }
}

/// A guest's end of connections, which answers with nonsense.
#[derive(Default)]
struct Connections(HashMap<(u16, SocketAddr), (u32, u32)>);

impl Connections {
    /// Notes what the other end says.
    fn hear(&mut self, frame: &[u8]) {
        let ip = &frame[IP..];
        let Some(packet) = Packet::v4(ip).filter(|packet| packet.protocol == IpProtocol::Tcp) else { return };
        let (Ok(tcp), Some((from, to))) = (TcpPacket::new_checked(packet.payload), packet.ports()) else {
            return;
        };
        let ours = if tcp.ack() { tcp.ack_number().0 as u32 } else { 77 };
        let theirs = (tcp.seq_number().0 as u32).wrapping_add(tcp.segment_len() as u32);
        self.0.insert((to.port(), from), (ours, theirs));
    }

    /// A segment that more or less fits one of them.
    fn segment(&self, dice: &mut Dice, remote: SocketAddr) -> (u16, SocketAddr, Vec<u8>) {
        let known: Vec<_> = self.0.iter().collect();
        let (port, remote, (ours, theirs)) = match dice.one_in(4) || known.is_empty() {
            true => (5000 + dice.place(16) as u16, remote, (dice.roll() as u32, 0)),
            false => {
                let (&(port, remote), &numbers) = known[dice.place(known.len())];
                (port, remote, numbers)
            }
        };
        let near =
            |dice: &mut Dice| dice.of(&[0, 0, 0, 0, 1, 2, 100, 70000, u32::MAX, u32::MAX - 500, 1 << 31]);
        let options: Vec<u8> = match dice.place(6) {
            0 => vec![2, 4, 0, dice.of(&[0, 1, 2, 40])], // maximum segment size
            1 => vec![3, 3, dice.of(&[0, 14, 15, 255]), 1], // window scale
            2 => [vec![1, 1, 5, dice.of(&[0, 1, 2, 10, 26])], dice.bytes(24)].concat(), // SACK
            3 => {
                let length = 4 * dice.place(11);
                dice.bytes(length)
            }
            4 => [vec![1, 1, 8, 10], dice.bytes(8)].concat(), // timestamps
            _ => Vec::new(),
        };
        let header = 20 + options.len();
        let words = if dice.one_in(20) { dice.place(16) } else { header / 4 };
        let flags =
            dice.of(&[0x02, 0x02, 0x10, 0x10, 0x10, 0x18, 0x18, 0x11, 0x11, 0x04, 0x14, 0x12, 0x29, 0, 0xff]);
        let mut bytes = port.to_be_bytes().to_vec();
        bytes.extend(remote.port().to_be_bytes());
        bytes.extend(ours.wrapping_add(near(dice)).to_be_bytes());
        bytes.extend(theirs.wrapping_add(near(dice)).to_be_bytes());
        bytes.extend([(words as u8) << 4, flags]);
        bytes.extend(dice.of(&[0u16, 1, 1000, 0xffff]).to_be_bytes());
        bytes.extend([0, 0, 0, dice.of(&[0, 0, 1, 255])]);
        bytes.extend(options);
        let length = dice.of(&[0, 0, 1, 500, 1400]);
        bytes.extend(dice.bytes(length));
        (port, remote, bytes)
    }
}

/// Something to the gateway, or through it.
fn outwards(dice: &mut Dice, world: &World, server: SocketAddr, connections: &Connections) -> Vec<u8> {
    let us = IpAddr::from(world.guests[1].address);
    let gateway = SocketAddr::new(GATEWAY.into(), server.port());
    let mac = world.guests[1].mac;
    let mut packet = match dice.place(10) {
        0..6 => {
            let (_, remote, segment) = connections.segment(dice, gateway);
            packet::ip(mac, (us, remote.ip()), IpProtocol::Tcp, None, segment.len(), |to| {
                to.copy_from_slice(&segment)
            })
        }
        6 => {
            // DHCP: fixed part, cookie, options.
            let mut message = vec![0; 240];
            message[..4].copy_from_slice(&[dice.of(&[1, 2]), 1, dice.of(&[6, 6, 16, 255]), 0]);
            message[28..34].copy_from_slice(&mac.0);
            message[236..240].copy_from_slice(&[99, 130, 83, 99]);
            message.extend([53, 1, dice.of(&[1, 3, 8, 4, 0])]);
            let (kind, length) = (dice.of(&[12, 50, 54, 55, 57, 61, 61, 255]), dice.place(256));
            message.extend([kind, length as u8]);
            let sent = if dice.one_in(2) { length } else { dice.place(300) };
            message.extend(dice.bytes(sent));
            let from = SocketAddr::new(dice.of(&[us, Ipv4Addr::UNSPECIFIED.into()]), 68);
            packet::udp(
                mac,
                from,
                SocketAddr::new(dice.of(&[GATEWAY.into(), packet::BROADCAST]), 67),
                &message,
            )
        }
        7 => {
            let mut message = vec![1, 2, 1, 0, 0, dice.of(&[0, 1, 1, 2]), 0, 0, 0, 0, 0, 0];
            for _ in 0..dice.place(40) {
                let length = dice.of(&[1, 3, 63, 64, 192, 255]);
                message.push(length);
                message.extend(dice.bytes(usize::from(length)));
            }
            message.extend(dice.of(&[
                &b"\x03web\x08internal\0"[..],
                b"\x011\x010\x03200\x0210\x07in-addr\x04arpa\0",
                b"\xc0\x0c",
            ]));
            message.extend([0, dice.of(&[1, 12, 28, 255]), 0, 1]);
            packet::udp(mac, SocketAddr::new(us, 4000), (GATEWAY, 53).into(), &message)
        }
        8 => {
            let (length, protocol) =
                (dice.place(120), dice.of(&[IpProtocol::Icmp, IpProtocol::Icmpv6, IpProtocol::Udp]));
            let mut data = dice.bytes(length);
            data.first_mut().into_iter().for_each(|kind| *kind = dice.of(&[8, 0, 128, 133, 135, 136]));
            let v6 = (v6(world, "mallory", 3), world.gateway_v6().into());
            let addresses = if dice.one_in(2) { (us, GATEWAY.into()) } else { v6 };
            packet::ip(mac, addresses, protocol, Some(255), data.len(), |to| to.copy_from_slice(&data))
        }
        _ => {
            let near =
                [[127, 0, 0, 1], [0, 0, 0, 0], [169, 254, 169, 254], [255, 255, 255, 255], [224, 0, 0, 1]];
            let to = SocketAddr::new(dice.of(&near).into(), dice.roll() as u16);
            packet::udp(mac, SocketAddr::new(us, 4000 + dice.place(3000) as u16), to, &dice.bytes(20))
        }
    };
    packet[HEADER..HEADER + 6].copy_from_slice(&GATEWAY_MAC.0);
    packet[HEADER + 6..HEADER + 12].copy_from_slice(&mac.0);
    if dice.one_in(4) {
        offload(dice, &mut packet);
    }
    for _ in 0..dice.of(&[0, 0, 0, 1, 2]) {
        let at = IP + dice.place(packet.len() - IP);
        packet[at] = dice.roll() as u8;
    }
    if dice.one_in(10) {
        packet.truncate(1 + dice.place(packet.len()));
    }
    packet
}

/// A server of the host that says a lot, and hears what it is told.
fn server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut heard = [0; 4096];
                while client.write_all(&[7; 3000]).is_ok() && matches!(client.read(&mut heard), Ok(1..)) {}
            });
        }
    });
    address
}

#[test]
fn nothing_a_guest_sends_ends_the_network_or_makes_it_grow() {
    let server = server();
    for seed in seeds(SEEDS) {
        let published = free_port();
        let publish = format!("127.0.0.1:{published}:80");
        let (mut dice, mut world) = (Dice::new(seed), office(&[&publish]));
        let (mut connections, mut clients) = (Connections::default(), Vec::new());
        for round in 0..PACKETS {
            if round % 200 == 0 {
                clients.truncate(4);
                clients.extend(TcpStream::connect(("127.0.0.1", published)));
            }
            let packet = outwards(&mut dice, &world, server, &connections);
            world.guests[1].send(&packet);
            let began = Instant::now();
            world.network.turn(&mut world.buffer, Duration::ZERO).unwrap();
            assert!(began.elapsed() < Duration::from_secs(5), "OSPITE_SEED={seed}: packet {round}");
            while let Some(frame) = world.guests[1].next() {
                connections.hear(&frame);
            }
            while let Some(frame) = world.guests[0].next() {
                assert_eq!(is_honest(&world, &frame), Ok(()), "OSPITE_SEED={seed}: packet {round}");
            }
        }
        assert!(world.network.tcp.len() <= 2048, "OSPITE_SEED={seed}");
        // Its neighbour is served all the same.
        let us = SocketAddr::new(world.guests[0].address.into(), 4000);
        world.guests[0].send_udp(us, (GATEWAY, 53), b"\x01\x02\x01\0\0\x01\0\0\0\0\0\0\x03web\0\0\x01\0\x01");
        let answer = world.until("an answer to its neighbour", |guest| guest.next_of(IpProtocol::Udp));
        assert_eq!(answer.2[8..10], [1, 2], "OSPITE_SEED={seed}");
    }
}

#[test]
fn a_checksum_to_be_completed_is_no_way_to_anothers_address() {
    let mut world = office(&[]);
    let (web, mallory) = (world.guests[0].address, world.guests[1].address);
    let at = |address: Ipv4Addr| SocketAddr::new(address.into(), 9);
    let mac = world.guests[1].mac;
    let mut packet = packet::udp(mac, at(mallory), at(web), b"I am another");
    packet[HEADER + 6..HEADER + 12].copy_from_slice(&mac.0);
    // Over the lower half of the source address, which is all that tells the guests of a network apart.
    let header = Header { flags: NEEDS_CSUM, csum_start: 14, csum_offset: 14, ..Header::default() };
    packet[..HEADER].copy_from_slice(&header.bytes());
    world.guests[1].send(&packet);
    world.turns(5);
    assert_eq!(world.guests[0].next_of(IpProtocol::Udp), None);
}
