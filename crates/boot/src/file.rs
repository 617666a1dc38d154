//! Opening the files that a guest is started from.

use std::fs::File;
use std::io::Seek;
use std::path::{Path, PathBuf};

use mem::{Bytes, GuestAddress, GuestRam};

use crate::{Error, Problem, Role};

/// An initial RAM disk: opened and checked, read straight into guest memory when it is loaded.
#[derive(Debug)]
pub struct Initrd {
    path: PathBuf,
    file: File,
    size: u64,
}

impl Initrd {
    /// Opens the file; its content is the guest's business.
    pub fn open(path: impl AsRef<Path>) -> Result<Initrd, Error> {
        let path = path.as_ref();
        let (file, size) = open(path).map_err(|p| p.of(Role::Initrd, path))?;
        Ok(Initrd { path: path.to_owned(), file, size })
    }

    /// Its length in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn error(&self, problem: Problem) -> Error {
        problem.of(Role::Initrd, &self.path)
    }

    pub(crate) fn load(&self, ram: &GuestRam, addr: u64) -> Result<(), Error> {
        let mut file = &self.file;
        file.rewind().map_err(|e| self.error(Problem::Read(e)))?;
        let read = ram.read_exact_volatile_from(GuestAddress(addr), &mut file, self.size as usize);
        read.map_err(|source| self.error(Problem::GuestMemory { addr, source }))
    }
}

/// Opens a regular, non-empty file. It is looked at first: opening a pipe would wait for its writer.
pub(crate) fn open(path: &Path) -> Result<(File, u64), Problem> {
    let meta = std::fs::metadata(path).map_err(Problem::Read)?;
    if meta.is_dir() {
        return Err(Problem::Directory);
    }
    if !meta.is_file() {
        return Err(Problem::NotRegular);
    }
    let file = File::open(path).map_err(Problem::Read)?;
    match file.metadata().map_err(Problem::Read)?.len() {
        0 => Err(Problem::Empty),
        size => Ok((file, size)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Image;
    use std::error::Error as _;

    #[test]
    fn files_that_cannot_be_read_say_which_and_why() {
        let dir = tempfile::tempdir().unwrap();
        let error = Image::open(dir.path()).err().unwrap();
        assert!(matches!(error.problem, Problem::Directory));
        assert!(error.to_string().contains(&dir.path().display().to_string()), "{error}");

        let error = Initrd::open(dir.path().join("absent")).unwrap_err();
        assert!(error.to_string().starts_with("initrd "), "{error}");
        assert!(error.source().unwrap().to_string().contains("No such file"));

        let error = Image::open(Path::new("/dev/null")).err().unwrap();
        assert!(matches!(error.problem, Problem::NotRegular));

        let empty = dir.path().join("empty");
        File::create(&empty).unwrap();
        assert!(matches!(Initrd::open(&empty).unwrap_err().problem, Problem::Empty));
    }

    #[test]
    fn an_initrd_that_shrank_is_an_error_and_can_be_loaded_again_and_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("initrd");
        std::fs::write(&path, vec![7u8; 5000]).unwrap();
        let ram = GuestRam::new(&[0..0x10000]).unwrap();
        let initrd = Initrd::open(&path).unwrap();
        for addr in [0x1000, 0x8000] {
            initrd.load(&ram, addr).unwrap();
            assert_eq!(ram.read_obj::<u8>(GuestAddress(addr + 4999)).unwrap(), 7);
        }
        File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
        assert!(initrd.load(&ram, 0x1000).is_err());
    }
}
