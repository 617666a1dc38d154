//! A process that has nothing but pages of one guest program, and runs it.
//!
//! It is a child of ours that has let go of all its memory but the [`stub`](super::stub)'s two pages, and is
//! traced by the vCPU's thread: whatever the guest program does that is more than computing on its pages
//! stops it, system calls above all, which the host's kernel shows to us in place of executing them
//! (`PTRACE_SYSEMU`). Its mappings are changed by the stub, which runs only while no guest code does. A filter
//! of system calls, which knows the stub's addresses, stands behind all that.

#![allow(unsafe_code)] // fork

use std::io::Error;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use mem::PAGE_SIZE;
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};

use super::child;
use super::pin::only;
use super::state::{USER_CODE, USER_DATA};
use super::stub::{Call, MOST_CALLS, STUB_LEN, Stub};
use super::tracee::{Stop, Tracee};

/// Behind the last address that a process can have.
pub const END: u64 = 0x7fff_ffff_f000;
/// Descriptor of the guest's memory in the child.
pub const MEMORY_FD: i32 = 3;
/// How long a child may take to begin.
const PATIENCE: Duration = Duration::from_secs(10);

/// The process.
pub struct Jail {
    tracee: Tracee,
    stub: Stub,
    refuses_cpuid: bool,
    cpu: Option<usize>,
}

impl Jail {
    /// Starts a process that can map `memory`, and has no page of it yet.
    pub fn start(memory: BorrowedFd<'_>) -> Result<Jail, Error> {
        let stub = Stub::new()?;
        let plan = child::Plan::new(memory, &stub);
        // SAFETY: the child only makes the system calls in `child`, until it stops for us.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            child::become_jail(&plan);
        }
        let pid = Pid::from_raw(pid.max(0)).ok_or_else(Error::last_os_error)?;
        Ok(Jail { tracee: Tracee::new(pid)?, stub, refuses_cpuid: false, cpu: None })
    }

    /// Makes it the calling thread's, which lets it run from now on.
    pub fn adopt(&mut self) -> Result<(), Error> {
        self.refuses_cpuid = self.wait_until_ready()? == child::READY_WITHOUT_CPUID;
        if self.tracee.seize()? == Stop::Gone {
            return Err(Error::other("the process that was to run guest programs ended"));
        }
        let unmap = |from: u64, to: u64| [libc::SYS_munmap as u64, from, to - from, 0, 0, 0, 0];
        let stub = self.stub();
        self.call(&[unmap(0, stub), unmap(stub + STUB_LEN, END)])?;
        self.tracee.fetch_xstate()
    }

    /// Waits until it has confined itself, and says with which word.
    fn wait_until_ready(&self) -> Result<u64, Error> {
        let start = Instant::now();
        loop {
            let word = self.stub.first();
            if matches!(word, child::READY | child::READY_WITHOUT_CPUID) {
                return Ok(word);
            }
            if self.tracee.has_ended() || start.elapsed() > PATIENCE {
                return Err(Error::other("a process for guest programs could not confine itself"));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// The process.
    pub fn tracee(&mut self) -> &mut Tracee {
        &mut self.tracee
    }

    /// Whether the host's CPU refuses `CPUID` there.
    pub fn refuses_cpuid(&self) -> bool {
        self.refuses_cpuid
    }

    /// The process's number.
    pub fn pid(&self) -> u32 {
        self.tracee.pid().as_raw_nonzero().get().unsigned_abs()
    }

    /// The clock of its CPU time: clock ids of processes are made of their ids (clock_getcpuclockid(3)).
    pub fn clock(&self) -> libc::clockid_t {
        !Pid::as_raw(Some(self.tracee.pid())) << 3 | 2
    }

    /// What signals it ([`kick`](super::kick)).
    pub fn handle(&self) -> i32 {
        self.tracee.handle()
    }

    /// Address of the stub's pages.
    pub fn stub(&self) -> u64 {
        self.stub.address()
    }

    /// Lets guest code run until something stops it.
    pub fn run(&mut self) -> Stop {
        self.tracee.run()
    }

    /// Has the stub make system calls, in order, up to the first that fails. Guest registers must be set
    /// anew afterwards.
    pub fn call(&mut self, calls: &[Call]) -> Result<(), Error> {
        calls.chunks(MOST_CALLS).try_for_each(|calls| self.call_list(calls))
    }

    fn call_list(&mut self, calls: &[Call]) -> Result<(), Error> {
        self.stub.write(calls);
        let mut regs = self.tracee.registers()?;
        (regs.rip, regs.rbx, regs.rbp) = (self.stub(), self.stub() + PAGE_SIZE, calls.len() as u64);
        (regs.orig_rax, regs.eflags) = (u64::MAX, 0x202);
        (regs.cs, regs.ss) = (USER_CODE.into(), USER_DATA.into());
        self.tracee.set_registers(&regs)?;
        let result = self.wait_for_stub();
        self.stub.wipe(calls.len());
        result?;
        let regs = self.tracee.registers()?;
        if regs.rbp == 0 { Ok(()) } else { Err(Error::from_raw_os_error(-(regs.rax as i32))) }
    }

    fn wait_for_stub(&mut self) -> Result<(), Error> {
        loop {
            match self.tracee.run_freely()? {
                Stop::Signal(libc::SIGTRAP, libc::SI_KERNEL, _) => return Ok(()),
                Stop::Signal(libc::SIGSEGV | libc::SIGSYS | libc::SIGBUS | libc::SIGILL, ..)
                | Stop::SystemCall
                | Stop::Gone => return Err(Error::other("the stub was stopped")),
                Stop::Signal(..) => {} // a kick that came late
            }
        }
    }

    /// Keeps it on a CPU of the host, that of the thread which waits for it: waking each other up there is
    /// faster than across CPUs. Or lets it go to all those of a set.
    pub fn keep(&mut self, cpu: Option<usize>, allowed: &CpuSet) {
        let set = cpu.map(only);
        if self.cpu != cpu
            && sched_setaffinity(Some(self.tracee.pid()), set.as_ref().unwrap_or(allowed)).is_ok()
        {
            self.cpu = cpu;
        }
    }
}

#[cfg(test)]
mod tests {
    use mem::{Bytes, GuestAddress};

    use super::super::testing::{BARE_CODE, BARE_DATA, bare};
    use super::super::{kick, stub};
    use super::*;

    #[test]
    fn it_computes_on_its_pages_and_stops_in_front_of_system_calls() {
        // mov qword [rdi], 42; syscall
        let (mut jail, ram) = bare(&[0x48, 0xc7, 0x07, 42, 0, 0, 0, 0x0f, 0x05]);
        assert_eq!(jail.run(), Stop::SystemCall);
        let regs = jail.tracee.registers().unwrap();
        assert_eq!((regs.rip, regs.orig_rax), (BARE_CODE + 9, libc::SYS_getpid as u64));
        assert_ne!(regs.rax as u32, jail.pid(), "it was not made");
        assert_eq!(ram.read_obj::<u64>(GuestAddress(0x2000)).unwrap(), 42);
    }

    #[test]
    fn nothing_of_ours_is_there() {
        let here = 7u64;
        for address in
            [(&raw const here).addr() as u64, bare as *const () as u64, BARE_DATA + PAGE_SIZE, 0x1000]
        {
            // mov rax, [rsi]
            let (mut jail, _ram) = bare(&[0x48, 0x8b, 0x06]);
            let mut regs = jail.tracee.registers().unwrap();
            regs.rsi = address;
            jail.tracee.set_registers(&regs).unwrap();
            let Stop::Signal(libc::SIGSEGV, _, at) = jail.run() else { panic!("{address:#x} could be read") };
            assert_eq!(at, address);
        }
    }

    #[test]
    fn only_the_stub_maps_and_only_maps() {
        let (mut jail, _ram) = bare(&[0x90]);
        let other = [libc::SYS_getpid as u64, 0, 0, 0, 0, 0, 0];
        assert!(jail.call(&[other]).is_err(), "another call by the stub");
        // A guest program that is in the stub, at its SYSCALL.
        let (mut jail, _ram) = bare(&[0x90]);
        let mut regs = jail.tracee.registers().unwrap();
        (regs.rip, regs.rax, regs.orig_rax) =
            (jail.stub() + stub::SYSCALL, libc::SYS_munmap as u64, u64::MAX);
        jail.tracee.set_registers(&regs).unwrap();
        assert_eq!(jail.run(), Stop::SystemCall, "it is shown to us, not made");
    }

    #[test]
    fn a_kick_stops_a_program_that_does_nothing_else() {
        let (mut jail, _ram) = bare(&[0xeb, 0xfe]); // jmp to itself
        let handle = jail.handle();
        let kicker = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            kick(handle);
        });
        assert!(matches!(jail.run(), Stop::Signal(libc::SIGUSR1, ..)));
        kicker.join().unwrap();
        assert_eq!(jail.tracee.registers().unwrap().rip, BARE_CODE);
    }

    #[test]
    fn the_time_stamp_counter_is_refused() {
        let (mut jail, _ram) = bare(&[0x0f, 0x31]); // rdtsc
        assert!(matches!(jail.run(), Stop::Signal(libc::SIGSEGV, libc::SI_KERNEL, _)));
    }

    #[test]
    fn vector_registers_go_there_and_come_back() {
        let (mut jail, _ram) = bare(&[0x0f, 0x58, 0xc0, 0x0f, 0x05]); // addps xmm0, xmm0; syscall
        jail.tracee.fetch_xstate().unwrap();
        let area = jail.tracee.xstate();
        area[160..164].copy_from_slice(&1.5f32.to_le_bytes());
        area[512..520].copy_from_slice(&7u64.to_le_bytes());
        jail.tracee.put_xstate().unwrap();
        assert_eq!(jail.run(), Stop::SystemCall);
        jail.tracee.fetch_xstate().unwrap();
        assert_eq!(jail.tracee.xstate()[160..164], 3.0f32.to_le_bytes());
    }
}
