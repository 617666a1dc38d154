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
    pub size: u16,
    /// Whether it writes them.
    pub write: bool,
    /// The check is that of a group of accesses: if it fails, the plain variant of the unit goes on.
    pub group: bool,
    /// Where the access starts anew when the TLB has been refilled.
    pub retry: u64,
    /// Behind the instruction.
    pub resume: u64,
}

impl OpSite {
    /// An instruction that its handler executes, at an offset in the page.
    pub fn new(op: Op, at: u16) -> OpSite {
        OpSite { op, at, size: 0, write: false, group: false, retry: 0, resume: 0 }
    }
}

/// Entries of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// [`Unit::direct`](super::build::Unit::direct)
    Direct,
    /// [`Unit::checked`](super::build::Unit::checked)
    Checked,
    /// [`Unit::indirect`](super::build::Unit::indirect)
    Indirect,
    /// [`Unit::forward`](super::build::Unit::forward)
    Forward,
}

/// Places in the code of a jump to another page.
#[derive(Clone, Copy)]
pub struct FarSite {
    /// The value that [`JumpCache::link_id`](crate::x86::fast::JumpCache::link_id) is compared with.
    pub guard: u64,
    /// Offset of the jump if it is equal.
    pub jump: u64,
    /// Offset of the jump if it is not.
    pub other: u64,
    /// Where that goes when the jump has been linked once.
    pub lookup: u64,
    /// Target, relative to the page.
    pub offset: i64,
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
        /// Which entry of the target it takes.
        entry: Entry,
        /// The target is a plain variant.
        plain: bool,
    },
    /// A jump to another page.
    Far(FarSite),
    /// An instruction that goes on in the next page.
    Straddle {
        /// Its offset in the page.
        at: u16,
    },
    /// A jump to another page that is not in the jump cache: its site is in the frame.
    FarMiss,
    /// Leaves at an instruction.
    Leave {
        /// Its offset in the page; may be that of the next page.
        at: u16,
    },
}
