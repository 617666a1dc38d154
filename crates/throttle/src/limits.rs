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
    #[error("there is no limit `{0}`; write {known}", known = DiskLimits::OPTIONS)]
    Unknown(String),
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
        let told = || format!("{name}={value}");
        let bytes = || value.parse().map(Some).map_err(|_: BadBytes| BadLimit::Bytes(told()));
        let requests = || value.parse().map(Some).map_err(|_: BadRequests| BadLimit::Requests(told()));
        match name {
            "iops" => self.iops = requests()?,
            "iops-burst" => self.iops_burst = requests()?,
            "bandwidth" => self.bandwidth = bytes()?,
            "bandwidth-burst" => self.bandwidth_burst = bytes()?,
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
        if self.bandwidth.is_none() && self.bandwidth_burst.is_some() {
            return Err(BadLimit::Burst("bandwidth", "20M"));
        }
        Ok(())
    }

    /// What holds a disk to them; nothing where there is no limit.
    pub fn throttle(&self) -> Option<Throttle> {
        let requests = bucket(self.iops.map(Requests::get), self.iops_burst.map(Requests::get));
        let bytes = bucket(self.bandwidth.map(Bytes::get), self.bandwidth_burst.map(Bytes::get));
        (requests.is_some() || bytes.is_some()).then_some(Throttle { requests, bytes })
    }
}

fn bucket(rate: Option<u64>, burst: Option<u64>) -> Option<Bucket> {
    rate.map(|rate| Bucket::new(rate, burst.unwrap_or(rate / BURST)))
}

/// `iops=500,bandwidth=20M`
impl FromStr for DiskLimits {
    type Err = BadLimit;

    fn from_str(text: &str) -> Result<DiskLimits, BadLimit> {
        let mut limits = DiskLimits::default();
        for option in text.split(',') {
            let known = option.split_once('=').map(|(name, value)| limits.set(name, value)).transpose()?;
            if known != Some(true) {
                return Err(BadLimit::Unknown(option.into()));
            }
        }
        limits.check().map(|()| limits)
    }
}

/// `at most 500 requests/s and 20 MiB/s (100 MiB at once)`; nothing where there is no limit.
impl fmt::Display for DiskLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let iops = self.iops.map(|iops| format!("{iops} requests/s{}", at_once(self.iops_burst)));
        let bandwidth = self.bandwidth.map(|rate| format!("{rate}/s{}", at_once(self.bandwidth_burst)));
        match (iops, bandwidth) {
            (Some(iops), Some(bandwidth)) => write!(f, "at most {iops} and {bandwidth}"),
            (Some(one), None) | (None, Some(one)) => write!(f, "at most {one}"),
            (None, None) => Ok(()),
        }
    }
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
    fn a_tenth_of_a_second_may_come_at_once() {
        let now = Instant::now();
        let mut throttle = "iops=50".parse::<DiskLimits>().unwrap().throttle().unwrap();
        assert_eq!((0..99).take_while(|_| throttle.pass(1, 1 << 30, now).is_ok()).count(), 5);
        let mut throttle = "iops=1".parse::<DiskLimits>().unwrap().throttle().unwrap();
        assert_eq!((0..99).take_while(|_| throttle.pass(1, 0, now).is_ok()).count(), 1);
    }
}
