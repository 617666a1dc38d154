//! Reading a disk outside of any guest.

use std::io;
use std::sync::Arc;

use mem::{GuestAddress, GuestMemoryBackend, GuestRam};

use crate::Disk;

/// Reads a disk into plain memory, at any byte.
pub struct Reader {
    disk: Arc<dyn Disk>,
    buffer: GuestRam,
}

const BUFFER: u64 = 1 << 20;

impl Reader {
    /// One of `disk`.
    ///
    /// # Errors
    /// Where memory is short.
    pub fn new(disk: Arc<dyn Disk>) -> io::Result<Reader> {
        Ok(Reader { disk, buffer: GuestRam::new(&[0..BUFFER]).map_err(io::Error::other)? })
    }

    /// The disk's size in bytes.
    pub fn size(&self) -> u64 {
        self.disk.size()
    }

    /// Fills `bytes` from `offset` on.
    ///
    /// # Errors
    /// Where that is not all within the disk, or it cannot be read.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        for (index, piece) in bytes.chunks_mut(BUFFER as usize).enumerate() {
            let at = (index as u64 * BUFFER).checked_add(offset).ok_or(io::ErrorKind::InvalidInput)?;
            let slice = GuestMemoryBackend::get_slice(&*self.buffer, GuestAddress(0), piece.len());
            let slices = [slice.map_err(io::Error::other)?];
            self.disk.read_vectored_at(&slices, at)?;
            slices[0].copy_to(piece);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_byte_of_a_disk_can_be_read_and_none_behind_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..3u32 << 19).flat_map(|word| word.to_le_bytes()).collect();
        std::fs::write(file.path(), &bytes).unwrap();
        let disk = crate::open(file.path(), Some(crate::Format::Raw), true).unwrap();
        let reader = Reader::new(disk.into()).unwrap();
        let mut read = vec![0; (5 << 20) + 3];
        reader.read(77, &mut read).unwrap();
        assert!(read == bytes[77..][..read.len()]);
        assert!(reader.read(reader.size() - 1, &mut [0; 2]).is_err());
        assert!(reader.read(u64::MAX, &mut [0; 2]).is_err());
    }
}
