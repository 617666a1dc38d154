//! `--disk FILE[,readonly][,format=F][,base=FILE][,serial=S][,iops=N][,bandwidth=SIZE]`

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use machine::DiskSpec;
use throttle::{BadLimit, DiskLimits};

/// A disk as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskArg {
    /// The image or device.
    pub path: PathBuf,
    /// Its format, where it was given.
    pub format: Option<disk::Format>,
    /// The image that it is an overlay of, where it was given.
    pub base: Option<PathBuf>,
    /// The guest may not write.
    pub read_only: bool,
    /// The serial number that the guest sees.
    pub serial: Option<String>,
    /// What it may do in a second.
    pub limits: DiskLimits,
}

/// Why a text is no disk.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DiskError {
    /// Nothing before the first comma.
    #[error("the file's name is missing: write FILE[,readonly][,format=raw|qcow2][,serial=TEXT]")]
    NoFile,
    /// An option that disks do not have.
    #[error(
        "a disk has no option `{0}`; it has readonly, format=raw|qcow2, base=FILE, serial=TEXT, and limits: {limits} \
         (a comma in a name is written twice)", limits = DiskLimits::OPTIONS
    )]
    Option(String),
    /// A format that we cannot read.
    #[error("unknown format `{0}`; known are: {known}", known = formats())]
    Format(String),
    /// A serial number that does not fit.
    #[error("the serial number `{0}` does not fit: up to 20 printable ASCII characters")]
    Serial(String),
    /// A limit that is none.
    #[error(transparent)]
    Limit(#[from] BadLimit),
}

/// The serial number's room in a virtio-blk GET_ID answer (virtio 1.2, 5.2.6).
const SERIAL_MAX: usize = 20;

impl DiskArg {
    /// Reads the option's value. File names need not be UTF-8.
    pub fn parse(text: OsString) -> Result<DiskArg, DiskError> {
        let mut parts = split(text.as_bytes()).into_iter();
        let path = parts.next().filter(|path| !path.is_empty()).ok_or(DiskError::NoFile)?;
        let path = PathBuf::from(OsString::from_vec(path));
        let limits = DiskLimits::default();
        let mut disk = DiskArg { path, format: None, base: None, read_only: false, serial: None, limits };
        for option in parts {
            disk.set(&OsStr::from_bytes(&option).to_string_lossy())?;
        }
        disk.limits.check()?;
        Ok(disk)
    }

    fn set(&mut self, option: &str) -> Result<(), DiskError> {
        match option.split_once('=') {
            None if option == "readonly" => self.read_only = true,
            Some(("format", name)) => self.format = Some(format(name)?),
            Some(("base", base)) if !base.is_empty() => self.base = Some(base.into()),
            Some(("serial", serial)) => self.serial = Some(check_serial(serial)?),
            Some((limit, value)) if self.limits.set(limit, value)? => {}
            _ => return Err(DiskError::Option(option.into())),
        }
        Ok(())
    }
}

impl From<&DiskArg> for DiskSpec {
    fn from(arg: &DiskArg) -> DiskSpec {
        let DiskArg { path, format, base, read_only, serial, limits } = arg.clone();
        DiskSpec { path, format, base, read_only, serial, limits }
    }
}

fn format(name: &str) -> Result<disk::Format, DiskError> {
    name.parse().map_err(|_| DiskError::Format(name.into()))
}

fn formats() -> String {
    disk::Format::ALL.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn check_serial(serial: &str) -> Result<String, DiskError> {
    let fits =
        (1..=SERIAL_MAX).contains(&serial.len()) && serial.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
    if fits { Ok(serial.into()) } else { Err(DiskError::Serial(serial.into())) }
}

/// Splits at single commas; two in a row are one that belongs to the text.
fn split(text: &[u8]) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte == b',' && bytes.next_if_eq(&b',').is_none() {
            parts.push(Vec::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(byte);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<DiskArg, DiskError> {
        DiskArg::parse(text.into())
    }

    #[test]
    fn a_file_and_its_options() {
        let disk = parse("d.qcow2,readonly,format=qcow2,serial=DATA 1").unwrap();
        assert_eq!(disk.path, PathBuf::from("d.qcow2"));
        assert_eq!(disk.format.map(|format| format.to_string()).as_deref(), Some("qcow2"));
        assert!(disk.read_only);
        assert_eq!(disk.serial.as_deref(), Some("DATA 1"));
        assert_eq!(parse("d,base=/b,,1.qcow2").unwrap().base, Some(PathBuf::from("/b,1.qcow2")));
        let limits = parse("d,iops=500,readonly,bandwidth=20M,bandwidth-burst=1G").unwrap().limits;
        assert_eq!(limits.to_string(), "at most 500 requests/s and 20 MiB/s (1 GiB at once)");
    }

    #[test]
    fn commas_and_odd_bytes_in_names() {
        assert_eq!(parse("a,,b.img,readonly").unwrap().path, PathBuf::from("a,b.img"));
        let odd = OsString::from_vec(b"\xff.img,readonly".to_vec());
        assert_eq!(DiskArg::parse(odd).unwrap().path.as_os_str().as_bytes(), b"\xff.img");
    }

    #[test]
    fn what_is_wrong_is_said() {
        assert_eq!(parse(",readonly"), Err(DiskError::NoFile));
        assert!(parse("d,wat=1").unwrap_err().to_string().contains("no option `wat=1`"));
        assert!(parse("d,format=zip").unwrap_err().to_string().contains("known are: raw, qcow2"));
        assert!(parse("d,serial=0123456789012345678901").unwrap_err().to_string().contains("20"));
        assert!(parse("d,bandwidth=5").unwrap_err().to_string().contains("20M"));
        assert!(parse("d,iops-burst=5").unwrap_err().to_string().contains("add iops=500"));
    }
}
