//! Formats, and how to tell them apart by their first sector.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The bytes of the disk as they are.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
    /// VMware's format; flat extents, read-only.
    Vmdk,
}

impl Format {
    /// All formats.
    pub const ALL: [Format; 3] = [Format::Raw, Format::Qcow2, Format::Vmdk];

    /// The name that users type after `format=`.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A format name that means nothing to us.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("unknown disk format {0:?}; use raw, qcow2 or vmdk, or leave format= out")]
pub struct UnknownFormat(String);

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Format, UnknownFormat> {
        let known = Format::ALL.into_iter().find(|format| format.name() == name);
        known.ok_or_else(|| UnknownFormat(name.into()))
    }
}

/// Where a format's mark is, what it is, and what it means: a format of ours, or one that we only
/// know the name of.
const MARKS: [(usize, &[u8], Result<Format, &str>); 10] = [
    (0, b"QFI\xfb", Ok(Format::Qcow2)),
    (0, b"# Disk DescriptorFile", Ok(Format::Vmdk)),
    (0, b"KDMV", Err("sparse VMDK")),
    (0, b"COWD", Err("sparse VMDK")),
    (0, b"vhdxfile", Err("VHDX")),
    (0, b"conectix", Err("VHD")),
    (0, b"QED\0", Err("QED")),
    (0, b"WithoutFreeSpace", Err("Parallels")),
    (0, b"WithouFreSpacExt", Err("Parallels")),
    (0x40, b"\x7f\x10\xda\xbe", Err("VirtualBox VDI")),
];

/// The format of an image that starts with `head`.
pub(crate) fn tell(head: &[u8]) -> Result<Format, &'static str> {
    let marked = |at: usize, mark: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(mark));
    let mark = MARKS.iter().find(|(at, mark, _)| marked(*at, mark));
    // qcow version 1 shares the mark with its successor.
    match mark.map_or(Ok(Format::Raw), |(.., found)| *found) {
        Ok(Format::Qcow2) if head.get(4..8) == Some(&[0, 0, 0, 1]) => Err("qcow (version 1)"),
        found => found,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_told_by_their_marks() {
        let mut vdi = vec![0; 512];
        vdi[0x40..0x44].copy_from_slice(&0xbeda_107fu32.to_le_bytes());
        assert_eq!(tell(&vdi), Err("VirtualBox VDI"));
        assert_eq!(tell(b"QFI\xfb\0\0\0\x03"), Ok(Format::Qcow2));
        assert_eq!(tell(b"QFI\xfb\0\0\0\x01"), Err("qcow (version 1)"));
        assert_eq!(tell(b"# Disk DescriptorFile\nversion=1\n"), Ok(Format::Vmdk));
        for raw in [&b""[..], b"QFI", &[0; 512], b"\xeb\x3c\x90MSDOS5.0"] {
            assert_eq!(tell(raw), Ok(Format::Raw));
        }
    }

    #[test]
    fn names_go_round() {
        for format in Format::ALL {
            assert_eq!(format.to_string().parse(), Ok(format));
        }
        assert!("QCOW2".parse::<Format>().is_err());
    }
}
