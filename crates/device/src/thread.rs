//! Threads of a machine.

use std::thread::Builder;

/// Less than a huge page: kernels from Linux 6.7 on back a mapping of that size with one, and every thread
/// would cost 2 MiB from its first byte on.
const STACK: usize = 1 << 20;

/// A thread of this name, to be spawned; for everything that a machine runs.
pub fn thread(name: impl Into<String>) -> Builder {
    Builder::new().name(name.into()).stack_size(STACK)
}
