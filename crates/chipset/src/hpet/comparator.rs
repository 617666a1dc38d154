//! One timer (2.3.8): a comparator, and what its match with the main counter does.

use device::BadState;
use serde::{Deserialize, Serialize};

use super::merge;

/// Tn_CONF_CAP (2.3.8).
pub(super) mod conf {
    pub const LEVEL: u64 = 1 << 1;
    pub const ENABLED: u64 = 1 << 2;
    pub const PERIODIC: u64 = 1 << 3;
    /// Can be periodic, and has 64 bits. No FSB messages.
    pub const CAPABLE: u64 = 1 << 4 | 1 << 5;
    pub const VALUE_SET: u64 = 1 << 6;
    pub const ONLY_32_BITS: u64 = 1 << 8;
    pub const ROUTE_SHIFT: u32 = 9;
    pub const ROUTE: u64 = 0x1f << ROUTE_SHIFT;
    pub const KEPT: u64 = LEVEL | ENABLED | PERIODIC | ONLY_32_BITS | ROUTE;
}

/// The I/O APIC's pins that a timer may be routed to, by bit: those that PCI uses. All others belong to one
/// device each, and systems look here (Linux takes none below 16).
pub(super) const ROUTES: u64 = 0x00ff_0000;

/// Ticks of some 20 years: what is further away is not waited for.
const FAR: u64 = 1 << 56;

/// A comparator that is set to what the counter was so many ticks (0.2 s) ago matches at once. The guest meant a
/// moment to come: the host held its vCPU up between the reading and the writing.
const LATE: u64 = 1 << 24;

/// Which part of the comparator a write sets in periodic mode, the period aside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum ValueSet {
    #[default]
    Nothing,
    Whole,
    /// The low half was set; either the high half comes, or there is none and the period does.
    HighHalf,
}

/// Saved state of one timer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComparatorState {
    /// The bits of the configuration that can be written.
    config: u64,
    comparator: u64,
    period: u64,
    value_set: ValueSet,
    /// The first value of the main counter that has not been compared yet.
    unseen: u64,
}

impl ComparatorState {
    pub(super) fn new() -> ComparatorState {
        ComparatorState {
            config: 0,
            comparator: u64::MAX,
            period: 0,
            value_set: ValueSet::Nothing,
            unseen: 0,
        }
    }

    pub(super) fn is_level(&self) -> bool {
        self.config & conf::LEVEL != 0
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.config & conf::ENABLED != 0
    }

    pub(super) fn is_periodic(&self) -> bool {
        self.config & conf::PERIODIC != 0
    }

    /// The I/O APIC's pin that it interrupts through, unless the legacy routes are on.
    pub(super) fn route(&self) -> Option<u32> {
        let route = ((self.config & conf::ROUTE) >> conf::ROUTE_SHIFT) as u32;
        (ROUTES >> route & 1 != 0).then_some(route)
    }

    /// The bits that are compared.
    fn width(&self) -> u64 {
        if self.config & conf::ONLY_32_BITS != 0 { u64::from(u32::MAX) } else { u64::MAX }
    }

    pub(super) fn config(&self) -> u64 {
        self.config | conf::CAPABLE | ROUTES << 32
    }

    pub(super) fn write_config(&mut self, value: u64, mask: u64) {
        let old = self.config;
        self.config = merge(old, value, mask) & conf::KEPT;
        if self.route().is_none() {
            // A route that cannot be had does not read back as it was written.
            self.config = self.config & !conf::ROUTE | old & conf::ROUTE;
        }
        if mask & conf::VALUE_SET != 0 {
            self.value_set = if value & conf::VALUE_SET != 0 { ValueSet::Whole } else { ValueSet::Nothing };
        }
        self.comparator &= self.width();
        self.period &= self.width();
    }

    pub(super) fn comparator(&self) -> u64 {
        self.comparator
    }

    /// In periodic mode the comparator itself is set after VAL_SET only, and what is written is the period too,
    /// so that one write can set both.
    /// `counter` is the main counter's value, and whether it runs.
    pub(super) fn write_comparator(&mut self, value: u64, mask: u64, counter: (u64, bool)) {
        let mask = mask & self.width();
        if mask == 0 {
            return;
        }
        if self.is_periodic() {
            self.period = merge(self.period, value, mask);
        }
        if !self.is_periodic() || self.takes_value(mask) {
            self.comparator = merge(self.comparator, value, mask);
            let (counter, running) = counter;
            let missed_by = (counter & self.width()).checked_sub(self.comparator);
            let missed_by = missed_by.filter(|ticks| running && *ticks <= LATE);
            self.compare_from(counter.wrapping_sub(missed_by.unwrap_or(0)));
        }
    }

    /// VAL_SET lasts until the whole comparator is set, in one write or in two halves. Software that has no
    /// use for the high half writes the low one twice: the second time it means the period.
    fn takes_value(&mut self, mask: u64) -> bool {
        let (low, high) = (mask as u32 != 0, mask >> 32 != 0);
        let takes = match self.value_set {
            ValueSet::Nothing => false,
            ValueSet::Whole => true,
            ValueSet::HighHalf => high,
        };
        let rest_comes = low && !high && self.width() != u64::from(u32::MAX);
        let set_before = self.value_set == ValueSet::Whole;
        self.value_set = if set_before && rest_comes { ValueSet::HighHalf } else { ValueSet::Nothing };
        takes
    }

    /// What is compared from now on: the main counter from `counter` on.
    pub(super) fn compare_from(&mut self, counter: u64) {
        self.unseen = counter;
    }

    /// Whether the main counter, which now is `counter`, has come by the comparator since the last look. A
    /// periodic comparator moves on, by so many periods as have passed.
    pub(super) fn pass(&mut self, counter: u64) -> bool {
        let new = counter.wrapping_add(1).wrapping_sub(self.unseen);
        let ahead = self.ahead();
        self.unseen = counter.wrapping_add(1);
        if ahead >= new {
            return false;
        }
        if self.is_periodic() && self.period != 0 {
            let periods = (new - 1 - ahead) / self.period + 1;
            let way = periods.wrapping_mul(self.period);
            self.comparator = self.comparator.wrapping_add(way) & self.width();
        }
        true
    }

    /// How many values after the first unseen one the next match is.
    fn ahead(&self) -> u64 {
        self.comparator.wrapping_sub(self.unseen) & self.width()
    }

    /// The main counter's value at the next match, if anybody lives to see it.
    pub(super) fn next(&self) -> Option<u64> {
        let ahead = self.ahead();
        (ahead < FAR).then(|| self.unseen.wrapping_add(ahead))
    }

    pub(super) fn check(&self) -> Result<(), BadState> {
        let ComparatorState { config, comparator, period, value_set: _, unseen: _ } = self;
        let unknown = config & !conf::KEPT != 0 || config & conf::ROUTE != 0 && self.route().is_none();
        if unknown || (comparator | period) & !self.width() != 0 {
            let what = format!("timer {config:#x} at {comparator:#x}, period {period:#x}");
            return Err(BadState::new("hpet", what));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = u64::MAX;
    const LOW: u64 = 0xffff_ffff;

    fn timer(config: u64) -> ComparatorState {
        let mut timer = ComparatorState::new();
        timer.write_config(config, ALL);
        timer
    }

    #[test]
    fn a_one_shot_matches_when_the_counter_comes_by_and_not_again() {
        let mut timer = timer(conf::ENABLED);
        timer.write_comparator(1000, ALL, (10, true));
        assert_eq!(timer.next(), Some(1000));
        assert!(!timer.pass(999));
        assert!(timer.pass(1000));
        assert!(!timer.pass(1000) && !timer.pass(1 << 60));
        assert_eq!(timer.next(), None);
        timer.write_comparator(1 << 60, ALL, (1 << 60, true));
        assert!(timer.pass(1 << 60), "set to what the counter is");
    }

    #[test]
    fn a_match_that_was_missed_while_it_was_set_comes_at_once() {
        let mut timer = timer(0);
        timer.write_comparator(1000, ALL, (1500, true));
        assert!(timer.pass(1501) && !timer.pass(1502));
        timer.write_comparator(1000, ALL, (1000 + 2 * LATE, true));
        assert!(!timer.pass(1001 + 2 * LATE), "that is for the counter's next round");
        timer.write_comparator(0, ALL, (10, false));
        assert!(!timer.pass(10), "nothing is missed while it is halted");
        timer.write_comparator(ALL, ALL, (10, true));
        assert!(!timer.pass(11), "never");
    }

    #[test]
    fn a_timer_of_32_bits_matches_in_each_round_of_the_counters_low_half() {
        let mut timer = timer(conf::ONLY_32_BITS);
        timer.write_comparator(0x7_0000_0010, ALL, (0x2_ffff_fff0, true));
        assert_eq!((timer.comparator(), timer.next()), (0x10, Some(0x3_0000_0010)));
        assert!(!timer.pass(0x3_0000_000f));
        assert!(timer.pass(0x3_0000_0010));
        assert_eq!(timer.next(), Some(0x4_0000_0010));
    }

    #[test]
    fn a_periodic_timer_moves_on_by_its_period_without_drift() {
        // As Linux sets it up: the first match, then the period.
        let mut timer = timer(conf::PERIODIC | conf::ONLY_32_BITS | conf::VALUE_SET);
        timer.write_comparator(5000, LOW, (0, true));
        timer.write_comparator(100, LOW, (0, true));
        assert!(timer.pass(5003));
        assert_eq!(timer.comparator(), 5100);
        assert!(timer.pass(5350), "a late host");
        assert_eq!(timer.comparator(), 5400);
        assert!(!timer.pass(5399));
    }

    #[test]
    fn one_write_sets_first_match_and_period() {
        let mut timer = timer(conf::PERIODIC | conf::VALUE_SET);
        timer.write_comparator(700, ALL, (0, true));
        assert!(timer.pass(700));
        assert_eq!(timer.comparator(), 1400);
        timer.write_comparator(500, ALL, (700, true));
        assert_eq!(timer.comparator(), 1400, "the period alone");
        assert!(timer.pass(1400));
        assert_eq!(timer.comparator(), 1900);
    }

    #[test]
    fn halves_are_written_in_two_ways() {
        let mut timer = timer(conf::PERIODIC | conf::VALUE_SET);
        timer.write_comparator(0x10, LOW, (0, true));
        timer.write_comparator(7 << 32, !LOW, (0, true));
        assert_eq!(timer.comparator(), 0x7_0000_0010);
        timer.write_comparator(100, LOW, (0, true));
        timer.write_comparator(0, !LOW, (0, true));
        assert!(timer.pass(0x7_0000_0010));
        assert_eq!(timer.comparator(), 0x7_0000_0074);

        timer.write_config(conf::PERIODIC | conf::VALUE_SET, ALL);
        timer.write_comparator(0, !LOW, (0, true));
        timer.write_config(conf::PERIODIC | conf::VALUE_SET, ALL);
        timer.write_comparator(1000, LOW, (0, true));
        timer.write_comparator(50, LOW, (0, true));
        assert_eq!((timer.comparator(), timer.period), (1000, 50));
    }

    #[test]
    fn a_period_of_nothing_is_no_endless_loop() {
        let mut timer = timer(conf::PERIODIC | conf::VALUE_SET);
        timer.write_comparator(0, ALL, (0, true));
        assert!(timer.pass(0));
        assert!(!timer.pass(ALL - 1));
    }

    #[test]
    fn what_a_timer_cannot_do_does_not_read_back() {
        let mut timer = timer(ALL);
        let all = conf::LEVEL | conf::ENABLED | conf::PERIODIC | conf::ONLY_32_BITS;
        assert_eq!(timer.config(), all | conf::CAPABLE | ROUTES << 32, "no route 31, no messages");
        timer.write_config(21 << conf::ROUTE_SHIFT, ALL);
        assert_eq!(timer.route(), Some(21));
        timer.write_config(2 << conf::ROUTE_SHIFT | conf::ENABLED, ALL);
        assert_eq!((timer.route(), timer.is_enabled()), (Some(21), true));
    }
}
