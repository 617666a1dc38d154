//! Finding the kernel on a disk.

use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use disk::{Disk, Reader};
use ext4_view::{Ext4, Ext4Read};

use super::partitions::{Partition, partitions};

/// What is started, as found on a disk.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Its release, where its name tells it.
    pub(super) release: Option<String>,
    /// The kernel's `root=`, where its file system was found.
    pub(super) root: Option<String>,
}

/// Longer than any kernel or initial RAM disk.
const LONGEST: u64 = 1 << 30;

struct Part {
    disk: Reader,
    part: Partition,
}

impl Ext4Read for Part {
    fn read(
        &mut self,
        start: u64,
        bytes: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        let end = start.checked_add(bytes.len() as u64).filter(|end| *end <= self.part.length);
        end.ok_or(io::ErrorKind::UnexpectedEof).map_err(io::Error::from)?;
        Ok(self.disk.read(self.part.start + start, bytes)?)
    }
}

/// Finds the newest kernel in an ext4 file system of `disk`, in `/boot`, or on a partition for `/boot`;
/// writes it to `kernel` and its initial RAM disk, where there is one, to `initrd`.
pub(super) fn find(disk: &Arc<dyn Disk>, kernel: &Path, initrd: &Path) -> io::Result<Option<Found>> {
    let systems = systems(disk)?;
    let newest = systems.iter().flat_map(|(_, fs)| {
        let names = ["/boot", "/"].map(|folder| (folder, kernels(fs, folder)));
        names
            .into_iter()
            .flat_map(move |(folder, names)| names.into_iter().map(move |name| (fs, folder, name)))
    });
    let Some((fs, folder, name)) = newest.max_by_key(|(_, _, name)| version(name)) else { return Ok(None) };
    let place = |name: &str| format!("{}/{name}", folder.trim_end_matches('/'));
    copy(fs, &place(&name), kernel)?;
    let release = name.strip_prefix("vmlinuz-").map(str::to_owned);
    if let Some(release) = &release {
        let names = [
            format!("initrd.img-{release}"),
            format!("initramfs-{release}.img"),
            format!("initrd-{release}"),
        ];
        if let Some(name) = names.iter().find(|name| fs.exists(place(name).as_str()).unwrap_or(false)) {
            copy(fs, &place(name), initrd)?;
        }
    }
    let root = systems.iter().find(|(_, fs)| fs.exists("/etc/os-release").unwrap_or(false));
    let root = root.map(|(part, fs)| match (initrd.exists(), part.number) {
        // Only an initial RAM disk knows file systems by name.
        (true, _) => format!("UUID={}", fs.uuid()),
        (false, 0) => "/dev/vda".into(),
        (false, number) => format!("/dev/vda{number}"),
    });
    Ok(Some(Found { release, root }))
}

/// The ext4 file systems of a disk; others are not looked into.
fn systems(disk: &Arc<dyn Disk>) -> io::Result<Vec<(Partition, Ext4)>> {
    let reader = || Reader::new(disk.clone());
    let parts = partitions(&reader()?)?;
    let mut systems = Vec::new();
    for part in parts {
        match Ext4::load(Box::new(Part { disk: reader()?, part })) {
            Ok(fs) => systems.push((part, fs)),
            Err(error) => log::debug!("partition {}: {error}", part.number),
        }
    }
    Ok(systems)
}

/// The names of kernels in a folder.
fn kernels(fs: &Ext4, folder: &str) -> Vec<String> {
    let entries = fs.read_dir(folder).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| Some(entry.file_name().as_str().ok()?.to_owned()));
    names.filter(|name| name.starts_with("vmlinuz-") && !name.contains("rescue")).collect()
}

/// Sorts 6.1.0-9 before 6.1.0-10.
fn version(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

fn copy(fs: &Ext4, from: &str, to: &Path) -> io::Result<()> {
    let failed = |error: ext4_view::Ext4Error| io::Error::other(format!("{from} on the disk: {error}"));
    if fs.metadata(from).map_err(failed)?.len() > LONGEST {
        return Err(io::Error::other(format!("{from} on the disk is too large for a kernel or an initrd")));
    }
    let file = fs.open(from).map_err(failed)?;
    io::copy(&mut file.take(LONGEST), &mut fs::File::create(to)?)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// A disk with a file system of these files; nothing where it cannot be made.
    pub(crate) fn disk(files: &[(&str, &str)]) -> Option<(tempfile::TempDir, std::path::PathBuf)> {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("tree");
        for (name, text) in files {
            let path = tree.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let image = folder.path().join("disk.raw");
        fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        let uuid = "01234567-89ab-4cde-8f01-23456789abcd";
        let made = Command::new("/sbin/mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-U", uuid, "-d"])
            .args([&tree, &image])
            .status();
        match made {
            Ok(status) => assert!(status.success()),
            Err(error) => {
                eprintln!("*** SKIPPED: mke2fs cannot be run ({error}); install e2fsprogs ***");
                return None;
            }
        }
        Some((folder, image))
    }

    fn found(files: &[(&str, &str)]) -> Option<(Option<Found>, String, Option<String>)> {
        let (folder, image) = disk(files)?;
        let (kernel, initrd) = (folder.path().join("k"), folder.path().join("i"));
        let disk = disk::open(&image, None, true).unwrap().into();
        let found = find(&disk, &kernel, &initrd).unwrap();
        Some((found, fs::read_to_string(kernel).unwrap_or_default(), fs::read_to_string(initrd).ok()))
    }

    #[test]
    fn the_newest_kernel_is_found_with_what_belongs_to_it() {
        let Some((found, kernel, initrd)) = found(&[
            ("boot/vmlinuz-6.1.0-9-amd64", "old"),
            ("boot/vmlinuz-6.1.0-10-amd64", "new"),
            ("boot/initrd.img-6.1.0-10-amd64", "ram"),
            ("boot/initrd.img-6.1.0-9-amd64", "no"),
            ("etc/os-release", "ID=debian"),
        ]) else {
            return;
        };
        assert_eq!((kernel.as_str(), initrd.as_deref()), ("new", Some("ram")));
        let found = found.unwrap();
        assert_eq!(found.release.as_deref(), Some("6.1.0-10-amd64"));
        assert_eq!(found.root.as_deref(), Some("UUID=01234567-89ab-4cde-8f01-23456789abcd"));
    }

    #[test]
    fn without_an_initial_ram_disk_the_root_is_a_device() {
        let files = [("vmlinuz-5.0", "k"), ("etc/os-release", "")];
        let Some((Some(found), _, None)) = found(&files) else { return };
        assert_eq!(found.root.as_deref(), Some("/dev/vda"));
    }

    #[test]
    fn a_disk_without_one_has_none() {
        let Some((found, ..)) = found(&[("etc/os-release", "")]) else { return };
        assert_eq!(found, None);
        let noise = tempfile::NamedTempFile::new().unwrap();
        fs::write(noise.path(), vec![0x5a; 1 << 20]).unwrap();
        let disk = disk::open(noise.path(), None, true).unwrap().into();
        assert_eq!(find(&disk, Path::new("/no"), Path::new("/no")).unwrap(), None);
    }
}
