//! The host's time-stamp counter as a clock.

#![allow(unsafe_code)] // the rdtsc intrinsic

use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

/// How long the counter is compared with the host's clock at least before its frequency is taken.
const BASELINE: Duration = Duration::from_millis(20);

/// The host's counter and its frequency.
pub struct Clock {
    start: (u64, Instant),
    hz: OnceLock<u64>,
}

impl Default for Clock {
    fn default() -> Self {
        Clock { start: (Clock::ticks(), Instant::now()), hz: OnceLock::new() }
    }
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
        *self.hz.get_or_init(|| {
            let (ticks, instant) = self.start;
            thread::sleep(BASELINE.saturating_sub(instant.elapsed()));
            let (ticks, nanos) = (Clock::ticks() - ticks, instant.elapsed().as_nanos());
            (u128::from(ticks) * 1_000_000_000 / nanos) as u64
        })
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
