//! Who has which address in a network.
//!
//! IPv4: 10.200.0.0/16, the gateway first. IPv6: a unique local /48 of the network's name (RFC 4193), and
//! in it a /64 for each VM (RFC 8273), so that whatever address a guest makes for itself is known to be
//! its own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::mac::stable_hash;
use crate::{Cidr, Mac};

/// The gateway's link-local address, the same in every network.
pub(super) const GATEWAY_LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const V4: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 0);
/// Bits of the IPv4 network.
pub(super) const V4_PREFIX: u8 = 16;

/// A network's addresses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    /// The upper half of all its IPv6 addresses, the subnet 0.
    v6: u64,
}

/// A VM's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) v4: Ipv4Addr,
    /// The upper half of its IPv6 addresses.
    pub(super) v6: u64,
}

impl Plan {
    pub(super) fn new(network: &str) -> Plan {
        let global_id = stable_hash(network) & 0xff_ffff_ffff;
        Plan { v6: 0xfd << 56 | global_id << 16 }
    }

    pub(super) fn gateway_v4(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(V4.to_bits() | 1)
    }

    pub(super) fn mask_v4(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(u32::MAX << (32 - V4_PREFIX))
    }

    pub(super) fn gateway_v6(&self) -> Ipv6Addr {
        Ipv6Addr::from_bits(u128::from(self.v6) << 64 | 1)
    }

    /// Whether `address` is the gateway's.
    pub(super) fn is_gateway(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) => v4 == self.gateway_v4(),
            IpAddr::V6(v6) => v6 == self.gateway_v6() || v6 == GATEWAY_LINK_LOCAL,
        }
    }

    /// Whether `address` belongs to the network, so that it leads nowhere else.
    pub(super) fn contains(&self, address: IpAddr) -> bool {
        Cidr::new(V4.into(), V4_PREFIX).contains(address)
            || Cidr::new(self.gateway_v6().into(), 48).contains(address)
            || self.is_gateway(address)
    }

    /// The addresses of the VM called `name`: the same every time, unless one of `taken` has them.
    pub(super) fn assign(&self, name: &str, taken: impl Fn(Ipv4Addr) -> bool) -> Option<Addresses> {
        const FIRST: u64 = 2;
        const COUNT: u64 = (1 << (32 - V4_PREFIX)) - 3; // without network, gateway, broadcast
        let start = stable_hash(name) % COUNT;
        (0..COUNT)
            .map(|step| FIRST + (start + step) % COUNT)
            .map(|host| self.host(host as u16))
            .find(|a| !taken(a.v4))
    }

    /// The addresses of a VM that is alone.
    pub(super) fn only(&self) -> Addresses {
        self.host(2)
    }

    fn host(&self, number: u16) -> Addresses {
        Addresses {
            v4: Ipv4Addr::from_bits(V4.to_bits() | u32::from(number)),
            v6: self.v6 | u64::from(number),
        }
    }
}

impl Addresses {
    /// Whether `address` is one of them.
    pub(super) fn contains(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) => v4 == self.v4,
            IpAddr::V6(v6) => (v6.to_bits() >> 64) as u64 == self.v6,
        }
    }

    /// The IPv6 address that a guest makes from its card's address (RFC 4291, appendix A).
    pub(super) fn v6_of(&self, mac: Mac) -> Ipv6Addr {
        let [a, b, c, d, e, f] = mac.0;
        let interface = u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
        Ipv6Addr::from_bits(u128::from(self.v6) << 64 | u128::from(interface))
    }

    /// Its IPv6 network's first address.
    pub(super) fn v6_prefix(&self) -> Ipv6Addr {
        Ipv6Addr::from_bits(u128::from(self.v6) << 64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_its_addresses_and_shares_them_with_nobody() {
        let plan = Plan::new("office");
        let web = plan.assign("web", |_| false).unwrap();
        assert_eq!(plan.assign("web", |_| false), Some(web));
        let other = plan.assign("web", |address| address == web.v4).unwrap();
        assert!(other.v4 != web.v4 && other.v6 != web.v6);
        assert_eq!(plan.assign("web", |_| true), None);
        assert!(plan.contains(web.v4.into()) && plan.contains(web.v6_prefix().into()));
        assert!(!Plan::new("home").contains(web.v6_prefix().into()), "networks have prefixes of their own");
    }

    #[test]
    fn only_what_is_in_its_prefix_is_its_own() {
        let plan = Plan::new("");
        let only = plan.only();
        assert_eq!(
            (only.v4.to_string().as_str(), plan.gateway_v4().to_string().as_str()),
            ("10.200.0.2", "10.200.0.1")
        );
        assert!(only.contains(only.v6_of(Mac([0x52, 0x54, 0, 1, 2, 3])).into()));
        assert!(only.v6_of(Mac([0x52, 0x54, 0, 1, 2, 3])).to_string().ends_with(":2:5054:ff:fe01:203"));
        assert!(!only.contains(plan.gateway_v6().into()) && !only.contains("10.200.0.3".parse().unwrap()));
        assert!(plan.is_gateway("fe80::1".parse().unwrap()));
    }
}
