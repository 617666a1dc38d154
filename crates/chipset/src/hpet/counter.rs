//! The main counter (2.3.7): real time in ticks since it was started, and what it was started from.

use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

/// Nanoseconds of a tick: 100 MHz.
pub(super) const TICK: u64 = 10;
/// COUNTER_CLK_PERIOD (2.3.4) in femtoseconds.
pub(super) const PERIOD: u64 = TICK * 1_000_000;

#[derive(Clone, Copy)]
enum Count {
    Halted(u64),
    Running { from: u64, since: Instant },
}

impl Count {
    fn now(self) -> u64 {
        match self {
            Count::Halted(value) => value,
            Count::Running { from, since } => {
                from.wrapping_add((since.elapsed().as_nanos() / u128::from(TICK)) as u64)
            }
        }
    }
}

/// A lock of its own, which readers share: guests' clocks read it on all vCPUs at once.
pub(super) struct Counter(RwLock<Count>);

impl Counter {
    pub(super) fn halted() -> Counter {
        Counter(RwLock::new(Count::Halted(0)))
    }

    fn count(&self) -> RwLockReadGuard<'_, Count> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its value. The host's clock is read under the lock, so that no value is less than an earlier one, whoever
    /// halts and starts it meanwhile.
    pub(super) fn now(&self) -> u64 {
        self.count().now()
    }

    /// Goes on, or stands still, with the value that it has.
    pub(super) fn run(&self, running: bool) {
        let mut count = self.0.write().unwrap_or_else(PoisonError::into_inner);
        *count = match (*count, running) {
            (Count::Halted(from), true) => Count::Running { from, since: Instant::now() },
            (Count::Running { .. }, false) => Count::Halted(count.now()),
            (same, _) => same,
        };
    }

    /// Stands still, with this value.
    pub(super) fn halt_at(&self, value: u64) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Count::Halted(value);
    }

    /// When it will have reached `value`, which is not further from now than half of its range; a moment in the
    /// past if it has. `None` while it stands still.
    pub(super) fn moment(&self, value: u64) -> Option<Instant> {
        let Count::Running { from, since } = *self.count() else { return None };
        let ticks = value.wrapping_sub(from).cast_signed();
        let ticks = u64::try_from(ticks).unwrap_or(0);
        since.checked_add(Duration::from_nanos(ticks.saturating_mul(TICK)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread::{scope, sleep};

    #[test]
    fn it_runs_in_real_time_and_halts_where_it_is() {
        let counter = Counter::halted();
        assert_eq!((counter.now(), counter.moment(5)), (0, None));
        counter.halt_at(u64::MAX - 1000);
        let start = Instant::now();
        counter.run(true);
        sleep(Duration::from_millis(20));
        let (now, passed) = (counter.now().wrapping_add(1001), start.elapsed().as_nanos() as u64 / TICK);
        assert!(
            now >= 2_000_000 && now <= passed + 100_000,
            "{now} of {passed}, over the end of its 64 bits"
        );
        assert!(counter.moment(1_000_000_000).unwrap() > start + Duration::from_secs(9));
        assert!(counter.moment(u64::MAX - 2000).unwrap() <= Instant::now(), "that was before it began");
        counter.run(false);
        let halted = counter.now();
        sleep(Duration::from_millis(2));
        assert_eq!(counter.now(), halted);
        counter.run(true);
        assert!(counter.now().wrapping_sub(halted) < 100_000_000);
    }

    #[test]
    fn nobody_sees_it_go_back_while_somebody_halts_and_starts_it() {
        let counter = Counter::halted();
        let done = AtomicBool::new(false);
        scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut last = 0;
                    while !done.load(Ordering::Relaxed) {
                        let now = counter.now();
                        assert!(now >= last, "{now} after {last}");
                        last = now;
                    }
                });
            }
            for turn in 0..20_000 {
                counter.run(turn % 2 == 0);
            }
            done.store(true, Ordering::Relaxed);
        });
        assert!(counter.now() > 0);
    }
}
