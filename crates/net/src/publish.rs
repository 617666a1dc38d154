//! Published ports.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::text::serde_as_text;

/// What runs over IP and has ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP
    #[default]
    Tcp,
    /// UDP
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        })
    }
}

/// A port of the host that leads to one of the guest: `8080:80`, `127.0.0.1:2121:21`,
/// `[::1]:5353:53/udp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Publish {
    /// The host's address; all that it has where there is none.
    pub address: Option<IpAddr>,
    /// The host's port.
    pub host: u16,
    /// The guest's port.
    pub guest: u16,
    /// Of both.
    pub protocol: Protocol,
}

/// Not a [`Publish`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a published port: write [ADDR:]HOST:GUEST[/udp], as 8080:80 or 127.0.0.1:5353:53/udp; an \
     IPv6 address stands in brackets"
)]
pub struct BadPublish(String);

impl FromStr for Publish {
    type Err = BadPublish;

    fn from_str(text: &str) -> Result<Publish, BadPublish> {
        parse(text).ok_or_else(|| BadPublish(text.into()))
    }
}

fn parse(text: &str) -> Option<Publish> {
    let (ports, protocol) = match text.split_once('/') {
        Some((ports, "tcp")) => (ports, Protocol::Tcp),
        Some((ports, "udp")) => (ports, Protocol::Udp),
        Some(_) => return None,
        None => (text, Protocol::Tcp),
    };
    let (front, guest) = ports.rsplit_once(':')?;
    let (address, host) = match front.rsplit_once(':') {
        Some((address, host)) => (Some(parse_address(address)?), host),
        None => (None, front),
    };
    Some(Publish { address, host: parse_port(host)?, guest: parse_port(guest)?, protocol })
}

fn parse_address(text: &str) -> Option<IpAddr> {
    match text.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']')?.parse().ok().map(IpAddr::V6),
        None => text.parse().ok().map(IpAddr::V4),
    }
}

fn parse_port(text: &str) -> Option<u16> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|&port| digits && port != 0)
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            None => {}
        }
        write!(f, "{}:{}", self.host, self.guest)?;
        if self.protocol == Protocol::Udp { f.write_str("/udp") } else { Ok(()) }
    }
}

serde_as_text!(Publish);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_and_written_alike() {
        for text in ["8080:80", "127.0.0.1:2121:21", "[::1]:5353:53/udp", "1:65535/udp"] {
            assert_eq!(text.parse::<Publish>().unwrap().to_string(), text);
        }
        let port: Publish = "[fd00::1]:1:2/tcp".parse().unwrap();
        assert_eq!((port.host, port.guest, port.protocol), (1, 2, Protocol::Tcp));
        assert_eq!(serde_json::from_str::<Publish>("\"8080:80\"").unwrap().host, 8080);
    }

    #[test]
    fn what_is_none_is_refused_with_an_example() {
        for bad in
            ["", "80", "0:80", "80:0", "80:65536", "+80:80", "::1:80:80", "a:80:80", "80:80/icmp", "80:80/"]
        {
            assert!(bad.parse::<Publish>().unwrap_err().to_string().contains("8080:80"), "{bad}");
        }
    }
}
