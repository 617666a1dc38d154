//! What of the host's memory is behind the guest's.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A kind of host memory. The guest sees no difference but speed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Private pages; huge ones (2 MiB) wherever the host has some free, which nested page tables map at once.
    #[default]
    Thp,
    /// Private pages of 4 KiB: the host gives no more than the guest has touched.
    Small,
    /// Pages of a file without a name (`memfd`), which other processes can be given; huge ones where the host
    /// allows them for files (`shmem_enabled`).
    Shared,
    /// Huge pages (2 MiB) from the pool that the host's administrator set aside, all taken at once.
    Hugetlb,
}

impl Kind {
    /// All there are.
    pub const ALL: [Kind; 4] = [Kind::Thp, Kind::Small, Kind::Shared, Kind::Hugetlb];

    /// What users type.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Thp => "thp",
            Kind::Small => "small",
            Kind::Shared => "shared",
            Kind::Hugetlb => "hugetlb",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// There is no such kind of memory.
#[derive(Debug, thiserror::Error)]
#[error("there is no memory backing `{0}`; known are: thp, small, shared, hugetlb")]
pub struct UnknownKind(String);

impl FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<Kind, UnknownKind> {
        Kind::ALL.into_iter().find(|one| one.name() == text).ok_or_else(|| UnknownKind(text.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_and_a_wrong_one_is_answered_with_the_right_ones() {
        for kind in Kind::ALL {
            assert_eq!(kind.name().parse::<Kind>().unwrap(), kind);
        }
        let error = "huge".parse::<Kind>().unwrap_err().to_string();
        assert!(Kind::ALL.iter().all(|kind| error.contains(kind.name())), "{error}");
    }
}
