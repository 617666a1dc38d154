//! Opening and locking the files of an image.

use std::fs::{File, FileType, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::time::Duration;

use crate::{Error, SECTOR};

/// Opens and locks an image: for writing to this process alone, for reading shared with readers.
pub(crate) fn open(path: &Path, read_only: bool) -> Result<File, Error> {
    let failed = |source| open_error(path, !read_only, source);
    // Before it is opened: opening a pipe would wait for its other end.
    check_kind(path, std::fs::metadata(path).map_err(failed)?.file_type())?;
    let file = OpenOptions::new().read(true).write(!read_only).open(path).map_err(failed)?;
    check_kind(path, file.metadata().map_err(failed)?.file_type())?;
    lock(path, &file, !read_only)?;
    Ok(file)
}

fn check_kind(path: &Path, kind: FileType) -> Result<(), Error> {
    if kind.is_dir() {
        return Err(Error::Directory { path: path.into() });
    }
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::NotADisk { path: path.into() });
    }
    Ok(())
}

fn open_error(path: &Path, write: bool, source: io::Error) -> Error {
    match source.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => Error::Missing { path: path.into() },
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            Error::Permission { path: path.into(), write }
        }
        _ => Error::io(path, "open", source),
    }
}

/// How often, and how long apart, a lock that somebody holds is tried: a VM that ends just now may
/// still hold it, and so may a child process between its fork and its exec.
const TRIES: u32 = 10;
const PAUSE: Duration = Duration::from_millis(20);

fn lock(path: &Path, file: &File, write: bool) -> Result<(), Error> {
    let lock = || if write { file.try_lock() } else { file.try_lock_shared() };
    let mut locked = lock();
    for _ in 1..TRIES {
        if !matches!(locked, Err(TryLockError::WouldBlock)) {
            break;
        }
        std::thread::sleep(PAUSE);
        locked = lock();
    }
    match locked {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(Error::Locked { path: path.into(), write }),
        Err(TryLockError::Error(error)) => {
            // Some network file systems have no locks: better a disk without than none.
            log::warn!("disk image {} cannot be locked: {error}", path.display());
            Ok(())
        }
    }
}

/// The first sector, or what there is of it.
pub(crate) fn head(file: &File) -> io::Result<Vec<u8>> {
    read_up_to(file, 0, SECTOR as usize)
}

/// `length` bytes from `offset` on, or as many as there are.
pub(crate) fn read_up_to(file: &File, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut data = vec![0; length];
    let mut done = 0;
    while done < length {
        match file.read_at(&mut data[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    data.truncate(done);
    Ok(data)
}

/// Length in bytes, of block devices too.
pub(crate) fn length(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_image_is_named_for_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("none.img");
        assert!(matches!(open(&missing, false), Err(Error::Missing { .. })));
        assert!(matches!(open(dir.path(), true), Err(Error::Directory { .. })));
        assert!(matches!(open(Path::new("/dev/null"), true), Err(Error::NotADisk { .. })));
        let image = dir.path().join("a.img");
        std::fs::write(&image, "x").unwrap();
        assert!(matches!(open(&image.join("b"), true), Err(Error::Missing { .. })));
        let denied = open_error(&image, true, ErrorKind::PermissionDenied.into());
        let text = format!("no permission to write to disk image {}; add ,readonly", image.display());
        assert!(denied.to_string().starts_with(&text), "{denied}");
    }

    #[test]
    fn a_writer_is_alone_and_readers_share() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let writer = open(image.path(), false).unwrap();
        let refused = open(image.path(), false).unwrap_err();
        assert!(matches!(refused, Error::Locked { .. }));
        assert!(refused.to_string().contains("in use by another VM"), "{refused}");
        assert!(matches!(open(image.path(), true), Err(Error::Locked { .. })));
        // A writer that is about to end is waited for.
        let ending = std::thread::spawn(move || {
            std::thread::sleep(PAUSE);
            drop(writer);
        });
        let _one = open(image.path(), true).unwrap();
        ending.join().unwrap();
        let _two = open(image.path(), true).unwrap();
        assert!(matches!(open(image.path(), false), Err(Error::Locked { .. })));
    }
}
