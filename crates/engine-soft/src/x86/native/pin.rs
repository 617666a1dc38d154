//! Keeps a vCPU's thread and its jail on one CPU of the host, as long as they take turns.
//!
//! Left to itself the host's scheduler wakes the one on another CPU, idle so far, whenever the other one
//! stops: several times as slow as staying. The pair moves on when it does not get its CPU.

#![allow(unsafe_code)] // affinities and clocks of threads

use super::super::cpu::Cpu;
use super::jail::{Jail, set_affinity};
use crate::vm::Shared;

/// How often it is looked whether the pair gets its CPU.
const PERIOD: u64 = 2_000_000;
/// Less than this part of the time, in percent, is too little.
const ENOUGH: u64 = 80;

/// Where the vCPU's thread is kept.
#[derive(Default)]
pub struct Pin {
    /// The CPU, and the CPUs that it may be on otherwise.
    at: Option<(usize, Box<libc::cpu_set_t>)>,
    /// When it was last looked, and the time that the pair had used.
    looked: Option<(u64, u64)>,
}

/// Keeps the calling thread where it is, and says where; `None` if the host does not let us.
pub fn pin(cpu: &mut Cpu) -> Option<usize> {
    if cpu.pin.at.is_none() {
        let allowed = allowed()?;
        // SAFETY: a system call without arguments.
        let here = usize::try_from(unsafe { libc::sched_getcpu() }).ok()?;
        let here = if cpu.vm.is_pinned(here) { free(&cpu.vm, &allowed).unwrap_or(here) } else { here };
        set_affinity(0, here).ok()?;
        cpu.vm.vcpus[cpu.id as usize].pin(Some(here));
        cpu.pin.at = Some((here, allowed));
        cpu.pin.looked = None;
    }
    cpu.pin.at.as_ref().map(|(here, _)| *here)
}

/// Lets the thread go anywhere again.
pub fn unpin(cpu: &mut Cpu) {
    if let Some((_, allowed)) = cpu.pin.at.take() {
        // SAFETY: a set that the kernel filled.
        unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const *allowed) };
        cpu.vm.vcpus[cpu.id as usize].pin(None);
    }
}

/// A vCPU that is not kept anywhere leaves a CPU on which another one of its VM is: that one has nowhere else
/// to go, and the scheduler does not move who runs.
pub fn make_room(cpu: &Cpu) {
    // SAFETY: a system call without arguments.
    let here = usize::try_from(unsafe { libc::sched_getcpu() });
    if cpu.pin.at.is_some() || !here.is_ok_and(|here| cpu.vm.is_pinned(here)) {
        return;
    }
    let Some(allowed) = allowed() else { return };
    if let Some(there) = free(&cpu.vm, &allowed)
        && set_affinity(0, there).is_ok()
    {
        // SAFETY: a set that the kernel filled.
        unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const *allowed) };
    }
}

/// Moves the pair if it does not get its CPU.
pub fn look_around(cpu: &mut Cpu, jail: &Jail, now: u64) {
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
        next(cpu, now);
    }
}

fn allowed() -> Option<Box<libc::cpu_set_t>> {
    // SAFETY: plain data, filled by the kernel.
    unsafe {
        let mut set: Box<libc::cpu_set_t> = Box::new(std::mem::zeroed());
        let size = size_of::<libc::cpu_set_t>();
        (libc::sched_getaffinity(0, size, &raw mut *set) == 0).then_some(set)
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

/// The CPUs of a set.
fn cpus(set: &libc::cpu_set_t) -> impl Iterator<Item = usize> + '_ {
    // SAFETY: within the set.
    (0..libc::CPU_SETSIZE as usize).filter(|&number| unsafe { libc::CPU_ISSET(number, set) })
}

/// A CPU on which no vCPU of the VM is kept.
fn free(vm: &Shared, allowed: &libc::cpu_set_t) -> Option<usize> {
    cpus(allowed).find(|&number| !vm.is_pinned(number))
}

/// A CPU that is free, or one of the others; which one, and whether now, is as good as random, or two pairs
/// would follow each other around.
fn next(cpu: &mut Cpu, now: u64) {
    let Some((here, allowed)) = &mut cpu.pin.at else { return };
    let others: Vec<usize> = cpus(allowed).filter(|number| number != here).collect();
    let dice = now.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
    if others.is_empty() || dice & 1 != 0 {
        return;
    }
    let any = others[(dice >> 1) as usize % others.len()];
    let there = free(&cpu.vm, allowed).unwrap_or(any);
    if set_affinity(0, there).is_ok() {
        *here = there;
        cpu.vm.vcpus[cpu.id as usize].pin(Some(there));
    }
}
