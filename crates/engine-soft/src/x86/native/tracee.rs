//! A child of ours that the calling thread traces: stops, registers, and its end.

#![allow(unsafe_code)] // ptrace

use std::io::Error;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, waitpid};

const NT_X86_XSTATE: usize = 0x202;
/// More than any CPU's state, which is 11,008 bytes with AMX. The kernel takes it whole or not at all.
const XSTATE_ROOM: usize = 16384;
/// Goes on up to the next system call, which is not executed (ptrace(2)); not in the libc crate.
const PTRACE_SYSEMU: u32 = 31;

/// Why a guest program stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// In front of a system call, with RIP behind the instruction.
    SystemCall,
    /// A signal, its code, and its address.
    Signal(i32, i32, u64),
    /// The process is gone.
    Gone,
}

/// The process. It ends with this.
pub struct Tracee {
    pid: Pid,
    handle: OwnedFd,
    /// The vector state in the kernel's format, and how many bytes of it there are.
    xstate: Box<[u64; XSTATE_ROOM / 8]>,
    xstate_len: usize,
}

fn check(result: i64) -> Result<i64, Error> {
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result) }
}

impl Tracee {
    /// Takes over a child that is not waited for yet, and not traced.
    pub fn new(pid: Pid) -> Result<Tracee, Error> {
        let handle = pidfd_open(pid, PidfdFlags::empty()).inspect_err(|_| {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
            let _ = waitpid(Some(pid), WaitOptions::empty());
        })?;
        Ok(Tracee { pid, handle, xstate: Box::new([0; XSTATE_ROOM / 8]), xstate_len: 0 })
    }

    /// Its number.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// What signals it.
    pub fn handle(&self) -> i32 {
        self.handle.as_raw_fd()
    }

    /// Whether it ended, before it is traced.
    pub fn has_ended(&self) -> bool {
        !matches!(waitpid(Some(self.pid), WaitOptions::NOHANG), Ok(None))
    }

    /// Makes it the calling thread's, and stops it.
    pub fn seize(&mut self) -> Result<Stop, Error> {
        let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD;
        self.ptrace(libc::PTRACE_SEIZE, 0, options as usize)?;
        self.ptrace(libc::PTRACE_INTERRUPT, 0, 0)?;
        Ok(self.wait())
    }

    fn ptrace(&self, request: u32, address: usize, data: usize) -> Result<i64, Error> {
        // SAFETY: about our own child; `data` is what each request below wants.
        check(unsafe { libc::ptrace(request, Pid::as_raw(Some(self.pid)), address, data) })
    }

    fn wait(&mut self) -> Stop {
        let status = loop {
            match waitpid(Some(self.pid), WaitOptions::empty()) {
                Ok(Some((_, status))) => break status,
                Ok(None) | Err(Errno::INTR) => {}
                Err(_) => return Stop::Gone,
            }
        };
        match status.stopping_signal() {
            None => Stop::Gone,
            Some(signal) if signal == libc::SIGTRAP | 0x80 => Stop::SystemCall,
            Some(signal) => {
                let (code, address) = self.signal_info();
                Stop::Signal(signal, code, address)
            }
        }
    }

    fn signal_info(&self) -> (i32, u64) {
        // SAFETY: plain data.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        if self.ptrace(libc::PTRACE_GETSIGINFO, 0, (&raw mut info).expose_provenance()).is_err() {
            return (0, 0);
        }
        // SAFETY: for the signals that we look at this is what the union holds; else any number.
        (info.si_code, unsafe { info.si_addr() }.addr() as u64)
    }

    /// Lets guest code run until something stops it.
    pub fn run(&mut self) -> Stop {
        match self.ptrace(PTRACE_SYSEMU, 0, 0) {
            Ok(_) => self.wait(),
            Err(_) => Stop::Gone,
        }
    }

    /// Lets it run as any process, its system calls too.
    pub fn run_freely(&mut self) -> Result<Stop, Error> {
        self.ptrace(libc::PTRACE_CONT, 0, 0)?;
        Ok(self.wait())
    }

    /// Its general registers.
    pub fn registers(&self) -> Result<libc::user_regs_struct, Error> {
        // SAFETY: plain data.
        let mut regs: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        self.ptrace(libc::PTRACE_GETREGS, 0, (&raw mut regs).expose_provenance())?;
        Ok(regs)
    }

    /// Changes its general registers.
    pub fn set_registers(&mut self, regs: &libc::user_regs_struct) -> Result<(), Error> {
        self.ptrace(libc::PTRACE_SETREGS, 0, ptr::from_ref(regs).expose_provenance()).map(drop)
    }

    /// Reads its x87 and vector registers into [`Tracee::xstate`].
    pub fn fetch_xstate(&mut self) -> Result<(), Error> {
        let mut area = libc::iovec { iov_base: self.xstate.as_mut_ptr().cast(), iov_len: XSTATE_ROOM };
        self.ptrace(libc::PTRACE_GETREGSET, NT_X86_XSTATE, (&raw mut area).expose_provenance())?;
        self.xstate_len = area.iov_len;
        Ok(())
    }

    /// Writes them back from there.
    pub fn put_xstate(&mut self) -> Result<(), Error> {
        let mut area = libc::iovec { iov_base: self.xstate.as_mut_ptr().cast(), iov_len: self.xstate_len };
        self.ptrace(libc::PTRACE_SETREGSET, NT_X86_XSTATE, (&raw mut area).expose_provenance()).map(drop)
    }

    /// An XSAVE area in the standard format.
    pub fn xstate(&mut self) -> &mut [u8] {
        let len = self.xstate_len;
        // SAFETY: the same bytes, as bytes.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.xstate.as_mut_ptr().cast(), XSTATE_ROOM) };
        &mut bytes[..len]
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        // Refused if it is gone.
        let _ = pidfd_send_signal(&self.handle, Signal::KILL);
        while self.wait() != Stop::Gone {}
    }
}

/// Stops a process that runs guest code, or will. From any thread; harmless if it is gone.
pub fn kick(handle: i32) {
    // SAFETY: a system call that takes numbers; a descriptor that is no process's is refused.
    unsafe { libc::syscall(libc::SYS_pidfd_send_signal, handle, libc::SIGUSR1, 0, 0) };
}
