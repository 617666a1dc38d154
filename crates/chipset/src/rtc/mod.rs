//! MC146818 real-time clock and CMOS memory (Motorola MC146818A data sheet; the PC's use of the bytes:
//! R. Brown's CMOS list).
//!
//! The time is the host's clock, in UTC, plus an offset that the guest changes when it sets the time.

mod calendar;
mod registers;

use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use device::{BadState, Device, IrqLine, Snapshot, Timer, Timers};
use serde::{Deserialize, Serialize};

use crate::sync::lock;
use registers::{ALARM_REGS, DATE_REGS, DIVIDER_RESET, SIZE, a, b, c, cmos, reg};

const SECOND: i64 = 1_000_000;
/// The update takes 1984 µs and announces itself 244 µs before (data sheet, table 5).
const UPDATE_IN_PROGRESS: i64 = 2228;
/// After the divider's reset the first update comes half a second later.
const FIRST_UPDATE: i64 = SECOND / 2;
/// An armed timer looks at the host's clock again at least so often: somebody may have set it.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// Guest memory as firmware finds it described in CMOS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySizes {
    /// Bytes of RAM below 4 GiB, from address 0.
    pub below_4g: u64,
    /// Bytes of RAM from 4 GiB up.
    pub above_4g: u64,
}

/// Saved state of [`Rtc`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    /// The register that port 0x71 accesses.
    pub index: u8,
    /// All 128 bytes. Those of the time are current only while the clock stands still.
    pub bytes: Vec<u8>,
    /// Guest time less host time, in microseconds.
    pub offset: i64,
    /// Added to the calendar's weekday, 0 to 6: the guest may count its own.
    pub weekday_offset: u8,
    /// The last second (guest time) whose update was noticed.
    pub last_second: i64,
    /// The last periodic tick (guest time in ticks) that was noticed.
    pub last_tick: i64,
}

/// The clock and its memory: index at offset 0, data at offset 1.
pub struct Rtc {
    state: RtcState,
    irq: IrqLine,
    timer: Timer,
    /// Host time in microseconds since 1970.
    host_time: Box<dyn Fn() -> i64 + Send>,
    /// The next second that matches the alarm, when known.
    next_alarm: Option<Option<i64>>,
}

fn host_time() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(0)
}

impl Rtc {
    /// A clock that interrupts through `irq` and has `memory` written in its CMOS.
    pub fn new(irq: IrqLine, timers: &Timers, memory: &MemorySizes, cpus: u32) -> Arc<Mutex<Rtc>> {
        let rtc = Rtc::with_clock(irq, timers, Box::new(host_time));
        lock(&rtc).describe(memory, cpus);
        rtc
    }

    fn with_clock(irq: IrqLine, timers: &Timers, host_time: Box<dyn Fn() -> i64 + Send>) -> Arc<Mutex<Rtc>> {
        Arc::new_cyclic(|rtc: &Weak<Mutex<Rtc>>| {
            let rtc = rtc.clone();
            let timer = timers.timer(move || {
                if let Some(rtc) = rtc.upgrade() {
                    let mut rtc = lock(&rtc);
                    rtc.look();
                    rtc.arm();
                }
            });
            let mut bytes = vec![0; SIZE];
            bytes[reg::A] = a::NORMAL;
            bytes[reg::B] = b::HOURS_24;
            bytes[reg::D] = 0x80; // the battery is good
            let now = host_time();
            let state = RtcState {
                index: 0,
                bytes,
                offset: 0,
                weekday_offset: 0,
                last_second: now.div_euclid(SECOND),
                last_tick: 0,
            };
            Mutex::new(Rtc { state, irq, timer, host_time, next_alarm: None })
        })
    }

    /// Writes a byte of the memory as firmware's setup would.
    pub fn set_byte(&mut self, index: u8, value: u8) {
        if usize::from(index) > reg::D {
            self.state.bytes[usize::from(index) & (SIZE - 1)] = value;
        }
    }

    fn describe(&mut self, memory: &MemorySizes, cpus: u32) {
        let kib = memory.below_4g / 1024;
        let extended = kib.saturating_sub(1024).min(0xffff);
        let above_16m = (memory.below_4g.saturating_sub(16 << 20) >> 16).min(0xffff);
        let above_4g = memory.above_4g >> 16;
        let bytes = [
            (cmos::BASE_LOW, 640 & 0xff),
            (cmos::BASE_HIGH, 640 >> 8),
            (cmos::EXTENDED_LOW, extended),
            (cmos::EXTENDED_HIGH, extended >> 8),
            (cmos::EXTENDED_LOW_2, extended),
            (cmos::EXTENDED_HIGH_2, extended >> 8),
            (cmos::ABOVE_16M_LOW, above_16m),
            (cmos::ABOVE_16M_HIGH, above_16m >> 8),
            (cmos::ABOVE_4G, above_4g),
            (cmos::ABOVE_4G + 1, above_4g >> 8),
            (cmos::ABOVE_4G + 2, above_4g >> 16),
            (cmos::CPUS_LESS_1, u64::from(cpus.saturating_sub(1))),
        ];
        for (index, value) in bytes {
            self.set_byte(index, value as u8);
        }
    }

    fn guest_time(&self) -> i64 {
        (self.host_time)().wrapping_add(self.state.offset)
    }

    /// The time does not run: software holds it to set it, or holds the divider.
    fn is_stopped(&self) -> bool {
        let bytes = &self.state.bytes;
        bytes[reg::B] & b::SET != 0 || bytes[reg::A] & a::DIVIDER >= DIVIDER_RESET
    }

    /// Notices what happened since the last look: flags in register C, the interrupt line.
    fn look(&mut self) {
        if !self.is_stopped() {
            let now = self.guest_time();
            self.notice_seconds(now.div_euclid(SECOND));
            self.notice_ticks(now);
        }
        self.update_line();
    }

    fn notice_seconds(&mut self, second: i64) {
        if second > self.state.last_second {
            self.state.bytes[reg::C] |= c::UPDATE;
            if self.alarm().is_some_and(|alarm| alarm <= second) {
                self.state.bytes[reg::C] |= c::ALARM;
                self.next_alarm = None;
            }
        } else if second < self.state.last_second {
            self.next_alarm = None; // the host's clock was set back
        }
        self.state.last_second = second;
    }

    fn notice_ticks(&mut self, now: i64) {
        let Some(rate) = self.rate() else { return };
        let tick = ticks_at(now, rate);
        if tick != self.state.last_tick {
            self.state.last_tick = tick;
            self.state.bytes[reg::C] |= c::PERIODIC;
        }
    }

    fn update_line(&mut self) {
        let flags = self.state.bytes[reg::C] & self.state.bytes[reg::B] & c::SOURCES;
        if flags != 0 {
            self.state.bytes[reg::C] |= c::IRQ;
        }
        self.irq.set(self.state.bytes[reg::C] & c::IRQ != 0);
    }

    /// Periodic rate in Hz (data sheet, table 5, for the 32.768 kHz crystal).
    fn rate(&self) -> Option<i64> {
        match self.state.bytes[reg::A] & a::RATE {
            0 => None,
            1 => Some(256),
            2 => Some(128),
            n => Some(32_768 >> (n - 1)),
        }
    }

    /// The first second after the last one noticed that matches the alarm.
    fn alarm(&mut self) -> Option<i64> {
        if let Some(known) = self.next_alarm {
            return known;
        }
        let first = self.state.last_second + 1;
        let next = self.alarm_pattern().and_then(|pattern| pattern.first_match(first));
        self.next_alarm = Some(next);
        next
    }

    fn arm(&mut self) {
        let enabled = self.state.bytes[reg::B];
        if self.is_stopped() || self.state.bytes[reg::C] & c::IRQ != 0 {
            return self.timer.disarm();
        }
        let now = self.guest_time();
        let mut next = None;
        let mut sooner = |at: i64| next = Some(next.map_or(at, |next: i64| next.min(at)));
        if enabled & b::PERIODIC_IRQ != 0
            && let Some(rate) = self.rate()
        {
            sooner(tick_time(ticks_at(now, rate) + 1, rate));
        }
        if enabled & b::UPDATE_IRQ != 0 {
            sooner((now.div_euclid(SECOND) + 1) * SECOND);
        }
        if enabled & b::ALARM_IRQ != 0
            && let Some(second) = self.alarm()
        {
            sooner(second.saturating_mul(SECOND));
        }
        match next {
            None => self.timer.disarm(),
            Some(at) => {
                let wait = Duration::from_micros(at.saturating_sub(now).max(0) as u64).min(LOOK_AGAIN);
                self.timer.arm(Instant::now() + wait);
            }
        }
    }

    fn read_register(&mut self) -> u8 {
        self.look();
        let index = usize::from(self.state.index) & (SIZE - 1);
        match index {
            reg::A => self.state.bytes[reg::A] | if self.is_updating() { a::UPDATING } else { 0 },
            reg::C => {
                let flags = std::mem::take(&mut self.state.bytes[reg::C]);
                self.update_line();
                self.arm();
                flags
            }
            _ if DATE_REGS.contains(&index) => {
                if !self.is_stopped() {
                    self.show_time();
                }
                self.state.bytes[index]
            }
            _ => self.state.bytes[index],
        }
    }

    fn is_updating(&self) -> bool {
        !self.is_stopped() && self.guest_time().rem_euclid(SECOND) >= SECOND - UPDATE_IN_PROGRESS
    }

    fn write_register(&mut self, value: u8) {
        self.look();
        let index = usize::from(self.state.index) & (SIZE - 1);
        match index {
            reg::A => self.write_control(reg::A, value & !a::UPDATING),
            reg::B => self.write_control(reg::B, value),
            reg::C | reg::D => {}
            _ if DATE_REGS.contains(&index) => self.write_time(index, value),
            _ => self.state.bytes[index] = value,
        }
        if ALARM_REGS.contains(&index) {
            self.next_alarm = None;
        }
        self.update_line();
        self.arm();
    }

    /// Registers A and B: the clock may stop or go on, and change its format.
    fn write_control(&mut self, index: usize, value: u8) {
        if !self.is_stopped() {
            self.show_time();
        }
        let (was_stopped, divider_held) = (self.is_stopped(), self.divider_is_held());
        let rate = self.rate();
        self.state.bytes[index] = value;
        if index == reg::B && value & b::SET != 0 {
            self.state.bytes[reg::B] &= !b::UPDATE_IRQ; // SET clears UIE
        }
        if was_stopped && !self.is_stopped() {
            let restarted = divider_held && !self.divider_is_held();
            self.take_time(if restarted { SECOND - FIRST_UPDATE } else { 0 });
        }
        if self.rate() != rate
            && let Some(rate) = self.rate()
        {
            self.state.last_tick = ticks_at(self.guest_time(), rate);
        }
        self.next_alarm = None;
    }

    fn divider_is_held(&self) -> bool {
        self.state.bytes[reg::A] & a::DIVIDER >= DIVIDER_RESET
    }

    fn write_time(&mut self, index: usize, value: u8) {
        if self.is_stopped() {
            self.state.bytes[index] = value;
            return;
        }
        self.show_time();
        self.state.bytes[index] = value;
        let phase = self.guest_time().rem_euclid(SECOND);
        self.take_time(phase);
    }
}

fn ticks_at(time: i64, rate: i64) -> i64 {
    (i128::from(time) * i128::from(rate)).div_euclid(i128::from(SECOND)) as i64
}

/// The time of a tick, rounded up so that the tick has come by then.
fn tick_time(tick: i64, rate: i64) -> i64 {
    let exact = i128::from(tick) * i128::from(SECOND);
    -(-exact).div_euclid(i128::from(rate)) as i64
}

impl Device for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let [first, ..] = data else { return };
        // The index port cannot be read on a PC.
        *first = if offset == 1 { self.read_register() } else { 0xff };
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (offset, &value) in (offset..).zip(data) {
            match offset {
                0 => self.state.index = value & 0x7f, // bit 7 masks NMIs, of which we have none here
                1 => self.write_register(value),
                _ => {}
            }
        }
    }

    /// The reset pin stops interrupts; time and memory live on the battery (data sheet, "RESET").
    fn reset(&mut self) {
        self.look();
        self.state.bytes[reg::B] &= !(b::PERIODIC_IRQ | b::ALARM_IRQ | b::UPDATE_IRQ | b::SQUARE_WAVE);
        self.state.bytes[reg::C] = 0;
        self.state.index = 0;
        if self.is_stopped() {
            self.write_control(reg::A, a::NORMAL);
            let running = self.state.bytes[reg::B] & !b::SET;
            self.write_control(reg::B, running);
        }
        self.update_line();
        self.arm();
    }
}

impl Snapshot for Rtc {
    type State = RtcState;

    fn save(&self) -> RtcState {
        self.state.clone()
    }

    fn restore(&mut self, state: RtcState) -> Result<(), BadState> {
        let RtcState { index, bytes, offset, weekday_offset, last_second, last_tick: _ } = &state;
        let bad = |what: String| Err(BadState::new("rtc", what));
        if bytes.len() != SIZE || *index > 0x7f || *weekday_offset > 6 {
            return bad(format!("{} bytes, index {index}, weekday {weekday_offset}", bytes.len()));
        }
        // Some 30,000 years either way: what the calendar of a four-digit year can reach, and more.
        let limit = 1_000_000_000_000;
        if offset.unsigned_abs() > limit * SECOND as u64 || last_second.unsigned_abs() > limit {
            return bad(format!("offset {offset} µs or time {last_second} s"));
        }
        self.state = state;
        self.next_alarm = None;
        self.look();
        self.arm();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
