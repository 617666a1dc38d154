//! A kernel and its HPET, in real time.

use super::comparator::conf;
use super::*;
use device::IrqSink;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;

/// Ticks of a millisecond.
const MS: u64 = 100_000;
const PIN: u64 = 20;

#[derive(Default)]
struct Wires {
    levels: AtomicU32,
    edges: [AtomicU32; 24],
}

impl IrqSink for Wires {
    fn set_level(&self, pin: u32, high: bool) {
        if high {
            self.levels.fetch_or(1 << pin, Ordering::SeqCst);
            self.edges[pin as usize].fetch_add(1, Ordering::SeqCst);
        } else {
            self.levels.fetch_and(!(1 << pin), Ordering::SeqCst);
        }
    }
}

struct Bench {
    hpet: Arc<Mutex<Hpet>>,
    bus: Arc<dyn BusDevice>,
    wires: Arc<Wires>,
    lines: Arc<HpetLines>,
    _timers: Timers,
}

fn bench() -> Bench {
    let timers = Timers::start().unwrap();
    let wires = Arc::new(Wires::default());
    let lines = HpetLines::new(wires.clone());
    let hpet = Hpet::new(lines.clone(), &timers);
    Bench { bus: Hpet::at(&hpet), hpet, wires, lines, _timers: timers }
}

fn timer(number: u64, register: u64) -> u64 {
    reg::TIMERS + number * reg::TIMER_SIZE + register
}

impl Bench {
    fn read(&self, register: u64) -> u64 {
        let mut data = [0; 8];
        self.bus.bus_read(register, &mut data);
        u64::from_le_bytes(data)
    }
    fn write(&self, register: u64, value: u64) {
        self.bus.bus_write(register, &value.to_le_bytes());
    }
    fn write32(&self, register: u64, value: u32) {
        self.bus.bus_write(register, &value.to_le_bytes());
    }
    fn edges(&self, pin: u64) -> u32 {
        self.wires.edges[pin as usize].load(Ordering::SeqCst)
    }
    fn is_high(&self, pin: u64) -> bool {
        self.wires.levels.load(Ordering::SeqCst) >> pin & 1 != 0
    }
    fn waits_for(&self, what: impl Fn() -> bool) {
        let start = Instant::now();
        while !what() {
            assert!(start.elapsed() < Duration::from_secs(5));
            sleep(Duration::from_millis(1));
        }
    }
    /// A timer that interrupts through [`PIN`], `ms` from now; the counter runs.
    fn set_off(&self, number: u64, flags: u64, ms: u64) {
        self.write(timer(number, reg::TIMER_CONFIG), flags | conf::ENABLED | PIN << conf::ROUTE_SHIFT);
        self.write(timer(number, reg::TIMER_COMPARATOR), self.read(reg::COUNTER) + ms * MS);
        self.write(reg::CONFIG, config::ENABLED);
    }
}

#[test]
fn a_kernel_finds_three_timers_of_100_mhz() {
    let b = bench();
    assert_eq!(b.read(reg::CAPABILITIES), 10_000_000 << 32 | 0x8086_a201);
    assert_eq!((b.read(reg::CONFIG), b.read(reg::COUNTER), b.read(reg::STATUS)), (0, 0, 0));
    for number in 0..3 {
        assert_eq!(b.read(timer(number, 0)), 0x00ff_0000_0000_0030);
        assert_eq!(b.read(timer(number, reg::TIMER_COMPARATOR)), u64::MAX);
    }
    assert_eq!(b.read(timer(3, 0)), 0, "there is no fourth");
    b.write(reg::CAPABILITIES, 0);
    assert_eq!(b.read(reg::CAPABILITIES) as u32, 0x8086_a201);
}

#[test]
fn any_width_at_any_place_reads_and_writes_the_registers_bytes() {
    let b = bench();
    b.write(reg::COUNTER, 0x8877_6655_4433_2211);
    let mut odd = [0; 3];
    b.bus.bus_read(reg::COUNTER + 5, &mut odd);
    assert_eq!(odd, [0x66, 0x77, 0x88]);
    b.bus.bus_write(reg::COUNTER + 1, &[0xaa]);
    assert_eq!(b.read(reg::COUNTER), 0x8877_6655_4433_aa11);
    let mut wide = [0xff; 24];
    b.bus.bus_read(reg::COUNTER - 4, &mut wide);
    assert_eq!(wide[..6], [0, 0, 0, 0, 0x11, 0xaa], "over registers' ends");
    let mut two = [0xff; 16];
    b.bus.bus_read(reg::COUNTER, &mut two);
    assert_eq!(two[7..10], [0x88, 0, 0]);
    b.bus.bus_write(timer(0, 4), &[0xff; 8]);
    assert_eq!(b.read(timer(0, 8)) >> 32, 0xffff_ffff);
    b.bus.bus_write(0x3ff, &[0xff; 8]);
    b.bus.bus_write(0, &[0xff; 1024]);
    b.bus.bus_read(0x3fc, &mut wide);
}

#[test]
fn the_counter_halts_at_a_write_and_is_set_only_then() {
    let b = bench();
    b.write(reg::COUNTER, 500);
    b.write(reg::CONFIG, config::ENABLED);
    b.write(reg::COUNTER, 1 << 60);
    sleep(Duration::from_millis(2));
    b.write32(reg::CONFIG, 0);
    let halted = b.read(reg::COUNTER);
    assert!((500 + MS..1 << 40).contains(&halted), "{halted}");
    assert_eq!(b.read(reg::COUNTER), halted);
}

#[test]
fn a_one_shot_interrupts_once() {
    let b = bench();
    b.set_off(1, 0, 10);
    let start = Instant::now();
    b.waits_for(|| b.edges(PIN) == 1);
    assert!(start.elapsed() > Duration::from_millis(8));
    sleep(Duration::from_millis(20));
    assert_eq!((b.edges(PIN), b.is_high(PIN), b.read(reg::STATUS)), (1, false, 0));
    b.set_off(1, 0, 0);
    b.waits_for(|| b.edges(PIN) == 2);
}

#[test]
fn a_level_lasts_until_its_status_is_cleared_even_while_the_counter_is_halted() {
    let b = bench();
    b.set_off(2, conf::LEVEL, 2);
    b.waits_for(|| b.is_high(PIN));
    b.write(reg::CONFIG, 0);
    assert_eq!((b.read(reg::STATUS), b.is_high(PIN)), (4, true));
    b.write(reg::STATUS, 3);
    assert!(b.is_high(PIN), "others' bits");
    b.lines.set_level(PIN as u32, true);
    b.write(reg::STATUS, 4);
    assert_eq!((b.read(reg::STATUS), b.is_high(PIN)), (0, true), "a PCI device still holds it");
    b.lines.set_level(PIN as u32, false);
    assert!(!b.is_high(PIN));
}

#[test]
fn a_timer_that_may_not_interrupt_still_has_a_status() {
    let b = bench();
    b.write(timer(0, 0), conf::LEVEL | PIN << conf::ROUTE_SHIFT);
    b.write(timer(0, reg::TIMER_COMPARATOR), MS);
    b.write(reg::CONFIG, config::ENABLED);
    b.waits_for(|| b.read(reg::STATUS) == 1);
    assert!(!b.is_high(PIN));
    b.write(timer(0, 0), conf::LEVEL | conf::ENABLED | PIN << conf::ROUTE_SHIFT);
    assert!(b.is_high(PIN), "allowed while it waits");
    b.write(timer(0, 0), PIN << conf::ROUTE_SHIFT);
    assert_eq!((b.is_high(PIN), b.read(reg::STATUS)), (false, 0), "an edge has no status");
}

#[test]
fn periodic_ticks_come_on_the_pits_line_and_do_not_drift() {
    let b = bench();
    let periodic = conf::PERIODIC | conf::ONLY_32_BITS | conf::VALUE_SET | conf::ENABLED;
    b.write32(timer(0, 0), periodic as u32);
    b.write32(timer(0, reg::TIMER_COMPARATOR), 4 * MS as u32);
    b.write32(timer(0, reg::TIMER_COMPARATOR), 4 * MS as u32);
    let start = Instant::now();
    b.write32(reg::CONFIG, (config::ENABLED | config::LEGACY) as u32);
    b.lines.set_level(0, true);
    assert!(!b.is_high(0), "the PIT is not heard");
    sleep(Duration::from_millis(400));
    let (ticks, expected) = (b.edges(0), start.elapsed().as_millis() as u32 / 4);
    assert!(ticks <= expected && ticks > expected / 2, "{ticks} of {expected}");
    assert_eq!(b.read(timer(0, reg::TIMER_COMPARATOR)) % (4 * MS), 0);
    b.write32(reg::CONFIG, config::ENABLED as u32);
    assert!(b.is_high(0), "it is again");
}

#[test]
fn a_guest_that_wants_an_interrupt_each_tick_does_not_get_it() {
    let b = bench();
    b.write(timer(0, 0), conf::PERIODIC | conf::VALUE_SET | conf::ENABLED | PIN << conf::ROUTE_SHIFT);
    b.write(timer(0, reg::TIMER_COMPARATOR), 1);
    let start = Instant::now();
    b.write(reg::CONFIG, config::ENABLED);
    sleep(Duration::from_millis(20));
    b.write(reg::CONFIG, 0);
    let most = start.elapsed().as_micros() as u32 / 100 + 3;
    assert!((1..=most).contains(&b.edges(PIN)), "{} of {most}", b.edges(PIN));
}

#[test]
fn a_match_that_comes_while_the_counter_is_halted_is_not_lost() {
    let b = bench();
    b.set_off(0, 0, 1);
    for running in [true, false].repeat(500) {
        b.write(reg::CONFIG, u64::from(running));
    }
    b.write(reg::CONFIG, config::ENABLED);
    b.waits_for(|| b.edges(PIN) == 1);
}

#[test]
fn saved_timers_go_on_in_another_process_and_impossible_ones_are_refused() {
    let b = bench();
    b.set_off(0, conf::LEVEL, 1);
    b.set_off(1, 0, 30);
    b.waits_for(|| b.is_high(PIN));
    let saved = lock(&b.hpet).save();
    let other = bench();
    lock(&other.hpet).restore(saved.clone()).unwrap();
    assert!(other.is_high(PIN));
    assert!(other.read(reg::COUNTER) >= saved.counter);
    other.write(reg::STATUS, 1);
    other.waits_for(|| other.edges(PIN) == 2);
    let refused = |state| assert!(lock(&other.hpet).restore(state).is_err());
    refused(HpetState { config: 4, ..saved.clone() });
    refused(HpetState { status: 2, ..saved.clone() });
    let mut timers = saved.timers.clone();
    timers[0].write_config(0, conf::LEVEL);
    refused(HpetState { timers, ..saved });
}

#[test]
fn reset_silences_it() {
    let b = bench();
    b.set_off(0, conf::LEVEL, 0);
    b.waits_for(|| b.is_high(PIN));
    lock(&b.hpet).reset();
    assert!(!b.is_high(PIN));
    assert_eq!((b.read(reg::CONFIG), b.read(reg::STATUS), b.read(reg::COUNTER)), (0, 0, 0));
    assert_eq!(b.read(timer(0, 0)), 0x00ff_0000_0000_0030);
}
