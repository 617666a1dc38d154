//! The host's time-stamp counter as a clock.

#![allow(unsafe_code)] // the rdtsc intrinsic

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How long the counter is compared with the host's clock at least before its frequency is taken.
const BASELINE: Duration = Duration::from_millis(20);

/// Looks at counter and clock of which the best is taken.
const LOOKS: u32 = 8;

/// The host's counter and its frequency.
pub struct Clock {
    start: (u64, Instant),
    /// Ticks a second; 0 until it is measured.
    hz: AtomicU64,
}

impl Default for Clock {
    fn default() -> Self {
        Clock { start: moment(), hz: AtomicU64::new(0) }
    }
}

/// Counter and clock at one moment. The host may take the CPU away between the two, but not each time.
fn moment() -> (u64, Instant) {
    let look = || {
        let (before, instant, after) = (Clock::ticks(), Instant::now(), Clock::ticks());
        let took = after.saturating_sub(before);
        (took, before + took / 2, instant)
    };
    let best = (1..LOOKS).fold(look(), |best, _| std::cmp::min_by_key(best, look(), |(took, ..)| *took));
    (best.1, best.2)
}

impl Clock {
    /// The counter now.
    #[inline(always)]
    pub fn ticks() -> u64 {
        // SAFETY: every x86-64 CPU has it, and Linux lets user programs use it.
        unsafe { core::arch::x86_64::_rdtsc() }
    }

    /// The counter when the clock was made.
    pub fn start(&self) -> u64 {
        self.start.0
    }

    /// Ticks a second. Measured at the first call, against the time since the clock was made (at least
    /// 20 ms), and the same from then on.
    pub fn hz(&self) -> u64 {
        match self.hz.load(Ordering::Relaxed) {
            0 => self.measure(),
            hz => hz,
        }
    }

    /// Whether the frequency is known, so that nobody waits for it.
    pub fn is_measured(&self) -> bool {
        self.hz.load(Ordering::Relaxed) != 0
    }

    /// The same in kHz.
    pub fn khz(&self) -> u32 {
        (self.hz() / 1000) as u32
    }

    /// Takes a frequency that the guest was told elsewhere for our own, of which it is as good a measurement. 0 is
    /// none.
    pub fn adopt(&self, khz: u32) {
        if khz != 0 {
            self.hz.store(u64::from(khz) * 1000, Ordering::Relaxed);
        }
    }

    fn measure(&self) -> u64 {
        let (ticks, instant) = self.start;
        thread::sleep(BASELINE.saturating_sub(instant.elapsed()));
        let (now, then) = moment();
        let nanos = then.duration_since(instant).as_nanos();
        let hz = (u128::from(now - ticks) * 1_000_000_000 / nanos) as u64;
        // Whoever came first is right.
        match self.hz.compare_exchange(0, hz, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => hz,
            Err(first) => first,
        }
    }

    /// A duration in ticks.
    pub fn ticks_in(&self, nanos: u64) -> u64 {
        (u128::from(nanos) * u128::from(self.hz()) / 1_000_000_000) as u64
    }

    /// Ticks as a duration.
    pub fn nanos_in(&self, ticks: u64) -> u64 {
        (u128::from(ticks) * 1_000_000_000 / u128::from(self.hz())) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_is_a_second() {
        let clock = Clock::default();
        let (ticks, instant) = (Clock::ticks(), Instant::now());
        thread::sleep(Duration::from_millis(100));
        let (measured, real) = (clock.nanos_in(Clock::ticks() - ticks), instant.elapsed().as_nanos() as u64);
        assert!(measured.abs_diff(real) < real / 50, "{measured} ns by the counter, {real} ns by the clock");
    }
}
