//! Sizes of memory and disks.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A size in bytes, written 256M or 6G; in files, a text like that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Size(u64);

impl Size {
    /// In bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

/// Why a text is no size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SizeError {
    /// Not a number with a unit.
    #[error("write a number with a unit: 256M, 6G (K, M, G, T are powers of 1024; a plain number is MiB)")]
    Form,
    /// More than 64 bits of bytes.
    #[error("more than any machine has; K, M, G and T are powers of 1024, a plain number is MiB")]
    TooBig,
    /// Less than a guest can use.
    #[error("too small: at least 1M; a plain number is MiB")]
    TooSmall,
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Size, SizeError> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let shift = match unit.to_ascii_lowercase().as_str() {
            "k" | "kib" => 10,
            "" | "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            _ => return Err(SizeError::Form),
        };
        if number.is_empty() {
            return Err(SizeError::Form);
        }
        let number: u64 = number.parse().map_err(|_| SizeError::TooBig)?;
        let bytes = number.checked_mul(1 << shift).ok_or(SizeError::TooBig)?;
        if bytes < 1 << 20 { Err(SizeError::TooSmall) } else { Ok(Size(bytes)) }
    }
}

/// In the largest unit that leaves a whole number.
impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        let fits = units.iter().find(|(shift, _)| self.0 >> shift << shift == self.0);
        match fits {
            Some((shift, unit)) if self.0 != 0 => write!(f, "{} {unit}", self.0 >> shift),
            _ => write!(f, "{} bytes", self.0),
        }
    }
}

impl TryFrom<String> for Size {
    type Error = SizeError;

    fn try_from(text: String) -> Result<Size, SizeError> {
        text.parse()
    }
}

/// As [`FromStr`] reads it. Less than a KiB is lost, which nothing that was read has.
impl From<Size> for String {
    fn from(size: Size) -> String {
        let units = [(40, 'T'), (30, 'G'), (20, 'M')];
        let fits = units.iter().find(|(shift, _)| size.0 >> shift << shift == size.0);
        fits.map_or_else(
            || format!("{}K", size.0 >> 10),
            |(shift, unit)| format!("{}{unit}", size.0 >> shift),
        )
    }
}

impl From<u64> for Size {
    fn from(bytes: u64) -> Size {
        Size(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_units() {
        for (text, bytes) in [
            ("256M", 256 << 20),
            ("6G", 6 << 30),
            ("6GiB", 6 << 30),
            ("512", 512 << 20),
            ("2048k", 2 << 20),
            ("1t", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn everything_else_is_refused_with_the_units_named() {
        for text in [
            "",
            "M",
            "12x",
            "-1M",
            "1.5G",
            "6 G",
            "6GB",
            "99999999999999999999G",
            "18446744073709551615",
            "0",
            "4k",
        ] {
            let error = text.parse::<Size>().unwrap_err().to_string();
            assert!(error.contains("MiB"), "{text}: {error}");
        }
    }

    #[test]
    fn sizes_in_files_are_read_as_they_are_written() {
        for text in ["256M", "6G", "3T", "1025K"] {
            let json = format!("\"{text}\"");
            let size: Size = serde_json::from_str(&json).unwrap();
            assert_eq!(serde_json::to_string(&size).unwrap(), json);
        }
        assert!(serde_json::from_str::<Size>("\"6 apples\"").is_err());
    }

    #[test]
    fn sizes_are_shown_in_the_unit_that_fits() {
        assert_eq!(Size(6 << 30).to_string(), "6 GiB");
        assert_eq!(Size(1536 << 20).to_string(), "1536 MiB");
        assert_eq!(Size((1 << 20) + 1).to_string(), "1048577 bytes");
    }
}
