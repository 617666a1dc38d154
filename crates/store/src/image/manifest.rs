//! What an image is, as JSON beside it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::Name;

/// What an image is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this form: [`Manifest::VERSION`].
    pub version: u32,
    /// The name under which it was made.
    pub name: Name,
    /// The guest's architecture as the kernel names it: `x86_64`.
    pub architecture: String,
    /// Where it is from.
    pub origin: Origin,
    /// The kernel's release, as `uname -r` prints it; absent where it could not be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_release: Option<String>,
    /// The kernel's command line: names the root file system and the serial console.
    pub cmdline: String,
    /// The disk's size as a guest sees it, in bytes.
    pub size: u64,
    /// Seconds since 1970.
    pub created: u64,
    /// [`crate::image::Recipe::digest`] of what it was built by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe_digest: Option<String>,
    /// The disk's file.
    pub disk: Checksum,
    /// The kernel's.
    pub kernel: Checksum,
    /// The initial RAM disk's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<Checksum>,
    /// Packages and their versions, where it was built.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub packages: BTreeMap<String, String>,
}

/// Where an image is from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// Built from Debian's packages.
    Debian {
        /// The release's code name.
        release: String,
    },
    /// A disk image from elsewhere.
    Imported {
        /// The file's name.
        file: String,
    },
}

/// A file's length and SHA-256.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checksum {
    /// Its length in bytes.
    pub bytes: u64,
    /// Its SHA-256 in hexadecimal digits.
    pub sha256: String,
}

impl Manifest {
    /// The form that is written, and the only one that is read.
    pub const VERSION: u32 = 1;

    /// Reads one.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &[u8]) -> io::Result<Manifest> {
        let manifest: Manifest = serde_json::from_slice(text)?;
        if manifest.version != Manifest::VERSION {
            let text = format!("version {} is not one that this ospite knows", manifest.version);
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(manifest)
    }
}

impl Checksum {
    /// A file's.
    ///
    /// # Errors
    /// What the host says.
    pub fn of(path: &Path) -> io::Result<Checksum> {
        let mut file = File::open(path)?;
        let (mut hash, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(Checksum { bytes, sha256: hex(&hash.finalize()) }),
                count => {
                    hash.update(&buffer[..count]);
                    bytes += count as u64;
                }
            }
        }
    }
}

/// Hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_is_what_sha256sum_prints() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "abc").unwrap();
        let known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(Checksum::of(file.path()).unwrap(), Checksum { bytes: 3, sha256: known.into() });
    }
}
