//! The token bucket.

use std::time::{Duration, Instant};

const SECOND: u128 = 1_000_000_000;

/// Fills at `rate` tokens a second until it holds `burst`, as it does at first. What wants more than it holds
/// has to wait; what wants more than it can hold waits until it is full, and leaves it in debt.
///
/// It has no clock: who asks says what time it is.
#[derive(Clone, Debug)]
pub struct Bucket {
    rate: u64,
    /// How long it takes to fill.
    depth: Duration,
    /// When it is full again; nothing where it has never been used.
    full: Option<Instant>,
}

impl Bucket {
    /// A full one. Both are 1 at least.
    pub fn new(rate: u64, burst: u64) -> Bucket {
        let rate = rate.max(1);
        Bucket { rate, depth: time(burst.max(1), rate), full: None }
    }

    /// Whether `tokens` can be taken at `now`, or when they can if nobody takes some before.
    ///
    /// # Errors
    /// The instant to wait for.
    pub fn ready(&self, tokens: u64, now: Instant) -> Result<(), Instant> {
        let spare = self.depth.saturating_sub(time(tokens, self.rate));
        match self.full.and_then(|full| full.checked_sub(spare)) {
            Some(ready) if ready > now => Err(ready),
            _ => Ok(()),
        }
    }

    /// Takes them, even if that leaves a debt.
    pub fn take(&mut self, tokens: u64, now: Instant) {
        let full = self.full.map_or(now, |full| full.max(now));
        self.full = full.checked_add(time(tokens, self.rate)).or(Some(full));
    }
}

/// How long that many tokens take to come.
fn time(tokens: u64, rate: u64) -> Duration {
    let nanos = (u128::from(tokens) * SECOND).div_ceil(rate.into());
    Duration::from_nanos(nanos.try_into().unwrap_or(u64::MAX))
}

/// What the requests of a device wait for.
#[derive(Clone, Debug, Default)]
pub struct Throttle {
    pub(crate) requests: Option<Bucket>,
    pub(crate) bytes: Option<Bucket>,
}

impl Throttle {
    /// Lets a request pass that counts as `requests` and moves `bytes`, if neither is more than there may be.
    ///
    /// # Errors
    /// The instant to ask again, before which it cannot pass.
    pub fn pass(&mut self, requests: u64, bytes: u64, now: Instant) -> Result<(), Instant> {
        let of = |bucket: &Option<Bucket>, tokens| match bucket {
            Some(bucket) => bucket.ready(tokens, now).err(),
            None => None,
        };
        if let Some(later) = of(&self.requests, requests).max(of(&self.bytes, bytes)) {
            return Err(later);
        }
        for (bucket, tokens) in [(&mut self.requests, requests), (&mut self.bytes, bytes)] {
            bucket.iter_mut().for_each(|bucket| bucket.take(tokens, now));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    /// Takes what it can at once; how many times.
    fn drain(bucket: &mut Bucket, tokens: u64, now: Instant) -> u64 {
        let mut times = 0;
        while bucket.ready(tokens, now).is_ok() {
            bucket.take(tokens, now);
            times += 1;
        }
        times
    }

    #[test]
    fn after_a_pause_there_is_a_burst_and_then_the_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::new(1000, 50);
        assert_eq!(drain(&mut bucket, 1, start), 50);
        assert_eq!(bucket.ready(1, start), Err(start + MILLISECOND));
        assert_eq!(drain(&mut bucket, 1, start + 7 * MILLISECOND), 7);
        assert_eq!(bucket.ready(10, start + 7 * MILLISECOND), Err(start + 17 * MILLISECOND));
        assert_eq!(drain(&mut bucket, 1, start + Duration::from_secs(3600)), 50, "no more than it holds");
    }

    #[test]
    fn what_is_larger_than_the_bucket_passes_and_is_paid_afterwards() {
        let start = Instant::now();
        let mut bucket = Bucket::new(1000, 100);
        bucket.take(1, start);
        assert_eq!(bucket.ready(5000, start), Err(start + MILLISECOND), "when it is full");
        let now = start + MILLISECOND;
        assert_eq!(drain(&mut bucket, 5000, now), 1);
        assert_eq!(bucket.ready(0, now), Err(now + 4900 * MILLISECOND), "not even nothing while in debt");
        assert_eq!(bucket.ready(1, now), Err(now + 4901 * MILLISECOND));
        assert_eq!(bucket.ready(5000, now), Err(now + 5000 * MILLISECOND));
    }

    #[test]
    fn no_number_is_too_large() {
        let now = Instant::now();
        for (rate, burst) in [(0, 0), (1, u64::MAX), (u64::MAX, 1), (u64::MAX, u64::MAX)] {
            let mut bucket = Bucket::new(rate, burst);
            for _ in 0..4 {
                assert_eq!(bucket.ready(u64::MAX, now).is_ok(), bucket.full.is_none_or(|full| full <= now));
                bucket.take(u64::MAX, now);
            }
        }
    }

    #[test]
    fn a_request_waits_for_requests_and_bytes_and_takes_neither_alone() {
        let start = Instant::now();
        let mut both = Throttle { requests: Some(Bucket::new(10, 1)), bytes: Some(Bucket::new(1000, 1000)) };
        assert_eq!(both.pass(1, 900, start), Ok(()));
        let (requests, bytes) = (start + 100 * MILLISECOND, start + 300 * MILLISECOND);
        assert_eq!(both.pass(1, 0, start), Err(requests));
        for _ in 0..5 {
            assert_eq!(both.pass(1, 400, start), Err(bytes));
        }
        assert_eq!(both.pass(1, 400, bytes), Ok(()));
        assert_eq!(Throttle::default().pass(u64::MAX, u64::MAX, start), Ok(()));
    }

    proptest! {
        /// Whoever waits as told gets the rate, and nobody more than that and one bucket.
        #[test]
        fn the_rate_holds_whatever_is_asked_for(
            rate in 1..1_000_000u64,
            burst in 1..1_000_000u64,
            asked in prop::collection::vec((0..2_000_000u64, 0..50u32), 1..200),
        ) {
            let start = Instant::now();
            let (mut bucket, mut now, mut before) = (Bucket::new(rate, burst), start, 0);
            for (tokens, pause) in asked {
                now += pause * MILLISECOND;
                if let Err(later) = bucket.ready(tokens, now) {
                    prop_assert!(later > now);
                    now = later;
                }
                prop_assert_eq!(bucket.ready(tokens, now), Ok(()));
                bucket.take(tokens, now);
                let came = ((now - start).as_nanos() * u128::from(rate)).div_ceil(SECOND);
                let with_it = before + u128::from(tokens.min(burst));
                prop_assert!(with_it <= u128::from(burst) + came, "{with_it} by {:?}", now - start);
                before += u128::from(tokens);
            }
        }
    }
}
