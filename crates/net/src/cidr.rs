//! Ranges of addresses.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use crate::text::serde_as_text;

/// Addresses with a common prefix (RFC 4632): `10.1.0.0/16`, `fd00::/8`, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cidr {
    address: IpAddr,
    prefix: u8,
}

/// Not a [`Cidr`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a range of addresses: write 10.1.0.0/16, fd00::/8, or one address")]
pub struct BadCidr(String);

impl Cidr {
    /// The addresses whose first `prefix` bits are those of `address`; more bits than there are count
    /// as all.
    pub fn new(address: IpAddr, prefix: u8) -> Cidr {
        match address {
            IpAddr::V4(v4) => {
                let prefix = prefix.min(32);
                let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
                Cidr { address: Ipv4Addr::from_bits(v4.to_bits() & mask).into(), prefix }
            }
            IpAddr::V6(v6) => {
                let prefix = prefix.min(128);
                let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
                Cidr { address: Ipv6Addr::from_bits(v6.to_bits() & mask).into(), prefix }
            }
        }
    }

    /// How many bits they have in common.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Whether `address` is one of them.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.address.is_ipv4() == address.is_ipv4() && Cidr::new(address, self.prefix) == *self
    }
}

impl FromStr for Cidr {
    type Err = BadCidr;

    fn from_str(text: &str) -> Result<Cidr, BadCidr> {
        let bad = || BadCidr(text.into());
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.map_or(Ok(most), str::parse).map_err(|_| bad())?;
        if prefix > most { Err(bad()) } else { Ok(Cidr::new(address, prefix)) }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

serde_as_text!(Cidr);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_hold_what_their_prefix_says() {
        let in_range =
            |range: &str, address: &str| range.parse::<Cidr>().unwrap().contains(address.parse().unwrap());
        assert!(in_range("10.1.2.3/16", "10.1.255.255") && !in_range("10.1.0.0/16", "10.2.0.0"));
        assert!(in_range("0.0.0.0/0", "1.2.3.4") && !in_range("0.0.0.0/0", "::1"));
        assert!(in_range("127.0.0.1", "127.0.0.1") && !in_range("127.0.0.1", "127.0.0.2"));
        assert!(in_range("fd00::/8", "fdff::1") && in_range("::/0", "2001:db8::1"));
        assert_eq!("10.1.2.3/16".parse::<Cidr>().unwrap().to_string(), "10.1.0.0/16");
    }

    #[test]
    fn what_is_none_is_refused() {
        for bad in ["", "10.1.0.0/33", "::/129", "10.1/16", "example.org", "10.0.0.0/-1"] {
            assert!(bad.parse::<Cidr>().unwrap_err().to_string().contains("10.1.0.0/16"), "{bad}");
        }
    }
}
