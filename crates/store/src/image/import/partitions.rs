//! Where file systems may be on a disk: on all of it, or in the partitions of an MBR or a GPT.

use std::io;

use disk::Reader;

/// A part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Partition {
    /// Its number from 1 on, as in `/dev/vda1`; 0 is the whole disk.
    pub(super) number: u32,
    /// Where it begins, in bytes.
    pub(super) start: u64,
    /// Its length in bytes.
    pub(super) length: u64,
}

const SECTOR: u64 = 512;
const SIGNATURE: [u8; 2] = [0x55, 0xaa];
/// The type of the entry that says there is a GPT (UEFI 2.10, 5.2.3).
const PROTECTIVE: u8 = 0xee;
/// Entries of a GPT beyond these are an accident or an attack.
const MAX_ENTRIES: u64 = 256;

/// The partitions; the whole disk where there are none.
pub(super) fn partitions(disk: &Reader) -> io::Result<Vec<Partition>> {
    let whole = Partition { number: 0, start: 0, length: disk.size() };
    let mut first = [0; SECTOR as usize];
    disk.read(0, &mut first)?;
    if first[510..] != SIGNATURE {
        return Ok(vec![whole]);
    }
    let mut found = mbr(&first);
    if first[446..510].chunks(16).any(|entry| entry[4] == PROTECTIVE) {
        found = gpt(disk)?;
    }
    let fits = |part: &Partition| {
        part.length != 0 && part.start.checked_add(part.length).is_some_and(|end| end <= disk.size())
    };
    found.retain(fits);
    // A boot sector of a file system has the signature, too.
    if found.is_empty() { Ok(vec![whole]) } else { Ok(found) }
}

/// The primary partitions of an MBR (UEFI 2.10, 5.2.1).
fn mbr(sector: &[u8]) -> Vec<Partition> {
    let entries = sector[446..510].chunks(16);
    let parts = (1..).zip(entries).filter(|(_, entry)| entry[4] != 0 && entry[0] & 0x7f == 0);
    parts
        .map(|(number, entry)| Partition {
            number,
            start: u64::from(le32(entry, 8)) * SECTOR,
            length: u64::from(le32(entry, 12)) * SECTOR,
        })
        .collect()
}

/// The partitions of a GPT (UEFI 2.10, 5.3) with sectors of 512 bytes.
fn gpt(disk: &Reader) -> io::Result<Vec<Partition>> {
    let mut header = [0; SECTOR as usize];
    disk.read(SECTOR, &mut header)?;
    let size = u64::from(le32(&header, 84));
    if !header.starts_with(b"EFI PART") || !(128..=4096).contains(&size) {
        return Ok(Vec::new());
    }
    let (table, count) = (le64(&header, 72), u64::from(le32(&header, 80)).min(MAX_ENTRIES));
    let Some(table) = table.checked_mul(SECTOR) else { return Ok(Vec::new()) };
    let mut entries = vec![0; (count * size) as usize];
    disk.read(table, &mut entries)?;
    let used = (1..).zip(entries.chunks(size as usize)).filter(|(_, entry)| entry[..16] != [0; 16]);
    let bytes = |lba: u64| lba.saturating_mul(SECTOR);
    Ok(used
        .map(|(number, entry)| {
            let (first, last) = (le64(entry, 32), le64(entry, 40));
            let length = bytes(last.saturating_add(1).saturating_sub(first));
            Partition { number, start: bytes(first), length }
        })
        .collect())
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    const SIZE: u64 = 64 << 20;

    fn disk(fill: impl FnOnce(&std::path::Path)) -> Reader {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(SIZE).unwrap();
        fill(file.path());
        Reader::new(disk::open(file.path(), Some(disk::Format::Raw), true).unwrap().into()).unwrap()
    }

    /// Partitions as `sfdisk` makes them; nothing where there is none.
    fn sfdisk(label: &str, lines: &str) -> Option<Vec<Partition>> {
        let mut made = true;
        let disk = disk(|path| {
            let child = Command::new("/sbin/sfdisk")
                .args(["--quiet", "--label", label])
                .arg(path)
                .stdin(Stdio::piped())
                .spawn();
            match child {
                Err(error) => {
                    eprintln!("*** SKIPPED: sfdisk cannot be run ({error}); install fdisk ***");
                    made = false;
                }
                Ok(mut child) => {
                    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
                    assert!(child.wait().unwrap().success());
                }
            }
        });
        made.then(|| partitions(&disk).unwrap())
    }

    #[test]
    fn partitions_are_found_as_the_reference_makes_them() {
        let lines = "start=2048,size=2048\nstart=8192,size=65536\n";
        let expected = [
            Partition { number: 1, start: 1 << 20, length: 1 << 20 },
            Partition { number: 2, start: 4 << 20, length: 32 << 20 },
        ];
        for label in ["gpt", "dos"] {
            if let Some(found) = sfdisk(label, lines) {
                assert_eq!(found, expected, "{label}");
            }
        }
    }

    #[test]
    fn a_disk_without_partitions_is_one_and_so_is_one_with_nonsense() {
        let whole = Partition { number: 0, start: 0, length: SIZE };
        assert_eq!(partitions(&disk(|_| ())).unwrap(), [whole]);
        let nonsense = |kind: u8| {
            disk(|path| {
                let mut bytes = vec![0xff; 4096];
                bytes[446] = 0;
                bytes[450] = kind;
                bytes[510..512].copy_from_slice(&SIGNATURE);
                bytes[512..520].copy_from_slice(b"EFI PART");
                bytes[512 + 84..512 + 88].copy_from_slice(&128u32.to_le_bytes());
                std::fs::OpenOptions::new().write(true).open(path).unwrap().write_all(&bytes).unwrap();
            })
        };
        assert_eq!(partitions(&nonsense(0x83)).unwrap(), [whole]);
        let _ = partitions(&nonsense(PROTECTIVE)); // an error or not, it does not panic
    }
}
