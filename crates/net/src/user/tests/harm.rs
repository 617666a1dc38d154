//! A guest that means harm, and networks that end.

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetProtocol, Icmpv4DstUnreachable, Icmpv4Packet,
    Icmpv4Repr, IpProtocol,
};

use super::*;
use crate::user::packet::{ETHERNET, GATEWAY_MAC};
use crate::{Attachment, Introduction, Link};

/// What comes to the guest number `index` of a kind of IP packet, after everybody had time.
fn gets(world: &mut World, index: usize, protocol: IpProtocol) -> Option<Vec<u8>> {
    world.turns(5);
    world.guests[index].next_of(protocol).map(|(_, _, bytes)| bytes)
}

fn office() -> World {
    let mut world = World::shared();
    for name in ["web", "mallory"] {
        world.join(name, &[]).unwrap();
        world.guests.last_mut().unwrap().be_raw();
    }
    world
}

#[test]
fn who_speaks_with_anothers_address_is_not_heard() {
    let mut world = office();
    let (web, mallory) = (world.guests[0].address, world.guests[1].address);
    let at = |address: Ipv4Addr| SocketAddr::new(address.into(), 9);
    world.guests[1].send_udp(at(mallory), at(web), b"true");
    assert!(gets(&mut world, 0, IpProtocol::Udp).is_some_and(|bytes| bytes.ends_with(b"true")));
    for lie in [GATEWAY, Ipv4Addr::new(1, 1, 1, 1), Ipv4Addr::new(127, 0, 0, 1), web] {
        world.guests[1].send_udp(at(lie), at(web), b"false");
        assert_eq!(gets(&mut world, 0, IpProtocol::Udp), None, "as from {lie}");
    }
    let mac = world.guests[1].mac;
    let mut forged = packet::udp(mac, at(mallory), at(web), b"false");
    forged[HEADER..HEADER + 6].copy_from_slice(&GATEWAY_MAC.0);
    let other = world.guests[0].mac;
    forged[HEADER + 6..HEADER + 12].copy_from_slice(&other.0);
    world.guests[1].send(&forged);
    assert_eq!(gets(&mut world, 0, IpProtocol::Udp), None, "with another's MAC address");
    assert_eq!(world.network.ports.values().map(|port| port.forged).sum::<u64>(), 5);
}

#[test]
fn nobody_hears_anothers_arp() {
    let mut world = office();
    let (web, mallory) = (world.guests[0].address, &mut world.guests[1]);
    let mac = mallory.mac;
    // "The gateway is me", to everybody and to one.
    for target in [EthernetAddress::BROADCAST, EthernetAddress([0x52, 0x54, 0, 1, 2, 3])] {
        let claim = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: EthernetAddress(mac.0),
            source_protocol_addr: GATEWAY,
            target_hardware_addr: target,
            target_protocol_addr: web,
        };
        let mut packet = packet::ethernet(mac, EthernetProtocol::Arp, claim.buffer_len());
        claim.emit(&mut ArpPacket::new_unchecked(&mut packet[HEADER + ETHERNET..]));
        packet[HEADER..HEADER + 6].copy_from_slice(&target.0);
        packet[HEADER + 6..HEADER + 12].copy_from_slice(&mac.0);
        mallory.send(&packet);
    }
    world.turns(5);
    while let Some(frame) = world.guests[0].next() {
        assert_eq!(frame[HEADER + 6..HEADER + 12], GATEWAY_MAC.0, "all frames are the gateway's");
        assert_ne!(frame[HEADER + 12..HEADER + 14], [8, 6], "and none of them is ARP");
    }
}

#[test]
fn what_is_near_the_host_is_closed_and_says_so() {
    let mut world = World::with(&[], &[]);
    world.guest().be_raw();
    let trap = UdpSocket::bind("127.0.0.1:0").unwrap();
    trap.set_nonblocking(true).unwrap();
    let port = trap.local_addr().unwrap().port();
    let us = SocketAddr::new(world.guest().address.into(), 4000);
    let own = world.network.env.policy.permits("192.0.2.2".parse().unwrap(), &[]);
    assert!(!own);
    for near in ["127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "10.200.0.1"] {
        let near: Ipv4Addr = near.parse().unwrap();
        world.guest().send_udp(us, (near, port), b"let me in");
        let told = world.until("a refusal", |guest| guest.next_of(IpProtocol::Icmp));
        let packet = Icmpv4Packet::new_checked(&told.2[..]).unwrap();
        match Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()).unwrap() {
            Icmpv4Repr::DstUnreachable { reason: Icmpv4DstUnreachable::CommProhibited, header, .. } => {
                assert_eq!(header.dst_addr, near);
            }
            other => panic!("{near}: {other:?}"),
        }
    }
    assert!(trap.recv(&mut [0; 100]).is_err(), "nothing came through");
}

#[test]
fn a_tcp_connection_to_the_hosts_services_is_closed() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut world = World::with(&[], &[]);
    world.guest().connect((GATEWAY, listener.local_addr().unwrap().port()), 1000);
    world.guest().connect(listener.local_addr().unwrap(), 1000);
    world.turns(20);
    assert!(listener.accept().is_err() && world.network.tcp.len() == 0);
}

#[test]
fn garbage_is_dropped() {
    let mut world = World::alone(&[]);
    world.guest().be_raw();
    let mac = world.guest().mac;
    let us = SocketAddr::new(world.guest().address.into(), 4000);
    let sound = {
        let mut packet = packet::udp(mac, us, (GATEWAY, 53).into(), &[0; 40]);
        packet[HEADER..HEADER + 6].copy_from_slice(&GATEWAY_MAC.0);
        packet[HEADER + 6..HEADER + 12].copy_from_slice(&mac.0);
        packet
    };
    let mut seed = 0x1234_5678_u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize
    };
    for _ in 0..5000 {
        let mut packet = sound.clone();
        for _ in 0..1 + random() % 4 {
            // Not the source's MAC address, so that it is looked at.
            let at = HEADER + 12 + random() % (packet.len() - HEADER - 12);
            packet[at] = random() as u8;
        }
        packet.truncate(HEADER + random() % (packet.len() - HEADER) + 1);
        world.guest().send(&packet);
        world.network.turn(&mut world.buffer, Duration::ZERO).unwrap();
        while world.guest().next().is_some() {}
    }
}

#[test]
fn a_vm_that_leaves_takes_its_ports_and_its_name_with_it() {
    let port = free_port();
    let publish = format!("127.0.0.1:{port}:80");
    let mut world = World::shared();
    world.join("web", &[&publish]).unwrap();
    let address = world.guests[0].address;
    assert!(world.join("web", &[]).unwrap_err().contains("is in the network already"));
    let taken = world.join("ftp", &[&publish]).unwrap_err();
    assert!(taken.contains("is taken; choose another one"), "{taken}");
    world.guests.clear();
    world.turns(3);
    world.join("web", &[&publish]).unwrap();
    assert_eq!(world.guests[0].address, address);
}

#[test]
fn a_network_of_one_ends_with_its_vm() {
    let mut world = World::alone(&[]);
    world.guests.clear();
    let start = Instant::now();
    while world.network.turn(&mut world.buffer, Duration::from_millis(1)).unwrap() {
        assert!(start.elapsed() < PATIENCE);
    }
}

/// Pings the gateway through a VM's end of its cable, until it answers.
fn ping_gateway(attachment: &Attachment, mac: Mac) {
    let request = Icmpv4Repr::EchoRequest { ident: 1, seq_no: 1, data: b"" };
    let addresses = (IpAddr::V4(attachment.address()), IpAddr::V4(GATEWAY));
    let mut packet = packet::ip(mac, addresses, IpProtocol::Icmp, None, request.buffer_len(), |payload| {
        request.emit(&mut Icmpv4Packet::new_unchecked(payload), &ChecksumCapabilities::default());
    });
    packet[HEADER..HEADER + 6].copy_from_slice(&GATEWAY_MAC.0);
    packet[HEADER + 6..HEADER + 12].copy_from_slice(&mac.0);
    let (start, mut buffer) = (Instant::now(), vec![0; MAX_PACKET]);
    while start.elapsed() < PATIENCE {
        attachment.send(&packet);
        std::thread::sleep(Duration::from_millis(10));
        while let Some(length) = attachment.receive(&mut buffer) {
            if let Some(answer) = Packet::v4(&buffer[HEADER + ETHERNET..length])
                && answer.protocol == IpProtocol::Icmp
            {
                return;
            }
        }
    }
    panic!("the gateway does not answer");
}

#[test]
fn a_network_that_crashed_is_replaced_behind_the_cards_back() {
    let port = free_port();
    let controls = Arc::new(Mutex::new(Vec::new()));
    let theirs = controls.clone();
    let mac = Mac::of_card(3);
    let publish = vec![format!("127.0.0.1:{port}:80").parse().unwrap()];
    let introduction =
        Introduction { name: "alone".into(), mac, publish, allow: Vec::new(), bandwidth: None };
    let dial = move || {
        let (ours, network) = UnixStream::pair()?;
        introduction.say(&ours)?;
        theirs.lock().unwrap().push(ours.try_clone()?);
        std::thread::spawn(move || run(Door::Private(network.into())));
        Ok(ours.into())
    };
    let attachment = Attachment::new(None, Box::new(dial)).unwrap();
    ping_gateway(&attachment, mac);
    for crash in 1..4 {
        controls.lock().unwrap()[crash - 1].shutdown(std::net::Shutdown::Both).unwrap();
        let start = Instant::now();
        while controls.lock().unwrap().len() <= crash {
            assert!(start.elapsed() < PATIENCE, "no network takes its place");
            std::thread::sleep(Duration::from_millis(5));
        }
        ping_gateway(&attachment, mac);
        // The first answer may have been the old one's last.
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(start.elapsed() < PATIENCE, "its published port is not there again");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A connection as a VM's process gets it, and a cable.
fn introduced(world: &World, name: &str) -> (UnixStream, [OwnedFd; 2]) {
    let control = UnixStream::connect(world.door.as_ref().unwrap()).unwrap();
    let introduction = Introduction {
        name: name.into(),
        mac: Mac::of_vm(name),
        publish: Vec::new(),
        allow: Vec::new(),
        bandwidth: None,
    };
    introduction.say(&control).unwrap();
    let cable = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    (control, cable.into())
}

#[test]
fn a_vms_process_cannot_say_that_it_is_another_or_may_do_more() {
    let mut world = World::shared();
    let (publish, allow) = (vec!["127.0.0.1:8080:80".parse().unwrap()], vec!["0.0.0.0/0".parse().unwrap()]);
    let lie = Introduction { name: "web".into(), mac: Mac::of_vm("web"), publish, allow, bandwidth: None };
    let (control, cable) = introduced(&world, "mallory");
    lie.say(&control).unwrap();
    let nobody = UnixStream::connect(world.door.as_ref().unwrap()).unwrap();
    for control in [control, nobody] {
        let _ = say(&control, &FromVm::Attach, Some(cable[0].as_fd())); // it may have been shown the door
        world.turns(10);
        assert!(world.network.ports.is_empty());
    }
    let crowd: Vec<_> = (0..20).map(|_| introduced(&world, "mallory")).collect();
    world.turns(40);
    world.join("web", &[]).unwrap();
    assert!(world.network.members.len() < 12, "one VM has the room of all");
    drop(crowd);
}

#[test]
fn a_cable_with_an_end_leads_out_and_what_is_no_cable_nowhere() {
    let mut world = World::shared();
    let (control, [theirs, ours]) = introduced(&world, "mallory");
    say(&control, &FromVm::Attach, Some(theirs.as_fd())).unwrap();
    world.turns(10);
    assert_eq!(world.network.ports.len(), 1);
    rustix::net::shutdown(&ours, rustix::net::Shutdown::Write).unwrap();
    world.turns(10);
    assert!(world.network.ports.is_empty() && world.network.members.is_empty());
    let event = rustix::event::eventfd(1, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let (control, _) = introduced(&world, "mallory");
    say(&control, &FromVm::Attach, Some(event.as_fd())).unwrap();
    world.turns(10);
    assert!(world.network.ports.is_empty());
}
