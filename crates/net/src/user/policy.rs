//! Where a guest may go: the internet. What is near the host is kept from it unless it is allowed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use nix::ifaddrs::getifaddrs;

use crate::Cidr;

/// Never the internet, whatever the host's routes say (RFC 6890 and its registries).
const NEAR: [(IpAddr, u8); 26] = [
    v4(0, 0, 0, 0, 8), // this host: Linux takes it for loopback
    v4(10, 0, 0, 0, 8),
    v4(100, 64, 0, 0, 10),
    v4(127, 0, 0, 0, 8),
    v4(168, 63, 129, 16, 32), // Azure's host, at an address that is public otherwise
    v4(169, 254, 0, 0, 16),   // link-local, and clouds' metadata services
    v4(172, 16, 0, 0, 12),
    v4(192, 0, 0, 0, 24),
    v4(192, 0, 2, 0, 24),
    v4(192, 88, 99, 0, 24),
    v4(192, 168, 0, 0, 16),
    v4(198, 18, 0, 0, 15),
    v4(198, 51, 100, 0, 24),
    v4(203, 0, 113, 0, 24),
    v4(224, 0, 0, 0, 3),  // multicast, reserved, broadcast
    v6(0, 0, 8),          // unspecified, loopback, embedded IPv4 addresses
    v6(0x64, 0xff9b, 32), // IPv4 addresses again (NAT64)
    v6(0x100, 0, 16),
    v6(0x2001, 0, 32), // Teredo and
    v6(0x2002, 0, 16), // 6to4 lead to IPv4 addresses
    v6(0x2001, 0xdb8, 32),
    v6(0x3fff, 0, 20),
    v6(0x5f00, 0, 16),
    v6(0xfc00, 0, 7),
    v6(0xfe80, 0, 9), // link-local, site-local
    v6(0xff00, 0, 8),
];

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> (IpAddr, u8) {
    (IpAddr::V4(Ipv4Addr::new(a, b, c, d)), prefix)
}

const fn v6(a: u16, b: u16, prefix: u8) -> (IpAddr, u8) {
    (IpAddr::V6(Ipv6Addr::new(a, b, 0, 0, 0, 0, 0, 0)), prefix)
}

/// How long the host's addresses are taken for the same.
const FRESH: Duration = Duration::from_secs(10);

/// The host's own networks, which may have public addresses.
pub(super) struct Policy {
    local: Vec<Cidr>,
    asked: Option<Instant>,
}

impl Policy {
    pub(super) fn new() -> Policy {
        Policy { local: Vec::new(), asked: None }
    }

    /// Whether a guest with the exceptions `allow` may reach `address`.
    pub(super) fn permits(&mut self, address: IpAddr, allow: &[Cidr]) -> bool {
        // The host takes such a one for the IPv4 address in it, for which no leave was given.
        if matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some()) {
            return false;
        }
        if allow.iter().any(|range| range.contains(address)) {
            return true;
        }
        let near = NEAR.iter().any(|&(range, prefix)| Cidr::new(range, prefix).contains(address));
        !near && !self.is_local(address) && !is_own(address)
    }

    fn is_local(&mut self, address: IpAddr) -> bool {
        if self.asked.is_none_or(|asked| asked.elapsed() > FRESH) {
            self.asked = Some(Instant::now());
            // Where the host would not tell, what it told last stands.
            if let Ok(networks) = networks() {
                self.local = networks;
            }
        }
        self.local.iter().any(|range| range.contains(address))
    }
}

/// The networks that the host's interfaces are in.
fn networks() -> nix::Result<Vec<Cidr>> {
    let networks = getifaddrs()?.filter_map(|interface| {
        let (address, mask) = (interface.address?, interface.netmask?);
        match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
            (Some(v4), _) => {
                Some(Cidr::new(v4.ip().into(), mask.as_sockaddr_in()?.ip().to_bits().count_ones() as u8))
            }
            (_, Some(v6)) => {
                Some(Cidr::new(v6.ip().into(), mask.as_sockaddr_in6()?.ip().to_bits().count_ones() as u8))
            }
            _ => None,
        }
    });
    // A prefix of 0 would be the world: a tunnel without a network of its own.
    Ok(networks.filter(|range| range.prefix() > 0).collect())
}

/// Whether the host would talk to itself there: its source would be the destination. The kernel knows better
/// than a list that was made a while ago.
fn is_own(address: IpAddr) -> bool {
    let any: SocketAddr = match address {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let source = UdpSocket::bind(any).and_then(|socket| {
        socket.connect((address, 9))?; // sends nothing
        socket.local_addr()
    });
    // Without a route it is nobody's.
    source.is_ok_and(|source| source.ip() == address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permits(address: &str, allow: &[&str]) -> bool {
        let allow: Vec<_> = allow.iter().map(|range| range.parse().unwrap()).collect();
        Policy::new().permits(address.parse().unwrap(), &allow)
    }

    #[test]
    fn the_internet_is_open() {
        for address in ["1.1.1.1", "8.8.8.8", "100.63.255.255", "172.32.0.1", "2606:4700::1111", "2a00::1"] {
            assert!(permits(address, &[]), "{address}");
        }
    }

    #[test]
    fn what_is_near_the_host_is_not() {
        for address in [
            "0.0.0.0",
            "127.0.0.1",
            "10.0.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "169.254.169.254",
            "168.63.129.16",
            "100.64.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "fd00:ec2::254",
            "fe80::1",
            "ff02::1",
        ] {
            assert!(!permits(address, &[]), "{address}");
        }
    }

    #[test]
    fn every_address_of_the_host_is_near() {
        for interface in getifaddrs().unwrap() {
            let address = interface.address.and_then(|address| {
                let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
                v4.or(address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
            });
            if let Some(address) = address {
                assert!(!permits(&address.to_string(), &[]), "{address}");
                assert!(is_own(address) || address.is_ipv6(), "{address}");
            }
        }
        assert!(is_own("127.0.0.1".parse().unwrap()) && !is_own("1.1.1.1".parse().unwrap()));
    }

    #[test]
    fn exceptions_are_made_by_name() {
        assert!(permits("10.1.2.3", &["10.1.0.0/16"]) && !permits("10.2.0.1", &["10.1.0.0/16"]));
        assert!(permits("127.0.0.1", &["127.0.0.1"]));
        assert!(permits("fd00::1", &["fd00::/64"]) && !permits("fd01::1", &["fd00::/64"]));
        assert!(permits("::1", &["::/0"]) && !permits("::ffff:127.0.0.1", &["::/0"]));
    }
}
