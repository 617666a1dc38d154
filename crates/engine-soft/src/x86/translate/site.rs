//! Places in translated code from which Rust code is reached.

use super::super::op::Op;

/// An instruction whose handler may have to run.
#[derive(Clone, Copy)]
pub struct OpSite {
    /// The instruction.
    pub op: Op,
    /// Its offset in the page.
    pub at: u16,
    /// Bytes that it accesses at the checked address.
    pub size: u8,
    /// Whether it writes them.
    pub write: bool,
    /// Where the access starts anew when the TLB has been refilled.
    pub retry: u64,
    /// Behind the instruction.
    pub resume: u64,
}

/// A place that leaves translated code, or calls out of it.
#[derive(Clone, Copy)]
pub enum Site {
    /// An indirect jump whose target is unknown: its linear address is in the first scratch slot.
    Indirect,
    /// A handler, after a TLB miss or always.
    Op(OpSite),
    /// A jump within the page whose target is not translated yet.
    Link {
        /// Where the jump's offset is.
        patch: u64,
        /// Offset of the target in the page.
        target: u16,
        /// A jump backward.
        back: bool,
    },
    /// Leaves at an instruction.
    Leave {
        /// Its offset in the page; may be that of the next page.
        at: u16,
    },
}
