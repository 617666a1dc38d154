//! What a VM's network is asked to be.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use throttle::NetLimits;

use crate::text::serde_as_text;
use crate::{Cidr, Publish};

/// What is behind a VM's network card.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum NetworkMode {
    /// `user`: a network of the VM's own, which leads to the internet.
    #[default]
    User,
    /// Its name: the same, shared by the VMs of one user that name it.
    Named(String),
    /// `tap=INTERFACE`, `tap=INTERFACE,bridge=BRIDGE`: an interface of the host.
    Tap {
        /// Its name.
        interface: String,
        /// The bridge that it is put in.
        bridge: Option<String>,
    },
    /// `none`: no network card.
    None,
}

/// Not a [`NetworkMode`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a network: write user, none, tap=INTERFACE[,bridge=BRIDGE], or a name of 1 to 48 of a-z, 0-9 and '-', a \
     letter or a digit first and last"
)]
pub struct BadNetwork(String);

/// What is a host's name, and safe as a file's (RFC 1123, 2.1, in lower case).
pub(crate) fn is_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = text.as_bytes();
    (1..=48).contains(&bytes.len())
        && bytes.iter().all(|&byte| plain(byte) || byte == b'-')
        && plain(bytes[0])
        && plain(bytes[bytes.len() - 1])
}

/// An interface's name as Linux takes it (IFNAMSIZ with its 0 is 16).
fn is_interface(text: &str) -> bool {
    (1..16).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_graphic() && !b"/,".contains(&byte))
}

fn parse_tap(text: &str) -> Option<NetworkMode> {
    let (interface, bridge) = match text.split_once(',') {
        Some((interface, rest)) => (interface, Some(rest.strip_prefix("bridge=")?)),
        None => (text, None),
    };
    let sound = is_interface(interface) && bridge.is_none_or(is_interface);
    sound.then(|| NetworkMode::Tap { interface: interface.into(), bridge: bridge.map(Into::into) })
}

impl FromStr for NetworkMode {
    type Err = BadNetwork;

    fn from_str(text: &str) -> Result<NetworkMode, BadNetwork> {
        let tap = text.strip_prefix("tap=").or_else(|| text.strip_prefix("tap:"));
        match (text, tap) {
            ("user", _) => Ok(NetworkMode::User),
            ("none", _) => Ok(NetworkMode::None),
            (_, Some(tap)) => parse_tap(tap).ok_or_else(|| BadNetwork(text.into())),
            (name, None) if is_name(name) => Ok(NetworkMode::Named(name.into())),
            _ => Err(BadNetwork(text.into())),
        }
    }
}

impl fmt::Display for NetworkMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NetworkMode::User => f.pad("user"),
            NetworkMode::Named(name) => f.pad(name),
            NetworkMode::Tap { interface, bridge: None } => f.pad(&format!("tap={interface}")),
            NetworkMode::Tap { interface, bridge: Some(bridge) } => {
                f.pad(&format!("tap={interface},bridge={bridge}"))
            }
            NetworkMode::None => f.pad("none"),
        }
    }
}

serde_as_text!(NetworkMode);

/// A VM's network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkSettings {
    /// What the card leads to.
    #[serde(rename = "network")]
    pub mode: NetworkMode,
    /// Ports of the host that lead to the guest.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub publish: Vec<Publish>,
    /// What the guest may reach besides the internet and its own network: addresses of the host and
    /// of local networks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Cidr>,
    /// What the card may do in a second.
    #[serde(rename = "net_limits", skip_serializing_if = "NetLimits::is_none")]
    pub limits: NetLimits,
}

/// How many bytes may wait for a card that takes `bandwidth` bytes a second: an eighth of a second's worth, since all
/// that comes after them waits as long; the most where it has no limit.
pub(crate) fn queue(bandwidth: Option<u64>, within: RangeInclusive<usize>) -> usize {
    let (least, most) = within.into_inner();
    let eighth = bandwidth.and_then(|rate| usize::try_from(rate / 8).ok());
    eighth.unwrap_or(most).clamp(least, most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_waits_for_a_slow_card() {
        let waits =
            [None, Some(1 << 13), Some(1 << 20), Some(u64::MAX)].map(|rate| queue(rate, 1 << 12..=1 << 18));
        assert_eq!(waits, [1 << 18, 1 << 12, 1 << 17, 1 << 18]);
    }

    #[test]
    fn modes_are_read_and_written_alike() {
        for text in ["user", "none", "office", "tap=tap0", "tap=tap0,bridge=br0", "a-1"] {
            assert_eq!(text.parse::<NetworkMode>().unwrap().to_string(), text);
        }
        let tap = NetworkMode::Tap { interface: "vm.7".into(), bridge: None };
        assert_eq!("tap:vm.7".parse(), Ok(tap));
        for bad in [
            "tap=a,b",
            "tap=a,bridge=",
            "",
            "Office",
            "tap=",
            "tap=0123456789abcdef",
            "tap=a/b",
            "../x",
            "-a",
            "a b",
        ] {
            assert!(bad.parse::<NetworkMode>().unwrap_err().to_string().contains("tap=INTERFACE"), "{bad}");
        }
    }

    #[test]
    fn settings_are_short_in_files_and_mistakes_are_told() {
        let settings: NetworkSettings =
            serde_json::from_str(r#"{"network":"office","publish":["8080:80"],"allow":["10.0.0.0/8"],"net_limits":{"bandwidth":1048576}}"#)
                .unwrap();
        assert_eq!((settings.publish.len(), settings.allow.len()), (1, 1));
        assert_eq!(settings.limits.to_string(), "at most 1 MiB/s each way");
        assert_eq!(serde_json::to_string(&NetworkSettings::default()).unwrap(), r#"{"network":"user"}"#);
        assert!(serde_json::from_str::<NetworkSettings>(r#"{"ports":[]}"#).is_err());
    }
}
