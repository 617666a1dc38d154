//! A kernel's bytes. They are needed at power-on and at resets only, so a file stays a file in between.

use std::borrow::Cow;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use mem::{Bytes, GuestAddress, GuestRam};

use crate::file::open;
use crate::{Error, Problem, Role, setup};

/// Larger kernels do not exist; a disk image given by mistake should not be read to its end.
const KERNEL_LIMIT: u64 = 1 << 30;
/// Enough to tell a bzImage, and to have all of its header.
const HEAD: u64 = 4096;

/// A file that is kept open, or bytes.
pub(crate) enum Image {
    /// A file of this size, with its first [`HEAD`] bytes.
    File { file: File, size: u64, head: Vec<u8> },
    /// Bytes that the caller had.
    Memory(Vec<u8>),
}

impl Image {
    /// Opens a kernel file.
    pub fn open(path: &Path) -> Result<Image, Error> {
        let (file, size) = open(path).map_err(|p| p.of(Role::Kernel, path))?;
        if size > KERNEL_LIMIT {
            return Err(Problem::TooLarge { size, limit: KERNEL_LIMIT }.of(Role::Kernel, path));
        }
        let head = read_at(&file, 0..size.min(HEAD)).map_err(|p| p.of(Role::Kernel, path))?;
        Ok(Image::File { file, size, head })
    }

    /// Its length in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Image::File { size, .. } => *size,
            Image::Memory(bytes) => bytes.len() as u64,
        }
    }

    /// The first bytes, or all.
    pub fn head(&self) -> &[u8] {
        match self {
            Image::File { head, .. } => head,
            Image::Memory(bytes) => bytes,
        }
    }

    /// All of its bytes, as many as there were at first.
    pub fn whole(&self) -> Result<Cow<'_, [u8]>, Problem> {
        match self {
            Image::File { file, size, .. } => read_at(file, 0..*size).map(Cow::Owned),
            Image::Memory(bytes) => Ok(Cow::Borrowed(bytes)),
        }
    }

    /// Reads its bytes from `at` on.
    pub fn read(&self, at: usize, into: &mut [u8]) -> Result<(), Problem> {
        match self {
            Image::File { file, .. } => file.read_exact_at(into, at as u64).map_err(Problem::Read),
            Image::Memory(bytes) => {
                let end = at.checked_add(into.len()).ok_or_else(changed)?;
                into.copy_from_slice(bytes.get(at..end).ok_or_else(changed)?);
                Ok(())
            }
        }
    }

    /// Copies a part of it into guest memory.
    pub fn copy(&self, ram: &GuestRam, addr: u64, part: Range<usize>) -> Result<(), Problem> {
        match self {
            Image::File { file, .. } => {
                let mut file = file;
                file.seek(SeekFrom::Start(part.start as u64)).map_err(Problem::Read)?;
                let read = ram.read_exact_volatile_from(GuestAddress(addr), &mut file, part.len());
                read.map_err(|source| Problem::GuestMemory { addr, source })
            }
            Image::Memory(bytes) => {
                let part = bytes.get(part).ok_or_else(changed)?;
                setup::write(ram, addr, part)
            }
        }
    }

    /// Refuses a file that is not what it was: its header was checked, and nothing of another one.
    pub fn is_unchanged(&self) -> Result<(), Problem> {
        let Image::File { file, size, head } = self else { return Ok(()) };
        let now = file.metadata().map_err(Problem::Read)?.len();
        if now == *size && read_at(file, 0..head.len() as u64)? == *head { Ok(()) } else { Err(changed()) }
    }
}

fn changed() -> Problem {
    Problem::Damaged("it was changed since the machine was started".into())
}

fn read_at(file: &File, range: Range<u64>) -> Result<Vec<u8>, Problem> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    file.read_exact_at(&mut bytes, range.start).map_err(Problem::Read)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_image_is_not_read_as_a_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        File::create(&path).unwrap().set_len(KERNEL_LIMIT + 1).unwrap();
        let error = Image::open(&path).err().unwrap();
        assert!(matches!(error.problem, Problem::TooLarge { .. }));
    }

    #[test]
    fn a_file_is_read_again_when_it_is_needed_and_refused_once_it_is_another_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel");
        std::fs::write(&path, vec![7u8; 3 * HEAD as usize]).unwrap();
        let (image, ram) = (Image::open(&path).unwrap(), GuestRam::new(&[0..0x10000]).unwrap());
        for addr in [0x1000, 0x8000] {
            image.is_unchanged().unwrap();
            image.copy(&ram, addr, 2 * HEAD as usize..3 * HEAD as usize).unwrap();
            assert_eq!(ram.read_obj::<u8>(GuestAddress(addr + HEAD - 1)).unwrap(), 7);
        }
        assert_eq!(image.whole().unwrap().len() as u64, image.size());
        let write = |bytes: &[u8]| std::fs::write(&path, bytes).unwrap();
        write(&[8; 3 * HEAD as usize]);
        assert!(image.is_unchanged().unwrap_err().to_string().contains("changed"));
        write(&[7; 2 * HEAD as usize]);
        assert!(image.is_unchanged().is_err() && image.whole().is_err());
        assert!(image.copy(&ram, 0x1000, 2 * HEAD as usize..3 * HEAD as usize).is_err());
    }
}
