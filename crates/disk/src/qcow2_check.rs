//! What must hold of a qcow2 file before the library opens it (QEMU's docs/interop/qcow2.txt).
//!
//! The library reads zeroes past the end of a file, so a truncated download would look like a disk
//! with holes. The reference counts tell: a cluster that is in use must be there.

use std::fs::File;
use std::io;
use std::path::Path;

use crate::{Error, file};

/// `QFI` and FBh.
const MAGIC: u64 = 0x5146_49fb;
const HEADER_LEN: usize = 72;
/// Tables larger than this are an attack or an accident (QEMU has the same bounds).
const MAX_TABLE: u64 = 32 << 20;
const MAX_BLOCKS: usize = 64;
const L1_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const FEATURE_DIRTY: u64 = 1 << 0;
const FEATURE_CORRUPT: u64 = 1 << 1;

/// The header extension that names features, and the length of each entry.
const FEATURE_NAMES: u64 = 0x6803_f857;
const FEATURE_NAME: u64 = 48;

/// The fields that are looked at.
pub(crate) struct Header {
    pub(crate) cluster_size: u64,
    version: u64,
    l1: Table,
    refcounts: Table,
    refcount_bits: u64,
    features: u64,
}

#[derive(Clone, Copy)]
struct Table {
    offset: u64,
    len: u64,
}

fn be32(data: &[u8], at: usize) -> u64 {
    data.get(at..at + 4).map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]).into())
}

fn be64(data: &[u8], at: usize) -> u64 {
    be32(data, at) << 32 | be32(data, at + 4)
}

fn parse(path: &Path, head: &[u8]) -> Result<Header, Error> {
    if head.len() < HEADER_LEN {
        return Err(Error::Truncated { path: path.into(), what: "its header" });
    }
    if be32(head, 0) != MAGIC {
        return Err(Error::bad(
            path,
            "it is no qcow2 image; one is made of it with: qemu-img convert -O qcow2",
        ));
    }
    let (version, cluster_bits) = (be32(head, 4), be32(head, 20));
    if !(2..=3).contains(&version) {
        return Err(Error::bad(path, format!("qcow2 version {version} is unknown")));
    }
    if !(9..=21).contains(&cluster_bits) {
        return Err(Error::bad(path, format!("clusters of 2^{cluster_bits} bytes are impossible")));
    }
    if be32(head, 32) != 0 {
        return Err(Error::bad(path, "it is encrypted; convert it with: qemu-img convert -O qcow2"));
    }
    let cluster_size = 1 << cluster_bits;
    let order = if version == 2 { 4 } else { be32(head, 96) };
    if order > 6 {
        return Err(Error::bad(path, format!("reference counts of 2^{order} bits are impossible")));
    }
    Ok(Header {
        cluster_size,
        version,
        l1: Table { offset: be64(head, 40), len: be32(head, 36) * 8 },
        refcounts: Table { offset: be64(head, 48), len: be32(head, 56) * cluster_size },
        refcount_bits: 1 << order,
        features: if version == 2 { 0 } else { be64(head, 72) },
    })
}

/// Looks at the file's header and reference counts.
pub(crate) fn check(path: &Path, file: &File) -> Result<Header, Error> {
    let failed = |source| Error::io(path, "read", source);
    let head = file::head(file).map_err(failed)?;
    let length = file::length(file).map_err(failed)?;
    let header = parse(path, &head)?;
    if header.features & (FEATURE_DIRTY | FEATURE_CORRUPT) != 0 {
        let text = "it was not closed cleanly or is marked corrupt; mend it with: qemu-img check -r all";
        return Err(Error::bad(path, text));
    }
    for (table, what) in
        [(header.l1, "its table of clusters"), (header.refcounts, "its table of reference counts")]
    {
        if table.len > MAX_TABLE {
            return Err(Error::bad(path, format!("{what} is impossibly large")));
        }
        if table.offset % header.cluster_size != 0 {
            return Err(Error::bad(path, format!("{what} is not at a cluster's start")));
        }
        if table
            .offset
            .checked_add(table.len)
            .is_none_or(|end| end > length.next_multiple_of(header.cluster_size))
        {
            return Err(Error::Truncated { path: path.into(), what });
        }
    }
    if !extensions_are_whole(file, &header, &head).map_err(failed)? {
        return Err(Error::bad(path, "its header names features by halves"));
    }
    if !counts_header(file, &header, length).map_err(failed)? {
        return Err(Error::bad(path, "the cluster of its header has no reference count"));
    }
    if uses_past_end(file, &header, length).map_err(failed)? {
        return Err(Error::Truncated { path: path.into(), what: "data in use" });
    }
    if misses_l2(file, &header, length).map_err(failed)? {
        return Err(Error::Truncated { path: path.into(), what: "a table of clusters" });
    }
    Ok(header)
}

/// Whether the table of the features' names, if there is one, has whole entries: the library counts on it.
/// Extensions that are wrong otherwise are the library's to refuse.
fn extensions_are_whole(file: &File, header: &Header, head: &[u8]) -> io::Result<bool> {
    if header.version == 2 {
        return Ok(true);
    }
    let mut at = be32(head, 100);
    while at + 8 <= header.cluster_size {
        let extension = file::read_up_to(file, at, 8)?;
        let (kind, length) = (be32(&extension, 0), be32(&extension, 4));
        match kind {
            0 => break,
            FEATURE_NAMES if length % FEATURE_NAME != 0 => return Ok(false),
            _ => at += 8 + length.next_multiple_of(8),
        }
    }
    Ok(true)
}

/// Whether there is a block of reference counts for the file's first clusters. Where there is none, the library
/// looks for a place for one without end.
fn counts_header(file: &File, header: &Header, length: u64) -> io::Result<bool> {
    let first = file::read_up_to(file, header.refcounts.offset, 8)?;
    let block = be64(&first, 0) & !0x1ff;
    let whole = block < length && block.is_multiple_of(header.cluster_size);
    Ok(header.refcounts.len > 0 && block != 0 && whole)
}

/// Whether a cluster that starts at the file's end or later has a reference count.
fn uses_past_end(file: &File, header: &Header, length: u64) -> io::Result<bool> {
    let first = length.div_ceil(header.cluster_size);
    let per_block = header.cluster_size * 8 / header.refcount_bits;
    let table = file::read_up_to(file, header.refcounts.offset, header.refcounts.len as usize)?;
    let offsets = table.chunks_exact(8).map(|entry| be64(entry, 0) & !0x1ff).enumerate();
    let blocks = offsets.skip((first / per_block) as usize).filter(|(_, offset)| *offset != 0);
    // A sound image has a block or two there; a made-up one is not worth hours of looking.
    for (index, offset) in blocks.take(MAX_BLOCKS) {
        if offset >= length {
            return Ok(true);
        }
        let block = file::read_up_to(file, offset, header.cluster_size as usize)?;
        let unused_from = first.saturating_sub(index as u64 * per_block);
        if any_count(&block, unused_from * header.refcount_bits) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether a table of the guest's clusters is not in the file.
fn misses_l2(file: &File, header: &Header, length: u64) -> io::Result<bool> {
    let l1 = file::read_up_to(file, header.l1.offset, header.l1.len as usize)?;
    Ok(l1.chunks_exact(8).any(|entry| be64(entry, 0) & L1_OFFSET >= length))
}

/// Whether a bit is set from bit number `from` on. Counts of less than a byte start at its low end.
fn any_count(block: &[u8], from: u64) -> bool {
    let Some((first, rest)) = block.get((from / 8) as usize..).and_then(<[u8]>::split_first) else {
        return false;
    };
    first >> (from % 8) != 0 || rest.iter().any(|&byte| byte != 0)
}
