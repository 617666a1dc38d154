//! High precision event timers (IA-PC HPET specification 1.0a): a 64-bit counter of 100 MHz, three timers that
//! can be periodic, and the legacy routes, with which they take over the lines of PIT and RTC. No FSB
//! messages.
//!
//! *Late hosts.* Matches that a late host missed merge into one interrupt; a periodic comparator stays on its
//! multiples, so that nothing drifts. *Limits.* Periodic interrupts closer than [`MIN_GAP`] merge as well, so
//! that a guest cannot make the host spin.
//!
//! | what                           | file            |
//! |--------------------------------|-----------------|
//! | the main counter               | `counter.rs`    |
//! | a timer                        | `comparator.rs` |
//! | lines, shared and taken over   | `lines.rs`      |

mod comparator;
mod counter;
mod lines;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use device::{BadState, BusDevice, Device, Snapshot, Timer, Timers};
use serde::{Deserialize, Serialize};

use crate::sync::lock;
pub use comparator::ComparatorState;
use counter::Counter;
pub use lines::HpetLines;
use lines::LEGACY;

/// Registers (table 2).
mod reg {
    pub const CAPABILITIES: u64 = 0x00;
    pub const CONFIG: u64 = 0x10;
    pub const STATUS: u64 = 0x20;
    pub const COUNTER: u64 = 0xf0;
    pub const TIMERS: u64 = 0x100;
    /// From one timer's registers to the next one's.
    pub const TIMER_SIZE: u64 = 0x20;
    pub const TIMER_CONFIG: u64 = 0x00;
    pub const TIMER_COMPARATOR: u64 = 0x08;
}

/// General configuration (2.3.5).
mod config {
    pub const ENABLED: u64 = 1 << 0;
    pub const LEGACY: u64 = 1 << 1;
    pub const KEPT: u64 = ENABLED | LEGACY;
}

/// Number of timers.
const TIMERS: usize = 3;
/// General capabilities (2.3.4): Intel, legacy routes, 64 bits, revision 1.
const CAPABILITIES: u64 =
    counter::PERIOD << 32 | 0x8086 << 16 | 1 << 15 | 1 << 13 | (TIMERS as u64 - 1) << 8 | 1;
/// Least time between two interrupts of a periodic timer.
const MIN_GAP: Duration = Duration::from_nanos(Hpet::MIN_TICKS as u64 * counter::TICK);

/// Saved state of [`Hpet`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HpetState {
    /// General configuration.
    pub config: u64,
    /// General interrupt status: the level-triggered interrupts that wait for their end.
    pub status: u64,
    /// Main counter.
    pub counter: u64,
    /// The timers.
    pub timers: [ComparatorState; TIMERS],
}

/// The timers and their counter.
pub struct Hpet {
    state: HpetState,
    counter: Arc<Counter>,
    lines: Arc<HpetLines>,
    timer: Timer,
}

fn power_on() -> HpetState {
    HpetState { config: 0, status: 0, counter: 0, timers: std::array::from_fn(|_| ComparatorState::new()) }
}

/// `old` with the bits of `mask` from `new`.
fn merge(old: u64, new: u64, mask: u64) -> u64 {
    old & !mask | new & mask
}

impl Hpet {
    /// Event timer block ID, as the ACPI table has it (3.2.4): the low half of the capabilities.
    pub const ID: u32 = CAPABILITIES as u32;
    /// The least period that a timer keeps (3.2.4), in ticks.
    pub const MIN_TICKS: u16 = 10_000;

    /// Timers that interrupt through `lines`.
    pub fn new(lines: Arc<HpetLines>, timers: &Timers) -> Arc<Mutex<Hpet>> {
        Arc::new_cyclic(|hpet: &Weak<Mutex<Hpet>>| {
            let hpet = hpet.clone();
            let timer = timers.timer(move || {
                if let Some(hpet) = hpet.upgrade() {
                    let mut hpet = lock(&hpet);
                    hpet.catch_up();
                    hpet.arm();
                }
            });
            Mutex::new(Hpet { state: power_on(), counter: Arc::new(Counter::halted()), lines, timer })
        })
    }

    /// What the bus gets: 1 KiB of registers.
    pub fn at(hpet: &Arc<Mutex<Hpet>>) -> Arc<dyn BusDevice> {
        Arc::new(Registers { counter: lock(hpet).counter.clone(), hpet: hpet.clone() })
    }

    fn is_running(&self) -> bool {
        self.state.config & config::ENABLED != 0
    }

    fn has_legacy_routes(&self) -> bool {
        self.state.config & config::KEPT == config::KEPT
    }

    fn line(&self, timer: usize) -> Option<u32> {
        match LEGACY.get(timer) {
            Some(&line) if self.has_legacy_routes() => Some(line),
            _ => self.state.timers[timer].route(),
        }
    }

    /// Does what is due.
    fn catch_up(&mut self) {
        if !self.is_running() {
            return;
        }
        let counter = self.counter.now();
        for timer in 0..TIMERS {
            if self.state.timers[timer].pass(counter) {
                self.matched(timer);
            }
        }
    }

    fn matched(&mut self, timer: usize) {
        let state = &self.state.timers[timer];
        if state.is_level() {
            self.state.status |= 1 << timer;
            self.hold_lines();
        } else if state.is_enabled()
            && let Some(line) = self.line(timer)
        {
            self.lines.pulse(line);
        }
    }

    /// Level-triggered interrupts last until their status bit is cleared, even while the counter is halted
    /// (2.3.5, ENABLE_CNF).
    fn hold_lines(&self) {
        let asks =
            |timer: &usize| self.state.status >> timer & 1 != 0 && self.state.timers[*timer].is_enabled();
        let lines = (0..TIMERS).filter(asks).filter_map(|timer| self.line(timer));
        self.lines.hold(lines.fold(0, |lines, line| lines | 1 << line), self.has_legacy_routes());
    }

    /// Has the host's timer go off at the next match that anybody would hear of.
    fn arm(&self) {
        let soonest = Instant::now() + MIN_GAP;
        let due = |(timer, state): (usize, &ComparatorState)| {
            let waits = self.state.status >> timer & 1 != 0;
            if !state.is_enabled() || waits {
                return None;
            }
            let moment = self.counter.moment(state.next()?)?;
            Some(if state.is_periodic() { moment.max(soonest) } else { moment })
        };
        match self.state.timers.iter().enumerate().filter_map(due).min() {
            Some(moment) => self.timer.arm(moment),
            None => self.timer.disarm(),
        }
    }

    fn read_register(&self, register: u64) -> u64 {
        match register {
            reg::CAPABILITIES => CAPABILITIES,
            reg::CONFIG => self.state.config,
            reg::STATUS => self.state.status,
            reg::COUNTER => self.counter.now(),
            _ => match timer_register(register) {
                Some((timer, reg::TIMER_CONFIG)) => self.state.timers[timer].config(),
                Some((timer, reg::TIMER_COMPARATOR)) => self.state.timers[timer].comparator(),
                _ => 0,
            },
        }
    }

    fn write_register(&mut self, register: u64, value: u64, mask: u64) {
        match register {
            reg::CONFIG => {
                self.state.config = merge(self.state.config, value, mask) & config::KEPT;
                self.counter.run(self.is_running());
            }
            reg::STATUS => self.state.status &= !(value & mask), // ones clear
            // Written while it is halted (2.3.7); a running one is not disturbed.
            reg::COUNTER if !self.is_running() => {
                let value = merge(self.counter.now(), value, mask);
                self.counter.halt_at(value);
                self.state.timers.iter_mut().for_each(|timer| timer.compare_from(value));
            }
            _ => {
                if let Some((timer, register)) = timer_register(register) {
                    self.write_timer(timer, register, value, mask);
                }
            }
        }
    }

    fn write_timer(&mut self, timer: usize, register: u64, value: u64, mask: u64) {
        let counter = (self.counter.now(), self.is_running());
        let state = &mut self.state.timers[timer];
        match register {
            reg::TIMER_CONFIG => {
                state.write_config(value, mask);
                if !state.is_level() {
                    self.state.status &= !(1 << timer);
                }
            }
            reg::TIMER_COMPARATOR => state.write_comparator(value, mask, counter),
            _ => {}
        }
    }
}

/// The timer and the register in it.
fn timer_register(register: u64) -> Option<(usize, u64)> {
    let offset = register.checked_sub(reg::TIMERS)?;
    let timer = (offset / reg::TIMER_SIZE) as usize;
    (timer < TIMERS).then_some((timer, offset % reg::TIMER_SIZE))
}

/// The register that has the byte at `offset`, and the byte's place in it.
fn place(offset: u64) -> (u64, u32) {
    (offset & !7, 8 * (offset & 7) as u32)
}

impl Device for Hpet {
    /// Reads are of any width and place; each byte is its register's.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.catch_up();
        let mut known = None;
        for (offset, byte) in (offset..).zip(data) {
            let (register, shift) = place(offset);
            let value = match known {
                Some((last, value)) if last == register => value,
                _ => self.read_register(register),
            };
            known = Some((register, value));
            *byte = (value >> shift) as u8;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.catch_up();
        let mut bytes = (offset..).zip(data).peekable();
        while let Some(&(offset, _)) = bytes.peek() {
            let register = place(offset).0;
            let (mut value, mut mask) = (0, 0);
            while let Some((offset, &byte)) = bytes.next_if(|&(offset, _)| place(offset).0 == register) {
                let shift = place(offset).1;
                value |= u64::from(byte) << shift;
                mask |= 0xff << shift;
            }
            self.write_register(register, value, mask);
        }
        self.hold_lines();
        self.arm();
    }

    fn reset(&mut self) {
        self.state = power_on();
        self.counter.halt_at(0);
        self.lines.hold(0, false);
        self.timer.disarm();
    }
}

impl Snapshot for Hpet {
    type State = HpetState;

    fn save(&self) -> HpetState {
        HpetState { counter: self.counter.now(), ..self.state.clone() }
    }

    fn restore(&mut self, state: HpetState) -> Result<(), BadState> {
        let HpetState { config, status, counter, timers } = &state;
        let level = timers.iter().rev().fold(0, |bits, timer| bits << 1 | u64::from(timer.is_level()));
        if config & !config::KEPT != 0 || status & !level != 0 {
            return Err(BadState::new("hpet", format!("registers {config:#x}, {status:#x}")));
        }
        timers.iter().try_for_each(ComparatorState::check)?;
        self.counter.halt_at(*counter);
        self.state = state;
        self.counter.run(self.is_running());
        self.hold_lines();
        self.arm();
        Ok(())
    }
}

/// What is on the bus. Clocks read the counter very often: that takes no lock of the device's.
struct Registers {
    counter: Arc<Counter>,
    hpet: Arc<Mutex<Hpet>>,
}

impl BusDevice for Registers {
    fn bus_read(&self, offset: u64, data: &mut [u8]) {
        match offset.checked_sub(reg::COUNTER) {
            Some(at) if at + data.len() as u64 <= 8 => {
                let bytes = self.counter.now().to_le_bytes();
                data.copy_from_slice(&bytes[at as usize..at as usize + data.len()]);
            }
            _ => lock(&self.hpet).read(offset, data),
        }
    }

    fn bus_write(&self, offset: u64, data: &[u8]) {
        lock(&self.hpet).write(offset, data);
    }
}
