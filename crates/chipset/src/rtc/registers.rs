//! The clock's registers, and time and alarm in the formats that software may choose.

use super::calendar::DateTime;
use super::{Rtc, SECOND};

/// Bytes of memory, registers included.
pub(super) const SIZE: usize = 128;

pub(super) mod reg {
    pub(crate) const SECONDS: usize = 0;
    pub(crate) const SECONDS_ALARM: usize = 1;
    pub(crate) const MINUTES: usize = 2;
    pub(crate) const MINUTES_ALARM: usize = 3;
    pub(crate) const HOURS: usize = 4;
    pub(crate) const HOURS_ALARM: usize = 5;
    pub(crate) const WEEKDAY: usize = 6;
    pub(crate) const DAY: usize = 7;
    pub(crate) const MONTH: usize = 8;
    pub(crate) const YEAR: usize = 9;
    pub(crate) const A: usize = 10;
    pub(crate) const B: usize = 11;
    pub(crate) const C: usize = 12;
    pub(crate) const D: usize = 13;
}

/// Where the FADT says the century is.
pub(super) const CENTURY: usize = 0x32;

/// Registers that show the time.
pub(super) const DATE_REGS: [usize; 8] =
    [reg::SECONDS, reg::MINUTES, reg::HOURS, reg::WEEKDAY, reg::DAY, reg::MONTH, reg::YEAR, CENTURY];

/// Registers whose change moves the next alarm.
pub(super) const ALARM_REGS: [usize; 7] = [
    reg::SECONDS_ALARM,
    reg::MINUTES_ALARM,
    reg::HOURS_ALARM,
    reg::SECONDS,
    reg::MINUTES,
    reg::HOURS,
    reg::DAY,
];

pub(super) mod a {
    pub(crate) const UPDATING: u8 = 1 << 7;
    pub(crate) const DIVIDER: u8 = 0x70;
    pub(crate) const RATE: u8 = 0x0f;
    /// 32.768 kHz crystal, 1024 Hz periodic rate.
    pub(crate) const NORMAL: u8 = 0x26;
}

/// Divider settings from here on hold the clock.
pub(super) const DIVIDER_RESET: u8 = 0x60;

pub(super) mod b {
    pub(crate) const HOURS_24: u8 = 1 << 1;
    pub(crate) const BINARY: u8 = 1 << 2;
    pub(crate) const SQUARE_WAVE: u8 = 1 << 3;
    pub(crate) const UPDATE_IRQ: u8 = 1 << 4;
    pub(crate) const ALARM_IRQ: u8 = 1 << 5;
    pub(crate) const PERIODIC_IRQ: u8 = 1 << 6;
    pub(crate) const SET: u8 = 1 << 7;
}

pub(super) mod c {
    pub(crate) const UPDATE: u8 = 1 << 4;
    pub(crate) const ALARM: u8 = 1 << 5;
    pub(crate) const PERIODIC: u8 = 1 << 6;
    pub(crate) const IRQ: u8 = 1 << 7;
    pub(crate) const SOURCES: u8 = UPDATE | ALARM | PERIODIC;
}

/// Bytes that describe memory to firmware.
pub(super) mod cmos {
    pub(crate) const BASE_LOW: u8 = 0x15;
    pub(crate) const BASE_HIGH: u8 = 0x16;
    /// KiB above 1 MiB.
    pub(crate) const EXTENDED_LOW: u8 = 0x17;
    pub(crate) const EXTENDED_HIGH: u8 = 0x18;
    pub(crate) const EXTENDED_LOW_2: u8 = 0x30;
    pub(crate) const EXTENDED_HIGH_2: u8 = 0x31;
    /// Units of 64 KiB above 16 MiB and below 4 GiB.
    pub(crate) const ABOVE_16M_LOW: u8 = 0x34;
    pub(crate) const ABOVE_16M_HIGH: u8 = 0x35;
    /// Units of 64 KiB above 4 GiB, three bytes.
    pub(crate) const ABOVE_4G: u8 = 0x5b;
    pub(crate) const CPUS_LESS_1: u8 = 0x5f;
}

/// An alarm field from here on matches everything.
const DONT_CARE: u8 = 0xc0;
const PM: u8 = 0x80;

/// The seconds of a day at which the alarm goes off; `None` in a field matches all.
pub(super) struct AlarmPattern {
    hour: Option<i64>,
    minute: Option<i64>,
    second: Option<i64>,
}

impl AlarmPattern {
    /// The first matching second from `from` on; the pattern is that of a day, so it comes within one or never.
    pub(super) fn first_match(&self, from: i64) -> Option<i64> {
        let day = from.div_euclid(86_400) * 86_400;
        let candidates = |field: Option<i64>, count: i64| match field {
            Some(value) => value..value + 1,
            None => 0..count,
        };
        let in_day = |day: i64| {
            candidates(self.hour, 24).find_map(|hour| {
                candidates(self.minute, 60).find_map(|minute| {
                    let minute_start = day + hour * 3600 + minute * 60;
                    if minute_start + 59 < from {
                        return None;
                    }
                    candidates(self.second, 60).map(|s| minute_start + s).find(|&at| at >= from)
                })
            })
        };
        in_day(day).or_else(|| in_day(day + 86_400))
    }
}

impl Rtc {
    fn is_binary(&self) -> bool {
        self.state.bytes[reg::B] & b::BINARY != 0
    }

    fn encode(&self, value: i64) -> u8 {
        let value = value.rem_euclid(100) as u8;
        if self.is_binary() { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, byte: u8) -> i64 {
        i64::from(if self.is_binary() { byte } else { (byte >> 4) * 10 + (byte & 0x0f) })
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.state.bytes[reg::B] & b::HOURS_24 != 0 {
            return self.encode(hour);
        }
        let twelve = (hour + 11) % 12 + 1;
        self.encode(twelve) | if hour >= 12 { PM } else { 0 }
    }

    fn decode_hour(&self, byte: u8) -> i64 {
        if self.state.bytes[reg::B] & b::HOURS_24 != 0 {
            return self.decode(byte);
        }
        self.decode(byte & !PM) % 12 + if byte & PM != 0 { 12 } else { 0 }
    }

    /// Writes the time of now to its registers.
    pub(super) fn show_time(&mut self) {
        let t = DateTime::at(self.guest_time().div_euclid(SECOND));
        let weekday = (t.weekday - 1 + i64::from(self.state.weekday_offset)) % 7 + 1;
        let fields = [
            (reg::SECONDS, self.encode(t.second)),
            (reg::MINUTES, self.encode(t.minute)),
            (reg::HOURS, self.encode_hour(t.hour)),
            (reg::WEEKDAY, self.encode(weekday)),
            (reg::DAY, self.encode(t.day)),
            (reg::MONTH, self.encode(t.month)),
            (reg::YEAR, self.encode(t.year)),
            (CENTURY, self.encode(t.year.div_euclid(100))),
        ];
        for (index, value) in fields {
            self.state.bytes[index] = value;
        }
    }

    /// Makes the time in the registers the time of now, `phase` microseconds into its second.
    pub(super) fn take_time(&mut self, phase: i64) {
        let field = |index: usize| self.decode(self.state.bytes[index]);
        let mut t = DateTime {
            year: field(CENTURY) * 100 + field(reg::YEAR),
            month: field(reg::MONTH),
            day: field(reg::DAY),
            hour: self.decode_hour(self.state.bytes[reg::HOURS]),
            minute: field(reg::MINUTES),
            second: field(reg::SECONDS),
            weekday: field(reg::WEEKDAY),
        };
        let seconds = t.seconds();
        let shown = std::mem::replace(&mut t.weekday, 0);
        let natural = DateTime::at(seconds).weekday;
        self.state.weekday_offset = (shown - natural).rem_euclid(7) as u8;
        self.state.offset = seconds * SECOND + phase - (self.host_time)();
        self.state.last_second = seconds;
        self.next_alarm = None;
        if let Some(rate) = self.rate() {
            self.state.last_tick = super::ticks_at(self.guest_time(), rate);
        }
    }

    /// The alarm, or `None` if its fields name no time.
    pub(super) fn alarm_pattern(&self) -> Option<AlarmPattern> {
        let field = |index: usize, limit: i64, decode: &dyn Fn(u8) -> i64| {
            let byte = self.state.bytes[index];
            if byte >= DONT_CARE {
                return Some(None);
            }
            let value = decode(byte);
            (value < limit).then_some(Some(value))
        };
        Some(AlarmPattern {
            second: field(reg::SECONDS_ALARM, 60, &|byte| self.decode(byte))?,
            minute: field(reg::MINUTES_ALARM, 60, &|byte| self.decode(byte))?,
            hour: field(reg::HOURS_ALARM, 24, &|byte| self.decode_hour(byte))?,
        })
    }
}
