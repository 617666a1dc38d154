//! Images: what VMs start from. Each is a folder of read-only files in [`Home::images`]:
//!
//! ```text
//! image.json    the manifest: what it is, and the checksums of the others
//! disk.qcow2    the disk; a VM's own disk is an overlay on it
//! vmlinuz       the kernel, taken from the disk
//! initrd        the initial RAM disk that finds the disk, where the kernel needs one
//! ```
//!
//! # Coming and going
//! An image is made in a folder of a name that nobody looks at ([`Draft`]) and gets its own by a rename: it
//! is there whole or not at all. It never changes after that, since overlays would not survive it; what
//! replaces it is another folder. Where a VM's definition comes to name an image, and where an image goes,
//! [`hold`] is held: so no VM is ever left without its image.

mod build;
mod draft;
mod error;
mod export;
mod import;
mod manifest;
mod recipe;
mod users;

use std::fs;
use std::path::{Path, PathBuf};

pub use build::{Listener, Progress, build};
pub use draft::Draft;
pub use error::Error;
pub use export::{export, export_qcow2, export_raw};
pub use import::{Boot, import};
pub use manifest::{Checksum, Manifest, Origin};
pub use recipe::{Bad, File, Recipe, User};
pub use users::users;

use crate::{Home, Lock, Name};

/// The name of the manifest in an image's folder.
const MANIFEST: &str = "image.json";
const DISK: &str = "disk.qcow2";
const KERNEL: &str = "vmlinuz";
const INITRD: &str = "initrd";

/// An image that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its name.
    pub name: Name,
    /// What it is.
    pub manifest: Manifest,
    /// Where it lies.
    pub folder: PathBuf,
}

impl Image {
    /// The image of this name.
    ///
    /// # Errors
    /// Where there is none, or what is there is none.
    pub fn open(home: &Home, name: &Name) -> Result<Image, Error> {
        let folder = home.image(name);
        let path = folder.join(MANIFEST);
        let text = fs::read(&path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => Error::Missing { name: name.clone() },
            _ => Error::io("read", &path, source),
        })?;
        let manifest = Manifest::parse(&text).map_err(|source| Error::Manifest { path, source })?;
        let image = Image { name: name.clone(), manifest, folder };
        image.check()?;
        Ok(image)
    }

    /// All images, by name. What cannot be read as one is left out, with a warning.
    ///
    /// # Errors
    /// What the host says about their folder.
    pub fn list(home: &Home) -> Result<Vec<Image>, Error> {
        let folder = home.images();
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|source| Error::io("read", &folder, source))?,
        };
        // What is in the making, and locks, have names that are none.
        let names = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<Name>().ok());
        let opened = names.filter_map(|name| {
            Image::open(home, &name).map_err(|error| log::warn!("{error}; it is not listed")).ok()
        });
        let mut images: Vec<Image> = opened.collect();
        images.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(images)
    }

    /// The disk: qcow2, never written to, shared by the VMs that are on it.
    pub fn disk(&self) -> PathBuf {
        self.folder.join(DISK)
    }

    /// The kernel.
    pub fn kernel(&self) -> PathBuf {
        self.folder.join(KERNEL)
    }

    /// The initial RAM disk.
    pub fn initrd(&self) -> Option<PathBuf> {
        self.manifest.initrd.as_ref().map(|_| self.folder.join(INITRD))
    }

    /// What it takes on the host, in bytes.
    pub fn bytes_on_host(&self) -> u64 {
        let Manifest { disk, kernel, initrd, .. } = &self.manifest;
        disk.bytes + kernel.bytes + initrd.as_ref().map_or(0, |initrd| initrd.bytes)
    }

    /// Every file is there, as long as it should be.
    fn check(&self) -> Result<(), Error> {
        let Manifest { disk, kernel, initrd, .. } = &self.manifest;
        let files = [(DISK, Some(disk)), (KERNEL, Some(kernel)), (INITRD, initrd.as_ref())];
        for (file, checksum) in files {
            let Some(checksum) = checksum else { continue };
            let path = self.folder.join(file);
            let length = fs::metadata(&path).map_err(|source| Error::io("read", &path, source))?.len();
            if length != checksum.bytes {
                return Err(Error::Damaged { name: self.name.clone(), path });
            }
        }
        Ok(())
    }

    /// Reads all of it and compares it with its checksums.
    ///
    /// # Errors
    /// Where it is not what its manifest says.
    pub fn verify(&self) -> Result<(), Error> {
        self.check()?;
        let Manifest { disk, kernel, initrd, .. } = &self.manifest;
        for (file, checksum) in [(DISK, Some(disk)), (KERNEL, Some(kernel)), (INITRD, initrd.as_ref())] {
            let path = self.folder.join(file);
            if checksum.is_some_and(|known| Checksum::of(&path).as_ref().ok() != Some(known)) {
                return Err(Error::Damaged { name: self.name.clone(), path });
            }
        }
        Ok(())
    }
}

/// Removes an image, damaged ones, too.
///
/// # Errors
/// Where there is none, or a VM is on it.
pub fn remove(home: &Home, name: &Name) -> Result<(), Error> {
    let folder = home.image(name);
    let gone = {
        if !folder.exists() {
            return Err(Error::Missing { name: name.clone() });
        }
        let _held = hold(home)?;
        not_in_use(home, name)?;
        draft::out_of_sight(home, name, &folder).map_err(|source| Error::io("remove", &folder, source))?
    };
    draft::remove_tree(&gone).map_err(|source| Error::io("remove", &gone, source))
}

/// Held while a VM's definition comes to name an image, and while an image goes.
///
/// # Errors
/// What the host says.
pub fn hold(home: &Home) -> Result<Lock, Error> {
    let path = home.images().join(".hold");
    Lock::wait(&path).map_err(|source| Error::io("lock", &path, source))
}

fn not_in_use(home: &Home, name: &Name) -> Result<(), Error> {
    let vms = users(home, name);
    if vms.is_empty() { Ok(()) } else { Err(Error::InUse { name: name.clone(), vms }) }
}

/// Makes a VM's disk at `at`: an overlay on the image's, of `size` bytes, or of the image's size. The guest
/// grows its file system to the disk when it starts.
///
/// # Errors
/// Where `size` is less than the image's, a file is there already, or the host says no.
pub fn overlay(image: &Image, at: &Path, size: Option<u64>) -> Result<(), Error> {
    let least = image.manifest.size;
    let size = size.unwrap_or(least);
    if size < least {
        return Err(Error::TooSmall { name: image.name.clone(), asked: size, least });
    }
    disk::create_overlay(at, &image.disk(), size).map_err(Error::Disk)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A home with an image of nothing much.
    pub(crate) fn home(images: &[&str]) -> (tempfile::TempDir, Home) {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::at(folder.path().join("home"));
        home.prepare().unwrap();
        for name in images {
            let draft = Draft::new(&home, &name.parse().unwrap()).unwrap();
            disk::create(&draft.path().join(DISK), 1 << 20).unwrap();
            fs::write(draft.path().join(KERNEL), "kernel").unwrap();
            let manifest = draft.manifest("root=/dev/vda rw").unwrap();
            draft.publish(&home, manifest).unwrap();
        }
        (folder, home)
    }

    #[test]
    fn an_image_is_opened_listed_and_removed() {
        let (_folder, home) = home(&["debian", "alpine"]);
        let names: Vec<String> = Image::list(&home).unwrap().iter().map(|i| i.name.to_string()).collect();
        assert_eq!(names, ["alpine", "debian"]);
        let debian: Name = "debian".parse().unwrap();
        let image = Image::open(&home, &debian).unwrap();
        assert_eq!((image.manifest.size, image.initrd()), (1 << 20, None));
        image.verify().unwrap();
        remove(&home, &debian).unwrap();
        let error = Image::open(&home, &debian).unwrap_err();
        assert!(error.to_string().contains("ospite image build"), "{error}");
        assert!(!home.image(&debian).exists());
        assert_eq!(Image::list(&home).unwrap().len(), 1);
    }

    #[test]
    fn damage_is_noticed() {
        let (_folder, home) = home(&["debian"]);
        let image = Image::open(&home, &"debian".parse().unwrap()).unwrap();
        let kernel = image.kernel();
        fs::set_permissions(&kernel, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        fs::write(&kernel, "kernal").unwrap();
        let error = image.verify().unwrap_err();
        assert!(matches!(&error, Error::Damaged { path, .. } if *path == kernel), "{error}");
        fs::write(&kernel, "k").unwrap();
        assert!(matches!(Image::open(&home, &image.name), Err(Error::Damaged { .. })));
        fs::write(image.folder.join(MANIFEST), "{\"version\":99}").unwrap();
        let error = Image::open(&home, &image.name).unwrap_err();
        assert!(matches!(error, Error::Manifest { .. }), "{error}");
        assert!(Image::list(&home).unwrap().is_empty());
        remove(&home, &image.name).unwrap();
    }

    #[test]
    fn a_vm_has_a_disk_of_its_own_on_the_image() {
        let (folder, home) = home(&["debian"]);
        let image = Image::open(&home, &"debian".parse().unwrap()).unwrap();
        let at = folder.path().join("vm.qcow2");
        let small = overlay(&image, &at, Some(4096)).unwrap_err();
        assert!(small.to_string().contains("1 MiB"), "{small}");
        overlay(&image, &at, Some(3 << 20)).unwrap();
        assert_eq!(disk::open_overlay(&at, &image.disk(), false).unwrap().size(), 3 << 20);
        assert!(overlay(&image, &at, None).is_err(), "a disk that is there stays");
    }

    #[test]
    fn an_image_stays_while_a_vm_is_on_it() {
        let (_folder, home) = home(&["debian"]);
        let image = Image::open(&home, &"debian".parse().unwrap()).unwrap();
        let vm = home.vm(&"web".parse().unwrap());
        fs::create_dir(&vm).unwrap();
        fs::write(vm.join("vm.json"), r#"{"name":"web","image":"debian"}"#).unwrap();
        let error = remove(&home, &image.name).unwrap_err();
        assert!(error.to_string().contains("web"), "{error}");
        assert!(image.disk().exists());
        fs::remove_dir_all(vm).unwrap();
        remove(&home, &image.name).unwrap();
    }
}
