//! User programs on the host's own CPU: the tier above the translator.
//!
//! A 64-bit user program that computes needs no translation, only somebody who sees to it that it reaches
//! nothing but its own pages. That is a [`jail`]: a process of the host with the guest program's pages at
//! the guest program's addresses ([`mirror`]), where it runs until it does something else: a system call, a
//! fault, an instruction whose result is the guest CPU's to tell ([`scan`]). Then the translator or the
//! interpreter goes on, with the guest's kernel, and comes back here when that returns to the program. Which
//! programs are worth it is [`policy`]'s to say.
//!
//! A jail has no page of the guest's kernel, of other programs or of ours, and cannot make a system call; so
//! a guest program can do there what it can do on a CPU of metal.

mod cell;
mod child;
#[cfg(test)]
mod escapes;
pub mod flushes;
mod jail;
mod mirror;
pub mod pin;
pub mod policy;
mod scan;
mod state;
pub mod stats;
mod stub;
mod suits;
#[cfg(test)]
mod testing;
mod tracee;

use std::io::Error;
use std::thread::ThreadId;

use super::block::Blocks;
use super::cpu::Cpu;
use super::exception::Exec;
use super::run::step_block;
use super::translate::translator::Translator;
use crate::clock::Clock;
use crate::profile::Profile;
use crate::vm::{Shared, attention};
use cell::{Cell, Left};
use jail::Jail;
use policy::Policy;
use state::Registers;
use stats::Stats;
use suits::suits;
pub use tracee::kick;

/// Jails of a vCPU. Each holds an address space; the one that was not used for longest gets the next.
const JAILS: usize = 3;

/// The jails of one vCPU.
#[derive(Default)]
pub struct Native {
    cells: Vec<Cell>,
    policy: Policy,
    uses: u64,
    /// The TLB's count of full flushes: tags of address spaces begin anew with each.
    flushes: u64,
    /// The program runs code that is not for the host's CPU, until it has been in its kernel.
    pause: bool,
    /// This host has no jails for us.
    unavailable: bool,
    /// A jail was killed with a program in it: the vCPU cannot go on.
    lost: bool,
    /// Jails belong to the thread that started them.
    thread: Option<ThreadId>,
    /// What happened.
    pub stats: Stats,
}

/// Whether this host lets us have a jail.
pub fn try_host() -> Result<(), Error> {
    let backing = mem::Backing::Shared;
    let ram = mem::GuestRam::with_backing(&[0..mem::PAGE_SIZE], backing).map_err(Error::other)?;
    let Some((memory, _)) = ram.file(0) else { return Ok(()) };
    Jail::start(memory)?.adopt()
}

impl Native {
    /// Runs the program that the vCPU is in on the host's CPU, if it is one for that, and the instruction
    /// that it stopped at if that is the interpreter's. `None`: the translator is to go on.
    pub fn step(&mut self, cpu: &mut Cpu, blocks: &mut Blocks, profile: Option<&Profile>) -> Option<Exec> {
        let sampled = std::mem::take(&mut cpu.native.sampled);
        if self.flushes != cpu.tlb.flushes_log.all {
            self.flushes = cpu.tlb.flushes_log.all;
            cpu.native.clear();
        }
        if std::mem::take(&mut cpu.native.returned) || sampled || cpu.cpl != 3 {
            self.pause = false;
        }
        if cpu.cpl != 3 || self.unavailable || self.pause {
            return None;
        }
        cpu.end_idle_resume();
        if !suits(cpu) {
            return None;
        }
        if sampled {
            let now = now(cpu);
            self.policy.sample(&mut cpu.native, cpu.tlb.asid(), cpu.cr3, now);
        }
        if !cpu.native.is_on(cpu.tlb.asid()) {
            return None;
        }
        Translator::publish_deadline(cpu);
        let left = match profile {
            None => self.run(cpu),
            Some(profile) => profile.measure(&profile.native, || self.run(cpu)),
        };
        match left {
            Ok(Left::Call) => None,
            Ok(Left::Attend) => Some(Ok(())),
            Ok(Left::Interpret) => {
                self.stats.interpreted += 1;
                Some(step_block(cpu, blocks))
            }
            Ok(Left::Lost) => {
                self.lost = true;
                self.cells.clear();
                cpu.vm.vcpus[cpu.id as usize].notify(attention::STOP);
                Some(Ok(()))
            }
            Ok(Left::Foreign) => {
                self.stats.foreign += 1;
                self.pause = true;
                None
            }
            Err(error) => {
                self.give_up(&error);
                None
            }
        }
    }

    /// Whether the vCPU's state is there.
    pub fn check(&self) -> Result<(), engine::Error> {
        if !self.lost {
            return Ok(());
        }
        let source = Error::other("somebody killed it, or the host was out of memory");
        Err(engine::Error::Host {
            what: "the process that ran a program of the guest (guest-program)",
            source,
        })
    }

    /// Forgets all programs.
    pub fn clear(&mut self, cpu: &mut Cpu) {
        self.policy = Policy::default();
        self.lost = false;
        cpu.native = policy::Wish::default();
    }

    fn run(&mut self, cpu: &mut Cpu) -> Result<Left, Error> {
        let at = self.find(cpu)?;
        let cell = &mut self.cells[at];
        cell.mirror.follow(cpu, &cell.jail);
        let stub = cell.jail.stub();
        if [stub, stub + mem::PAGE_SIZE].into_iter().any(|page| cpu.user_leaf(page).is_some()) {
            self.cells.remove(at); // the guest has something where our stub is; the others' are elsewhere
            return Ok(Left::Foreign);
        }
        let time = now(cpu);
        pin::pin(cpu, &mut cell.jail, time);
        if !cell.settle(cpu)? {
            return Ok(Left::Foreign);
        }
        cell.registers.load(cpu, cell.jail.tracee())?;
        let left = cell.stay(cpu, &mut self.stats);
        let (cell, time) = (&mut self.cells[at], now(cpu));
        let (program, since) = ((cpu.tlb.asid(), cpu.cr3), cell.since);
        let used = || pin::time_of(cell.jail.clock()).saturating_sub(since);
        if self.policy.judge(&mut cpu.native, program, cell.window, used, time) {
            cell.begin_window();
        }
        pin::look_around(cpu, &cell.jail, time);
        left
    }

    /// The jail of the current address space.
    fn find(&mut self, cpu: &Cpu) -> Result<usize, Error> {
        self.uses += 1;
        let asid = cpu.tlb.asid();
        let at = match self.cells.iter().position(|cell| cell.asid == asid) {
            Some(at) => at,
            None if self.cells.is_empty() => return Err(Error::other("there are no processes for them")),
            None => self.reuse(cpu),
        };
        let cell = &mut self.cells[at];
        if cell.asid != asid {
            cell.begin_window();
        }
        (cell.asid, cell.used) = (asid, self.uses);
        Ok(at)
    }

    /// The jails of a vCPU, not yet on its thread: processes can be started now and not later, when this one
    /// is confined and has grown.
    pub fn start(vm: &Shared) -> Native {
        let mut native = Native::default();
        if let Err(error) = native.start_jails(vm) {
            native.give_up(&error);
        }
        native
    }

    fn start_jails(&mut self, vm: &Shared) -> Result<(), Error> {
        let Some((memory, _)) = vm.ram.file(0) else {
            return Err(Error::other("the guest's memory is private"));
        };
        if rustix::fs::fstatfs(memory)?.f_bsize != mem::PAGE_SIZE as i64 {
            return Err(Error::other(
                "the guest's memory is of huge pages (hugetlb), which no other process can map in parts",
            ));
        }
        for _ in 0..JAILS {
            self.cells.push(Cell::new(Jail::start(memory)?));
        }
        Ok(())
    }

    /// On the thread that will run the vCPU, before it does.
    pub fn prepare(&mut self) {
        let thread = std::thread::current().id();
        if self.unavailable || self.thread == Some(thread) {
            return;
        }
        // One that is on another thread already cannot come back.
        let moved = self.thread.replace(thread).is_some();
        let result = match moved {
            true => Err(Error::other("the vCPU is on another thread")),
            false => self.cells.iter_mut().try_for_each(|cell| cell.jail.adopt()),
        };
        if let Err(error) = result {
            self.give_up(&error);
        }
    }

    /// Numbers of the jails' processes.
    pub fn processes(&self) -> Vec<u32> {
        self.cells.iter().map(|cell| cell.jail.pid()).collect()
    }

    fn give_up(&mut self, error: &Error) {
        log::warn!("the guest's programs are translated, not run on the host's CPU: {error}");
        self.unavailable = true;
        self.cells.clear();
    }

    fn reuse(&mut self, cpu: &Cpu) -> usize {
        let oldest = self.cells.iter().enumerate().min_by_key(|(_, cell)| cell.used).map_or(0, |(at, _)| at);
        let cell = &mut self.cells[oldest];
        self.stats.flushes += 1;
        cell.mirror.clear(&cell.jail, &cpu.tlb.flushes_log);
        cell.registers = Registers::default(); // its registers are more than we know of
        oldest
    }
}

fn now(cpu: &Cpu) -> u64 {
    cpu.vm.clock.nanos_in(Clock::ticks().wrapping_sub(cpu.vm.clock.start()))
}
