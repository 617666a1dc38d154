//! Limits as users say them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::units::{BadBytes, BadRequests};
use crate::{Bucket, Bytes, Requests, Throttle};

/// What may come at once after a pause, where nobody says: this part of a second's worth.
const BURST: u64 = 10;

/// Why a text is no limit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadLimit {
    /// A limit that there is not.
    #[error("there is no limit `{0}`; write {1}")]
    Unknown(String, &'static str),
    /// Not a number of bytes.
    #[error("`{0}`: {BadBytes}")]
    Bytes(String),
    /// Not a number of requests.
    #[error("`{0}`: {BadRequests}")]
    Requests(String),
    /// A burst of nothing.
    #[error("{0}-burst says what may come at once where there is a limit: add {0}={1}")]
    Burst(&'static str, &'static str),
}

/// What a disk may do in a second, reads and writes together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DiskLimits {
    /// Requests a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops: Option<Requests>,
    /// Requests that may come at once after a pause; a tenth of a second's where absent.
    #[serde(alias = "iops-burst", skip_serializing_if = "Option::is_none")]
    pub iops_burst: Option<Requests>,
    /// Bytes a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Bytes>,
    /// Bytes that may come at once after a pause; a tenth of a second's where absent.
    #[serde(alias = "bandwidth-burst", skip_serializing_if = "Option::is_none")]
    pub bandwidth_burst: Option<Bytes>,
}

impl DiskLimits {
    /// How they are written.
    pub const OPTIONS: &str = "iops=N, iops-burst=N, bandwidth=SIZE or bandwidth-burst=SIZE";

    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        *self == DiskLimits::default()
    }

    /// Sets the limit called `name`; `false` where there is none of that name.
    ///
    /// # Errors
    /// What is wrong with the value.
    pub fn set(&mut self, name: &str, value: &str) -> Result<bool, BadLimit> {
        match name {
            "iops" => self.iops = Some(requests(name, value)?),
            "iops-burst" => self.iops_burst = Some(requests(name, value)?),
            "bandwidth" => self.bandwidth = Some(bytes(name, value)?),
            "bandwidth-burst" => self.bandwidth_burst = Some(bytes(name, value)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Whether they mean something together.
    ///
    /// # Errors
    /// A burst without a limit.
    pub fn check(&self) -> Result<(), BadLimit> {
        if self.iops.is_none() && self.iops_burst.is_some() {
            return Err(BadLimit::Burst("iops", "500"));
        }
        check_bandwidth(self.bandwidth, self.bandwidth_burst)
    }

    /// What holds a disk to them; nothing where there is no limit.
    pub fn throttle(&self) -> Option<Throttle> {
        let requests = bucket(self.iops.map(Requests::get), self.iops_burst.map(Requests::get));
        let bytes = bandwidth(self.bandwidth, self.bandwidth_burst);
        (requests.is_some() || bytes.is_some()).then_some(Throttle { requests, bytes })
    }
}

/// What a network card may do in a second, in each direction by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetLimits {
    /// Bytes a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Bytes>,
    /// Bytes that may come at once after a pause; a tenth of a second's where absent.
    #[serde(alias = "bandwidth-burst", skip_serializing_if = "Option::is_none")]
    pub bandwidth_burst: Option<Bytes>,
}

impl NetLimits {
    /// How they are written.
    pub const OPTIONS: &str = "bandwidth=SIZE or bandwidth-burst=SIZE";

    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        *self == NetLimits::default()
    }

    fn set(&mut self, name: &str, value: &str) -> Result<bool, BadLimit> {
        match name {
            "bandwidth" => self.bandwidth = Some(bytes(name, value)?),
            "bandwidth-burst" => self.bandwidth_burst = Some(bytes(name, value)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Whether they mean something together.
    ///
    /// # Errors
    /// A burst without a limit.
    pub fn check(&self) -> Result<(), BadLimit> {
        check_bandwidth(self.bandwidth, self.bandwidth_burst)
    }

    /// What holds one direction to them; nothing where there is no limit.
    pub fn bucket(&self) -> Option<Bucket> {
        bandwidth(self.bandwidth, self.bandwidth_burst)
    }
}

fn check_bandwidth(rate: Option<Bytes>, burst: Option<Bytes>) -> Result<(), BadLimit> {
    match (rate, burst) {
        (None, Some(_)) => Err(BadLimit::Burst("bandwidth", "20M")),
        _ => Ok(()),
    }
}

fn bandwidth(rate: Option<Bytes>, burst: Option<Bytes>) -> Option<Bucket> {
    bucket(rate.map(Bytes::get), burst.map(Bytes::get))
}

fn bytes(name: &str, value: &str) -> Result<Bytes, BadLimit> {
    value.parse().map_err(|_: BadBytes| BadLimit::Bytes(format!("{name}={value}")))
}

fn requests(name: &str, value: &str) -> Result<Requests, BadLimit> {
    value.parse().map_err(|_: BadRequests| BadLimit::Requests(format!("{name}={value}")))
}

/// Hands each option of `A=1,B=2` to `set`, which says whether there is such a one.
fn each(
    text: &str,
    known: &'static str,
    mut set: impl FnMut(&str, &str) -> Result<bool, BadLimit>,
) -> Result<(), BadLimit> {
    text.split(',').try_for_each(|option| match option.split_once('=') {
        Some((name, value)) if set(name, value)? => Ok(()),
        _ => Err(BadLimit::Unknown(option.into(), known)),
    })
}

fn bucket(rate: Option<u64>, burst: Option<u64>) -> Option<Bucket> {
    rate.map(|rate| Bucket::new(rate, burst.unwrap_or(rate / BURST)))
}

/// `iops=500,bandwidth=20M`
impl FromStr for DiskLimits {
    type Err = BadLimit;

    fn from_str(text: &str) -> Result<DiskLimits, BadLimit> {
        let mut limits = DiskLimits::default();
        each(text, DiskLimits::OPTIONS, |name, value| limits.set(name, value))?;
        limits.check().map(|()| limits)
    }
}

/// `bandwidth=10M`
impl FromStr for NetLimits {
    type Err = BadLimit;

    fn from_str(text: &str) -> Result<NetLimits, BadLimit> {
        let mut limits = NetLimits::default();
        each(text, NetLimits::OPTIONS, |name, value| limits.set(name, value))?;
        limits.check().map(|()| limits)
    }
}

/// `at most 500 requests/s and 20 MiB/s (100 MiB at once)`; nothing where there is no limit.
impl fmt::Display for DiskLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let iops = self.iops.map(|iops| format!("{iops} requests/s{}", at_once(self.iops_burst)));
        let bandwidth = shown(self.bandwidth, self.bandwidth_burst);
        match (iops, bandwidth) {
            (Some(iops), Some(bandwidth)) => write!(f, "at most {iops} and {bandwidth}"),
            (Some(one), None) | (None, Some(one)) => write!(f, "at most {one}"),
            (None, None) => Ok(()),
        }
    }
}

/// `at most 10 MiB/s each way`; nothing where there is no limit.
impl fmt::Display for NetLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match shown(self.bandwidth, self.bandwidth_burst) {
            Some(bandwidth) => write!(f, "at most {bandwidth} each way"),
            None => Ok(()),
        }
    }
}

fn shown(rate: Option<Bytes>, burst: Option<Bytes>) -> Option<String> {
    rate.map(|rate| format!("{rate}/s{}", at_once(burst)))
}

fn at_once(burst: Option<impl fmt::Display>) -> String {
    burst.map(|burst| format!(" ({burst} at once)")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn limits_are_read_shown_and_kept() {
        for (text, shown, json) in [
            ("iops=500", "at most 500 requests/s", r#"{"iops":500}"#),
            (
                "bandwidth=20M,bandwidth-burst=1G",
                "at most 20 MiB/s (1 GiB at once)",
                r#"{"bandwidth":20971520,"bandwidth_burst":1073741824}"#,
            ),
            (
                "iops=2,iops-burst=9,bandwidth=1K",
                "at most 2 requests/s (9 at once) and 1 KiB/s",
                r#"{"iops":2,"iops_burst":9,"bandwidth":1024}"#,
            ),
        ] {
            let limits: DiskLimits = text.parse().unwrap();
            assert_eq!(limits.to_string(), shown);
            assert_eq!(serde_json::to_string(&limits).unwrap(), json);
            assert_eq!(serde_json::from_str::<DiskLimits>(json).unwrap(), limits);
        }
        assert!(DiskLimits::default().is_none() && DiskLimits::default().throttle().is_none());
    }

    #[test]
    fn nonsense_is_told_with_what_to_write() {
        for (text, told) in [
            ("", "iops=N"),
            ("speed=5", "no limit `speed=5`"),
            ("iops", "no limit `iops`"),
            ("iops=0", "`iops=0`: write a number of requests"),
            ("iops=-5", "at least 1"),
            ("bandwidth=0", "20M"),
            ("bandwidth=-1M", "20M"),
            ("bandwidth=5Q", "`bandwidth=5Q`: write a number with a unit"),
            ("iops-burst=5", "add iops=500"),
            ("iops=5,bandwidth-burst=1M", "add bandwidth=20M"),
        ] {
            let error = text.parse::<DiskLimits>().unwrap_err().to_string();
            assert!(error.contains(told), "{text:?} is told as {error}");
        }
    }

    #[test]
    fn a_card_has_no_requests() {
        let limits: NetLimits = "bandwidth=10M,bandwidth-burst=1M".parse().unwrap();
        assert_eq!(limits.to_string(), "at most 10 MiB/s (1 MiB at once) each way");
        for (text, told) in [("iops=5", "write bandwidth=SIZE"), ("bandwidth-burst=1M", "add bandwidth=20M")]
        {
            let error = text.parse::<NetLimits>().unwrap_err().to_string();
            assert!(error.contains(told), "{text:?} is told as {error}");
        }
        assert!(serde_json::from_str::<NetLimits>(r#"{"iops":5}"#).is_err());
        assert!(NetLimits::default().is_none() && NetLimits::default().bucket().is_none());
    }

    #[test]
    fn a_tenth_of_a_second_may_come_at_once() {
        let now = Instant::now();
        let mut throttle = "iops=50".parse::<DiskLimits>().unwrap().throttle().unwrap();
        assert_eq!((0..99).take_while(|_| throttle.pass(1, 1 << 30, now).is_ok()).count(), 5);
        let mut throttle = "iops=1".parse::<DiskLimits>().unwrap().throttle().unwrap();
        assert_eq!((0..99).take_while(|_| throttle.pass(1, 0, now).is_ok()).count(), 1);
    }
}
