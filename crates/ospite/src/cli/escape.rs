//! The key that opens the console's menu.

use std::fmt;
use std::str::FromStr;

/// A control character, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EscapeKey(pub Option<u8>);

/// The text names no control key.
#[derive(Debug, thiserror::Error)]
#[error("write ctrl- and a letter or one of @[\\]^_, as in ctrl-], or none")]
pub struct EscapeError;

impl FromStr for EscapeKey {
    type Err = EscapeError;

    fn from_str(text: &str) -> Result<EscapeKey, EscapeError> {
        let lower = text.to_ascii_lowercase();
        if lower == "none" {
            return Ok(EscapeKey(None));
        }
        match lower.strip_prefix("ctrl-").or(lower.strip_prefix('^')).map(str::as_bytes) {
            // A control key sends its letter's low five bits.
            Some(&[key]) if key.is_ascii_lowercase() || b"@[\\]^_".contains(&key) => {
                Ok(EscapeKey(Some(key & 0x1f)))
            }
            _ => Err(EscapeError),
        }
    }
}

impl fmt::Display for EscapeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(key) => write!(f, "Ctrl-{}", char::from(key + b'@')),
            None => f.write_str("none"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_keys_are_read_and_shown() {
        for (text, key, shown) in [("ctrl-]", 0x1d, "Ctrl-]"), ("Ctrl-A", 1, "Ctrl-A"), ("^@", 0, "Ctrl-@")] {
            let escape: EscapeKey = text.parse().unwrap();
            assert_eq!((escape.0, escape.to_string().as_str()), (Some(key), shown));
        }
        assert_eq!("none".parse::<EscapeKey>().unwrap().0, None);
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "a", "ctrl-", "ctrl-ab", "ctrl-1", "alt-x", "ctrl-ä"] {
            assert!(text.parse::<EscapeKey>().is_err(), "{text}");
        }
    }
}
