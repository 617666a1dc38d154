//! LZ4 as Linux' build uses it: the "legacy" frame (lz4's `doc/lz4_Frame_format.md`), whose blocks of 8 MiB do
//! not refer to each other, and behind it the size of all of them.

use std::ops::Range;

use crate::Problem;
use crate::image::Image;

const MARK: u32 = 0x184c_2102;
/// What each block but the last unpacks to, in bytes.
pub(crate) const BLOCK: u64 = 8 << 20;

/// What a block of that size is packed to at most, in bytes.
const PACKED_BLOCK: usize = BLOCK as usize + BLOCK as usize / 255 + 16;
/// glibc takes no larger ones from its heap (mallopt(3), `M_MMAP_THRESHOLD`): a buffer of so many bytes is given
/// back to the host whole, and what is not touched of it is never taken.
pub(crate) const BEYOND_HEAP: usize = 33 << 20;

/// A packed file, one block of it unpacked.
pub(crate) struct Packed<'a> {
    image: &'a Image,
    /// Where the blocks are in the image.
    blocks: Vec<Range<usize>>,
    /// Unpacked, in bytes.
    pub size: u64,
    /// [`BEYOND_HEAP`] bytes: the unpacked block, behind it the packed one.
    room: Vec<u8>,
    /// The block that is unpacked.
    current: Option<u64>,
}

impl Packed<'_> {
    /// What is packed in this part of the image; `None` if it is not LZ4, or not as expected.
    pub fn find(image: &Image, part: Range<usize>) -> Option<Packed<'_>> {
        let word = |at: usize| {
            let mut word = [0; 4];
            image.read(at, &mut word).ok()?;
            Some(u32::from_le_bytes(word))
        };
        if part.len() < 8 || word(part.start)? != MARK {
            return None;
        }
        let end = part.end - 4;
        let (mut at, mut blocks) = (part.start + 4, Vec::new());
        while at < end {
            let block = at + 4..(at + 4).checked_add(word(at)? as usize)?;
            at = block.end;
            blocks.push(block);
        }
        let size = u64::from(word(end)?);
        let sound = at == end && blocks.len() as u64 == size.div_ceil(BLOCK);
        let fits = blocks.iter().all(|block| block.len() <= PACKED_BLOCK);
        (sound && fits).then(|| Packed { image, blocks, size, room: vec![0; BEYOND_HEAP], current: None })
    }

    /// Unpacks block number `index`: its place in the file, and its bytes.
    pub fn unpack(&mut self, index: u64) -> Result<(Range<u64>, &[u8]), Problem> {
        let damaged = |why: String| Problem::Damaged(format!("its compressed kernel {why}"));
        let block =
            self.blocks.get(index as usize).ok_or_else(|| damaged(format!("has no block {index}")))?;
        let start = index * BLOCK;
        let place = start..self.size.min(start + BLOCK);
        let (bytes, packed) = self.room.split_at_mut(BLOCK as usize);
        let (bytes, packed) = (&mut bytes[..(place.end - start) as usize], &mut packed[..block.len()]);
        if self.current == Some(index) {
            return Ok((place, bytes));
        }
        self.current = None;
        self.image.read(block.start, packed)?;
        match lz4_flex::block::decompress_into(packed, bytes) {
            Ok(done) if done == bytes.len() => self.current = Some(index),
            Ok(done) => return Err(damaged(format!("has {done} bytes where {} belong", bytes.len()))),
            Err(error) => return Err(damaged(format!("cannot be unpacked: {error}"))),
        }
        Ok((place, bytes))
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> u64 {
        self.blocks.len() as u64
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// `file` as `lz4 -l` packs it, all of it literals, with its size behind it.
    pub fn pack(file: &[u8]) -> Vec<u8> {
        let mut packed = MARK.to_le_bytes().to_vec();
        for block in file.chunks(BLOCK as usize) {
            let mut bytes = vec![0xf0];
            let more = block.len() - 15;
            bytes.resize(1 + more / 255, 255);
            bytes.push((more % 255) as u8);
            bytes[0] = 0xf0;
            bytes.extend(block);
            packed.extend((bytes.len() as u32).to_le_bytes());
            packed.extend(bytes);
        }
        packed.extend((file.len() as u32).to_le_bytes());
        packed
    }

    #[test]
    fn a_file_comes_back_block_by_block() {
        let file: Vec<u8> = (0..BLOCK as usize + 5000).map(|i| (i / 7) as u8).collect();
        let mut image = b"before".to_vec();
        image.extend(pack(&file));
        let (image, end) = (Image::Memory(image.clone()), image.len());
        let mut packed = Packed::find(&image, 6..end).unwrap();
        assert_eq!((packed.size, packed.blocks()), (file.len() as u64, 2));
        for (index, place) in [(0, 0..BLOCK), (1, BLOCK..file.len() as u64)] {
            let bytes = &file[place.start as usize..place.end as usize];
            assert!(packed.unpack(index).unwrap() == (place, bytes));
        }
        assert!(packed.unpack(2).is_err());
    }

    #[test]
    fn what_is_no_lz4_or_cut_off_is_none() {
        let packed = pack(&[1; 1000]);
        let find = |bytes: &[u8]| Packed::find(&Image::Memory(bytes.to_vec()), 0..bytes.len()).is_some();
        assert!(find(&packed));
        assert!(!find(&packed[..packed.len() - 1]) && !find(&packed[..6]) && !find(b"\x1f\x8b345678"));
        let mut lies = packed.clone();
        lies[4..8].fill(0xff);
        assert!(!find(&lies));
        let mut garbage = packed.clone();
        garbage[8..].fill(0);
        let size = garbage.len();
        garbage[size - 4..].copy_from_slice(&1000u32.to_le_bytes());
        let image = Image::Memory(garbage);
        let error = Packed::find(&image, 0..size).unwrap().unpack(0).unwrap_err();
        assert!(matches!(error, Problem::Damaged(_)), "{error}");
    }
}
