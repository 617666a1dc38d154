//! What a chain asks for (5.2.6). Headers may be split over descriptors in any way (2.7.4.1).

use disk::SECTOR;

use crate::{Broken, Chain, Slices};

const HEADER: usize = 16;
const RANGE: usize = 16;
/// Length of the serial number.
pub(super) const ID_LEN: usize = 20;
/// Ranges in one discard or write-zeroes request.
pub(super) const MAX_RANGES: usize = 32;
/// Sectors in one of them, 1 GiB.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 21;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;
/// Range flag: the space may be given back (write zeroes only).
const FLAG_UNMAP: u32 = 1;

/// Status of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What requests are measured against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Size of the disk in bytes.
    pub(super) size: u64,
    pub(super) read_only: bool,
}

/// A piece of the disk, in bytes, that lies within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) may_free: bool,
}

/// What to do. Lengths are whole sectors and lie within the disk, which may be written to where
/// that is asked for.
#[derive(Debug)]
pub(super) enum Operation<'m> {
    Read { offset: u64, data: Slices<'m> },
    Write { offset: u64, data: Slices<'m> },
    Flush,
    GetId { data: Slices<'m> },
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
}

/// Where the answer goes.
#[derive(Debug)]
pub(super) struct Reply<'m> {
    pub(super) head: u16,
    /// The last byte that the device may write.
    pub(super) status: Slices<'m>,
}

/// A request that cannot be bad, or the status that a bad one gets.
#[derive(Debug)]
pub(super) struct Request<'m> {
    pub(super) reply: Reply<'m>,
    pub(super) operation: Result<Operation<'m>, Status>,
}

impl<'m> Request<'m> {
    /// Makes a request of a chain. Broken is only one without room for a status.
    pub(super) fn parse(chain: Chain<'m>, limits: &Limits) -> Result<Request<'m>, Broken> {
        let Chain { head, readable, mut writable } = chain;
        let last = writable.len().checked_sub(1).ok_or(Broken::Short(head))?;
        let status = writable.split_off(last);
        let operation = parse_operation(readable, writable, limits);
        Ok(Request { reply: Reply { head, status }, operation })
    }
}

fn parse_operation<'m>(
    mut readable: Slices<'m>,
    writable: Slices<'m>,
    limits: &Limits,
) -> Result<Operation<'m>, Status> {
    let mut header = [0; HEADER];
    let out = readable.split_off(HEADER);
    if readable.read(&mut header) != HEADER {
        return Err(Status::IoError);
    }
    let [kind, _, sector_low, sector_high] = words(header);
    let sector = u64::from(sector_high) << 32 | u64::from(sector_low);
    let writing = matches!(kind, TYPE_OUT | TYPE_DISCARD | TYPE_WRITE_ZEROES);
    if writing && limits.read_only {
        return Err(Status::IoError);
    }
    match kind {
        TYPE_IN => Ok(Operation::Read { offset: place(sector, &writable, limits)?, data: writable }),
        TYPE_OUT => Ok(Operation::Write { offset: place(sector, &out, limits)?, data: out }),
        TYPE_FLUSH => Ok(Operation::Flush),
        TYPE_GET_ID => Ok(Operation::GetId { data: writable }),
        TYPE_DISCARD => Ok(Operation::Discard(ranges(out, 0, limits)?)),
        TYPE_WRITE_ZEROES => Ok(Operation::WriteZeroes(ranges(out, FLAG_UNMAP, limits)?)),
        _ => Err(Status::Unsupported),
    }
}

/// The little-endian words of a header or a range.
fn words(bytes: [u8; 16]) -> [u32; 4] {
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    [word(0), word(4), word(8), word(12)]
}

/// Where in the disk `data` belongs.
fn place(sector: u64, data: &Slices<'_>, limits: &Limits) -> Result<u64, Status> {
    within(sector, data.len() as u64, limits)
        .filter(|_| (data.len() as u64).is_multiple_of(SECTOR))
        .ok_or(Status::IoError)
}

fn within(sector: u64, length: u64, limits: &Limits) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR)?;
    offset.checked_add(length).filter(|end| *end <= limits.size).map(|_| offset)
}

/// The ranges of a discard or write-zeroes request, with no flags but those of `allowed` (5.2.6.2).
fn ranges(mut data: Slices<'_>, allowed: u32, limits: &Limits) -> Result<Vec<Range>, Status> {
    let count = data.len() / RANGE;
    if !data.len().is_multiple_of(RANGE) || !(1..=MAX_RANGES).contains(&count) {
        return Err(Status::IoError);
    }
    let mut ranges = Vec::with_capacity(count);
    for _ in 0..count {
        let mut bytes = [0; RANGE];
        let rest = data.split_off(RANGE);
        data.read(&mut bytes);
        data = rest;
        let [low, high, sectors, flags] = words(bytes);
        if flags & !allowed != 0 {
            return Err(Status::Unsupported);
        }
        let length = u64::from(sectors) * SECTOR;
        let offset = within(u64::from(high) << 32 | u64::from(low), length, limits);
        let offset = offset.filter(|_| sectors <= MAX_RANGE_SECTORS).ok_or(Status::IoError)?;
        ranges.push(Range { offset, length, may_free: flags & FLAG_UNMAP != 0 });
    }
    Ok(ranges)
}
