//! One VM of an office.

use std::fmt;

use net::{Cidr, NetworkMode, Publish};
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use throttle::{DiskLimits, NetLimits};

use crate::image::Recipe;
use crate::vm::{Health, OnFailure, Probe, Restart};
use crate::{Name, Size, cloud_init};

/// One VM, as the file declares it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Member {
    /// What its disk starts as.
    pub image: Source,
    /// Number of vCPUs.
    #[serde(default = "one")]
    pub cpus: u32,
    /// What they say they are: a CPU model's name.
    #[serde(default = "host")]
    pub cpu: String,
    /// Memory.
    #[serde(default = "half_a_gibibyte")]
    pub memory: Size,
    /// What of the host's memory is behind it, by name.
    #[serde(default = "thp")]
    pub memory_backing: String,
    /// Size of its disk; the image's where absent.
    #[serde(default)]
    pub disk: Option<Size>,
    /// What its disk may do in a second.
    #[serde(default)]
    pub disk_limit: DiskLimits,
    /// What its guest is told at its first start.
    #[serde(default)]
    pub cloud_init: Option<cloud_init::Files>,
    /// `auto`, or an engine's name.
    #[serde(default = "auto")]
    pub engine: String,
    /// What its network card leads to.
    #[serde(default)]
    pub network: NetworkMode,
    /// Ports of the host that lead to it.
    #[serde(default)]
    pub publish: Vec<Publish>,
    /// What it may reach besides the internet and its own network.
    #[serde(default)]
    pub net_allow: Vec<Cidr>,
    /// What its network card may do in a second.
    #[serde(default)]
    pub net_limit: NetLimits,
    /// Whether it comes back when it ends.
    #[serde(default)]
    pub restart: Restart,
    /// How to tell that it does its work.
    #[serde(default)]
    pub health: Option<Check>,
    /// How long an orderly power-off may take before its power is cut, in seconds.
    #[serde(default = "a_minute_and_a_half")]
    pub stop_timeout: u64,
}

/// What a VM's disk starts as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// An image that is there.
    Image(Name),
    /// One that is made.
    Recipe(Box<Recipe>),
}

/// A health check. Exactly one of `http`, `tcp` and `command` is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Check {
    /// `PORT/PATH` of the guest; answers 2xx or 3xx.
    pub http: Option<String>,
    /// Port of the guest whose server speaks first, as those for mail and files do.
    pub tcp: Option<u16>,
    /// Run in the guest; returns 0.
    pub command: Option<Vec<String>>,
    /// Seconds between two tries.
    pub interval: Option<u64>,
    /// Seconds that a try may take.
    pub timeout: Option<u64>,
    /// Failed tries in a row until the VM counts as ill.
    pub retries: Option<u32>,
    /// Seconds from its start on in which tries may fail before one has passed.
    pub start_period: Option<u64>,
    /// What follows when the VM is ill.
    pub on_failure: OnFailure,
}

fn one() -> u32 {
    1
}

fn host() -> String {
    "host".into()
}

fn thp() -> String {
    "thp".into()
}

fn half_a_gibibyte() -> Size {
    Size::from(512 << 20)
}

fn auto() -> String {
    "auto".into()
}

fn a_minute_and_a_half() -> u64 {
    90
}

impl Member {
    /// The health check, where it declares one.
    pub fn health(&self) -> Option<Health> {
        self.health.as_ref().and_then(|check| check.health().ok())
    }

    /// Whether it can be.
    pub(super) fn check(&self) -> Result<(), String> {
        if !(1..=254).contains(&self.cpus) {
            return Err(format!("has {} CPUs; a VM has 1 to 254", self.cpus));
        }
        self.disk_limit.check().map_err(|error| format!("disk-limit: {error}"))?;
        self.net_limit.check().map_err(|error| format!("net-limit: {error}"))?;
        let Some(check) = &self.health else { return Ok(()) };
        let health = check.health()?;
        if health.on_failure == OnFailure::Restart && self.restart == Restart::No {
            return Err("health.on-failure = \"restart\" needs restart = \"on-failure\" or \"always\"".into());
        }
        let port = match health.probe {
            Probe::Http(port, _) | Probe::Tcp(port) => port,
            Probe::Command(_) => return Ok(()),
        };
        let tcp = |published: &&Publish| published.protocol == net::Protocol::Tcp;
        if self.publish.iter().filter(tcp).any(|published| published.guest == port) {
            return Ok(());
        }
        Err(format!(
            "its health check asks port {port}, which no port of the host leads to; publish it, as \
             publish = [\"127.0.0.1:{}:{port}\"], or check by a command: health.command = [...]",
            if port < 1024 { port + 8000 } else { port },
        ))
    }
}

impl Check {
    fn health(&self) -> Result<Health, String> {
        let probe = match (&self.http, self.tcp, &self.command) {
            (Some(http), None, None) => probe_http(http)?,
            (None, Some(port), None) if port != 0 => Probe::Tcp(port),
            (None, None, Some(command)) if !command.is_empty() => Probe::Command(command.clone()),
            _ => {
                return Err("a health check is one of http = \"80/\", tcp = 25 and command = [...]".into());
            }
        };
        let (interval, timeout) = (self.interval.unwrap_or(5).max(1), self.timeout.unwrap_or(10).max(1));
        Ok(Health {
            probe,
            interval,
            timeout,
            retries: self.retries.unwrap_or(3).max(1),
            start_period: self.start_period.unwrap_or(300),
            on_failure: self.on_failure,
        })
    }
}

fn probe_http(text: &str) -> Result<Probe, String> {
    let (port, path) = text.split_once('/').unwrap_or((text, ""));
    let plain = !path.contains(|c: char| c.is_control() || c == ' ');
    match port.parse() {
        Ok(port) if port != 0 && plain => Ok(Probe::Http(port, format!("/{path}"))),
        _ => Err(format!("{text:?} is no port and path of a health check; write http = \"80/\"")),
    }
}

impl<'de> Deserialize<'de> for Source {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Source, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = Source;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an image's name, or a recipe as image.packages = [...]")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Source, E> {
                text.parse().map(Source::Image).map_err(E::custom)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Source, A::Error> {
                Recipe::deserialize(MapAccessDeserializer::new(map)).map(Box::new).map(Source::Recipe)
            }
        }

        deserializer.deserialize_any(Either)
    }
}
