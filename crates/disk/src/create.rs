//! New images.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, StorageOpenOptions};

use crate::{Disk, Error, Format, SECTOR, Slice, open};

/// Longest name of a backing file (QEMU's docs/interop/qcow2.txt).
const MAX_NAME: usize = 1023;

/// Makes a qcow2 disk of `size` bytes that reads as zeroes.
///
/// # Errors
/// Where there is a file already, or the host says no. Nothing is left behind then.
pub fn create(path: &Path, size: u64) -> Result<(), Error> {
    make(path, size, None)
}

/// Makes a qcow2 disk of `size` bytes that reads as the qcow2 image `base`, with zeroes behind its end,
/// until it is written to. It names `base` by its absolute path, for other programs: [`crate::open_overlay`]
/// is told where the base is.
///
/// # Errors
/// As [`create`].
pub fn create_overlay(path: &Path, base: &Path, size: u64) -> Result<(), Error> {
    let base = base.canonicalize().map_err(|source| Error::io(base, "find", source))?;
    let name = base.to_str().filter(|name| name.len() <= MAX_NAME);
    let name = name.ok_or_else(|| {
        Error::bad(&base, format!("its name is not UTF-8 of up to {MAX_NAME} bytes, as qcow2 requires"))
    })?;
    make(path, size, Some(name))
}

fn make(path: &Path, size: u64, base: Option<&str>) -> Result<(), Error> {
    let failed = |source| Error::io(path, "make", source);
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    let made = format(path, file.map_err(failed)?, size, base);
    if made.is_err() {
        let _ = fs::remove_file(path); // the first failure is the one to tell
    }
    made.map_err(failed)
}

fn format(path: &Path, file: fs::File, size: u64, base: Option<&str>) -> io::Result<()> {
    let synced = file.try_clone()?;
    let storage = File::from_open_file(file, StorageOpenOptions::new().filename(path).write(true))?;
    let mut builder = Qcow2::<File>::create_builder(storage).size(size.next_multiple_of(SECTOR));
    if let Some(base) = base {
        builder = builder.backing(base.into(), Format::Qcow2.name().into());
    }
    builder.create()?;
    synced.sync_all()
}

/// Bytes that are copied at a time: a multiple of every cluster size.
const CHUNK: u64 = 2 << 20;
/// Runs of zeroes of at least this length are left out: one cluster of what [`create`] makes.
const GRAIN: usize = 64 << 10;

/// Copies a disk into a new qcow2 image, holes and zeroes left out, and flushes it. `progress` hears how
/// many bytes of `from` are done and may stop it by an error.
///
/// # Errors
/// As [`create`], and what reading, writing and `progress` say.
pub fn copy(
    from: &dyn Disk,
    to: &Path,
    mut progress: impl FnMut(u64) -> io::Result<()>,
) -> Result<(), Error> {
    create(to, from.size())?;
    let copied = copy_into(from, to, &mut progress);
    if copied.is_err() {
        let _ = fs::remove_file(to); // the first failure is the one to tell
    }
    copied
}

fn copy_into(
    from: &dyn Disk,
    to: &Path,
    progress: &mut dyn FnMut(u64) -> io::Result<()>,
) -> Result<(), Error> {
    let disk = open(to, Some(Format::Qcow2), false)?;
    let failed = |source| Error::io(to, "write", source);
    let ram = mem::GuestRam::new(&[0..CHUNK]).map_err(|error| failed(io::Error::other(error)))?;
    let slice = |at, length| {
        mem::GuestMemoryBackend::get_slice(&*ram, mem::GuestAddress(at), length)
            .map_err(|error| failed(io::Error::other(error)))
    };
    let mut bytes = vec![0; CHUNK as usize];
    let mut next = 0;
    while let Some(at) = from.data_from(next).map(|data| data / CHUNK * CHUNK) {
        next = at + CHUNK;
        let length = CHUNK.min(from.size() - at) as usize;
        let chunk: [Slice<'_>; 1] = [slice(0, length)?];
        from.read_vectored_at(&chunk, at).map_err(|source| Error::Read { offset: at, source })?;
        chunk[0].copy_to(&mut bytes[..length]);
        for (start, length) in filled(&bytes[..length]) {
            let piece = slice(start as u64, length)?;
            disk.write_vectored_at(&[piece], at + start as u64).map_err(failed)?;
        }
        progress(at + length as u64).map_err(failed)?;
    }
    progress(from.size()).map_err(failed)?;
    disk.flush().map_err(failed)
}

/// The runs of grains that hold anything but zeroes, as (start, length).
fn filled(bytes: &[u8]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (index, grain) in bytes.chunks(GRAIN).enumerate() {
        if grain.iter().all(|&byte| byte == 0) {
            continue;
        }
        let start = index * GRAIN;
        match runs.last_mut() {
            Some((from, length)) if *from + *length == start => *length += grain.len(),
            _ => runs.push((start, grain.len())),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Guest, qemu_img};

    #[test]
    fn a_copy_is_what_it_is_a_copy_of_without_its_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (raw, copied) = (dir.path().join("a.raw"), dir.path().join("a.qcow2"));
        let file = fs::File::create(&raw).unwrap();
        file.set_len((64 << 20) + 512).unwrap();
        for (at, byte) in [(0, 1), (0x30_0200, 2), (0x1f_fff0, 3), (64 << 20, 4)] {
            std::os::unix::fs::FileExt::write_all_at(&file, &[byte; 512], at).unwrap();
        }
        let from = open(&raw, Some(Format::Raw), true).unwrap();
        let mut seen = Vec::new();
        copy(&*from, &copied, |done| {
            seen.push(done);
            Ok(())
        })
        .unwrap();
        assert_eq!(seen.last(), Some(&from.size()));
        assert!(seen.len() < 10, "holes are not even read: {seen:?}");
        assert!(fs::metadata(&copied).unwrap().len() < 2 << 20);
        if qemu_img(dir.path(), &["check", "-q", "a.qcow2"]) {
            qemu_img(dir.path(), &["compare", "-q", "-f", "qcow2", "-F", "raw", "a.qcow2", "a.raw"]);
        }
        assert!(copy(&*from, &copied, |_| Ok(())).is_err(), "nothing is overwritten");
        fs::remove_file(&copied).unwrap();
        let stopped = copy(&*from, &copied, |_| Err(io::ErrorKind::Interrupted.into()));
        assert!(stopped.is_err() && !copied.exists());
    }

    #[test]
    fn an_overlay_is_on_the_base_that_the_caller_names_wherever_that_is() {
        let dir = tempfile::tempdir().unwrap();
        let (images, vms) = (dir.path().join("images"), dir.path().join("vms"));
        fs::create_dir(&images).unwrap();
        fs::create_dir(&vms).unwrap();
        let (base, top) = (images.join("base.qcow2"), vms.join("top.qcow2"));
        create(&base, 1 << 20).unwrap();
        let guest = Guest::new();
        guest.fill(0, &[7; 512]);
        open(&base, None, false).unwrap().write_vectored_at(&[guest.slice(0, 512)], 1024).unwrap();
        create_overlay(&top, &base, 8 << 20).unwrap();
        if qemu_img(dir.path(), &["check", "-q", "vms/top.qcow2"]) {
            qemu_img(dir.path(), &["compare", "-q", "-f", "qcow2", "vms/top.qcow2", "images/base.qcow2"]);
        }
        // By its own word it gets nothing from elsewhere, as any foreign image.
        assert!(open(&top, None, true).is_err());

        // What it names does not matter: the home has been moved.
        let moved = dir.path().join("moved.qcow2");
        fs::rename(&base, &moved).unwrap();
        let before = fs::read(&moved).unwrap();
        let disk = crate::open_overlay(&top, &moved, false).unwrap();
        let second = crate::open_overlay(&top, &moved, true).err().unwrap();
        assert!(matches!(second, Error::Locked { .. }), "{second}");
        assert_eq!(disk.size(), 8 << 20);
        disk.read_vectored_at(&[guest.slice(0x1000, 512)], 1024).unwrap();
        assert_eq!(guest.bytes(0x1000, 512), [7; 512]);
        disk.write_vectored_at(&[guest.slice(0, 512)], 2048).unwrap();
        disk.write_vectored_at(&[guest.slice(0, 512)], (8 << 20) - 512).unwrap();
        disk.flush().unwrap();
        disk.read_vectored_at(&[guest.slice(0x1000, 512)], 4 << 20).unwrap();
        assert_eq!(guest.bytes(0x1000, 512), [0; 512], "zeroes behind the end of the base");
        drop(disk);
        assert!(fs::read(&moved).unwrap() == before, "a base is never written to");
    }

    #[test]
    fn a_disk_that_has_no_base_gets_none_and_a_base_has_none_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b, c] = ["a.qcow2", "b.qcow2", "c.qcow2"].map(|name| dir.path().join(name));
        create(&a, 1 << 20).unwrap();
        create(&b, 1 << 20).unwrap();
        let error = crate::open_overlay(&a, &b, true).err().unwrap();
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("no overlay"), "{error:?}");
        fs::remove_file(&b).unwrap();
        create_overlay(&b, &a, 1 << 20).unwrap();
        create_overlay(&c, &b, 1 << 20).unwrap();
        let error = crate::open_overlay(&c, &b, true).err().unwrap();
        let why = std::error::Error::source(&error).unwrap().to_string();
        assert!(why.contains("a base is on no other"), "{error:?}");
        assert!(crate::base_size(&b).is_err());
        assert_eq!(crate::base_size(&a).unwrap(), 1 << 20);
        crate::open_overlay(&b, &a, true).unwrap();
        fs::write(&a, [0; 4096]).unwrap();
        let error = crate::open_overlay(&b, &a, true).err().unwrap();
        assert!(
            std::error::Error::source(&error).unwrap().to_string().contains("no qcow2 image"),
            "{error:?}"
        );
    }
}
