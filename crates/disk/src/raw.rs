//! Raw images: a file or block device as it is.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate};
use rustix::io::Errno;

use crate::{Description, Disk, Error, Format, SECTOR, Slice, check_range, check_write, file, format, total};

/// Zeroes are written in pieces of this size where the host cannot make them by itself.
const ZEROES: usize = 1 << 20;

/// A raw image.
pub(crate) struct RawDisk {
    path: PathBuf,
    file: File,
    /// Length of the file rounded up to sectors: what is past the file's end reads as zeroes, and
    /// the file grows when it is written.
    size: u64,
    read_only: bool,
    /// The format was told by content: keep the guest from changing the answer.
    probed: bool,
    block: u64,
}

impl RawDisk {
    pub(crate) fn new(path: &Path, file: File, read_only: bool, probed: bool) -> Result<RawDisk, Error> {
        let failed = |source| Error::io(path, "find the size of", source);
        let length = file::length(&file).map_err(failed)?;
        if length == 0 {
            return Err(Error::Empty { path: path.into() });
        }
        let Some(size) = length.checked_next_multiple_of(SECTOR) else {
            return Err(Error::bad(path, "its size is impossible"));
        };
        let block = rustix::fs::fstat(&file).map_err(|e| failed(e.into()))?.st_blksize;
        let block = u64::try_from(block).unwrap_or(4096).clamp(SECTOR, 1 << 20);
        if probed && !read_only {
            log::warn!(
                "disk image {0} looks raw; its guest may not write another format's header to it. \
                 Say --disk {0},format=raw to allow that",
                path.display()
            );
        }
        Ok(RawDisk { path: path.into(), file, size, read_only, probed, block })
    }

    /// Writes what goes to the first sector from a copy that the guest cannot change after the
    /// check; how much of `slices` that was.
    fn write_guarded(&self, slices: &[Slice<'_>], offset: u64) -> io::Result<u64> {
        let mut sector = file::head(&self.file)?;
        let length = total(slices).min(SECTOR - offset) as usize;
        let at = offset as usize;
        sector.resize(sector.len().max(at + length), 0);
        let mut rest = &mut sector[at..at + length];
        for slice in slices {
            let count = slice.len().min(rest.len());
            slice.copy_to(&mut rest[..count]);
            rest = &mut rest[count..];
        }
        if format::tell(&sector) != Ok(Format::Raw) {
            log::warn!(
                "the guest's write of another format's header to {0} was refused; say --disk {0},format=raw to allow it",
                self.path.display()
            );
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.file.write_all_at(&sector[at..at + length], offset)?;
        Ok(length as u64)
    }

    fn write_zeroes_by_hand(&self, mut offset: u64, length: u64) -> io::Result<()> {
        let zeroes = vec![0; ZEROES.min(length as usize)];
        let end = offset + length;
        while offset < end {
            let piece = zeroes.len().min((end - offset) as usize);
            self.file.write_all_at(&zeroes[..piece], offset)?;
            offset += piece as u64;
        }
        Ok(())
    }

    /// `fallocate`, unless the host's file system or device cannot.
    fn try_fallocate(&self, flags: FallocateFlags, offset: u64, length: u64) -> io::Result<bool> {
        loop {
            match fallocate(&self.file, flags, offset, length) {
                Ok(()) => return Ok(true),
                Err(Errno::INTR) => {}
                // EINVAL: ranges that are not whole blocks of a block device.
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// `slices` without their first `count` bytes.
fn skip<'a>(slices: &[Slice<'a>], mut count: usize) -> io::Result<Vec<Slice<'a>>> {
    let mut rest = Vec::with_capacity(slices.len());
    for slice in slices {
        let here = count.min(slice.len());
        count -= here;
        if here < slice.len() {
            rest.push(slice.offset(here).map_err(io::Error::other)?);
        }
    }
    Ok(rest)
}

const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

impl Disk for RawDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn description(&self) -> Description {
        Description { format: Format::Raw, probed: self.probed, read_only: self.read_only, size: self.size }
    }

    fn discard_granularity(&self) -> u64 {
        self.block
    }

    fn read_vectored_at(&self, slices: &[Slice<'_>], offset: u64) -> io::Result<()> {
        let length = total(slices);
        check_range(self.size, offset, length)?;
        let done = mem::read_vectored_at(&self.file, slices, offset)?;
        if done < length {
            for slice in skip(slices, done as usize)? {
                slice.copy_from(&vec![0u8; slice.len()]);
            }
        }
        Ok(())
    }

    fn write_vectored_at(&self, slices: &[Slice<'_>], offset: u64) -> io::Result<()> {
        check_write(self.read_only)?;
        check_range(self.size, offset, total(slices))?;
        if !self.probed || offset >= SECTOR {
            return mem::write_vectored_at(&self.file, slices, offset);
        }
        let guarded = self.write_guarded(slices, offset)?;
        mem::write_vectored_at(&self.file, &skip(slices, guarded as usize)?, offset + guarded)
    }

    fn data_from(&self, offset: u64) -> Option<u64> {
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => Some(data.max(offset)),
            Err(Errno::NXIO) => None,
            // Not every file system can tell.
            Err(_) => (offset < self.size).then_some(offset),
        }
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.file.sync_data() }
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        check_write(self.read_only)?;
        check_range(self.size, offset, length)?;
        // A hint: where the host cannot, the range stays as it is.
        if length > 0 {
            self.try_fallocate(PUNCH, offset, length)?;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64, may_free: bool) -> io::Result<()> {
        check_write(self.read_only)?;
        check_range(self.size, offset, length)?;
        let flags = if may_free { PUNCH } else { FallocateFlags::ZERO_RANGE };
        if length == 0 || self.try_fallocate(flags, offset, length)? {
            return Ok(());
        }
        self.write_zeroes_by_hand(offset, length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Guest;
    use std::fs;

    fn image(length: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(length).unwrap();
        file
    }

    #[test]
    fn what_is_written_is_in_the_file_and_half_a_sector_at_the_end_is_usable() {
        let file = image(5000);
        let disk = crate::open(file.path(), Some(Format::Raw), false).unwrap();
        assert_eq!(disk.size(), 5120);
        let guest = Guest::new();
        guest.fill(0x1000, &[0xab; 1024]);
        disk.write_vectored_at(&[guest.slice(0x1000, 512), guest.slice(0x1200, 512)], 512).unwrap();
        disk.flush().unwrap();
        assert_eq!(
            fs::read(file.path()).unwrap()[500..1540],
            [&[0; 12][..], &[0xab; 1024], &[0; 4]].concat()
        );
        guest.fill(0x3000, &[0xff; 512]);
        disk.read_vectored_at(&[guest.slice(0x3000, 512)], 4608).unwrap();
        assert_eq!(guest.bytes(0x3000, 512), [0; 512], "past the file's end");
        disk.write_vectored_at(&[guest.slice(0x1000, 512)], 4608).unwrap();
        assert_eq!(fs::metadata(file.path()).unwrap().len(), 5120);
    }

    #[test]
    fn requests_past_the_end_or_to_a_read_only_disk_are_refused() {
        let file = image(4096);
        let guest = Guest::new();
        let disk = crate::open(file.path(), None, true).unwrap();
        let sector = [guest.slice(0, 512)];
        for offset in [4096 - 511, 4096, u64::MAX - 100] {
            let error = disk.read_vectored_at(&sector, offset).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
        for refused in
            [disk.write_vectored_at(&sector, 512), disk.discard(0, 512), disk.write_zeroes(0, 512, true)]
        {
            assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
        }
        disk.flush().unwrap();
    }

    #[test]
    fn a_guest_cannot_turn_an_image_told_to_be_raw_into_another_format() {
        let file = image(4096);
        let guest = Guest::new();
        let mut header = vec![0x55; 1024];
        header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        guest.fill(0, &header);
        let disk = crate::open(file.path(), None, false).unwrap();
        assert!(disk.description().probed);
        for slices in [vec![guest.slice(0, 1024)], vec![guest.slice(0, 2), guest.slice(2, 510)]] {
            let error = disk.write_vectored_at(&slices, 0).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        }
        disk.write_vectored_at(&[guest.slice(0, 512)], 512).unwrap();
        guest.fill(0, b"MBR!");
        disk.write_vectored_at(&[guest.slice(0, 300), guest.slice(300, 724)], 0).unwrap();
        let bytes = fs::read(file.path()).unwrap();
        assert_eq!((&bytes[..4], &bytes[8..1024]), (&b"MBR!"[..], &header[8..]));
        drop(disk);
        guest.fill(0, &header);
        let disk = crate::open(file.path(), Some(Format::Raw), false).unwrap();
        disk.write_vectored_at(&[guest.slice(0, 512)], 0).unwrap();
    }

    #[test]
    fn discarded_and_zeroed_ranges_read_as_zeroes_and_give_space_back() {
        use std::os::unix::fs::MetadataExt;
        let file = image(1 << 20);
        let guest = Guest::new();
        let disk = crate::open(file.path(), Some(Format::Raw), false).unwrap();
        guest.fill(0, &[0xcc; 0x8000]);
        for offset in (0..1 << 20).step_by(0x8000) {
            disk.write_vectored_at(&[guest.slice(0, 0x8000)], offset).unwrap();
        }
        let before = fs::metadata(file.path()).unwrap().blocks();
        disk.discard(0, 0x40000).unwrap();
        disk.write_zeroes(0x40000, 0x40000, true).unwrap();
        disk.write_zeroes(0x80200, 0x3fe00, false).unwrap();
        let mut expected = vec![0; 1 << 20];
        expected[0x80000..0x80200].fill(0xcc);
        expected[0xc0000..].fill(0xcc);
        assert!(fs::read(file.path()).unwrap() == expected);
        assert!(fs::metadata(file.path()).unwrap().blocks() < before);
    }
}
