//! Limits of what a device of a VM may do in a second, so that one VM leaves the others their share.
//!
//! [`DiskLimits`] is what users say, on the command line and in files; [`Throttle`] is what a device asks
//! before it does a request, and [`Bucket`] the token bucket behind it.

mod bucket;
mod limits;
mod units;

pub use bucket::{Bucket, Throttle};
pub use limits::{BadLimit, DiskLimits};
pub use units::{Bytes, Requests};
