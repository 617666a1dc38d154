//! Frames, read and made.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, IpAddress, IpProtocol, IpRepr, Ipv4Packet, Ipv6Packet,
    UdpPacket, UdpRepr,
};

use crate::offload::{GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, NEEDS_CSUM};
use crate::{HEADER, Header, Mac};

/// The gateway's address on every cable; locally administered.
pub(super) const GATEWAY_MAC: Mac = Mac([0x52, 0x55, 0x0a, 0xc8, 0x00, 0x01]);
/// Length of an Ethernet header.
pub(super) const ETHERNET: usize = 14;
/// What guests are told, and what frames without segmentation offload keep to.
pub(super) const MTU: usize = 1500;
/// Hop limit of what we send.
const HOPS: u8 = 64;

/// An IP packet from a guest, within bounds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet<'a> {
    /// The whole IP packet, without padding.
    pub(super) ip: &'a [u8],
    pub(super) src: IpAddr,
    pub(super) dst: IpAddr,
    pub(super) protocol: IpProtocol,
    /// What follows the IP header.
    pub(super) payload: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Reads an IPv4 packet. Fragments are none of ours.
    pub(super) fn v4(bytes: &'a [u8]) -> Option<Packet<'a>> {
        let packet = Ipv4Packet::new_checked(bytes).ok()?;
        if packet.version() != 4 || packet.more_frags() || packet.frag_offset() != 0 {
            return None;
        }
        let (start, end) = (usize::from(packet.header_len()), usize::from(packet.total_len()));
        Some(Packet {
            ip: bytes.get(..end)?,
            src: packet.src_addr().into(),
            dst: packet.dst_addr().into(),
            protocol: packet.next_header(),
            payload: bytes.get(start..end)?,
        })
    }

    /// Reads an IPv6 packet without extension headers.
    pub(super) fn v6(bytes: &'a [u8]) -> Option<Packet<'a>> {
        let packet = Ipv6Packet::new_checked(bytes).ok()?;
        if packet.version() != 6 {
            return None;
        }
        let end = packet.total_len();
        Some(Packet {
            ip: bytes.get(..end)?,
            src: packet.src_addr().into(),
            dst: packet.dst_addr().into(),
            protocol: packet.next_header(),
            payload: bytes.get(packet.header_len()..end)?,
        })
    }

    /// Source and destination, where the payload begins with ports.
    pub(super) fn ports(&self) -> Option<(SocketAddr, SocketAddr)> {
        let ports = self.payload.get(..4)?;
        let port = |at: usize| u16::from_be_bytes([ports[at], ports[at + 1]]);
        Some((SocketAddr::new(self.src, port(0)), SocketAddr::new(self.dst, port(2))))
    }

    /// What of a header may be told to another guest, or done on its behalf. Nothing where it asks for
    /// something outside of what IP carries: a checksum that is completed over an address which was checked
    /// already makes it another's.
    pub(super) fn vouched(&self, header: &Header) -> Option<Header> {
        let Header { flags, gso_type, header_length, gso_size, csum_start, csum_offset } = *header;
        let (start, end) = (ETHERNET + self.ip.len() - self.payload.len(), ETHERNET + self.ip.len());
        let at = usize::from(csum_start) + usize::from(csum_offset);
        let unfinished = flags & NEEDS_CSUM != 0;
        if unfinished && (usize::from(csum_start) < start || at + 2 > end) {
            return None;
        }
        let family = if self.src.is_ipv4() { GSO_TCPV4 } else { GSO_TCPV6 };
        let cut = gso_type & !GSO_ECN == family && self.protocol == IpProtocol::Tcp && gso_size != 0;
        let sum = Header { flags: NEEDS_CSUM, csum_start, csum_offset, ..Header::default() };
        match (unfinished, gso_type) {
            (false, GSO_NONE) => Some(Header::default()),
            (true, GSO_NONE) => Some(sum),
            (true, _) if cut => Some(Header { gso_type, header_length, gso_size, ..sum }),
            _ => None,
        }
    }

    /// The payload of a UDP datagram.
    pub(super) fn datagram(&self) -> Option<&'a [u8]> {
        let packet = UdpPacket::new_checked(self.payload).ok()?;
        self.payload.get(8..usize::from(packet.len()))
    }
}

/// An Ethernet frame from the gateway, header and room for `length` bytes after it.
pub(super) fn ethernet(to: Mac, protocol: EthernetProtocol, length: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER + ETHERNET + length];
    packet[..HEADER].copy_from_slice(&Header::default().bytes());
    let mut frame = EthernetFrame::new_unchecked(&mut packet[HEADER..]);
    frame.set_dst_addr(EthernetAddress(to.0));
    frame.set_src_addr(EthernetAddress(GATEWAY_MAC.0));
    frame.set_ethertype(protocol);
    packet
}

/// The kind of frame that an address's packets are in.
pub(super) fn ethertype(address: IpAddr) -> EthernetProtocol {
    if address.is_ipv4() { EthernetProtocol::Ipv4 } else { EthernetProtocol::Ipv6 }
}

/// An IP packet in a frame, its payload written by `fill`. Addresses are of one family.
pub(super) fn ip(
    to: Mac,
    (src, dst): (IpAddr, IpAddr),
    protocol: IpProtocol,
    hops: Option<u8>,
    length: usize,
    fill: impl FnOnce(&mut [u8]),
) -> Vec<u8> {
    let repr = IpRepr::new(src.into(), dst.into(), protocol, length, hops.unwrap_or(HOPS));
    let mut packet = ethernet(to, ethertype(src), repr.buffer_len());
    let ip = &mut packet[HEADER + ETHERNET..];
    repr.emit(&mut *ip, &ChecksumCapabilities::default());
    fill(&mut ip[repr.header_len()..]);
    packet
}

/// A UDP datagram in a frame.
pub(super) fn udp(to: Mac, src: SocketAddr, dst: SocketAddr, data: &[u8]) -> Vec<u8> {
    let repr = UdpRepr { src_port: src.port(), dst_port: dst.port() };
    let length = repr.header_len() + data.len();
    ip(to, (src.ip(), dst.ip()), IpProtocol::Udp, None, length, |payload| {
        let (src, dst): (IpAddress, IpAddress) = (src.ip().into(), dst.ip().into());
        let fill = |buffer: &mut [u8]| buffer.copy_from_slice(data);
        let mut packet = UdpPacket::new_unchecked(payload);
        repr.emit(&mut packet, &src, &dst, data.len(), fill, &ChecksumCapabilities::default());
    })
}

/// Cuts an IPv4 packet in a frame into fragments that fit the MTU (RFC 791, 3.2); others pass as they
/// are, or not at all where they do not fit.
pub(super) fn fragments(packet: Vec<u8>, ident: u16) -> Vec<Vec<u8>> {
    const IP: usize = HEADER + ETHERNET;
    if packet.len() - IP <= MTU {
        return vec![packet];
    }
    if packet[IP] >> 4 != 4 {
        return Vec::new();
    }
    let start = IP + usize::from(packet[IP] & 15) * 4;
    let each = (MTU - (start - IP)) & !7;
    let payload = &packet[start..];
    let count = payload.len().div_ceil(each);
    let cut = |(at, piece): (usize, &[u8])| {
        let mut fragment = packet[..start].to_vec();
        fragment.extend(piece);
        let length = (fragment.len() - IP) as u16;
        let mut ip = Ipv4Packet::new_unchecked(&mut fragment[IP..]);
        ip.set_total_len(length);
        ip.set_ident(ident);
        ip.set_dont_frag(false);
        ip.set_more_frags(at + 1 < count);
        ip.set_frag_offset((at * each) as u16);
        ip.fill_checksum();
        fragment
    };
    payload.chunks(each).enumerate().map(cut).collect()
}

/// The sum over `data` (RFC 1071), not inverted, upon `start`.
pub(super) fn sum(data: &[u8], start: u32) -> u32 {
    let mut words = data.chunks_exact(2);
    let mut sum = u64::from(start);
    for word in &mut words {
        sum += u64::from(u16::from_be_bytes([word[0], word[1]]));
    }
    if let [last] = words.remainder() {
        sum += u64::from(u16::from_be_bytes([*last, 0]));
    }
    u32::from(fold(sum))
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// The sum over the pseudo-header (RFC 9293, 3.1; RFC 8200, 8.1).
pub(super) fn pseudo_sum(src: IpAddr, dst: IpAddr, protocol: IpProtocol, length: usize) -> u16 {
    let mut total = u32::from(u8::from(protocol)) + length as u32;
    for address in [src, dst] {
        total = match address {
            IpAddr::V4(v4) => sum(&v4.octets(), total),
            IpAddr::V6(v6) => sum(&v6.octets(), total),
        };
    }
    fold(total.into())
}

/// Notes in an IPv6 packet that it has come over a router: neighbour discovery that comes with the highest hop
/// limit is taken for a neighbour's (RFC 4861, 3.1), and no guest is another's.
pub(super) fn leave_link(packet: &mut [u8]) -> Option<()> {
    const HOP_LIMIT: usize = HEADER + ETHERNET + 7;
    let hops = packet.get_mut(HOP_LIMIT)?;
    *hops = (*hops).min(254);
    Some(())
}

/// Completes a checksum that `header` left open; nothing where the header makes no sense.
pub(super) fn complete_checksum(packet: &mut [u8]) -> Option<()> {
    let mut header = Header::parse(packet)?;
    let frame = packet.get_mut(HEADER..)?;
    let (start, offset) = (usize::from(header.csum_start), usize::from(header.csum_offset));
    let total = !fold(sum(frame.get(start..)?, 0).into());
    let total = if total == 0 { 0xffff } else { total }; // 0 says "none" in UDP (RFC 768)
    frame.get_mut(start + offset..start + offset + 2)?.copy_from_slice(&total.to_be_bytes());
    header.flags = 0;
    packet[..HEADER].copy_from_slice(&header.bytes());
    Some(())
}

/// The IPv4 address for "everybody here".
pub(super) const BROADCAST: IpAddr = IpAddr::V4(Ipv4Addr::BROADCAST);

#[cfg(test)]
mod tests {
    use super::*;

    fn datagram(length: usize) -> Vec<u8> {
        let (src, dst) = ("10.0.0.1:53".parse().unwrap(), "10.0.0.2:9".parse().unwrap());
        udp(Mac([2; 6]), src, dst, &vec![7; length])
    }

    #[test]
    fn a_datagram_is_read_as_it_was_made() {
        let made = datagram(100);
        let packet = Packet::v4(&made[HEADER + ETHERNET..]).unwrap();
        let (src, dst) = packet.ports().unwrap();
        assert_eq!((src.port(), dst.to_string().as_str()), (53, "10.0.0.2:9"));
        assert_eq!(packet.datagram().unwrap(), [7; 100]);
        assert!(
            UdpPacket::new_checked(packet.payload)
                .unwrap()
                .verify_checksum(&src.ip().into(), &dst.ip().into())
        );
    }

    #[test]
    fn what_is_cut_off_is_no_packet() {
        let made = datagram(100);
        for length in 0..ETHERNET + 128 {
            assert!(Packet::v4(&made[HEADER + ETHERNET..][..length.min(127)]).is_none());
        }
        assert!(Packet::v6(&made[HEADER + ETHERNET..]).is_none());
    }

    #[test]
    fn long_datagrams_come_in_fragments_that_add_up() {
        let pieces = fragments(datagram(4000), 7);
        assert_eq!(pieces.len(), 3);
        let mut next = 0;
        for (at, piece) in pieces.iter().enumerate() {
            let ip = Ipv4Packet::new_checked(&piece[HEADER + ETHERNET..]).unwrap();
            assert!(ip.verify_checksum() && usize::from(ip.total_len()) <= MTU);
            assert_eq!((ip.frag_offset(), ip.more_frags(), ip.ident()), (next, at < 2, 7));
            next += ip.total_len() - 20;
        }
        assert_eq!(next, 4008);
        assert_eq!(fragments(datagram(1472), 7).len(), 1);
    }

    #[test]
    fn an_open_checksum_is_completed_to_the_one_it_had() {
        let whole = datagram(33);
        let mut open = whole.clone();
        let at = HEADER + ETHERNET + 20 + 6;
        let (src, dst) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        open[at..at + 2].copy_from_slice(&pseudo_sum(src, dst, IpProtocol::Udp, 41).to_be_bytes());
        let header = Header { flags: 1, csum_start: 34, csum_offset: 6, ..Header::default() };
        open[..HEADER].copy_from_slice(&header.bytes());
        complete_checksum(&mut open).unwrap();
        assert_eq!(open[HEADER..], whole[HEADER..]);
        let beyond = Header { csum_start: 80, ..header };
        open[..HEADER].copy_from_slice(&beyond.bytes());
        assert!(complete_checksum(&mut open).is_none());
    }
}
