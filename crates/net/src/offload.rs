//! What travels between a network card and its link: `struct virtio_net_hdr` with `num_buffers`
//! (virtio 1.2, 5.1.6), then an Ethernet frame, 64 KiB at most.

use serde::{Deserialize, Serialize};

/// Length of the header.
pub const HEADER: usize = 12;
/// The longest packet: header, Ethernet header with a VLAN tag, and the longest IP packet there is.
pub const MAX_PACKET: usize = HEADER + 18 + 65535;

/// `flags`: the checksum at `csum_start` + `csum_offset` has yet to be completed.
pub const NEEDS_CSUM: u8 = 1;
/// `gso_type`: a frame of its own.
pub const GSO_NONE: u8 = 0;
/// `gso_type`: TCP over IPv4, to be cut into pieces of `gso_size` bytes.
pub const GSO_TCPV4: u8 = 1;
/// `gso_type`: the same over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// A bit in `gso_type`: the TCP segment has CWR set (RFC 3168).
pub const GSO_ECN: u8 = 0x80;

/// What a guest's driver takes from its link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offloads {
    /// Checksums that are not complete.
    pub checksum: bool,
    /// TCP over IPv4 in pieces longer than the MTU; only with `checksum`.
    pub tso4: bool,
    /// TCP over IPv6 in pieces longer than the MTU; only with `checksum`.
    pub tso6: bool,
}

/// The header, host's byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// [`NEEDS_CSUM`]
    pub flags: u8,
    /// [`GSO_NONE`], [`GSO_TCPV4`], [`GSO_TCPV6`]
    pub gso_type: u8,
    /// Bytes of Ethernet, IP and TCP headers; a hint.
    pub header_length: u16,
    /// TCP payload of each piece.
    pub gso_size: u16,
    /// Where the checksummed range begins in the frame.
    pub csum_start: u16,
    /// Where the checksum is in that range.
    pub csum_offset: u16,
}

impl Header {
    /// Reads it from the start of a packet.
    pub fn parse(packet: &[u8]) -> Option<Header> {
        let header: &[u8; HEADER] = packet.get(..HEADER)?.try_into().ok()?;
        let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        Some(Header {
            flags: header[0],
            gso_type: header[1],
            header_length: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        })
    }

    /// As bytes, for one buffer.
    pub fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        for (at, word) in [
            (2, self.header_length),
            (4, self.gso_size),
            (6, self.csum_start),
            (8, self.csum_offset),
            (10, 1),
        ] {
            bytes[at..at + 2].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Whether a driver with `offloads` takes it.
    pub fn suits(&self, offloads: Offloads) -> bool {
        let gso = match self.gso_type & !GSO_ECN {
            GSO_NONE => true,
            GSO_TCPV4 => offloads.tso4,
            GSO_TCPV6 => offloads.tso6,
            _ => false,
        };
        gso && (self.flags & NEEDS_CSUM == 0 || offloads.checksum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_as_it_was_written_and_never_beyond_its_end() {
        let header = Header {
            flags: 1,
            gso_type: 4,
            header_length: 66,
            gso_size: 1440,
            csum_start: 34,
            csum_offset: 16,
        };
        assert_eq!(Header::parse(&header.bytes()), Some(header));
        assert_eq!(Header::parse(&[0; HEADER - 1]), None);
    }

    #[test]
    fn drivers_get_what_they_take() {
        let all = Offloads { checksum: true, tso4: true, tso6: false };
        let tcp4 = Header { flags: NEEDS_CSUM, gso_type: GSO_TCPV4 | GSO_ECN, ..Header::default() };
        assert!(tcp4.suits(all) && !tcp4.suits(Offloads { tso4: false, ..all }));
        assert!(!Header { gso_type: GSO_TCPV6, ..tcp4 }.suits(all));
        assert!(Header::default().suits(Offloads::default()) && !tcp4.suits(Offloads::default()));
        assert!(!Header { gso_type: 3, ..tcp4 }.suits(all), "UDP fragmentation is offered to nobody");
    }
}
