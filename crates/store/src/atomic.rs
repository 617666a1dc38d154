//! Files that are whole at any instant.

use std::ffi::OsString;
use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Replaces the content of `path`: after a power cut at any instant it is the old or the new one, and once
/// this has returned, the new one. Its readers need no lock; writers who build on what they read do.
///
/// # Errors
/// What the host says. The old content is untouched then.
pub fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut name = OsString::from(".");
    name.push(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    name.push(format!(".{}.{:?}.new", std::process::id(), std::thread::current().id()));
    let new = folder.join(name);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        File::open(folder)?.sync_all()
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&new); // it may not have come into being
    }
    written
}

/// A lock that one process has at a time; the kernel lifts it when the process ends, however it ends.
#[derive(Debug)]
pub struct Lock(File);

impl Lock {
    /// Waits for the lock whose file is `path`.
    ///
    /// # Errors
    /// What the host says.
    pub fn wait(path: &Path) -> io::Result<Lock> {
        let file = open(path)?;
        file.lock()?;
        Ok(Lock(file))
    }

    /// The lock whose file is `path`, or nothing where another has it.
    ///
    /// # Errors
    /// What the host says.
    pub fn try_now(path: &Path) -> io::Result<Option<Lock>> {
        let file = open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Lock(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Whether somebody has the lock whose file is `path`. A file that is not there is locked by nobody.
    ///
    /// # Errors
    /// What the host says.
    pub fn is_held(path: &Path) -> io::Result<bool> {
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            file => file?,
        };
        match file.try_lock_shared() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// The lock that a parent process has shared with this one.
    pub fn inherited(file: OwnedFd) -> Lock {
        Lock(file.into())
    }

    /// The same lock for a child process: it is lifted when nobody has it open any more.
    ///
    /// # Errors
    /// What the host says.
    pub fn share(&self) -> io::Result<OwnedFd> {
        Ok(self.0.try_clone()?.into())
    }

    /// Whether `path` still names the file that is locked: it may have been moved away before the lock
    /// was there.
    pub fn is_at(&self, path: &Path) -> bool {
        let place = |meta: Metadata| (meta.dev(), meta.ino());
        let here = self.0.metadata().ok().map(place);
        here.is_some() && here == std::fs::metadata(path).ok().map(place)
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_nothing_is_left_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        write_atomically(&path, b"one").unwrap();
        write_atomically(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert!(write_atomically(&folder.path().join("no/such"), b"").is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn one_has_the_lock() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        assert!(!Lock::is_held(&path).unwrap());
        let lock = Lock::wait(&path).unwrap();
        assert!(Lock::try_now(&path).unwrap().is_none() && Lock::is_held(&path).unwrap());
        drop(lock);
        assert!(!Lock::is_held(&path).unwrap());
        assert!(Lock::try_now(&path).unwrap().is_some());
    }

    #[test]
    fn a_shared_lock_is_held_by_whoever_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let lock = Lock::wait(&path).unwrap();
        let theirs = Lock::inherited(lock.share().unwrap());
        drop(lock);
        assert!(Lock::try_now(&path).unwrap().is_none());
        drop(theirs);
        assert!(Lock::try_now(&path).unwrap().is_some());
    }

    #[test]
    fn a_lock_knows_that_its_file_has_been_moved_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let lock = Lock::wait(&path).unwrap();
        assert!(lock.is_at(&path));
        std::fs::rename(&path, folder.path().join("away")).unwrap();
        assert!(!lock.is_at(&path));
        let new = Lock::wait(&path).unwrap();
        assert!(new.is_at(&path) && !lock.is_at(&path));
    }
}
