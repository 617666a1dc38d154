//! Exceptions as values: what an instruction returns instead of a result.

use std::num::NonZeroU64;

/// An exception, raised precisely at the instruction that is being executed.
///
/// One machine word, so that `Result<u64, Exception>` travels in registers. The page-fault address is
/// in CR2 already when the value exists; the debug-exception conditions are in DR6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception(NonZeroU64);

/// What every instruction handler and memory access returns.
pub type Exec<T = ()> = Result<T, Exception>;

const PRESENT: u64 = 1 << 63;
const HAS_CODE: u64 = 1 << 62;

/// Vectors by the SDM's names (volume 3A, table 6-1).
#[allow(missing_docs)]
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

impl Exception {
    const fn pack(vector: u8, code: u64) -> Exception {
        match NonZeroU64::new(PRESENT | code << 8 | vector as u64) {
            Some(word) => Exception(word),
            None => unreachable!(),
        }
    }

    /// An exception without an error code.
    pub const fn new(vector: u8) -> Exception {
        Exception::pack(vector, 0)
    }

    /// An exception with an error code.
    pub const fn with_code(vector: u8, code: u32) -> Exception {
        Exception::pack(vector, code as u64 | HAS_CODE >> 8)
    }

    /// The vector.
    pub fn vector(self) -> u8 {
        self.0.get() as u8
    }

    /// The error code, for vectors that have one.
    pub fn code(self) -> Option<u32> {
        (self.0.get() & HAS_CODE != 0).then_some((self.0.get() >> 8) as u32)
    }

    /// `#UD`.
    pub const UD: Exception = Exception::new(vector::UD);
    /// `#NM`.
    pub const NM: Exception = Exception::new(vector::NM);
    /// `#DE`.
    pub const DE: Exception = Exception::new(vector::DE);
    /// `#GP(0)`.
    pub const GP0: Exception = Exception::gp(0);
    /// `#SS(0)`.
    pub const SS0: Exception = Exception::with_code(vector::SS, 0);
    /// `#AC(0)`.
    pub const AC0: Exception = Exception::with_code(vector::AC, 0);

    /// `#GP(code)`.
    pub const fn gp(code: u32) -> Exception {
        Exception::with_code(vector::GP, code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vector_and_code_come_back() {
        assert_eq!((Exception::DE.vector(), Exception::DE.code()), (0, None));
        let fault = Exception::with_code(vector::PF, 0x8000_0015);
        assert_eq!((fault.vector(), fault.code()), (14, Some(0x8000_0015)));
        assert_eq!(Exception::GP0.code(), Some(0));
        assert_eq!(size_of::<Result<u64, Exception>>(), 16);
        assert_eq!(size_of::<Result<(), Exception>>(), 8);
    }
}
