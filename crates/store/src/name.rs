//! Names of images, VMs and networks.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A name that is safe as a file's, a socket's and a host's: 1 to 48 of a-z, 0-9 and `-`, with a letter
/// or digit first and last (RFC 1123, 2.1, in lower case; short enough for a socket's path).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// Not a [`Name`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a name: take 1 to 48 of a-z, 0-9 and '-', a letter or a digit first and last")]
pub struct BadName(String);

impl Name {
    const LONGEST: usize = 48;

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Name, BadName> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let bytes = text.as_bytes();
        let good = (1..=Name::LONGEST).contains(&bytes.len())
            && bytes.iter().all(|&byte| plain(byte) || byte == b'-')
            && plain(bytes[0])
            && plain(bytes[bytes.len() - 1]);
        if good { Ok(Name(text.into())) } else { Err(BadName(text.into())) }
    }
}

impl TryFrom<String> for Name {
    type Error = BadName;

    fn try_from(text: String) -> Result<Name, BadName> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_safe_everywhere_are_names() {
        for good in ["a", "web", "mail-2", "0", &"x".repeat(48)] {
            assert_eq!(good.parse::<Name>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", "a-", "Web", "a.b", "a/b", "..", "a b", "ä", &"x".repeat(49)] {
            let error = bad.parse::<Name>().unwrap_err();
            assert!(error.to_string().contains("a-z"), "{error}");
        }
        assert!(serde_json::from_str::<Name>("\"../x\"").is_err());
    }
}
