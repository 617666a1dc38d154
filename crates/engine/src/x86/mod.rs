//! What all engines that run x86-64 guests agree on: the saved state and the registers' layout.

mod model;
mod state;
mod tsc;

pub use model::{CpuModel, Feature, Identity, PHYSICAL_BITS, Registers, UnknownModel, Vendor};
pub use state::{Activity, CpuState, DescriptorTable, LapicState, PendingEvent, Segment, XSAVE_AREA_SIZE};
pub use tsc::{other_frequency, same_frequency};

/// Control, flag and model-specific register bits, by their names in the SDM.
pub mod bits;
