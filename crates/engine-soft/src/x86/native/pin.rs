//! Keeps a vCPU's thread and its jail on one CPU of the host, as long as they take turns and have it to
//! themselves.
//!
//! Left to itself the host's scheduler wakes the one on another CPU, idle so far, whenever the other one
//! stops, which takes longer than staying. But it alone knows who else wants a CPU, so a pair that does not
//! get the one it is kept on is let go for a while, and kept where it is then.

#![allow(unsafe_code)] // clocks of threads, and where this one is

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::super::cpu::Cpu;
use super::jail::Jail;
use crate::vm::Shared;

/// How often it is looked whether the pair gets its CPU, in nanoseconds.
const PERIOD: u64 = 2_000_000;
/// Less than this part of the time, in percent, is too little.
const ENOUGH: u64 = 80;
/// How long the pair is left to the scheduler then, in nanoseconds.
const FREE: u64 = 5_000_000;

/// Where the vCPU's thread is kept.
#[derive(Default)]
pub struct Pin {
    /// The CPU, and the CPUs that it may be on otherwise.
    at: Option<(usize, CpuSet)>,
    /// When it was last looked, and the time that the pair had used.
    looked: Option<(u64, u64)>,
    /// When it may be kept again.
    free_until: u64,
}

/// Keeps the calling thread where it is, and the jail there too, unless they are to be free now.
pub fn pin(cpu: &mut Cpu, jail: &mut Jail, now: u64) {
    if cpu.pin.at.is_none() {
        let Ok(allowed) = sched_getaffinity(None) else { return };
        if now < cpu.pin.free_until {
            return jail.keep(None, &allowed);
        }
        let Some(here) = here() else { return };
        let here = if cpu.vm.is_pinned(here) { free(&cpu.vm, &allowed).unwrap_or(here) } else { here };
        if sched_setaffinity(None, &only(here)).is_err() {
            return;
        }
        cpu.vm.vcpus[cpu.id as usize].pin(Some(here));
        cpu.pin.at = Some((here, allowed));
        cpu.pin.looked = None;
    }
    if let Some((here, allowed)) = &cpu.pin.at {
        jail.keep(Some(*here), allowed);
    }
}

/// Lets the thread go anywhere again.
pub fn unpin(cpu: &mut Cpu) {
    if let Some((_, allowed)) = cpu.pin.at.take() {
        sched_setaffinity(None, &allowed).ok();
        cpu.vm.vcpus[cpu.id as usize].pin(None);
    }
}

/// A vCPU that is not kept anywhere leaves a CPU on which another one of its VM is: that one has nowhere else
/// to go, and the scheduler does not move who runs.
pub fn make_room(cpu: &Cpu) {
    if cpu.pin.at.is_some() || !here().is_some_and(|here| cpu.vm.is_pinned(here)) {
        return;
    }
    let Ok(allowed) = sched_getaffinity(None) else { return };
    if let Some(there) = free(&cpu.vm, &allowed)
        && sched_setaffinity(None, &only(there)).is_ok()
    {
        sched_setaffinity(None, &allowed).ok();
    }
}

/// Lets the pair go if it does not get its CPU.
pub fn look_around(cpu: &mut Cpu, jail: &Jail, now: u64) {
    if cpu.pin.at.is_none() {
        return;
    }
    let Some((since, used)) = cpu.pin.looked else {
        cpu.pin.looked = Some((now, used(jail)));
        return;
    };
    if now - since < PERIOD {
        return;
    }
    let used_now = self::used(jail);
    cpu.pin.looked = Some((now, used_now));
    // Another jail than last time has another clock.
    let got = used_now.saturating_sub(used);
    if got != 0 && got * 100 < (now - since) * ENOUGH {
        cpu.pin.free_until = now + FREE;
        unpin(cpu);
    }
}

/// CPU time of this thread and of the jail, in nanoseconds.
fn used(jail: &Jail) -> u64 {
    time_of(libc::CLOCK_THREAD_CPUTIME_ID) + time_of(jail.clock())
}

/// Time of a clock, in nanoseconds.
pub fn time_of(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes to `time`.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// The CPU that this thread is on. The C library knows it by itself; rustix has to ask the kernel where to ask, which
/// a confined process may not.
fn here() -> Option<usize> {
    // SAFETY: a call without arguments.
    usize::try_from(unsafe { libc::sched_getcpu() }).ok()
}

/// A CPU on which no vCPU of the VM is kept.
fn free(vm: &Shared, allowed: &CpuSet) -> Option<usize> {
    (0..CpuSet::MAX_CPU).find(|&number| allowed.is_set(number) && !vm.is_pinned(number))
}

/// One CPU.
pub fn only(number: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(number);
    set
}
