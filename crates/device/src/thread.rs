//! Threads of a machine.

use std::io;
use std::thread::{Builder, JoinHandle};

use rustix::process::getpid;
use rustix::thread::{sched_getaffinity, sched_setaffinity};

/// Less than a huge page: kernels from Linux 6.7 on back a mapping of that size with one, and every thread
/// would cost 2 MiB from its first byte on.
const STACK: usize = 1 << 20;

/// Starts a thread of this name; for everything that a machine runs. It runs on whatever CPUs the process may,
/// even if a vCPU starts it that is kept on one.
pub fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let body = || {
        // The main thread is no vCPU. Where this fails, the thread stays where it was started.
        if let Ok(all) = sched_getaffinity(Some(getpid())) {
            let _ = sched_setaffinity(None, &all);
        }
        body()
    };
    Builder::new().name(name.into()).stack_size(STACK).spawn(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::thread::CpuSet;

    #[test]
    fn a_thread_that_a_kept_one_starts_is_not_kept_itself() {
        let all = sched_getaffinity(Some(getpid())).unwrap();
        let kept = std::thread::spawn(move || {
            let mut only = CpuSet::new();
            only.set((0..CpuSet::MAX_CPU).find(|&cpu| all.is_set(cpu)).unwrap());
            sched_setaffinity(None, &only).unwrap();
            assert_eq!(sched_getaffinity(None).unwrap().count(), 1);
            spawn("free", || sched_getaffinity(None).unwrap()).unwrap().join().unwrap()
        });
        let free = kept.join().unwrap();
        assert_eq!(free.count(), all.count(), "as many CPUs as the process has");
    }
}
