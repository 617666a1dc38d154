//! An image as one file.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::build::{Listener, Progress, go_on};
use super::{DISK, Error, INITRD, Image, KERNEL, MANIFEST, import};

/// Writes all of the image into a tar archive, its manifest first: what [`super::import()`] takes.
///
/// # Errors
/// Where the file is there already, or the host says no; nothing is left behind then.
pub fn export(image: &Image, to: &Path, progress: Listener<'_>) -> Result<(), Error> {
    write(to, progress, |file, progress| {
        let mut archive = tar::Builder::new(file);
        archive.sparse(false);
        let total = image.bytes_on_host();
        let mut before = 0;
        for name in [MANIFEST, KERNEL, INITRD, DISK] {
            let path = image.folder.join(name);
            if name == INITRD && image.initrd().is_none() {
                continue;
            }
            let from = File::open(path)?;
            let mut header = tar::Header::new_ustar();
            let length = from.metadata()?.len();
            header.set_size(length);
            header.set_mode(0o644);
            header.set_mtime(image.manifest.created);
            let told = Told { from, done: before, total, progress };
            archive.append_data(&mut header, name, told)?;
            before += length;
        }
        archive.finish()
    })
}

/// Writes the disk of an image as qcow2.
///
/// # Errors
/// As [`export`].
pub fn export_qcow2(image: &Image, to: &Path, progress: Listener<'_>) -> Result<(), Error> {
    let total = image.manifest.disk.bytes;
    write(to, progress, |file, progress| {
        import::copy(&mut File::open(image.disk())?, file, |done| progress(Progress::Bytes(done, total)))
    })
}

/// Writes the disk of an image as it is; what is zero is a hole.
///
/// # Errors
/// As [`export`].
pub fn export_raw(image: &Image, to: &Path, progress: Listener<'_>) -> Result<(), Error> {
    let disk = disk::open(&image.disk(), Some(disk::Format::Qcow2), true).map_err(Error::Disk)?;
    write(to, progress, |file, progress| {
        let disk = disk::Reader::new(disk.into())?;
        file.set_len(disk.size())?;
        let mut bytes = vec![0; 1 << 20];
        for at in (0..disk.size()).step_by(bytes.len()) {
            let length = (disk.size() - at).min(1 << 20) as usize;
            disk.read(at, &mut bytes[..length])?;
            for (index, block) in bytes[..length].chunks(4096).enumerate() {
                if block.iter().any(|&byte| byte != 0) {
                    file.write_all_at(block, at + index as u64 * 4096)?;
                }
            }
            stop(progress(Progress::Bytes(at, disk.size())))?;
        }
        Ok(())
    })
}

/// A reader that tells how far it is.
struct Told<'a, 'b> {
    from: File,
    done: u64,
    total: u64,
    progress: &'a mut (dyn FnMut(Progress<'_>) -> ControlFlow<()> + 'b),
}

impl Read for Told<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.from.read(buffer)?;
        self.done += count as u64;
        stop((self.progress)(Progress::Bytes(self.done, self.total)))?;
        Ok(count)
    }
}

fn stop(answer: ControlFlow<()>) -> io::Result<()> {
    if answer.is_break() { Err(io::Error::other("stopped")) } else { Ok(()) }
}

/// A file that gets its name when it is whole.
fn write(
    to: &Path,
    progress: Listener<'_>,
    content: impl FnOnce(&mut File, Listener<'_>) -> io::Result<()>,
) -> Result<(), Error> {
    let failed = |source| Error::io("write", to, source);
    if to.exists() {
        return Err(failed(io::ErrorKind::AlreadyExists.into()));
    }
    let mut name = OsString::from(".");
    name.push(to.file_name().ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?);
    name.push(format!(".{}.part", std::process::id()));
    let part = to.with_file_name(name);
    go_on(progress(Progress::Step("writing")))?;
    let mut stopped = false;
    let written = (|| {
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&part)?;
        content(&mut file, &mut |told| {
            let answer = progress(told);
            stopped = answer.is_break();
            answer
        })?;
        file.sync_all()?;
        Ok(renameat_with(CWD, &part, CWD, to, RenameFlags::NOREPLACE)?)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&part); // it may not have come into being
    }
    if stopped { Err(Error::Stopped) } else { written.map_err(failed) }
}

#[cfg(test)]
mod tests {
    use super::super::tests::home;
    use super::*;

    #[test]
    fn a_disk_is_written_as_it_is_and_nothing_is_written_over() {
        let (folder, home) = home(&["debian"]);
        let image = Image::open(&home, &"debian".parse().unwrap()).unwrap();
        let go_on: Listener<'_> = &mut |_| ControlFlow::Continue(());
        let (raw, qcow2) = (folder.path().join("a.raw"), folder.path().join("a.qcow2"));
        export_raw(&image, &raw, go_on).unwrap();
        assert_eq!(fs::read(&raw).unwrap(), vec![0; 1 << 20]);
        export_qcow2(&image, &qcow2, go_on).unwrap();
        assert_eq!(fs::read(&qcow2).unwrap(), fs::read(image.disk()).unwrap());
        for export in [export, export_raw, export_qcow2] {
            assert!(export(&image, &raw, go_on).is_err());
        }
        let stopped = export(&image, &folder.path().join("b"), &mut |told| match told {
            Progress::Bytes(..) => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        });
        assert!(matches!(stopped, Err(Error::Stopped)), "{stopped:?}");
        let mut left: Vec<_> =
            fs::read_dir(folder.path()).unwrap().flatten().map(|e| e.file_name()).collect();
        left.sort();
        assert_eq!(left, ["a.qcow2", "a.raw", "home"]);
    }
}
