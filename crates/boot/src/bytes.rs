//! Reads of little-endian fields that end in an error, not a panic, at the end of a file.

use std::ops::Range;

use crate::Problem;

/// A file's bytes, and what the part being read is called in messages.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    pub bytes: &'a [u8],
    pub what: &'static str,
}

impl<'a> Fields<'a> {
    pub fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Fields { bytes, what }
    }

    /// `len` bytes from `offset`.
    pub fn slice(&self, offset: u64, len: u64) -> Result<&'a [u8], Problem> {
        Ok(&self.bytes[self.range(offset, len)?])
    }

    /// The same as a range that is known to lie inside the file.
    pub fn range(&self, offset: u64, len: u64) -> Result<Range<usize>, Problem> {
        let has = self.bytes.len() as u64;
        let needs = offset.saturating_add(len);
        if needs > has {
            return Err(Problem::Truncated { what: self.what, needs, has });
        }
        Ok(offset as usize..needs as usize)
    }

    fn array<const N: usize>(&self, offset: u64) -> Result<[u8; N], Problem> {
        let mut array = [0; N];
        array.copy_from_slice(self.slice(offset, N as u64)?);
        Ok(array)
    }

    pub fn u8(&self, offset: u64) -> Result<u8, Problem> {
        Ok(self.array::<1>(offset)?[0])
    }

    pub fn u16(&self, offset: u64) -> Result<u16, Problem> {
        self.array(offset).map(u16::from_le_bytes)
    }

    pub fn u32(&self, offset: u64) -> Result<u32, Problem> {
        self.array(offset).map(u32::from_le_bytes)
    }

    pub fn u64(&self, offset: u64) -> Result<u64, Problem> {
        self.array(offset).map(u64::from_le_bytes)
    }
}

/// Puts `value` at `offset` of a structure that is being built. The structure's size is the
/// builder's own, so this does not fail.
pub(crate) fn put<const N: usize>(buffer: &mut [u8], offset: usize, value: [u8; N]) {
    buffer[offset..offset + N].copy_from_slice(&value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_past_the_end_says_where_the_file_ends() {
        let file = [1, 2, 3];
        let fields = Fields::new(&file, "the header");
        assert_eq!(fields.u16(1).unwrap(), 0x0302);
        let error = fields.u32(0).unwrap_err();
        assert!(matches!(error, Problem::Truncated { needs: 4, has: 3, .. }));
        assert!(fields.slice(u64::MAX, 2).is_err(), "an offset that overflows is past the end too");
    }
}
