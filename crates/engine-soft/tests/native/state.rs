//! What a case starts from and what it ends in, the same for the host's CPU and the interpreter.

use crate::random::Random;

/// Where the page with the code is. It is readable and executable, and all but the instruction is
/// `INT3`.
pub const CODE: u64 = 0x1_0000;
/// Where in it the instruction starts.
pub const START: u64 = CODE + 0x800;
/// Where the data is: pages that can be written, one that can only be read, and then none.
pub const AREA: u64 = 0x10_0000;
/// Bytes that can be written.
pub const WRITABLE: usize = 3 * 4096;
/// Bytes that can be read.
pub const READABLE: usize = 4 * 4096;

/// Bytes of the XSAVE area with x87, SSE and AVX.
pub const XSAVE: usize = 832;
/// Where in it things are (SDM 1, 10.5 and 13.4).
pub mod at {
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    pub const FTW: usize = 4;
    pub const FOP: usize = 6;
    pub const FIP: usize = 8;
    pub const FDP: usize = 16;
    pub const MXCSR: usize = 24;
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
    pub const HEADER: usize = 512;
    pub const YMM: usize = 576;
}

/// The start of a case.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Start {
    pub code: [u8; 16],
    pub len: u64,
    pub gpr: [u64; 16],
    pub rflags: u64,
    pub xsave: [u8; XSAVE],
}

/// [`End::vector`] of an instruction that completed.
pub const COMPLETED: u64 = 256;

/// The end of a case.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct End {
    pub vector: u64,
    pub code: u64,
    pub cr2: u64,
    pub rip: u64,
    pub gpr: [u64; 16],
    pub rflags: u64,
    pub xsave: [u8; XSAVE],
    pub memory: [u8; WRITABLE],
}

impl End {
    pub fn new() -> Box<End> {
        Box::new(End {
            vector: 0,
            code: 0,
            cr2: 0,
            rip: 0,
            gpr: [0; 16],
            rflags: 0,
            xsave: [0; XSAVE],
            memory: [0; WRITABLE],
        })
    }
}

/// The contents of the data pages that all cases of a run start from.
pub fn memory(seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed ^ 0x6d65_6d6f_7279);
    let mut bytes = Vec::with_capacity(READABLE);
    while bytes.len() < READABLE {
        // Runs of one kind, so that strings compare equal for a while and numbers make sense.
        let word = random.number();
        let repeats = if random.chance(8) { 24 } else { 1 };
        for _ in 0..repeats {
            bytes.extend(word.to_le_bytes());
        }
    }
    bytes.truncate(READABLE);
    bytes
}

pub fn get16(area: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([area[at], area[at + 1]])
}

pub fn get32(area: &[u8], at: usize) -> u32 {
    u32::from(get16(area, at)) | u32::from(get16(area, at + 2)) << 16
}

pub fn get64(area: &[u8], at: usize) -> u64 {
    u64::from(get32(area, at)) | u64::from(get32(area, at + 4)) << 32
}

pub fn put<const N: usize>(area: &mut [u8], at: usize, bytes: [u8; N]) {
    area[at..at + N].copy_from_slice(&bytes);
}
