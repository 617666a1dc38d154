//! One channel of the 8254: a counter as a function of the time since it was loaded.
//!
//! Time is counted in ticks of the PIT's clock since the machine began; nothing here knows what a
//! second is.

use device::BadState;
use serde::{Deserialize, Serialize};

/// Counting modes. 6 and 7 are other names of 2 and 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Mode {
    TerminalCount,
    OneShot,
    RateGenerator,
    SquareWave,
    SoftwareStrobe,
    HardwareStrobe,
}

impl Mode {
    fn from_bits(bits: u8) -> Mode {
        match bits & 7 {
            0 => Mode::TerminalCount,
            1 => Mode::OneShot,
            2 | 6 => Mode::RateGenerator,
            3 | 7 => Mode::SquareWave,
            4 => Mode::SoftwareStrobe,
            _ => Mode::HardwareStrobe,
        }
    }

    fn is_periodic(self) -> bool {
        matches!(self, Mode::RateGenerator | Mode::SquareWave)
    }

    /// Counting begins with an edge of GATE, not with the count.
    fn is_triggered(self) -> bool {
        matches!(self, Mode::OneShot | Mode::HardwareStrobe)
    }
}

/// Which bytes of the counter software reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Access {
    Low,
    High,
    Both,
}

/// A count that takes effect at the end of the running period.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Pending {
    count: u32,
    at: u64,
}

/// Saved state of one channel. Times are in ticks of the machine's PIT clock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelState {
    mode: Mode,
    bcd: bool,
    access: Access,
    control: u8,
    /// The count that is loaded, 1 to 65536; `None` after a control word.
    count: Option<u32>,
    pending: Option<Pending>,
    /// When counting began; moved on by the time that GATE held it. `None` while it waits for a trigger.
    start: Option<u64>,
    /// GATE is low since then.
    held_since: Option<u64>,
    /// First byte of a two-byte write.
    write_low: Option<u8>,
    /// The next read of a two-byte read gives the high byte.
    read_high: bool,
    latched: Option<u16>,
    latched_status: Option<u8>,
}

impl ChannelState {
    pub(super) fn new(gate: bool) -> ChannelState {
        ChannelState {
            mode: Mode::TerminalCount,
            bcd: false,
            access: Access::Both,
            control: 0x30,
            count: None,
            pending: None,
            start: None,
            held_since: (!gate).then_some(0),
            write_low: None,
            read_high: false,
            latched: None,
            latched_status: None,
        }
    }

    /// Counts are taken modulo this.
    fn modulus(&self) -> u32 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    /// Ticks counted so far, GATE's pauses left out.
    fn elapsed(&self, now: u64) -> Option<u64> {
        let now = self.held_since.map_or(now, |held| held.min(now));
        Some(now.saturating_sub(self.start?))
    }

    /// Takes on a count that waited for the end of its period.
    pub(super) fn sync(&mut self, now: u64) {
        if let Some(Pending { count, at }) = self.pending
            && now >= at
        {
            self.count = Some(count);
            self.start = Some(at);
            self.pending = None;
        }
    }

    /// The period of modes 2 and 3 and the moment from which its ends are counted.
    pub(super) fn period(&self) -> Option<(u64, u64)> {
        if !self.mode.is_periodic() || self.held_since.is_some() {
            return None;
        }
        Some((self.start?, u64::from(self.count?)))
    }

    /// The moment, past or to come, at which OUT rises once, in the modes in which it does.
    pub(super) fn single_rise(&self) -> Option<u64> {
        if self.held_since.is_some() {
            return None;
        }
        let end = self.start? + u64::from(self.count?);
        match self.mode {
            Mode::TerminalCount | Mode::OneShot => Some(end),
            Mode::SoftwareStrobe | Mode::HardwareStrobe => Some(end + 1),
            Mode::RateGenerator | Mode::SquareWave => None,
        }
    }

    /// When a pending count takes effect.
    pub(super) fn pending_at(&self) -> Option<u64> {
        self.pending.map(|pending| pending.at)
    }

    /// Level of OUT.
    pub(super) fn out(&self, now: u64) -> bool {
        let (Some(elapsed), Some(count)) = (self.elapsed(now), self.count) else {
            return self.mode != Mode::TerminalCount;
        };
        let count = u64::from(count);
        let held = self.held_since.is_some();
        match self.mode {
            Mode::TerminalCount | Mode::OneShot => elapsed >= count,
            Mode::RateGenerator => held || elapsed % count != count - 1,
            Mode::SquareWave => held || elapsed % count < count.div_ceil(2),
            Mode::SoftwareStrobe | Mode::HardwareStrobe => elapsed != count,
        }
    }

    /// The counting element, in binary.
    fn counter(&self, now: u64) -> u32 {
        let Some(count) = self.count else { return 0 };
        let Some(elapsed) = self.elapsed(now) else { return count % self.modulus() };
        let modulus = u64::from(self.modulus());
        let n = u64::from(count);
        let value = match self.mode {
            Mode::RateGenerator => n - elapsed % n,
            Mode::SquareWave => {
                // Counts down by two, twice per period; an odd count spends one tick more on high.
                let (phase, high) = (elapsed % n, n.div_ceil(2));
                (n & !1) - 2 * if phase < high { phase.min(n / 2) } else { phase - high }
            }
            _ => (n % modulus + modulus - elapsed % modulus) % modulus,
        };
        (value % modulus) as u32
    }

    /// The counter as software reads it.
    fn readable(&self, now: u64) -> u16 {
        let value = self.counter(now);
        if self.bcd { to_bcd(value) } else { value as u16 }
    }

    pub(super) fn latch_count(&mut self, now: u64) {
        if self.latched.is_none() {
            self.latched = Some(self.readable(now));
        }
    }

    /// Status byte of the read-back command: OUT, null count, control word.
    pub(super) fn latch_status(&mut self, now: u64) {
        if self.latched_status.is_none() {
            let null = self.count.is_none() || self.pending.is_some();
            self.latched_status =
                Some(u8::from(self.out(now)) << 7 | u8::from(null) << 6 | self.control & 0x3f);
        }
    }

    pub(super) fn write_control(&mut self, value: u8, now: u64) {
        let gate_low = self.held_since.is_some();
        *self = ChannelState {
            mode: Mode::from_bits(value >> 1),
            bcd: value & 1 != 0,
            access: match value >> 4 & 3 {
                1 => Access::Low,
                2 => Access::High,
                _ => Access::Both,
            },
            control: value & 0x3f,
            held_since: gate_low.then_some(now),
            ..ChannelState::new(true)
        };
    }

    pub(super) fn write_count(&mut self, value: u8, now: u64) {
        let raw = match (self.access, self.write_low.take()) {
            (Access::Low, _) => u16::from(value),
            (Access::High, _) => u16::from(value) << 8,
            (Access::Both, Some(low)) => u16::from(value) << 8 | u16::from(low),
            (Access::Both, None) => {
                self.write_low = Some(value);
                if self.mode == Mode::TerminalCount {
                    self.count = None; // the first byte stops the count and OUT stays low
                    self.start = None;
                }
                return;
            }
        };
        let count = if self.bcd { from_bcd(raw) } else { u32::from(raw) };
        self.load(if count == 0 { self.modulus() } else { count }, now);
    }

    fn load(&mut self, count: u32, now: u64) {
        match (self.period(), self.mode.is_triggered()) {
            (Some((start, period)), _) => {
                let at = start + ((now.saturating_sub(start)) / period + 1) * period;
                self.pending = Some(Pending { count, at });
            }
            (None, true) => self.count = Some(count), // from the next trigger on
            (None, false) => {
                self.count = Some(count);
                self.start = Some(now);
                self.pending = None;
                self.held_since = self.held_since.map(|_| now);
            }
        }
    }

    pub(super) fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let value = self.latched.unwrap_or_else(|| self.readable(now));
        let high = match self.access {
            Access::Low => false,
            Access::High => true,
            Access::Both => self.read_high,
        };
        let both = self.access == Access::Both;
        if both {
            self.read_high = !high;
        }
        if !both || high {
            self.latched = None;
        }
        if high { (value >> 8) as u8 } else { value as u8 }
    }

    pub(super) fn set_gate(&mut self, gate: bool, now: u64) {
        match (self.held_since, gate) {
            (None, false) if !self.mode.is_triggered() => self.held_since = Some(now),
            (None, false) => self.held_since = Some(u64::MAX), // does not stop modes 1 and 5
            (Some(held), true) => self.gate_rises(held, now),
            _ => {}
        }
    }

    fn gate_rises(&mut self, held: u64, now: u64) {
        self.held_since = None;
        if self.count.is_none() {
            return;
        }
        if self.mode.is_triggered() || self.mode.is_periodic() {
            if let Some(pending) = self.pending.take() {
                self.count = Some(pending.count);
            }
            self.start = Some(now);
        } else if let Some(start) = self.start {
            self.start = Some(start.max(start.saturating_add(now.saturating_sub(held.max(start)))));
        }
    }

    pub(super) fn gate(&self) -> bool {
        self.held_since.is_none()
    }

    pub(super) fn check(&self, now: u64) -> Result<(), BadState> {
        let bad = |what: String| Err(BadState::new("pit", what));
        let counts = [self.count, self.pending.map(|p| p.count)];
        if let Some(count) = counts.into_iter().flatten().find(|c| !(1..=0x1_0000).contains(c)) {
            return bad(format!("count {count}"));
        }
        if self.start.is_some_and(|start| start > now) || self.control & !0x3f != 0 {
            return bad("a count that began in the future, or control bits that do not exist".into());
        }
        if self.pending.is_some_and(|p| p.at > now.saturating_add(0x1_0000)) {
            return bad("a count that waits for more than a period".into());
        }
        Ok(())
    }
}

fn to_bcd(value: u32) -> u16 {
    [1000, 100, 10, 1].iter().fold(0, |bcd, digit| bcd << 4 | (value / digit % 10) as u16)
}

fn from_bcd(bcd: u16) -> u32 {
    [12, 8, 4, 0].iter().fold(0, |value, shift| value * 10 + u32::from(bcd >> shift & 0xf)) % 10_000
}

#[cfg(test)]
mod tests {
    use super::*;

    fn channel(control: u8, count: u16, now: u64) -> ChannelState {
        let mut c = ChannelState::new(true);
        c.write_control(control, now);
        c.write_count(count as u8, now);
        c.write_count((count >> 8) as u8, now);
        c
    }

    fn read16(c: &mut ChannelState, now: u64) -> u16 {
        let low = c.read(now);
        u16::from(c.read(now)) << 8 | u16::from(low)
    }

    #[test]
    fn mode_0_counts_down_once_and_goes_on_from_the_top() {
        let mut c = channel(0x30, 1000, 50);
        assert!(!c.out(1049));
        assert!(c.out(1050));
        assert_eq!(c.single_rise(), Some(1050));
        assert_eq!(read16(&mut c, 60), 990);
        assert_eq!(read16(&mut c, 1051), 0xffff);
        c.write_count(5, 2000);
        assert!(!c.out(2001), "the first byte stops it");
    }

    #[test]
    fn mode_2_is_low_for_the_last_tick_of_each_period() {
        let mut c = channel(0x34, 100, 0);
        assert!(c.out(98) && !c.out(99) && c.out(100) && !c.out(199));
        assert_eq!(read16(&mut c, 130), 70);
        assert_eq!(c.period(), Some((0, 100)));
    }

    #[test]
    fn mode_2_takes_a_new_count_at_the_end_of_the_period() {
        let mut c = channel(0x34, 100, 0);
        c.write_count(50, 130);
        c.write_count(0, 130);
        c.sync(199);
        assert_eq!(c.period(), Some((0, 100)));
        c.sync(200);
        assert_eq!(c.period(), Some((200, 50)));
    }

    #[test]
    fn mode_3_is_a_square_wave_that_counts_by_two() {
        let mut c = channel(0x36, 10, 0);
        let wave: Vec<bool> = (0..10).map(|t| c.out(t)).collect();
        assert_eq!(wave, [true, true, true, true, true, false, false, false, false, false]);
        assert_eq!((read16(&mut c, 1), read16(&mut c, 6)), (8, 8));
        let odd = channel(0x36, 5, 0);
        assert_eq!((0..5).filter(|&t| odd.out(t)).count(), 3);
        // A count of 1 is not allowed by the data sheet; it must only do no harm.
        let one = channel(0x36, 1, 0);
        assert!(one.out(7));
        assert_eq!(read16(&mut one.clone(), 7), 0);
    }

    #[test]
    fn mode_4_strobes_once() {
        let c = channel(0x38, 20, 0);
        assert!(c.out(19) && !c.out(20) && c.out(21));
        assert_eq!(c.single_rise(), Some(21));
    }

    #[test]
    fn mode_1_waits_for_the_gate() {
        let mut c = ChannelState::new(false);
        c.write_control(0xb2, 0);
        c.write_count(10, 0);
        c.write_count(0, 0);
        assert!(c.out(100));
        c.set_gate(true, 100);
        assert!(!c.out(109) && c.out(110));
        c.set_gate(false, 105);
        assert!(!c.out(109) && c.out(110), "the falling gate does not stop it");
        c.set_gate(true, 120);
        assert!(!c.out(125), "it can be triggered again");
    }

    #[test]
    fn the_gate_pauses_mode_0_and_restarts_mode_2() {
        let mut c = channel(0x30, 100, 0);
        c.set_gate(false, 40);
        assert_eq!(read16(&mut c, 500), 60);
        c.set_gate(true, 1000);
        assert_eq!(read16(&mut c, 1010), 50);
        let mut c = channel(0x34, 100, 0);
        c.set_gate(false, 40);
        assert!(c.out(99), "OUT goes high at once");
        c.set_gate(true, 250);
        assert_eq!(c.period(), Some((250, 100)));
    }

    #[test]
    fn a_latched_count_stays_until_both_bytes_are_read() {
        let mut c = channel(0x34, 0x1234, 0);
        c.latch_count(0x34);
        c.latch_count(0x100);
        assert_eq!(c.read(500), 0x00);
        assert_eq!(c.read(600), 0x12);
        assert_ne!(read16(&mut c, 0x200), 0x1200);
    }

    #[test]
    fn read_back_status_tells_out_null_count_and_mode() {
        let mut c = ChannelState::new(true);
        c.write_control(0x34, 0);
        c.latch_status(0);
        assert_eq!(c.read(0), 0xf4);
        c.write_count(0, 0);
        c.write_count(0, 0);
        c.latch_status(5);
        assert_eq!(c.read(5), 0xb4);
    }

    #[test]
    fn bcd_counts_in_tens_and_zero_is_the_most() {
        let mut c = channel(0x31, 0x1000, 0);
        assert_eq!(read16(&mut c, 1), 0x0999);
        assert_eq!(channel(0x35, 0, 0).period(), Some((0, 10_000)));
        assert_eq!(channel(0x34, 0, 0).period(), Some((0, 65_536)));
    }
}
