//! Where a vCPU's time goes, for those who ask for statistics; without them nothing here runs.
//!
//! Times are in ticks of the host's counter. A part's time does not include that of the parts within it.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use engine::{CpuIo, Statistics};
use iced_x86::Code;

use crate::clock::Clock;
use crate::x86::translate::stats::Stats;

/// Kinds kept in a table; later ones are not counted. It bounds what a guest can make us remember.
const MAX_KINDS: usize = 1 << 16;

/// One vCPU's. Only its thread writes.
#[derive(Default)]
pub struct Profile {
    /// In `Vcpu::run`, all of it.
    pub run: AtomicU64,
    /// In translated code.
    pub translated: AtomicU64,
    /// Where the fast TLB missed.
    pub misses: AtomicU64,
    /// In handlers that translated code calls.
    pub handlers: AtomicU64,
    /// In interpreted blocks.
    pub blocks: AtomicU64,
    /// In devices.
    pub devices: AtomicU64,
    /// In user programs that run on the host's CPU.
    pub native: AtomicU64,
    fallbacks: Table<Code>,
    jumps: Table<u64>,
    exits: Table<Access>,
}

struct Table<K>(Mutex<HashMap<K, u64>>);

impl<K> Default for Table<K> {
    fn default() -> Self {
        Table(Mutex::default())
    }
}

impl<K: Copy + Eq + Hash> Table<K> {
    fn count(&self, kind: K) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if table.len() < MAX_KINDS || table.contains_key(&kind) {
            *table.entry(kind).or_default() += 1;
        }
    }

    fn rows(&self, name: impl Fn(K) -> String) -> Vec<(String, u64)> {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.iter().map(|(&kind, &count)| (name(kind), count)).collect()
    }

    fn total(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }
}

/// What leaves the CPU.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Access {
    In(u16),
    Out(u16),
    /// By page.
    Load(u64),
    Store(u64),
    Interrupt,
}

impl Access {
    fn name(self) -> String {
        match self {
            Access::In(port) => format!("in from port {port:#x}"),
            Access::Out(port) => format!("out to port {port:#x}"),
            Access::Load(page) => format!("load from {:#x}", page << 12),
            Access::Store(page) => format!("store to {:#x}", page << 12),
            Access::Interrupt => "interrupt acknowledged or ended".into(),
        }
    }
}

impl Profile {
    /// Runs `f`, and adds its time to `part`, without that of the parts within it.
    #[inline]
    pub fn measure<R>(&self, part: &AtomicU64, f: impl FnOnce() -> R) -> R {
        let (start, within) = (Clock::ticks(), self.parts());
        let result = f();
        let within = self.parts().wrapping_sub(within);
        let spent = Clock::ticks().wrapping_sub(start).wrapping_sub(within);
        part.fetch_add(spent, Ordering::Relaxed);
        result
    }

    /// The parts that lie within others.
    fn parts(&self) -> u64 {
        let parts = [&self.misses, &self.handlers, &self.blocks, &self.devices, &self.native];
        parts.iter().map(|part| part.load(Ordering::Relaxed)).sum()
    }

    /// An instruction was executed by its handler because it is not translated.
    pub fn fallback(&self, instruction: Code) {
        self.fallbacks.count(instruction);
    }

    /// A jump's target was not in the jump cache.
    pub fn jump_miss(&self, target: u64) {
        self.jumps.count(target);
    }

    /// Adds what is known here. The time halted, and that spent translating, are measured elsewhere.
    pub fn report(&self, clock: &Clock, idle: u64, stats: Option<&Stats>, into: &mut Statistics) {
        let ticks = |part: &AtomicU64| part.load(Ordering::Relaxed);
        let translated = ticks(&self.translated);
        let translating = stats.map_or(0, |stats| stats.translation_ticks);
        let mut rest = ticks(&self.run).saturating_sub(translated + self.parts() + translating + idle);
        let mut interpreted = ticks(&self.handlers) + ticks(&self.blocks);
        if stats.is_none() {
            interpreted += std::mem::take(&mut rest);
        }
        for (name, ticks) in [
            ("on_the_hosts_cpu", ticks(&self.native)),
            ("translated_code", translated),
            ("translating", translating),
            ("tlb_misses", ticks(&self.misses)),
            ("interpreter", interpreted),
            ("devices", ticks(&self.devices)),
            ("between_them", rest),
            ("halted", idle),
        ] {
            into.time(name, clock.nanos_in(ticks) as f64 / 1e9);
        }
        into.count("exits_to_devices", self.exits.total());
        into.table(
            "fallbacks_to_the_interpreter",
            self.fallbacks.rows(|ins| format!("{ins:?}").to_lowercase()),
        );
        into.table("exits_to_devices", self.exits.rows(Access::name));
        into.table("jump_cache_misses_by_target", self.jumps.rows(|target| format!("{target:#x}")));
    }
}

/// A machine's devices behind a stop watch.
pub struct TimedIo<'a> {
    /// Who keeps the time.
    pub profile: &'a Profile,
    /// The machine.
    pub io: &'a dyn CpuIo,
}

impl TimedIo<'_> {
    fn timed<R>(&self, access: Access, f: impl FnOnce() -> R) -> R {
        self.profile.exits.count(access);
        self.profile.measure(&self.profile.devices, f)
    }
}

impl CpuIo for TimedIo<'_> {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.timed(Access::In(port), || self.io.port_read(port, data));
    }
    fn port_write(&self, port: u16, data: &[u8]) {
        self.timed(Access::Out(port), || self.io.port_write(port, data));
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.timed(Access::Load(gpa >> 12), || self.io.mmio_read(gpa, data));
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.timed(Access::Store(gpa >> 12), || self.io.mmio_write(gpa, data));
    }
    fn acknowledge_extint(&self) -> Option<u8> {
        self.timed(Access::Interrupt, || self.io.acknowledge_extint())
    }
    fn end_of_interrupt(&self, vector: u8) {
        self.timed(Access::Interrupt, || self.io.end_of_interrupt(vector));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_within_a_handler_is_no_time_of_the_handler() {
        let profile = Profile::default();
        let sleep = |millis| std::thread::sleep(std::time::Duration::from_millis(millis));
        profile.measure(&profile.translated, || {
            profile.measure(&profile.handlers, || profile.measure(&profile.devices, || sleep(100)));
        });
        let (ticks, devices) = (|part: &AtomicU64| part.load(Ordering::Relaxed), &profile.devices);
        assert!(ticks(&profile.handlers) + ticks(&profile.translated) < ticks(devices) / 10);
    }

    #[test]
    fn a_guest_that_jumps_everywhere_does_not_fill_our_memory() {
        let profile = Profile::default();
        (0..2 * MAX_KINDS as u64).for_each(|target| profile.jump_miss(target));
        assert_eq!(profile.jumps.rows(|target| target.to_string()).len(), MAX_KINDS);
    }
}
