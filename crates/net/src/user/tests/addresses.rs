//! Addresses and names.

use std::net::{SocketAddr, UdpSocket};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{DhcpMessageType, DhcpPacket, DhcpRepr, Icmpv6Packet, Icmpv6Repr, IpProtocol, NdiscRepr};

use super::*;
use crate::user::addresses::GATEWAY_LINK_LOCAL;
use crate::user::dns::Resolvers;

/// The prefix that the router tells.
pub(super) fn prefix(world: &mut World) -> Ipv6Addr {
    let guest = world.guest();
    let from: Ipv6Addr = "fe80::7".parse().unwrap();
    let all_routers: Ipv6Addr = "ff02::2".parse().unwrap();
    let repr = Icmpv6Repr::Ndisc(NdiscRepr::RouterSolicit { lladdr: None });
    let addresses = (IpAddr::V6(from), IpAddr::V6(all_routers));
    let packet =
        packet::ip(guest.mac, addresses, IpProtocol::Icmpv6, Some(255), repr.buffer_len(), |payload| {
            let mut packet = Icmpv6Packet::new_unchecked(payload);
            repr.emit(&from, &all_routers, &mut packet, &ChecksumCapabilities::default());
        });
    guest.send_as_ours(packet);
    world.until("a router advertisement", |guest| {
        let (from, to, bytes) = guest.next_of(IpProtocol::Icmpv6)?;
        let (IpAddr::V6(from), IpAddr::V6(to)) = (from, to) else { return None };
        let packet = Icmpv6Packet::new_checked(&bytes[..]).unwrap();
        assert!(packet.verify_checksum(&from, &to));
        assert_eq!(from, GATEWAY_LINK_LOCAL);
        // The DNS server's option is last; smoltcp reads what is before it.
        assert_eq!(bytes[bytes.len() - 24], 25);
        let known = Icmpv6Packet::new_unchecked(&bytes[..bytes.len() - 24]);
        match Icmpv6Repr::parse(&from, &to, &known, &ChecksumCapabilities::ignored()).unwrap() {
            Icmpv6Repr::Ndisc(NdiscRepr::RouterAdvert { prefix_info: Some(info), mtu, .. }) => {
                assert_eq!((info.prefix_len, mtu), (64, Some(1500)));
                Some(info.prefix)
            }
            _ => None,
        }
    })
}

fn dhcp(
    world: &mut World,
    message_type: DhcpMessageType,
    wanted: Option<Ipv4Addr>,
) -> (DhcpMessageType, Ipv4Addr) {
    let guest = world.guest();
    let request = DhcpRepr {
        message_type,
        transaction_id: 77,
        secs: 0,
        client_hardware_address: smoltcp::wire::EthernetAddress(guest.mac.0),
        client_ip: Ipv4Addr::UNSPECIFIED,
        your_ip: Ipv4Addr::UNSPECIFIED,
        server_ip: Ipv4Addr::UNSPECIFIED,
        router: None,
        subnet_mask: None,
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: false,
        requested_ip: wanted,
        client_identifier: None,
        server_identifier: None,
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: None,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    };
    let mut bytes = vec![0; request.buffer_len()];
    request.emit(&mut DhcpPacket::new_unchecked(&mut bytes[..])).unwrap();
    guest.send_udp(
        "0.0.0.0:68".parse().unwrap(),
        ("255.255.255.255".parse::<Ipv4Addr>().unwrap(), 67),
        &bytes,
    );
    world.until("an answer of the DHCP server", |guest| {
        let (_, _, datagram) = guest.next_of(IpProtocol::Udp)?;
        let packet = DhcpPacket::new_checked(&datagram[8..]).unwrap();
        let answer = DhcpRepr::parse(&packet).unwrap();
        assert_eq!(answer.transaction_id, 77);
        if answer.message_type != DhcpMessageType::Nak {
            assert_eq!((answer.router, answer.server_identifier), (Some(GATEWAY), Some(GATEWAY)));
            assert_eq!(answer.dns_servers.unwrap()[..], [GATEWAY]);
        }
        Some((answer.message_type, answer.your_ip))
    })
}

#[test]
fn a_guest_is_given_its_address_and_no_other() {
    let mut world = World::alone(&[]);
    let address = world.guest().address;
    world.guest().be_raw();
    assert_eq!(dhcp(&mut world, DhcpMessageType::Discover, None), (DhcpMessageType::Offer, address));
    assert_eq!(dhcp(&mut world, DhcpMessageType::Request, Some(address)), (DhcpMessageType::Ack, address));
    let other = Ipv4Addr::new(10, 200, 0, 77);
    assert_eq!(dhcp(&mut world, DhcpMessageType::Request, Some(other)).0, DhcpMessageType::Nak);
}

/// A question for the address of `name`: the answer's code, and its data.
fn ask(world: &mut World, name: &str, kind: u8) -> (u8, Vec<u8>) {
    let question = question(name, kind);
    let from = SocketAddr::new(world.guest().address.into(), 5353);
    world.guest().send_udp(from, (GATEWAY, 53), &question);
    answer(world, &question)
}

fn question(name: &str, kind: u8) -> Vec<u8> {
    let mut question = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        question.push(label.len() as u8);
        question.extend(label.as_bytes());
    }
    question.extend([0, 0, kind, 0, 1]);
    question
}

fn answer(world: &mut World, question: &[u8]) -> (u8, Vec<u8>) {
    world.until("an answer to a question", |guest| {
        let (from, _, datagram) = guest.next_of(IpProtocol::Udp)?;
        assert_eq!(from, IpAddr::V4(GATEWAY));
        let answer = &datagram[8..];
        assert_eq!(answer[..2], question[..2]);
        let data = answer.get(question.len() + 12..).unwrap_or_default();
        Some((answer[3] & 15, data.to_vec()))
    })
}

#[test]
fn names_lead_to_vms_and_unknown_ones_of_theirs_to_nobody() {
    const A: u8 = 1;
    let mut world = World::alone(&[]);
    let address = world.guest().address;
    world.guest().be_raw();
    assert_eq!(ask(&mut world, "alone", A), (0, address.octets().to_vec()));
    assert_eq!(ask(&mut world, "ALONE.internal", A), (0, address.octets().to_vec()));
    assert_eq!(ask(&mut world, "gateway.internal", A), (0, GATEWAY.octets().to_vec()));
    assert_eq!(ask(&mut world, "nobody.internal", A).0, 3);
    let pointer = ask(&mut world, "1.0.200.10.in-addr.arpa", 12);
    assert_eq!(pointer, (0, b"\x07gateway\x08internal\0".to_vec()));
}

#[test]
fn other_names_are_the_resolvers_affair_and_the_second_is_asked_where_the_first_is_silent() {
    let resolver = || {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    };
    let (silent, good) = (resolver(), resolver());
    let mut world = World::alone(&[]);
    let addresses = [&silent, &good].map(|socket| socket.local_addr().unwrap());
    world.network.env.resolvers = Resolvers::these(addresses.to_vec());
    world.guest().be_raw();
    let question = question("www.example.org", 1);
    let us = SocketAddr::new(world.guest().address.into(), 5353);
    world.guest().send_udp(us, (GATEWAY, 53), &question);
    let mut bytes = [0; 600];
    let mut heard = |world: &mut World, socket: &UdpSocket| {
        world.until("a question at a resolver", |_| {
            let (length, from) = socket.recv_from(&mut bytes).ok()?;
            Some((bytes[..length].to_vec(), from))
        })
    };
    assert_eq!(heard(&mut world, &silent).0, question);
    let (asked, from) = heard(&mut world, &good);
    assert_eq!(asked, question);
    let mut said = [&question[..], &[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7]].concat();
    said[2..4].copy_from_slice(&[0x81, 0x80]);
    said[7] = 1;
    // Answers to another question are passed over, and so is whoever was not asked.
    good.send_to(&[&[0x99, 0x99], &said[2..]].concat(), from).unwrap();
    silent.send_to(&said, from).unwrap();
    world.turns(20);
    assert!(world.guest().next_of(IpProtocol::Udp).is_none());
    good.send_to(&said, from).unwrap();
    assert_eq!(answer(&mut world, &question), (0, vec![192, 0, 2, 7]));
}
