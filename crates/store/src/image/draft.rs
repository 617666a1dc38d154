//! An image in the making.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::UNIX_EPOCH;

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::{Checksum, DISK, Error, INITRD, Image, KERNEL, MANIFEST, Manifest, Origin, hold, not_in_use};
use crate::{Home, Lock, Name, write_atomically};

/// What the folders of drafts, and of what is being removed, begin with: no [`Name`] does.
const PREFIX: &str = ".draft-";
const LOCK: &str = "lock";

/// The folder of an image in the making; it is gone when this is dropped, and where the process is killed,
/// with the next draft.
#[derive(Debug)]
pub struct Draft {
    name: Name,
    folder: PathBuf,
    /// Says that we live.
    _lock: Lock,
}

impl Draft {
    /// A new one, for an image that is to be called `name`. Clears what dead processes have left.
    ///
    /// # Errors
    /// What the host says.
    pub fn new(home: &Home, name: &Name) -> Result<Draft, Error> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        clear(home)?;
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = home.images().join(format!("{PREFIX}{name}-{}-{count}", std::process::id()));
        let failed = |source| Error::io("make", &folder, source);
        let _held = hold(home)?;
        DirBuilder::new().mode(0o700).create(&folder).map_err(failed)?;
        let lock = Lock::wait(&folder.join(LOCK)).map_err(failed)?;
        Ok(Draft { name: name.clone(), folder, _lock: lock })
    }

    /// The folder: `disk.qcow2`, `vmlinuz` and, where there is one, `initrd` go there. Whatever else is
    /// there is removed when the image is published.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// The disk's place in it.
    pub fn disk(&self) -> PathBuf {
        self.folder.join(DISK)
    }

    /// The kernel's.
    pub fn kernel(&self) -> PathBuf {
        self.folder.join(KERNEL)
    }

    /// The initial RAM disk's.
    pub fn initrd(&self) -> PathBuf {
        self.folder.join(INITRD)
    }

    /// The manifest of what is there now, as an import; the caller says more.
    ///
    /// # Errors
    /// Where disk or kernel is missing or cannot be read.
    pub fn manifest(&self, cmdline: &str) -> Result<Manifest, Error> {
        let checksum = |path: PathBuf| Checksum::of(&path).map_err(|source| Error::io("read", &path, source));
        let size = disk::base_size(&self.disk()).map_err(Error::Disk)?;
        let initrd = self.initrd();
        Ok(Manifest {
            version: Manifest::VERSION,
            name: self.name.clone(),
            architecture: "x86_64".into(),
            origin: Origin::Imported { file: String::new() },
            kernel_release: None,
            cmdline: cmdline.into(),
            size,
            created: UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs()),
            recipe_digest: None,
            disk: checksum(self.disk())?,
            kernel: checksum(self.kernel())?,
            initrd: if initrd.exists() { Some(checksum(initrd)?) } else { None },
            packages: Default::default(),
        })
    }

    /// Gives the image its name. One that has this name already is replaced.
    ///
    /// # Errors
    /// Where that one is in use, and what the host says.
    pub fn publish(self, home: &Home, manifest: Manifest) -> Result<Image, Error> {
        self.tidy()?;
        let failed = |what, source| Error::io(what, &self.folder, source);
        for file in [DISK, KERNEL, INITRD] {
            protect(&self.folder.join(file)).map_err(|source| failed("write", source))?;
        }
        let text = serde_json::to_vec_pretty(&manifest).map_err(|error| failed("write", error.into()))?;
        write_atomically(&self.folder.join(MANIFEST), &text).map_err(|source| failed("write", source))?;
        let folder = home.image(&self.name);
        {
            let _held = hold(home)?;
            // Unlocked, it must not be met by those who clear: they wait for the hold, too.
            let _ = fs::remove_file(self.folder.join(LOCK));
            if folder.exists() {
                not_in_use(home, &self.name)?;
                // The old one is then in the draft's place, and goes with it.
                renameat_with(CWD, &self.folder, CWD, &folder, RenameFlags::EXCHANGE)
            } else {
                renameat_with(CWD, &self.folder, CWD, &folder, RenameFlags::NOREPLACE)
            }
            .map_err(|error| failed("rename", error.into()))?;
            fs::File::open(home.images())
                .and_then(|images| images.sync_all())
                .map_err(|source| failed("rename", source))?;
        }
        Ok(Image { name: self.name.clone(), manifest, folder })
    }

    fn tidy(&self) -> Result<(), Error> {
        let failed = |source| Error::io("read", &self.folder, source);
        for entry in fs::read_dir(&self.folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            if ![DISK, KERNEL, INITRD, LOCK].iter().any(|keep| name == *keep) {
                remove_tree(&entry.path()).map_err(|source| Error::io("remove", &entry.path(), source))?;
            }
        }
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Err(error) = remove_tree(&self.folder) {
            log::warn!("cannot remove {}: {error}", self.folder.display());
        }
    }
}

/// Read-only, and on stable storage.
fn protect(path: &Path) -> io::Result<()> {
    match fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(file) => {
            file.set_permissions(Permissions::from_mode(0o400))?;
            file.sync_all()
        }
    }
}

/// Takes a folder out of sight in one step; [`clear`], or the caller, removes it.
pub(super) fn out_of_sight(home: &Home, name: &Name, folder: &Path) -> io::Result<PathBuf> {
    let gone = home.images().join(format!("{PREFIX}gone-{name}-{}", std::process::id()));
    fs::rename(folder, &gone)?;
    Ok(gone)
}

/// Removes the drafts of processes that are no more.
fn clear(home: &Home) -> Result<(), Error> {
    let images = home.images();
    let dead: Vec<(PathBuf, Lock)> = {
        let _held = hold(home)?;
        let entries = fs::read_dir(&images).map_err(|source| Error::io("read", &images, source))?;
        let drafts = entries
            .flatten()
            .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes()));
        drafts
            .filter_map(|entry| Some((entry.path(), Lock::try_now(&entry.path().join(LOCK)).ok()??)))
            .collect()
    };
    for (folder, _lock) in dead {
        remove_tree(&folder).map_err(|source| Error::io("remove", &folder, source))?;
    }
    Ok(())
}

/// Removes a folder or a file. A build without root leaves files of users that only a namespace of ours
/// knows, and only there they can be removed.
pub(super) fn remove_tree(path: &Path) -> io::Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let mut command = Command::new("unshare");
            command.args(["--map-root-user", "--map-auto", "--", "rm", "-rf", "--one-file-system", "--"]);
            let done = command.arg(path).stdin(Stdio::null()).stderr(Stdio::null()).status();
            if done.is_ok_and(|status| status.success()) { Ok(()) } else { Err(error) }
        }
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::home;
    use super::*;

    fn entries(home: &Home) -> Vec<String> {
        let entries = fs::read_dir(home.images()).unwrap().flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.retain(|name| name != ".hold");
        names.sort();
        names
    }

    #[test]
    fn a_draft_that_is_dropped_leaves_nothing() {
        let (_folder, home) = home(&[]);
        let draft = Draft::new(&home, &"web".parse().unwrap()).unwrap();
        fs::write(draft.kernel(), "half a ker").unwrap();
        assert!(draft.manifest("").is_err(), "there is no disk");
        assert_eq!(entries(&home).len(), 1);
        drop(draft);
        assert!(entries(&home).is_empty());
    }

    #[test]
    fn what_the_dead_left_goes_and_what_lives_stays() {
        let (_folder, home) = home(&[]);
        let alive = Draft::new(&home, &"web".parse().unwrap()).unwrap();
        let dead = home.images().join(".draft-web-1-1");
        fs::create_dir_all(dead.join("tree/etc")).unwrap();
        fs::write(dead.join("lock"), "").unwrap();
        let second = Draft::new(&home, &"web".parse().unwrap()).unwrap();
        assert!(!dead.exists() && alive.path().exists());
        assert_ne!(alive.path(), second.path());
    }

    #[test]
    fn an_image_is_replaced_whole_unless_a_vm_is_on_it() {
        let (_folder, home) = home(&["web"]);
        let name: Name = "web".parse().unwrap();
        let draft = |kernel: &str| {
            let draft = Draft::new(&home, &name).unwrap();
            disk::create(&draft.disk(), 1 << 20).unwrap();
            fs::write(draft.kernel(), kernel).unwrap();
            fs::create_dir(draft.path().join("tree")).unwrap();
            let manifest = draft.manifest("").unwrap();
            draft.publish(&home, manifest)
        };
        draft("second").unwrap();
        let image = Image::open(&home, &name).unwrap();
        assert_eq!(fs::read(image.kernel()).unwrap(), b"second");
        let mut files: Vec<_> =
            fs::read_dir(&image.folder).unwrap().flatten().map(|e| e.file_name()).collect();
        files.sort();
        assert_eq!(files, ["disk.qcow2", "image.json", "vmlinuz"]);
        fs::create_dir(home.vm(&name)).unwrap();
        fs::write(home.vm(&name).join("vm.json"), r#"{"image":"web"}"#).unwrap();
        assert!(matches!(draft("third"), Err(Error::InUse { .. })));
        Image::open(&home, &name).unwrap().verify().unwrap();
        assert_eq!(entries(&home), ["web"]);
    }
}
