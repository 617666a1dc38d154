//! What a guest with `cloud-init` is told at its first start: a small disk, the seed of its data source
//! NoCloud (cloud-init's documentation, "NoCloud": a vfat file system with the label CIDATA, and in it
//! `user-data`, `meta-data`, and, where they are given, `network-config` and `vendor-data`).

use std::fs;
use std::io::{self, Cursor, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions, format_volume};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The longest file, in bytes.
const LONGEST: u64 = 1 << 20;
const LABEL: [u8; 11] = *b"CIDATA     ";
/// Room beside the files' content: tables, and what each file's last cluster leaves empty.
const ROOM: usize = 1 << 20;
/// What user data and vendor data may begin with (cloud-init's documentation, "User data formats").
const BEGINNINGS: [&str; 9] = [
    "#cloud-config",
    "#!",
    "#include",
    "#cloud-boothook",
    "#part-handler",
    "## template: jinja",
    "Content-Type:",
    "MIME-Version:",
    "From ",
];

/// The files that a seed is made of: `USER-DATA[,network-config=FILE][,vendor-data=FILE]`. A comma in a name
/// is written twice.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Files {
    user_data: PathBuf,
    network_config: Option<PathBuf>,
    vendor_data: Option<PathBuf>,
}

/// What a guest is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloudInit {
    /// What its owner wants: users, packages, files, commands.
    pub user_data: String,
    /// Its network, instead of DHCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_config: Option<String>,
    /// What who runs it wants; the owner's word is stronger.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vendor_data: Option<String>,
}

/// Why files cannot be a seed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// They are not named as they must be.
    #[error("{0:?} names no cloud-init files: write USER-DATA[,network-config=FILE][,vendor-data=FILE]")]
    Option(String),
    /// One cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// One does not hold what cloud-init understands.
    #[error("{} is nothing that cloud-init understands: {why}", path.display())]
    Bad {
        /// Which.
        path: PathBuf,
        /// Why, and what to write.
        why: String,
    },
}

impl FromStr for Files {
    type Err = Error;

    fn from_str(text: &str) -> Result<Files, Error> {
        let wrong = || Error::Option(text.into());
        let mut parts = split(text).into_iter();
        let user_data = parts.next().filter(|path| !path.is_empty()).ok_or_else(wrong)?.into();
        let mut files = Files { user_data, network_config: None, vendor_data: None };
        for part in parts {
            let place = match part.split_once('=') {
                Some(("network-config", path)) if !path.is_empty() => (&mut files.network_config, path),
                Some(("vendor-data", path)) if !path.is_empty() => (&mut files.vendor_data, path),
                _ => return Err(wrong()),
            };
            *place.0 = Some(place.1.into());
        }
        Ok(files)
    }
}

impl TryFrom<String> for Files {
    type Error = Error;

    fn try_from(text: String) -> Result<Files, Error> {
        text.parse()
    }
}

/// At commas; two of them are one that belongs to a name.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        if c == ',' && rest.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    parts
}

impl Files {
    /// The same, where relative names are those of files in `folder`.
    pub fn relative_to(&mut self, folder: &Path) {
        let all = [Some(&mut self.user_data), self.network_config.as_mut(), self.vendor_data.as_mut()];
        all.into_iter().flatten().for_each(|path| *path = folder.join(&*path));
    }

    /// Reads them.
    ///
    /// # Errors
    /// One cannot be read, or cloud-init would not understand it.
    pub fn read(&self) -> Result<CloudInit, Error> {
        let data = |path: &PathBuf| {
            let text = read(path)?;
            begins_well(&text).map_err(|why| Error::Bad { path: path.clone(), why })?;
            Ok(text)
        };
        Ok(CloudInit {
            user_data: data(&self.user_data)?,
            network_config: self.network_config.as_deref().map(read).transpose()?,
            vendor_data: self.vendor_data.as_ref().map(data).transpose()?,
        })
    }
}

fn read(path: &Path) -> Result<String, Error> {
    let failed = |source| Error::Read { path: path.into(), source };
    let bad = |why: &str| Error::Bad { path: path.into(), why: why.into() };
    let meta = fs::metadata(path).map_err(failed)?;
    if meta.is_file() && meta.len() > LONGEST {
        return Err(bad("it is longer than 1 MiB"));
    }
    let bytes = fs::read(path).map_err(failed)?;
    let text = String::from_utf8(bytes).map_err(|_| bad("it is no text in UTF-8"))?;
    if text.trim().is_empty() { Err(bad("it is empty")) } else { Ok(text) }
}

/// cloud-init leaves alone, with a line in a log of the guest's, what begins otherwise.
fn begins_well(text: &str) -> Result<(), String> {
    if BEGINNINGS.iter().any(|beginning| text.starts_with(beginning)) {
        return Ok(());
    }
    let first: String = text.lines().next().unwrap_or_default().chars().take(40).collect();
    Err(format!(
        "its first line is {first:?}; it must be `#cloud-config` (then comes YAML), `#!` and an interpreter \
         for a script, or the header of a MIME message"
    ))
}

impl CloudInit {
    /// What tells one seed from another: hexadecimal digits.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for text in [Some(&self.user_data), self.network_config.as_ref(), self.vendor_data.as_ref()] {
            let text = text.map_or("", String::as_str);
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        }
        hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The disk. It is the same for the same words. A guest applies them once for each `instance`.
    ///
    /// # Errors
    /// None that is known of: the disk is in memory.
    pub fn seed(&self, instance: &str, host_name: &str) -> io::Result<Vec<u8>> {
        // Strings of JSON are strings of YAML, whatever is in them.
        let meta_data = format!(
            "instance-id: {}\nlocal-hostname: {}\n",
            serde_json::to_string(instance)?,
            serde_json::to_string(host_name)?
        );
        let files = [
            ("meta-data", Some(&meta_data)),
            ("user-data", Some(&self.user_data)),
            ("network-config", self.network_config.as_ref()),
            ("vendor-data", self.vendor_data.as_ref()),
        ];
        let content: usize = files.iter().filter_map(|(_, text)| text.map(String::len)).sum();
        let mut disk = Cursor::new(vec![0; (ROOM + content).next_multiple_of(4096)]);
        format_volume(&mut disk, FormatVolumeOptions::new().volume_label(LABEL))?;
        disk.seek(SeekFrom::Start(0))?;
        let volume = FileSystem::new(&mut disk, FsOptions::new())?;
        for (name, text) in files {
            if let Some(text) = text {
                volume.root_dir().create_file(name)?.write_all(text.as_bytes())?;
            }
        }
        volume.unmount()?;
        Ok(disk.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn read_text(user_data: &[u8]) -> Result<CloudInit, Error> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("u"), user_data).unwrap();
        let mut files: Files = "u".parse().unwrap();
        files.relative_to(folder.path());
        files.read()
    }

    #[test]
    fn a_seed_is_a_volume_of_that_label_with_the_files_in_it() {
        for length in [1, 1000, 500_000, 1 << 20] {
            let all = CloudInit {
                user_data: "x".repeat(length),
                network_config: Some("version: 2\n".into()),
                vendor_data: None,
            };
            let seed = all.seed("web-1", "007").unwrap();
            assert!(seed == all.seed("web-1", "007").unwrap(), "it is the same each time");
            let mut disk = Cursor::new(seed);
            let volume = FileSystem::new(&mut disk, FsOptions::new()).unwrap();
            assert_eq!(volume.read_volume_label_from_root_dir().unwrap().unwrap(), "CIDATA");
            let names: Vec<_> = volume.root_dir().iter().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(names, ["meta-data", "user-data", "network-config"]);
            let text = |name| {
                let mut text = String::new();
                volume.root_dir().open_file(name).unwrap().read_to_string(&mut text).unwrap();
                text
            };
            assert_eq!(text("meta-data"), "instance-id: \"web-1\"\nlocal-hostname: \"007\"\n");
            assert!(text("user-data") == all.user_data);
        }
    }

    #[test]
    fn what_cloud_init_would_pass_over_is_refused_with_what_to_write() {
        for good in
            ["#cloud-config\nusers: []\n", "#!/bin/sh\n", "Content-Type: multipart/mixed; boundary=x\n"]
        {
            assert_eq!(read_text(good.as_bytes()).unwrap().user_data, good);
        }
        for (bad, told) in [
            (&b"users: []\n"[..], "`#cloud-config`"),
            (b" #cloud-config\n", "first line"),
            (b"\n", "empty"),
            (b"\xff\xfe", "UTF-8"),
            (&[b'#'; (1 << 20) + 1], "1 MiB"),
        ] {
            let error = read_text(bad).unwrap_err().to_string();
            assert!(error.contains(told), "{error}");
        }
        assert!("no/such".parse::<Files>().unwrap().read().unwrap_err().to_string().contains("no/such"));
    }

    #[test]
    fn further_files_are_named_after_commas() {
        let files: Files = "a,,b.yaml,network-config=n,vendor-data=/v".parse().unwrap();
        assert_eq!(files.user_data, Path::new("a,b.yaml"));
        assert_eq!((files.network_config, files.vendor_data), (Some("n".into()), Some("/v".into())));
        for bad in ["", ",network-config=n", "a,n", "a,meta-data=m", "a,vendor-data="] {
            assert!(bad.parse::<Files>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn other_words_have_another_digest() {
        let of = |user: &str, vendor: Option<&str>| {
            let vendor_data = vendor.map(Into::into);
            CloudInit { user_data: user.into(), network_config: None, vendor_data }.digest()
        };
        assert_eq!(of("a", None), of("a", None));
        assert_ne!(of("ab", Some("c")), of("a", Some("bc")));
    }
}
