//! x87, MMX, SSE and AVX registers.

/// The extended state of a vCPU.
pub struct Fpu {
    /// XCR0: which state components are enabled.
    pub xcr0: u64,
}

impl Default for Fpu {
    fn default() -> Self {
        Fpu { xcr0: 1 }
    }
}
