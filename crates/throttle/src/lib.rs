//! Limits of what a device of a VM may do in a second, so that one VM leaves the others their share.
//!
//! [`DiskLimits`] and [`NetLimits`] are what users say, on the command line and in files; [`Bucket`] is the token
//! bucket that a device asks before it moves anything, [`Throttle`] a pair of them for requests and bytes.

mod bucket;
mod limits;
mod units;

pub use bucket::{Bucket, Throttle};
pub use limits::{BadLimit, DiskLimits, NetLimits};
pub use units::{Bytes, Requests};
