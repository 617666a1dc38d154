//! Numbers as users write them.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize};

/// A number of bytes, 1 KiB at least: written `20M`; in files that, or a plain number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Bytes(u64);

/// A number of requests, 1 at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Requests(u64);

/// Not a number of bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write a number with a unit, at least 1K: 512K, 20M, 1G (K, M, G, T are powers of 1024 bytes)")]
pub struct BadBytes;

/// Not a number of requests.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write a number of requests, at least 1: 500")]
pub struct BadRequests;

const UNITS: [(&str, &str, u32); 4] =
    [("T", "TiB", 40), ("G", "GiB", 30), ("M", "MiB", 20), ("K", "KiB", 10)];

impl Bytes {
    /// The number.
    pub fn get(self) -> u64 {
        self.0
    }
}

impl Requests {
    /// The number.
    pub fn get(self) -> u64 {
        self.0
    }
}

impl TryFrom<u64> for Bytes {
    type Error = BadBytes;

    fn try_from(number: u64) -> Result<Bytes, BadBytes> {
        if number < 1024 { Err(BadBytes) } else { Ok(Bytes(number)) }
    }
}

impl TryFrom<u64> for Requests {
    type Error = BadRequests;

    fn try_from(number: u64) -> Result<Requests, BadRequests> {
        if number == 0 { Err(BadRequests) } else { Ok(Requests(number)) }
    }
}

/// A plain number is none here: some programs mean bytes by it, others KiB, MiB or Mbit.
impl FromStr for Bytes {
    type Err = BadBytes;

    fn from_str(text: &str) -> Result<Bytes, BadBytes> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let is_it =
            |short: &str, long: &str| unit.eq_ignore_ascii_case(short) || unit.eq_ignore_ascii_case(long);
        let found = UNITS.into_iter().find(|(short, long, _)| is_it(short, long));
        let (number, (_, _, shift)) = number.parse::<u64>().ok().zip(found).ok_or(BadBytes)?;
        number.checked_mul(1 << shift).ok_or(BadBytes)?.try_into()
    }
}

impl FromStr for Requests {
    type Err = BadRequests;

    fn from_str(text: &str) -> Result<Requests, BadRequests> {
        text.parse::<u64>().map_err(|_| BadRequests)?.try_into()
    }
}

/// In the largest unit that leaves a whole number.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS.into_iter().find(|(_, _, shift)| self.0 >> shift << shift == self.0) {
            Some((_, unit, shift)) => write!(f, "{} {unit}", self.0 >> shift),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

impl fmt::Display for Requests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Reads a number or a text.
struct Either<T>(std::marker::PhantomData<T>);

impl<T> Visitor<'_> for Either<T>
where
    T: FromStr<Err: fmt::Display> + TryFrom<u64, Error: fmt::Display>,
{
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        T::try_from(number).map_err(E::custom)
    }

    /// Negative numbers are as little as 0 is.
    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        self.visit_u64(number.try_into().unwrap_or(0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        deserializer.deserialize_any(Either(std::marker::PhantomData))
    }
}

impl<'de> Deserialize<'de> for Requests {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Requests, D::Error> {
        deserializer.deserialize_any(Either(std::marker::PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_a_unit_and_are_shown_with_one() {
        for (text, bytes, shown) in [
            ("20M", 20 << 20, "20 MiB"),
            ("1k", 1 << 10, "1 KiB"),
            ("2GiB", 2 << 30, "2 GiB"),
            ("1024K", 1 << 20, "1 MiB"),
            ("1t", 1 << 40, "1 TiB"),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
            assert_eq!(Bytes(bytes).to_string(), shown);
        }
        assert_eq!(Bytes(1025).to_string(), "1025 bytes");
    }

    #[test]
    fn everything_else_is_refused_with_what_to_write() {
        for text in
            ["", "M", "20", "0", "0M", "-5M", "1.5M", "20 M", "20X", "100Mbit", "99999999999999999999G"]
        {
            assert!(text.parse::<Bytes>().unwrap_err().to_string().contains("20M"), "{text}");
        }
        for text in ["", "0", "-1", "1.5", "5K", "many"] {
            assert!(text.parse::<Requests>().unwrap_err().to_string().contains("500"), "{text}");
        }
    }

    #[test]
    fn files_have_texts_or_numbers_and_json_has_numbers() {
        let both: [Bytes; 2] = serde_json::from_str(r#"["2M", 2097152]"#).unwrap();
        assert_eq!(both, [Bytes(2 << 20); 2]);
        assert_eq!(serde_json::to_string(&both[0]).unwrap(), "2097152");
        for bad in ["0", "-1", "20", "1.5", r#""20""#, "null"] {
            assert!(serde_json::from_str::<Bytes>(bad).is_err(), "{bad}");
        }
        assert_eq!(serde_json::from_str::<Requests>("500").unwrap(), Requests(500));
        assert!(serde_json::from_str::<Requests>("-500").unwrap_err().to_string().contains("at least 1"));
    }
}
