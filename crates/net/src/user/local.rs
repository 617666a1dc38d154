//! What the gateway itself answers: who has an address, where the router is, and pings to it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::time::Duration;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetProtocol, Icmpv4DstUnreachable, Icmpv4Packet,
    Icmpv4Repr, Icmpv6DstUnreachable, Icmpv6Packet, Icmpv6Repr, IpProtocol, Ipv4Packet, Ipv4Repr, Ipv6Packet,
    Ipv6Repr, NdiscNeighborFlags, NdiscPrefixInfoFlags, NdiscPrefixInformation, NdiscRepr, NdiscRouterFlags,
    RawHardwareAddress,
};

use super::addresses::{GATEWAY_LINK_LOCAL, Plan};
use super::packet::{self, ETHERNET, GATEWAY_MAC, MTU, Packet};
use super::port::Port;
use crate::HEADER;

/// All nodes of the link (RFC 4291, 2.7.1).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// How long guests take us for a router; they hear of us more often.
const ROUTER_LIFETIME: Duration = Duration::from_secs(9000);
/// The hop limit that shows that a packet of neighbour discovery has come over no router (RFC 4861, 6.1).
const NEIGHBOUR_HOPS: u8 = 255;
/// Most of a refused packet that is told back, which keeps within every MTU.
const QUOTED: usize = 500;

/// Answers an ARP request; `taken` says which other addresses of the network are in use. A guest is told
/// that everybody is at the gateway.
pub(super) fn arp(
    port: &Port,
    plan: &Plan,
    bytes: &[u8],
    taken: impl Fn(Ipv4Addr) -> bool,
) -> Option<Vec<u8>> {
    let ArpRepr::EthernetIpv4 {
        operation, source_protocol_addr: source, target_protocol_addr: target, ..
    } = ArpRepr::parse(&ArpPacket::new_checked(bytes).ok()?).ok()?
    else {
        return None;
    };
    let known = target == plan.gateway_v4() || taken(target);
    if operation != ArpOperation::Request || !known || target == port.addresses.v4 {
        return None;
    }
    let reply = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: EthernetAddress(GATEWAY_MAC.0),
        source_protocol_addr: target,
        target_hardware_addr: EthernetAddress(port.mac.0),
        target_protocol_addr: source,
    };
    let mut packet = packet::ethernet(port.mac, EthernetProtocol::Arp, reply.buffer_len());
    reply.emit(&mut ArpPacket::new_unchecked(&mut packet[HEADER + ETHERNET..]));
    Some(packet)
}

/// Answers ICMPv4 to the gateway.
pub(super) fn icmp_v4(port: &Port, packet: &Packet<'_>) -> Option<Vec<u8>> {
    let icmp = Icmpv4Packet::new_checked(packet.payload).ok()?;
    let Icmpv4Repr::EchoRequest { ident, seq_no, data } =
        Icmpv4Repr::parse(&icmp, &ChecksumCapabilities::ignored()).ok()?
    else {
        return None;
    };
    Some(icmp_v4_packet(port, packet.dst, packet.src, &Icmpv4Repr::EchoReply { ident, seq_no, data }))
}

/// ICMPv4 in a frame.
pub(super) fn icmp_v4_packet(port: &Port, src: IpAddr, dst: IpAddr, repr: &Icmpv4Repr<'_>) -> Vec<u8> {
    packet::ip(port.mac, (src, dst), IpProtocol::Icmp, None, repr.buffer_len(), |payload| {
        repr.emit(&mut Icmpv4Packet::new_unchecked(payload), &ChecksumCapabilities::default());
    })
}

/// ICMPv6 in a frame. Addresses are IPv6 ones.
pub(super) fn icmp_v6_packet(
    port: &Port,
    (src, dst): (Ipv6Addr, Ipv6Addr),
    hops: Option<u8>,
    repr: &Icmpv6Repr<'_>,
) -> Vec<u8> {
    packet::ip(port.mac, (src.into(), dst.into()), IpProtocol::Icmpv6, hops, repr.buffer_len(), |payload| {
        let mut packet = Icmpv6Packet::new_unchecked(payload);
        repr.emit(&src, &dst, &mut packet, &ChecksumCapabilities::default());
    })
}

/// Answers ICMPv6 to the gateway and to everybody on the link.
pub(super) fn icmp_v6(port: &Port, plan: &Plan, packet: &Packet<'_>) -> Option<Vec<u8>> {
    let (IpAddr::V6(src), IpAddr::V6(dst)) = (packet.src, packet.dst) else { return None };
    let icmp = Icmpv6Packet::new_checked(packet.payload).ok()?;
    match Icmpv6Repr::parse(&src, &dst, &icmp, &ChecksumCapabilities::ignored()).ok()? {
        Icmpv6Repr::EchoRequest { ident, seq_no, data } if plan.is_gateway(packet.dst) => {
            let reply = Icmpv6Repr::EchoReply { ident, seq_no, data };
            Some(icmp_v6_packet(port, (dst, src), None, &reply))
        }
        Icmpv6Repr::Ndisc(NdiscRepr::RouterSolicit { .. }) => Some(advertisement(port, plan)),
        // One without a source asks whether its own address is free (RFC 4862, 5.4): it is.
        Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit { target_addr, .. })
            if !src.is_unspecified() && plan.is_gateway(target_addr.into()) =>
        {
            let flags =
                NdiscNeighborFlags::ROUTER | NdiscNeighborFlags::SOLICITED | NdiscNeighborFlags::OVERRIDE;
            let reply = NdiscRepr::NeighborAdvert { flags, target_addr, lladdr: Some(gateway()) };
            let reply = Icmpv6Repr::Ndisc(reply);
            Some(icmp_v6_packet(port, (target_addr, src), Some(NEIGHBOUR_HOPS), &reply))
        }
        _ => None,
    }
}

fn gateway() -> RawHardwareAddress {
    EthernetAddress(GATEWAY_MAC.0).into()
}

/// A router advertisement (RFC 4861, 4.2): the guest's prefix, not on the link so that all goes through
/// us, and the DNS server (RFC 8106, 5.1), which smoltcp does not write.
pub(super) fn advertisement(port: &Port, plan: &Plan) -> Vec<u8> {
    let forever = Duration::from_secs(u32::MAX.into());
    let prefix = NdiscPrefixInformation {
        prefix_len: 64,
        flags: NdiscPrefixInfoFlags::ADDRCONF,
        valid_lifetime: forever,
        preferred_lifetime: forever,
        prefix: port.addresses.v6_prefix(),
    };
    let repr = Icmpv6Repr::Ndisc(NdiscRepr::RouterAdvert {
        hop_limit: 64,
        flags: NdiscRouterFlags::empty(),
        router_lifetime: ROUTER_LIFETIME,
        reachable_time: Duration::ZERO,
        retrans_time: Duration::ZERO,
        lladdr: Some(gateway()),
        mtu: Some(MTU as u32),
        prefix_info: Some(prefix),
    });
    let mut dns = vec![25, 3, 0, 0];
    dns.extend((ROUTER_LIFETIME.secs() as u32).to_be_bytes());
    dns.extend(plan.gateway_v6().octets());
    let (src, dst) = (GATEWAY_LINK_LOCAL, ALL_NODES);
    let (body, hops) = (repr.buffer_len(), Some(NEIGHBOUR_HOPS));
    let addresses = (src.into(), dst.into());
    packet::ip(port.mac, addresses, IpProtocol::Icmpv6, hops, body + dns.len(), |payload| {
        let ignored = ChecksumCapabilities::ignored();
        repr.emit(&src, &dst, &mut Icmpv6Packet::new_unchecked(&mut payload[..body]), &ignored);
        payload[body..].copy_from_slice(&dns);
        Icmpv6Packet::new_unchecked(payload).fill_checksum(&src, &dst);
    })
}

/// Tells the guest that where it wanted to go is closed to it (RFC 792; RFC 4443, 3.1).
pub(super) fn prohibited(port: &Port, plan: &Plan, packet: &Packet<'_>) -> Option<Vec<u8>> {
    let caps = ChecksumCapabilities::ignored();
    match packet.src {
        IpAddr::V4(_) => {
            let header = Ipv4Repr::parse(&Ipv4Packet::new_unchecked(packet.ip), &caps).ok()?;
            let data = &packet.payload[..packet.payload.len().min(QUOTED)];
            let reason = Icmpv4DstUnreachable::CommProhibited;
            let repr = Icmpv4Repr::DstUnreachable { reason, header, data };
            Some(icmp_v4_packet(port, plan.gateway_v4().into(), packet.src, &repr))
        }
        IpAddr::V6(src) => {
            let header = Ipv6Repr::parse(&Ipv6Packet::new_unchecked(packet.ip)).ok()?;
            let data = &packet.payload[..packet.payload.len().min(QUOTED)];
            let reason = Icmpv6DstUnreachable::AdminProhibit;
            let repr = Icmpv6Repr::DstUnreachable { reason, header, data };
            Some(icmp_v6_packet(port, (plan.gateway_v6(), src), None, &repr))
        }
    }
}
