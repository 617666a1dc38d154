//! 8254 programmable interval timer (Intel order 231164-005) with the PC's wiring: channel 0 is IRQ 0,
//! channel 2 goes through port 0x61 to the speaker.
//!
//! *No drift.* Ticks are due at multiples of the period from the moment the count was loaded, never from
//! the moment a host timer happened to fire. *Catching up.* When the host was late by some periods, the
//! missed ticks follow at four times the programmed rate until the count is right again; of a gap of more
//! than [`BACKLOG`] ticks (a suspended host) the rest is dropped. *Limits.* Ticks closer than
//! [`MIN_GAP`] merge, so that a guest cannot make the host spin.
//!
//! Between ticks of modes 2 and 3 the line stays high and dips just before the next edge; controllers
//! see edges only.

mod channel;
mod port61;

use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use device::{BadState, Device, IrqLine, Snapshot, Timer, Timers};
use serde::{Deserialize, Serialize};

pub use channel::ChannelState;
pub use port61::Port61;

use crate::sync::lock;

/// The PIT's clock in Hz: a third of the NTSC colour subcarrier.
const FREQUENCY: u128 = 1_193_182;
/// How many missed ticks are made up for.
const BACKLOG: u64 = 1000;
/// Least time between two interrupts.
const MIN_GAP: Duration = Duration::from_micros(100);
const CONTROL_WORD: u64 = 3;
const READ_BACK: u8 = 3;

/// Saved state of [`Pit`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    /// Ticks of the PIT's clock since the machine began.
    pub clock: u64,
    /// Counters 0 to 2.
    pub channels: [ChannelState; 3],
    /// Level of IRQ 0.
    pub irq_high: bool,
    /// Periods of channel 0 that have been signalled, or whether its one edge has.
    pub signalled: u64,
    /// Speaker data enable, port 0x61 bit 1.
    pub speaker: bool,
}

/// The timer.
pub struct Pit {
    state: PitState,
    irq: IrqLine,
    timer: Timer,
    /// The moment of tick 0.
    origin: Instant,
}

fn power_on(clock: u64) -> PitState {
    let channels = [ChannelState::new(true), ChannelState::new(true), ChannelState::new(false)];
    PitState { clock, channels, irq_high: false, signalled: 0, speaker: false }
}

fn ticks(time: Duration) -> u64 {
    (time.as_nanos() * FREQUENCY / 1_000_000_000) as u64
}

/// The time of tick `ticks`, rounded up so that the tick has come by then.
fn duration(ticks: u64) -> Duration {
    let ns = (u128::from(ticks) * 1_000_000_000).div_ceil(FREQUENCY);
    Duration::new((ns / 1_000_000_000) as u64, (ns % 1_000_000_000) as u32)
}

impl Pit {
    /// A PIT that interrupts through `irq`.
    pub fn new(irq: IrqLine, timers: &Timers) -> Arc<Mutex<Pit>> {
        Arc::new_cyclic(|pit: &Weak<Mutex<Pit>>| {
            let pit = pit.clone();
            let timer = timers.timer(move || {
                if let Some(pit) = pit.upgrade() {
                    lock(&pit).expire(Instant::now());
                }
            });
            Mutex::new(Pit { state: power_on(0), irq, timer, origin: Instant::now() })
        })
    }

    fn clock(&self, now: Instant) -> u64 {
        ticks(now.saturating_duration_since(self.origin))
    }

    fn moment(&self, clock: u64) -> Instant {
        self.origin.checked_add(duration(clock)).unwrap_or(self.origin)
    }

    /// Brings pending counts into effect and IRQ 0 up to date.
    fn expire(&mut self, now: Instant) {
        let clock = self.clock(now);
        self.state.clock = clock;
        let due = self.edges_due(clock);
        if due > self.state.signalled {
            self.state.signalled = (self.state.signalled + 1).max(due.saturating_sub(BACKLOG));
            self.irq.set(false);
            self.state.irq_high = true;
            self.irq.set(true);
        }
        for (number, channel) in self.state.channels.iter_mut().enumerate() {
            // Channel 0 begins its new period when all edges of the old one are out.
            if number != 0 || due <= self.state.signalled {
                let before = channel.period();
                channel.sync(clock);
                if number == 0 && channel.period() != before {
                    self.state.signalled = 0;
                }
            }
        }
        self.arm(now, clock);
    }

    /// How many rising edges OUT of channel 0 has had since its count was loaded.
    fn edges_due(&self, clock: u64) -> u64 {
        let channel = &self.state.channels[0];
        if let Some((start, period)) = channel.period() {
            let until = channel.pending_at().map_or(clock, |at| at.min(clock));
            return until.saturating_sub(start) / period;
        }
        u64::from(channel.single_rise().is_some_and(|at| at <= clock))
    }

    fn arm(&self, now: Instant, clock: u64) {
        let channel = &self.state.channels[0];
        let signalled = self.state.signalled;
        let next = match channel.period() {
            Some((_, period)) if self.edges_due(clock) > signalled => clock + period / 4,
            Some((start, period)) => start + (signalled + 1) * period,
            None => match channel.single_rise() {
                Some(at) if signalled == 0 => at,
                _ => return self.timer.disarm(),
            },
        };
        self.timer.arm(self.moment(next).max(now + MIN_GAP));
    }

    fn control_word(&mut self, value: u8, now: Instant) {
        let clock = self.clock(now);
        let selected = value >> 6;
        if selected == READ_BACK {
            for (number, channel) in self.state.channels.iter_mut().enumerate() {
                if value & 2 << number != 0 {
                    read_back(channel, value, clock);
                }
            }
        } else if value & 0x30 == 0 {
            self.state.channels[usize::from(selected)].latch_count(clock);
        } else {
            self.state.channels[usize::from(selected)].write_control(value, clock);
            if selected == 0 {
                self.reprogrammed(clock);
                self.arm(now, clock);
            }
        }
    }

    /// A new control word or a new one-shot count in channel 0: the count of edges begins anew.
    fn reprogrammed(&mut self, clock: u64) {
        self.state.signalled = 0;
        self.state.irq_high = self.state.channels[0].out(clock);
        self.irq.set(self.state.irq_high);
    }

    fn write_count(&mut self, number: usize, value: u8, now: Instant) {
        let clock = self.clock(now);
        self.state.channels[number].write_count(value, clock);
        if number == 0 {
            if self.state.channels[0].period().is_none() {
                self.reprogrammed(clock);
            }
            self.arm(now, clock);
        }
    }

    fn read_at(&mut self, offset: u64, now: Instant) -> u8 {
        let clock = self.clock(now);
        match self.state.channels.get_mut(offset as usize) {
            Some(channel) => channel.read(clock),
            None => 0xff, // the control word cannot be read
        }
    }

    fn write_at(&mut self, offset: u64, value: u8, now: Instant) {
        self.expire_channels(now);
        match offset {
            0..CONTROL_WORD => self.write_count(offset as usize, value, now),
            CONTROL_WORD => self.control_word(value, now),
            _ => {}
        }
    }

    /// Pending counts of the channels that interrupt nobody.
    fn expire_channels(&mut self, now: Instant) {
        let clock = self.clock(now);
        self.state.clock = clock;
        self.state.channels[1].sync(clock);
        self.state.channels[2].sync(clock);
    }
}

fn read_back(channel: &mut ChannelState, command: u8, clock: u64) {
    if command & 1 << 5 == 0 {
        channel.latch_count(clock);
    }
    if command & 1 << 4 == 0 {
        channel.latch_status(clock);
    }
}

impl Device for Pit {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let now = Instant::now();
        self.expire_channels(now);
        for (offset, byte) in (offset..).zip(data) {
            *byte = self.read_at(offset, now);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let now = Instant::now();
        for (offset, &byte) in (offset..).zip(data) {
            self.write_at(offset, byte, now);
        }
    }

    fn reset(&mut self) {
        self.timer.disarm();
        self.state = power_on(self.clock(Instant::now()));
        self.irq.set(false);
    }
}

impl Snapshot for Pit {
    type State = PitState;

    fn save(&self) -> PitState {
        PitState { clock: self.clock(Instant::now()), ..self.state.clone() }
    }

    fn restore(&mut self, state: PitState) -> Result<(), BadState> {
        let PitState { clock, channels, irq_high, signalled: _, speaker: _ } = &state;
        // A century of ticks: more would overflow the arithmetic of deadlines.
        if *clock > (FREQUENCY as u64) * 3_200_000_000 {
            return Err(BadState::new("pit", format!("clock {clock}")));
        }
        channels.iter().try_for_each(|channel| channel.check(*clock))?;
        let now = Instant::now();
        let origin = now.checked_sub(duration(*clock));
        let origin = origin.ok_or_else(|| BadState::new("pit", "clock beyond the host's time"))?;
        self.origin = origin;
        self.irq.set(*irq_high);
        let clock = *clock;
        self.state = state;
        self.state.signalled = self.state.signalled.min(self.edges_due(clock));
        self.arm(now, clock);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Wire;
    use std::thread::sleep;

    pub(super) struct Bench {
        pub(super) pit: Arc<Mutex<Pit>>,
        wire: Arc<Wire>,
        timers: Timers,
    }

    pub(super) fn bench() -> Bench {
        let timers = Timers::start().unwrap();
        let wire = Arc::new(Wire::default());
        let pit = Pit::new(IrqLine::new(wire.clone(), 0), &timers);
        Bench { pit, wire, timers }
    }

    impl Bench {
        pub(super) fn write(&self, offset: u64, value: u8) {
            lock(&self.pit).write(offset, &[value]);
        }
        fn edges(&self) -> u32 {
            self.wire.edges()
        }
    }

    #[test]
    fn a_kernel_at_1000_hz_gets_its_ticks_without_drift() {
        let b = bench();
        b.write(3, 0x34);
        b.write(0, (1193 & 0xff) as u8);
        b.write(0, (1193 >> 8) as u8);
        let (start, before) = (Instant::now(), b.edges());
        sleep(Duration::from_millis(500));
        let ticks = b.edges() - before;
        let expected = start.elapsed().as_millis() as u32;
        assert!(ticks.abs_diff(expected) <= expected / 10 + 5, "{ticks} ticks in {expected} ms");
    }

    #[test]
    fn ticks_missed_by_a_late_host_are_made_up_for() {
        let b = bench();
        b.write(3, 0x34);
        b.write(0, 0xa9); // 10 ms
        b.write(0, 0x2e);
        let before = b.edges();
        let mut pit = lock(&b.pit);
        sleep(Duration::from_millis(105)); // the timer thread waits for the lock
        let late = Instant::now();
        for _ in 0..10 {
            pit.expire(late);
        }
        assert_eq!(b.edges() - before, 10);
        pit.expire(late);
        assert_eq!(b.edges() - before, 10, "and no more than were missed");
    }

    #[test]
    fn a_one_shot_fires_once() {
        let b = bench();
        b.write(3, 0x38); // mode 4, as tickless kernels use it
        let before = b.edges();
        b.write(0, 0xff);
        b.write(0, 0x04);
        sleep(Duration::from_millis(60));
        assert_eq!(b.edges() - before, 1);
        b.write(0, 0xff);
        b.write(0, 0x04);
        sleep(Duration::from_millis(60));
        assert_eq!(b.edges() - before, 2);
    }

    #[test]
    fn a_calibration_loop_sees_channel_2_run_in_real_time() {
        let b = bench();
        let port61 = Port61::new(b.pit.clone());
        let mut port61 = port61;
        port61.write(0, &[1]);
        b.write(3, 0xb0);
        b.write(2, 0x9c); // 50 ms
        b.write(2, 0xe9);
        let start = Instant::now();
        let mut byte = [0];
        while byte[0] & 0x20 == 0 {
            port61.read(0, &mut byte);
            assert!(start.elapsed() < Duration::from_secs(5));
        }
        assert!(start.elapsed() >= Duration::from_millis(50), "{:?}", start.elapsed());
    }

    #[test]
    fn a_saved_timer_goes_on_in_another_process() {
        let b = bench();
        b.write(3, 0x34);
        b.write(0, 0);
        b.write(0, 0x10);
        sleep(Duration::from_millis(20));
        let saved = lock(&b.pit).save();
        let other = bench();
        lock(&other.pit).restore(saved.clone()).unwrap();
        let before = other.edges();
        sleep(Duration::from_millis(100));
        assert!(other.edges() > before + 10);
        let impossible = PitState { clock: u64::MAX, ..saved };
        assert!(lock(&other.pit).restore(impossible).is_err());
        drop(other.timers);
    }

    #[test]
    fn reset_silences_it() {
        let b = bench();
        b.write(3, 0x34);
        b.write(0, 0);
        b.write(0, 0x08);
        lock(&b.pit).reset();
        let before = b.edges();
        sleep(Duration::from_millis(20));
        assert_eq!(b.edges(), before);
    }
}
