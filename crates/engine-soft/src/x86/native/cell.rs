//! A program in its jail: until it does something that is not for it.

use std::io::Error;

use super::super::cpu::Cpu;
use super::super::debug::DR6_BS;
use super::super::op::{RIP, reg, seg};
use super::super::tlb::View;
use super::super::walk::Intent;
use super::flushes::Flushes;
use super::jail::Jail;
use super::mirror::{Fault, Mirror};
use super::pin;
use super::policy::Window;
use super::state::{Registers, USER_CODE};
use super::stats::Stats;
use super::tracee::Stop;
use crate::clock::Clock;

/// One jail and whose pages it has.
pub struct Cell {
    /// The process,
    pub jail: Jail,
    /// its pages
    pub mirror: Mirror,
    /// and its registers.
    pub registers: Registers,
    /// The TLB's tag of the address space.
    pub asid: u64,
    /// Time of the last use.
    pub used: u64,
    /// What the latest stays cost,
    pub window: Window,
    /// and the CPU time that had been used before.
    pub since: u64,
}

/// Why a program left its jail.
pub enum Left {
    /// For the translator: a system call.
    Call,
    /// Something wants attention.
    Attend,
    /// For the interpreter, at the instruction that must be looked at.
    Interpret,
    /// Its code is not for the host's CPU.
    Foreign,
    /// Its process was killed, and took the program's registers along.
    Lost,
}

impl Cell {
    /// A jail without pages.
    pub fn new(jail: Jail) -> Cell {
        let (mirror, registers) = (Mirror::new(&Flushes::default()), Registers::default());
        Cell { jail, mirror, registers, asid: 0, used: 0, window: Window::default(), since: 0 }
    }

    /// Begins to count anew.
    pub fn begin_window(&mut self) {
        (self.window, self.since) = (Window::default(), pin::time_of(self.jail.clock()));
    }

    /// Carries out what the mirror decided. Whether the host did it: if not, there are no pages.
    pub fn settle(&mut self, cpu: &Cpu) -> Result<bool, Error> {
        let start = Clock::ticks();
        let settled = self.mirror.settle(&mut self.jail, &cpu.tlb.flushes_log)?;
        self.window.mapping += cpu.vm.clock.nanos_in(Clock::ticks().wrapping_sub(start));
        Ok(settled)
    }

    /// Lets the program run until it does something that is not for its jail.
    pub fn stay(&mut self, cpu: &mut Cpu, stats: &mut Stats) -> Result<Left, Error> {
        loop {
            let vm = cpu.vm.clone();
            let mailbox = &vm.vcpus[cpu.id as usize];
            stats.entries += 1;
            self.window.entries += 1;
            let stop = if mailbox.enter_jail(self.jail.handle()) { Some(self.jail.run()) } else { None };
            mailbox.leave_jail();
            let Some(stop) = stop else { return Ok(Left::Attend) };
            let calls = stop == Stop::SystemCall;
            // Without its registers, as they are now, the program cannot go on anywhere.
            if stop == Stop::Gone || self.registers.store(cpu, self.jail.tracee(), calls).is_err() {
                return Ok(Left::Lost);
            }
            match stop {
                Stop::Signal(libc::SIGSEGV, code, linear) if code > 0 && code < libc::SI_KERNEL => {
                    stats.faults += 1;
                    match self.mirror.fault(cpu, &self.jail, linear) {
                        Fault::Mapped => {}
                        Fault::Guest => return Ok(Left::Interpret),
                        Fault::Foreign => return Ok(Left::Foreign),
                    }
                    stats.pages = stats.pages.max(self.mirror.len() as u64);
                    let settled = self.settle(cpu)?;
                    if !settled {
                        return Ok(Left::Foreign);
                    }
                    // It came to 32-bit code, which is not for its jail.
                    if cpu.segs[seg::CS as usize].selector != USER_CODE {
                        return Ok(Left::Attend);
                    }
                    self.registers.load_general(cpu, self.jail.tracee())?;
                }
                stop => return Ok(leave(cpu, stats, stop)),
            }
        }
    }
}

/// Why there is a `SIGSYS` (siginfo.h): the filter of system calls.
const SYS_SECCOMP: i32 = 1;

/// What a program that stopped, not for a page, wants next.
fn leave(cpu: &mut Cpu, stats: &mut Stats, stop: Stop) -> Left {
    let rip = &mut cpu.regs[RIP as usize];
    match stop {
        // SYSCALL or INT 80h, to be executed once more.
        Stop::SystemCall => {
            stats.system_calls += 1;
            *rip = rip.wrapping_sub(2);
            Left::Call
        }
        // Nothing that the program did, but a kick, or a signal of somebody on the host.
        Stop::Signal(_, code, _) if code <= 0 => {
            stats.kicks += 1;
            Left::Attend
        }
        // The kernel skips a call into its vsyscall page, which the guest may have too.
        Stop::Signal(libc::SIGSYS, SYS_SECCOMP, call) => {
            *rip = call;
            let rsp = &mut cpu.regs[reg::RSP as usize];
            *rsp = rsp.wrapping_sub(8);
            Left::Interpret
        }
        // Behind INT3.
        Stop::Signal(libc::SIGTRAP, libc::SI_KERNEL, _) => {
            let at = *rip;
            let short = byte_before(cpu, at) == Some(0xcc);
            cpu.regs[RIP as usize] = at.wrapping_sub(if short { 1 } else { 2 });
            Left::Interpret
        }
        // Behind INT1; where the host is a guest itself, at it.
        Stop::Signal(libc::SIGTRAP, libc::TRAP_BRKPT, _) => {
            let at = *rip;
            let behind = byte_before(cpu, at) == Some(0xf1);
            cpu.regs[RIP as usize] = at.wrapping_sub(behind.into());
            Left::Interpret
        }
        // A step, by TF.
        Stop::Signal(libc::SIGTRAP, ..) => {
            cpu.debug_trap |= DR6_BS;
            Left::Interpret
        }
        Stop::Signal(libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGFPE, ..) => Left::Interpret,
        _ => Left::Attend,
    }
}

fn byte_before(cpu: &mut Cpu, rip: u64) -> Option<u8> {
    let mut byte = [0];
    cpu.probe(View::User, rip.wrapping_sub(1), Intent::Read)?;
    cpu.read_linear(View::User, rip.wrapping_sub(1), &mut byte).ok()?;
    Some(byte[0])
}
