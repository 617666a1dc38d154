//! UDP and pings.

use std::net::{SocketAddr, UdpSocket};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, Icmpv6Packet, Icmpv6Repr, IpProtocol, UdpPacket};

use super::*;

fn host_socket(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

/// What comes to a socket of the host while the world turns.
fn heard(world: &mut World, socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut bytes = [0; 2000];
    world.until("a datagram at the host", |_| {
        socket.recv_from(&mut bytes).ok().map(|(length, from)| (bytes[..length].to_vec(), from))
    })
}

/// The next datagram to the guest: from and to whom, and what it says.
fn arrived(world: &mut World) -> (SocketAddr, u16, Vec<u8>) {
    world.until("a datagram at the guest", |guest| {
        let (from, to, bytes) = guest.next_of(IpProtocol::Udp)?;
        let packet = UdpPacket::new_checked(&bytes[..]).unwrap();
        assert!(packet.verify_checksum(&from.into(), &to.into()));
        Some((SocketAddr::new(from, packet.src_port()), packet.dst_port(), packet.payload().to_vec()))
    })
}

#[test]
fn datagrams_go_out_and_answers_come_back() {
    let server = host_socket("127.0.0.1:0");
    let mut world = World::alone(&[]);
    world.guest().be_raw();
    let (us, port) =
        (SocketAddr::new(world.guest().address.into(), 4000), server.local_addr().unwrap().port());
    world.guest().send_udp(us, (GATEWAY, port), b"question");
    let (question, from) = heard(&mut world, &server);
    assert_eq!(question, b"question");
    server.send_to(&[9; 1400], from).unwrap();
    assert_eq!(arrived(&mut world), (SocketAddr::new(GATEWAY.into(), port), 4000, vec![9; 1400]));
}

#[test]
fn the_same_over_ipv6() {
    let server = host_socket("[::1]:0");
    let mut world = World::alone(&[]);
    let us = world.with_v6();
    world.guest().be_raw();
    let (gateway, port) = (world.gateway_v6(), server.local_addr().unwrap().port());
    world.guest().send_udp((us, 4000).into(), (gateway, port), b"question");
    let (question, from) = heard(&mut world, &server);
    assert_eq!(question, b"question");
    server.send_to(b"answer", from).unwrap();
    assert_eq!(arrived(&mut world), ((gateway, port).into(), 4000, b"answer".to_vec()));
}

#[test]
fn a_published_udp_port_leads_in_and_answers_come_from_it() {
    let port = host_socket("127.0.0.1:0").local_addr().unwrap().port();
    let mut world = World::alone(&[&format!("127.0.0.1:{port}:53/udp")]);
    world.guest().be_raw();
    let (one, two) = (host_socket("127.0.0.1:0"), host_socket("127.0.0.1:0"));
    let us = SocketAddr::new(world.guest().address.into(), 53);
    for (client, word) in [(&one, b"first "), (&two, b"second")] {
        client.send_to(word, ("127.0.0.1", port)).unwrap();
        let (from, to, data) = arrived(&mut world);
        assert_eq!((from.ip(), to, &data[..]), (GATEWAY.into(), 53, &word[..]));
        world.guest().send_udp(us, from, &data.repeat(2));
        let (answer, from) = heard(&mut world, client);
        assert_eq!((answer, from.port()), (word.repeat(2), port));
    }
}

/// Pings a host's address from the guest; whether it answers.
fn ping(world: &mut World, to: Ipv4Addr) -> bool {
    let (mac, us) = (world.guest().mac, world.guest().address);
    let request = Icmpv4Repr::EchoRequest { ident: 0x77, seq_no: 3, data: b"are you there?" };
    let addresses = (IpAddr::V4(us), IpAddr::V4(to));
    let packet = packet::ip(mac, addresses, IpProtocol::Icmp, None, request.buffer_len(), |payload| {
        request.emit(&mut Icmpv4Packet::new_unchecked(payload), &ChecksumCapabilities::default());
    });
    world.guest().send_as_ours(packet);
    world.until("an answer to a ping", |guest| {
        let (from, _, bytes) = guest.next_of(IpProtocol::Icmp)?;
        let packet = Icmpv4Packet::new_checked(&bytes[..]).unwrap();
        match Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()).unwrap() {
            Icmpv4Repr::EchoReply { ident: 0x77, seq_no: 3, data: b"are you there?" } => Some(from == to),
            Icmpv4Repr::DstUnreachable { .. } => Some(false),
            other => panic!("{other:?}"),
        }
    })
}

#[test]
fn the_gateway_answers_pings_and_the_world_those_that_it_gets() {
    let mut world = World::alone(&[]);
    world.guest().be_raw();
    assert!(ping(&mut world, GATEWAY));
    assert!(!ping(&mut world, Ipv4Addr::new(192, 168, 1, 1)), "a near one is closed");
    if rustix::process::geteuid().is_root() {
        assert!(ping(&mut world, Ipv4Addr::new(127, 0, 0, 9)), "and an allowed one is not");
    }
}

/// The same over IPv6: what it answers with, if it does.
fn ping_v6(world: &mut World, us: Ipv6Addr, to: Ipv6Addr) -> Option<Vec<u8>> {
    let mac = world.guest().mac;
    let request = Icmpv6Repr::EchoRequest { ident: 7, seq_no: 1, data: b"hello" };
    let addresses = (IpAddr::V6(us), IpAddr::V6(to));
    let packet = packet::ip(mac, addresses, IpProtocol::Icmpv6, None, request.buffer_len(), |payload| {
        let mut packet = Icmpv6Packet::new_unchecked(payload);
        request.emit(&us, &to, &mut packet, &ChecksumCapabilities::default());
    });
    world.guest().send_as_ours(packet);
    world.until("an answer to a ping", |guest| {
        let (from, _, bytes) = guest.next_of(IpProtocol::Icmpv6)?;
        match bytes[0] {
            129 => Some((from == to).then(|| bytes[4..].to_vec())),
            1 => Some(None), // destination unreachable
            _ => None,
        }
    })
}

#[test]
fn pings_over_ipv6_are_answered_by_the_gateway_and_by_the_world() {
    let mut world = World::alone(&[]);
    let us = world.with_v6();
    world.guest().be_raw();
    let gateway = world.gateway_v6();
    let answer = b"\0\x07\0\x01hello";
    assert_eq!(ping_v6(&mut world, us, gateway).as_deref(), Some(&answer[..]));
    assert_eq!(ping_v6(&mut world, us, "fd00::1".parse().unwrap()), None, "a near one is closed");
    if rustix::process::geteuid().is_root() {
        assert_eq!(
            ping_v6(&mut world, us, Ipv6Addr::LOCALHOST).as_deref(),
            Some(&answer[..]),
            "an allowed one"
        );
    }
}
