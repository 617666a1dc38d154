//! Tells vCPUs in translated code that their APIC timer is due.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::{self, Thread};
use std::time::Duration;

use crate::clock::Clock;
use crate::vm::{Shared, attention};

/// The longest a timer is late in translated code.
const PERIOD: Duration = Duration::from_micros(500);
/// Ticks from one look at what runs to the next.
const SAMPLE: u32 = 2;
/// Ticks without a vCPU that runs before the ticker rests: one that sleeps for a moment does not pay for
/// waking it.
const REST_AFTER: u32 = 4;

/// The ticker's rest: an idle VM costs its host nothing.
#[derive(Default)]
pub struct Rest {
    /// vCPUs that run guest code.
    awake: AtomicU32,
    resting: AtomicBool,
    thread: OnceLock<Thread>,
}

impl Rest {
    /// A vCPU begins to run guest code.
    pub fn vcpu_wakes(&self) {
        // Both sides write, then read: one of them sees the other.
        self.awake.fetch_add(1, Ordering::SeqCst);
        self.end();
    }

    /// It sleeps, or leaves.
    pub fn vcpu_sleeps(&self) {
        self.awake.fetch_sub(1, Ordering::SeqCst);
    }

    fn is_wanted(&self) -> bool {
        self.awake.load(Ordering::SeqCst) == 0
    }

    /// Wakes the ticker.
    pub fn end(&self) {
        if self.resting.load(Ordering::SeqCst)
            && self.resting.swap(false, Ordering::SeqCst)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }

    /// On the ticker's thread: rests as long as `wanted`.
    fn take(&self, wanted: impl Fn() -> bool) {
        self.resting.store(true, Ordering::SeqCst);
        while self.resting.load(Ordering::SeqCst) && wanted() {
            thread::park();
        }
        self.resting.store(false, Ordering::SeqCst);
    }
}

/// Starts the ticker of a VM. It ends with the VM. With `sample` it also has vCPUs look what they run.
pub fn start(shared: &Arc<Shared>, sample: bool) {
    let (rest, shared) = (shared.rest.clone(), Arc::downgrade(shared));
    let body = move || {
        let _ = rest.thread.set(thread::current());
        tick(&shared, &rest, sample);
    };
    thread::Builder::new().name("ospite-ticker".into()).spawn(body).ok();
}

fn tick(shared: &Weak<Shared>, rest: &Rest, sample: bool) {
    let (mut idle, mut ticks) = (0, 0u32);
    loop {
        thread::sleep(PERIOD);
        let Some(vm) = shared.upgrade() else { return };
        let now = Clock::ticks();
        for vcpu in vm.vcpus.iter().filter(|vcpu| vcpu.deadline.load(Ordering::Relaxed) <= now) {
            vcpu.deadline.store(u64::MAX, Ordering::Relaxed);
            vcpu.notify(attention::TIMER);
        }
        ticks = ticks.wrapping_add(1);
        if sample && ticks.is_multiple_of(SAMPLE) {
            vm.sample();
        }
        drop(vm);
        idle = if rest.is_wanted() { idle + 1 } else { 0 };
        if idle >= REST_AFTER {
            rest.take(|| rest.is_wanted() && shared.strong_count() > 0);
            idle = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn until(what: &str, holds: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !holds() {
            assert!(Instant::now() < deadline, "{what}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn the_ticker_rests_while_all_vcpus_sleep_and_is_there_when_one_runs() {
        let vm = crate::x86::testing::shared();
        let rest = vm.rest.clone();
        start(&vm, false);
        until("no rest", || rest.resting.load(Ordering::SeqCst));
        vm.vcpus[0].deadline.store(0, Ordering::Relaxed);
        thread::sleep(10 * PERIOD);
        assert_eq!(vm.vcpus[0].attention() & attention::TIMER, 0, "nobody looks at it");
        rest.vcpu_wakes();
        until("no tick", || vm.vcpus[0].attention() & attention::TIMER != 0);
        assert!(!rest.resting.load(Ordering::SeqCst));
        rest.vcpu_sleeps();
        until("no rest again", || rest.resting.load(Ordering::SeqCst));
    }

    #[test]
    fn the_ticker_ends_with_its_vm_even_at_rest() {
        let vm = crate::x86::testing::shared();
        let rest = Arc::downgrade(&vm.rest);
        start(&vm, false);
        until("no rest", || rest.upgrade().is_some_and(|rest| rest.resting.load(Ordering::SeqCst)));
        drop(vm);
        until("it still rests", || rest.strong_count() == 0);
    }
}
