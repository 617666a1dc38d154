//! When a program is worth a jail.
//!
//! A stay in the jail costs two switches between processes and some system calls, whatever its length;
//! translated code costs more the longer it runs. So a program goes there that a clock finds computing
//! several times, and leaves for a while when its stays turn out to be short.

use super::super::translate::translator::Map;
use super::scan::Verdicts;

/// Stays that are looked at together.
const WINDOW: u32 = 64;
/// What a stay costs beside the program's own time, in nanoseconds; in the jail's CPU time, and in all.
const COST_INSIDE: u64 = 7_500;
const COST: u64 = 20_000;
/// How long a program that was not worth it is left alone; doubled each time.
const FIRST_PAUSE: u64 = 10_000_000;
const DOUBLINGS: u32 = 5;
/// Samples, one in 2 ms, that find a program before it goes to a jail. Bringing its pages there has its price, which short
/// programs do not earn back: of 2, 6 and 12 ms, logins by FTP and IMAP were fastest with 6.
pub const SAMPLES: u32 = 3;
/// Address spaces that are remembered.
const MOST: usize = 256;
/// Address spaces that may be on at a time.
const ON: usize = 4;
/// No address space.
const NONE: u64 = 0;

/// What the vCPU's other parts need to know. Address spaces are known by their tags in the TLB: one that was
/// flushed, and may be another program's now, has to be found computing again.
#[derive(Default)]
pub struct Wish {
    on: [u64; ON],
    next: usize,
    /// A clock found the vCPU in a user program.
    pub sampled: bool,
    /// Translated code was left on the way back to a program that is on.
    pub returned: bool,
    /// What was found in pages of programs' code.
    pub verdicts: Verdicts,
}

impl Wish {
    /// Whether programs of this address space run in jails.
    #[inline(always)]
    pub fn is_on(&self, asid: u64) -> bool {
        self.on.contains(&asid)
    }

    fn switch_on(&mut self, asid: u64) {
        if !self.is_on(asid) {
            self.on[self.next] = asid;
            self.next = (self.next + 1) % ON;
        }
    }

    fn switch_off(&mut self, asid: u64) {
        self.on.iter_mut().filter(|on| **on == asid).for_each(|on| *on = NONE);
    }

    /// Tags have begun anew.
    pub fn clear(&mut self) {
        self.on = [NONE; ON];
    }
}

/// What stays in a jail have cost so far.
#[derive(Clone, Copy, Default)]
pub struct Window {
    /// Times that the program was let run.
    pub entries: u32,
    /// Time spent on its mappings, in nanoseconds.
    pub mapping: u64,
}

#[derive(Clone, Copy, Default)]
struct Record {
    pauses: u32,
    until: u64,
}

/// What is known of the address spaces, by CR3.
#[derive(Default)]
pub struct Policy {
    records: Map<u64, Record>,
    /// The program that the last sample found, and how many samples did.
    latest: (u64, u32),
}

impl Policy {
    fn record(&mut self, cr3: u64) -> &mut Record {
        if self.records.len() >= MOST && !self.records.contains_key(&(cr3 >> 12)) {
            self.records.clear();
        }
        self.records.entry(cr3 >> 12).or_default()
    }

    /// A clock found the program computing, at `now` nanoseconds.
    pub fn sample(&mut self, wish: &mut Wish, asid: u64, cr3: u64, now: u64) {
        let count = if self.latest.0 == asid { self.latest.1 + 1 } else { 1 };
        self.latest = (asid, count);
        if count >= SAMPLES && self.record(cr3).until <= now {
            wish.switch_on(asid);
        }
    }

    /// Looks whether a window's stays were worth it, if it is full: `used` tells the jail's CPU time in it.
    /// Whether a new one begins.
    pub fn judge(
        &mut self,
        wish: &mut Wish,
        (asid, cr3): (u64, u64),
        window: Window,
        used: impl FnOnce() -> u64,
        now: u64,
    ) -> bool {
        if window.entries < WINDOW {
            return false;
        }
        let entries = u64::from(window.entries);
        let own = used().saturating_sub(entries * COST_INSIDE + window.mapping);
        let record = self.record(cr3);
        // Worth it if its own time is at least the cost: translated, it would take some twice that.
        if own >= entries * COST + window.mapping {
            record.pauses = record.pauses.saturating_sub(1);
        } else {
            record.until = now + (FIRST_PAUSE << record.pauses);
            record.pauses = (record.pauses + 1).min(DOUBLINGS);
            wish.switch_off(asid);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASID: u64 = 7;
    const CR3: u64 = 0x1234_5000;
    const FULL: Window = Window { entries: WINDOW, mapping: 0 };

    fn found(policy: &mut Policy, wish: &mut Wish, now: u64) -> bool {
        for _ in 0..SAMPLES {
            policy.sample(wish, ASID, CR3 | 5, now);
        }
        wish.is_on(ASID)
    }

    #[test]
    fn a_program_with_short_stays_is_left_alone_for_longer_and_longer() {
        let (mut policy, mut wish, mut now) = (Policy::default(), Wish::default(), 0);
        for pause in [10_000_000, 20_000_000, 40_000_000] {
            assert!(found(&mut policy, &mut wish, now));
            let stays = || u64::from(WINDOW) * (COST_INSIDE + 5_000);
            assert!(policy.judge(&mut wish, (ASID, CR3 | 9), FULL, stays, now));
            assert!(!wish.is_on(ASID), "PCIDs do not tell address spaces apart");
            assert!(!found(&mut policy, &mut wish, now + pause - 1));
            now += pause;
        }
    }

    #[test]
    fn one_that_computes_stays_on_unless_its_pages_come_and_go() {
        let (mut policy, mut wish) = (Policy::default(), Wish::default());
        policy.sample(&mut wish, ASID, CR3, 0);
        policy.sample(&mut wish, ASID + 1, CR3, 0);
        assert!(!wish.is_on(ASID) && !wish.is_on(ASID + 1), "two programs, each found once");
        assert!(found(&mut policy, &mut wish, 0));
        let used = || u64::from(WINDOW) * 60_000;
        assert!(policy.judge(&mut wish, (ASID, CR3), FULL, used, 0) && wish.is_on(ASID));
        assert!(!policy.judge(&mut wish, (ASID, CR3), Window { entries: 3, mapping: 0 }, used, 0));
        let mapping = Window { entries: WINDOW, mapping: u64::from(WINDOW) * 30_000 };
        policy.judge(&mut wish, (ASID, CR3), mapping, used, 0);
        assert!(!wish.is_on(ASID));
    }
}
