//! Tap interfaces of the host: opened, made, brought up, put in a bridge.
//!
//! Packets are read from and written to the descriptor, one a call: a `struct virtio_net_hdr` with
//! `num_buffers`, little-endian, and an Ethernet frame (Linux, `Documentation/networking/tuntap.rst`).

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

mod ioctl;

/// What the other end takes beyond plain frames (`linux/if_tun.h`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums that are not complete.
    pub checksum: bool,
    /// TCP over IPv4 in pieces longer than the MTU; only with `checksum`.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
}

/// Why an interface cannot be had: what failed, and what to type.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no driver.
    #[error("this host has no /dev/net/tun; as root: modprobe tun")]
    NoDriver(#[source] io::Error),
    /// The driver's file is closed to this user.
    #[error("/dev/net/tun cannot be opened; as root: chmod 666 /dev/net/tun")]
    Closed(#[source] io::Error),
    /// It is another user's, or not there and this user may make none.
    #[error("the interface {name} {}; as root: {}", if *exists { "is not yours" } else { "is not there" },
        make(name, bridge.as_deref(), *exists))]
    NotOurs {
        /// The interface.
        name: String,
        /// Whether there is one.
        exists: bool,
        /// The bridge that it was to be in.
        bridge: Option<String>,
    },
    /// Another program holds it.
    #[error("the interface {0} is in use, by another VM perhaps; name another one, and ip tuntap lists them")]
    Busy(String),
    /// It is no tap interface, or one with flags that were not asked for.
    #[error(
        "the interface {0} is not a tap interface with one queue, as ip -d link show {0} would tell; \
         as root: ip tuntap del dev {0} mode tap multi_queue, or name another one"
    )]
    Kind(String),
    /// It could be had, but not put in its bridge.
    #[error("{interface} cannot be put in the bridge {bridge}; {advice}")]
    Bridge {
        /// The interface.
        interface: String,
        /// The bridge.
        bridge: String,
        /// What to type.
        advice: Advice,
        #[source]
        /// Why.
        source: io::Error,
    },
    /// The interface is down, and this user cannot change that.
    #[error("the interface {0} is down; as root: ip link set {0} up")]
    Down(String),
    /// The kernel refused something else.
    #[error("the interface {name} cannot be used")]
    Io {
        /// The interface.
        name: String,
        #[source]
        /// Why.
        source: io::Error,
    },
}

/// A command to type.
#[derive(Debug)]
pub struct Advice(String);

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The commands that make the interface `name` ours.
fn make(name: &str, bridge: Option<&str>, exists: bool) -> String {
    let remove = if exists { format!("ip link del {name} && ") } else { String::new() };
    let master = bridge.map(|bridge| format!(" master {bridge}")).unwrap_or_default();
    let user = rustix::process::getuid().as_raw();
    format!("{remove}ip tuntap add dev {name} mode tap user {user} && ip link set {name} up{master}")
}

/// Opens the tap interface `name`, makes it where it is not there and this process may, puts it in `bridge`
/// if that is given, and sees that it is up. One that was made goes with the descriptor.
///
/// # Errors
/// As [`Error`] says.
pub fn attach(name: &str, bridge: Option<&str>) -> Result<OwnedFd, Error> {
    let io = |source: Errno| Error::Io { name: name.into(), source: source.into() };
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let tun = open("/dev/net/tun", flags, Mode::empty()).map_err(|error| match error {
        Errno::ACCESS | Errno::PERM => Error::Closed(error.into()),
        error => Error::NoDriver(error.into()),
    })?;
    // Any socket leads to the host's interfaces.
    let control =
        socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None).map_err(io)?;
    let exists = ioctl::index(&control, name).is_ok();
    ioctl::take(&tun, name).map_err(|error| match error {
        Errno::PERM | Errno::ACCESS => {
            Error::NotOurs { name: name.into(), exists, bridge: bridge.map(Into::into) }
        }
        Errno::BUSY => Error::Busy(name.into()),
        Errno::INVAL => Error::Kind(name.into()),
        error => io(error),
    })?;
    set_offloads(&tun, Offloads::default()).map_err(|source| Error::Io { name: name.into(), source })?;
    if let Some(bridge) = bridge {
        join(&control, name, bridge)?;
    }
    match ioctl::bring_up(&control, name) {
        Ok(()) => Ok(tun),
        Err(Errno::PERM) => Err(Error::Down(name.into())),
        Err(error) => Err(io(error)),
    }
}

fn join(control: impl AsFd, name: &str, bridge: &str) -> Result<(), Error> {
    let member = std::fs::read_link(format!("/sys/class/net/{name}/master"));
    if member.is_ok_and(|master| master.file_name().is_some_and(|master| master == bridge)) {
        return Ok(());
    }
    ioctl::add_to_bridge(control, name, bridge).map_err(|error| {
        let advice = match error {
            Errno::NODEV => format!("as root: ip link add {bridge} type bridge && ip link set {bridge} up"),
            Errno::BUSY => format!("it is in another one; as root: ip link set {name} nomaster"),
            Errno::OPNOTSUPP => format!("{bridge} is no bridge; ip link show type bridge lists them"),
            _ => format!("as root: ip link set {name} master {bridge}"),
        };
        Error::Bridge {
            interface: name.into(),
            bridge: bridge.into(),
            advice: Advice(advice),
            source: error.into(),
        }
    })
}

/// Says what may be read from `tap` beyond plain frames.
///
/// # Errors
/// It is no tap interface.
pub fn set_offloads(tap: impl AsFd, offloads: Offloads) -> io::Result<()> {
    Ok(ioctl::offload(tap, offloads)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_not_is_told_what_root_would_type() {
        let error = |exists| Error::NotOurs { name: "t7".into(), exists, bridge: Some("br0".into()) };
        let text = error(false).to_string();
        assert!(
            text.starts_with("the interface t7 is not there; as root: ip tuntap add dev t7 mode tap user ")
        );
        assert!(text.ends_with("&& ip link set t7 up master br0"), "{text}");
        assert!(error(true).to_string().contains("is not yours; as root: ip link del t7 && "));
    }
}
