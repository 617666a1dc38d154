//! What software does with the clock.

use super::registers::CENTURY;
use super::*;
use crate::wire::Wire;
use std::sync::atomic::{AtomicI64, Ordering};

/// 2000-02-29 12:34:56 UTC, a Tuesday.
const LEAP_DAY: i64 = 951_827_696;

struct Bench {
    rtc: Arc<Mutex<Rtc>>,
    wire: Arc<Wire>,
    host: Arc<AtomicI64>,
    _timers: Timers,
}

fn bench() -> Bench {
    let timers = Timers::start().unwrap();
    let wire = Arc::new(Wire::default());
    let host = Arc::new(AtomicI64::new(LEAP_DAY * SECOND));
    let theirs = host.clone();
    let clock = Box::new(move || theirs.load(Ordering::SeqCst));
    let rtc = Rtc::with_clock(IrqLine::new(wire.clone(), 8), &timers, clock);
    Bench { rtc, wire, host, _timers: timers }
}

impl Bench {
    fn read(&self, index: u8) -> u8 {
        let mut rtc = lock(&self.rtc);
        rtc.write(0, &[index]);
        let mut byte = [0];
        rtc.read(1, &mut byte);
        byte[0]
    }
    fn write(&self, index: u8, value: u8) {
        let mut rtc = lock(&self.rtc);
        rtc.write(0, &[index]);
        rtc.write(1, &[value]);
    }
    fn pass(&self, microseconds: i64) {
        self.host.fetch_add(microseconds, Ordering::SeqCst);
        lock(&self.rtc).look();
    }
    fn time(&self) -> [u8; 8] {
        [CENTURY, reg::YEAR, reg::MONTH, reg::DAY, reg::WEEKDAY, reg::HOURS, reg::MINUTES, reg::SECONDS]
            .map(|index| self.read(index as u8))
    }
    fn is_high(&self) -> bool {
        self.wire.is_high()
    }
}

#[test]
fn the_hosts_time_shows_in_bcd_and_in_binary() {
    let b = bench();
    assert_eq!(b.time(), [0x20, 0x00, 0x02, 0x29, 3, 0x12, 0x34, 0x56]);
    b.write(0x0b, 0x06);
    assert_eq!(b.time(), [20, 0, 2, 29, 3, 12, 34, 56]);
    b.write(0x0b, 0x04);
    assert_eq!(b.read(4), 12 | 0x80, "12 PM");
    b.pass(12 * 3600 * SECOND);
    assert_eq!(b.read(4), 12, "12 AM");
    assert_eq!(b.read(0x0d), 0x80);
}

#[test]
fn linux_sets_the_time_and_it_runs_on_from_there() {
    let b = bench();
    b.write(0x0b, 0x82);
    b.write(0x0a, 0x76);
    for (index, value) in [(9, 0x27), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x58), (6, 6)] {
        b.write(index, value);
    }
    b.pass(7 * SECOND);
    b.write(0x0b, 0x02);
    b.write(0x0a, 0x26);
    assert_eq!(b.time(), [0x20, 0x27, 0x12, 0x31, 6, 0x23, 0x59, 0x58]);
    b.pass(SECOND / 2);
    assert_eq!(b.read(0), 0x59, "the first second after the divider's reset is half as long");
    b.pass(SECOND);
    assert_eq!(b.time(), [0x20, 0x28, 0x01, 0x01, 7, 0, 0, 0]);
}

#[test]
fn a_reader_is_told_when_the_time_is_about_to_change() {
    let b = bench();
    assert_eq!(b.read(0x0a), 0x26);
    b.pass(SECOND - 2000);
    assert_eq!(b.read(0x0a), 0xa6);
    b.pass(2000);
    assert_eq!(b.read(0x0a), 0x26);
}

#[test]
fn update_interrupts_come_every_second_and_end_with_a_look_at_register_c() {
    let b = bench();
    b.read(0x0c);
    b.write(0x0b, 0x12);
    b.pass(SECOND / 2);
    assert!(!b.is_high());
    b.pass(SECOND / 2);
    assert!(b.is_high());
    assert_eq!(b.read(0x0c) & 0xb0, 0x90);
    assert!(!b.is_high());
    assert_eq!(b.read(0x0c), 0);
    b.pass(SECOND);
    assert!(b.is_high());
}

#[test]
fn periodic_interrupts_have_the_chosen_rate() {
    let b = bench();
    b.write(0x0a, 0x2f); // 2 Hz
    b.read(0x0c);
    b.write(0x0b, 0x42);
    let mut ticks = 0;
    for _ in 0..100 {
        b.pass(100_000);
        ticks += u32::from(b.is_high());
        b.read(0x0c);
    }
    assert_eq!(ticks, 20, "in ten seconds");
}

#[test]
fn the_alarm_goes_off_at_its_time_and_every_minute_if_so_set() {
    let b = bench();
    for (index, value) in [(1, 0x58), (3, 0x34), (5, 0x12)] {
        b.write(index, value);
    }
    b.write(0x0b, 0x22);
    b.pass(SECOND);
    assert!(!b.is_high());
    b.pass(SECOND);
    assert!(b.is_high());
    assert_eq!(b.read(0x0c) & 0xa0, 0xa0);
    b.write(3, 0xff);
    b.write(5, 0xff);
    b.pass(59 * SECOND);
    assert!(!b.is_high());
    b.pass(SECOND);
    assert!(b.is_high());
    b.read(0x0c);
    b.write(5, 0x99); // no such hour
    b.pass(86_400 * SECOND);
    assert!(!b.is_high());
}

#[test]
fn an_armed_timer_raises_the_line_by_itself() {
    let timers = Timers::start().unwrap();
    let wire = Arc::new(Wire::default());
    let rtc = Rtc::new(IrqLine::new(wire.clone(), 8), &timers, &MemorySizes { below_4g: 0, above_4g: 0 }, 1);
    lock(&rtc).write(0, &[0x0b]);
    lock(&rtc).write(1, &[0x42]);
    let start = Instant::now();
    while !wire.is_high() {
        assert!(start.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn firmware_reads_the_memory_sizes() {
    let b = bench();
    lock(&b.rtc).describe(&MemorySizes { below_4g: 3 << 30, above_4g: 5 << 30 }, 4);
    let word = |low: u8| u32::from(b.read(low)) | u32::from(b.read(low + 1)) << 8;
    assert_eq!((word(0x15), word(0x17), word(0x30)), (640, 0xffff, 0xffff));
    assert_eq!(word(0x34), (3 << 30 >> 16) - 256);
    assert_eq!(word(0x5b) | u32::from(b.read(0x5d)) << 16, (5u64 << 30 >> 16) as u32);
    assert_eq!(b.read(0x5f), 3);
}

#[test]
fn reset_stops_interrupts_and_keeps_memory() {
    let b = bench();
    b.write(0x40, 0xa5);
    b.write(0x0b, 0x12);
    b.pass(SECOND);
    assert!(b.is_high());
    lock(&b.rtc).reset();
    assert!(!b.is_high());
    assert_eq!((b.read(0x40), b.read(0x0b)), (0xa5, 0x02));
}

#[test]
fn a_saved_clock_shows_the_same_time_and_an_impossible_one_is_refused() {
    let b = bench();
    b.write(9, 0x42);
    let saved = lock(&b.rtc).save();
    let other = bench();
    lock(&other.rtc).restore(saved.clone()).unwrap();
    assert_eq!(other.time(), b.time());
    assert_eq!(other.read(9), 0x42);
    for bad in [
        RtcState { bytes: vec![0; 5], ..saved.clone() },
        RtcState { offset: i64::MAX, ..saved.clone() },
        RtcState { weekday_offset: 7, ..saved },
    ] {
        assert!(lock(&other.rtc).restore(bad).is_err());
    }
}
