//! Tells vCPUs in translated code that their APIC timer is due.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use crate::clock::Clock;
use crate::vm::{Shared, attention};

/// How often the ticker looks at least what is due and what runs, while a vCPU runs. Each look costs whoever
/// has the CPU then.
const PERIOD: Duration = Duration::from_millis(2);
/// The longest a timer is late in translated code, when it is set for sooner than the next look.
const LATE: Duration = Duration::from_micros(500);
/// Looks without a vCPU that runs before the ticker rests: one that sleeps for a moment does not pay for
/// waking it.
const REST_AFTER: u32 = 2;

/// When the ticker looks next. An idle VM costs its host nothing: then the ticker rests.
#[derive(Default)]
pub struct Rest {
    /// vCPUs that run guest code.
    awake: AtomicU32,
    resting: AtomicBool,
    /// A timer that is due before this tick of the host's counter is not in time for the next look.
    plan: AtomicU64,
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

    /// A vCPU's timer is due at `deadline`: wakes the ticker if it would be late for that. Answers whether it
    /// did. What just misses a new plan is said again with the next unit of code that is entered.
    #[inline(always)]
    pub fn expect(&self, deadline: u64) -> bool {
        deadline < self.plan.load(Ordering::Relaxed) && self.hurry(deadline)
    }

    #[cold]
    fn hurry(&self, deadline: u64) -> bool {
        // Once is enough.
        let first = self.plan.fetch_min(deadline, Ordering::Relaxed) > deadline;
        if first && let Some(thread) = self.thread.get() {
            thread.unpark();
        }
        first
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
        self.plan.store(0, Ordering::Relaxed);
        self.resting.store(true, Ordering::SeqCst);
        while self.resting.load(Ordering::SeqCst) && wanted() {
            thread::park();
        }
        self.resting.store(false, Ordering::SeqCst);
    }

    /// On the ticker's thread: how long to wait for what is due next, from `now` on.
    fn wait(&self, vm: &Shared, now: u64) -> Duration {
        if !vm.clock.is_measured() {
            return LATE;
        }
        let end = now + vm.clock.ticks_in(PERIOD.as_nanos() as u64);
        self.plan.store(end - vm.clock.ticks_in(LATE.as_nanos() as u64), Ordering::Relaxed);
        let deadlines = vm.vcpus.iter().map(|vcpu| vcpu.deadline.load(Ordering::Relaxed));
        let next = deadlines.min().unwrap_or(end).min(end);
        Duration::from_nanos(vm.clock.nanos_in(next.saturating_sub(now)))
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
    let (mut idle, mut sampled) = (0, Instant::now());
    loop {
        let Some(vm) = shared.upgrade() else { return };
        let now = Clock::ticks();
        for vcpu in vm.vcpus.iter().filter(|vcpu| vcpu.deadline.load(Ordering::Relaxed) <= now) {
            vcpu.deadline.store(u64::MAX, Ordering::Relaxed);
            vcpu.notify(attention::TIMER);
        }
        // A look for a timer comes in between.
        if sampled.elapsed() >= PERIOD - LATE {
            sampled = Instant::now();
            if sample {
                vm.sample();
            }
            idle = if rest.is_wanted() { idle + 1 } else { 0 };
        }
        let wait = rest.wait(&vm, now);
        drop(vm);
        if idle < REST_AFTER {
            thread::park_timeout(wait);
        } else {
            rest.take(|| rest.is_wanted() && shared.strong_count() > 0);
            idle = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn the_ticker_is_woken_once_for_a_timer_that_is_due_before_it_looks() {
        let rest = Rest { plan: 1000.into(), ..Rest::default() };
        assert!(!rest.expect(u64::MAX) && !rest.expect(1000));
        assert!(rest.expect(900) && !rest.expect(900) && !rest.expect(950));
        assert!(rest.expect(800));
    }

    #[test]
    fn the_ticker_waits_for_the_first_timer_or_the_next_look() {
        let vm = crate::x86::testing::shared();
        let (rest, now) = (&vm.rest, Clock::ticks());
        assert_eq!(rest.wait(&vm, now), LATE, "it does not have the clock measured");
        let late = vm.clock.ticks_in(LATE.as_nanos() as u64);
        let off_by = |wait: Duration, right: Duration| wait.abs_diff(right);
        assert!(off_by(rest.wait(&vm, now), PERIOD) < Duration::from_micros(1));
        vm.vcpus[0].deadline.store(now + late, Ordering::Relaxed);
        assert!(off_by(rest.wait(&vm, now), LATE) < Duration::from_micros(1));
        vm.vcpus[0].deadline.store(now - 1, Ordering::Relaxed);
        assert_eq!(rest.wait(&vm, now), Duration::ZERO);
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
