//! A process that has nothing but pages of one guest program, and runs it.
//!
//! It is a child of ours that has let go of all its memory but the stub's two pages, and is traced by the
//! vCPU's thread: whatever the guest program does that is more than computing on its pages stops it, system
//! calls above all, which the host's kernel shows to us in place of executing them (`PTRACE_SYSEMU`). Its
//! mappings are changed by the stub, a loop over a list of system calls, which runs only while no guest code
//! does. A filter of system calls, which knows the stub's addresses, stands behind all that.

#![allow(unsafe_code)] // fork, ptrace, and what the child does before it is one

use std::fs::File;
use std::io::Error;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr;
use std::time::{Duration, Instant};

use rustix::rand::{GetRandomFlags, getrandom};

use super::child;

const PAGE: u64 = 4096;
/// Behind the last address that a process can have.
pub const END: u64 = 0x7fff_ffff_f000;
/// Where guests' programs rarely have anything: the stub lies at a random page of this range.
const STUB_FROM: u64 = 0x6000_0000_0000;
const STUB_SPAN: u64 = 0x0800_0000_0000;
/// The stub's code and its list.
pub const STUB_LEN: u64 = 2 * PAGE;
/// Descriptor of the guest's memory in the child.
pub const MEMORY_FD: i32 = 3;
/// Bytes of an entry of the list.
const CALL: usize = 7 * 8;
/// System calls that one list has room for.
pub const MOST_CALLS: usize = PAGE as usize / CALL;
/// Takes the list at RBX with RBP entries; RBP is 0 if all of them went well.
const STUB: [u8; 52] = [
    0x48, 0x8b, 0x03, // again: mov rax, [rbx]
    0x48, 0x8b, 0x7b, 0x08, // mov rdi, [rbx + 8]
    0x48, 0x8b, 0x73, 0x10, // mov rsi, [rbx + 16]
    0x48, 0x8b, 0x53, 0x18, // mov rdx, [rbx + 24]
    0x4c, 0x8b, 0x53, 0x20, // mov r10, [rbx + 32]
    0x4c, 0x8b, 0x43, 0x28, // mov r8, [rbx + 40]
    0x4c, 0x8b, 0x4b, 0x30, // mov r9, [rbx + 48]
    0x0f, 0x05, // syscall
    0x48, 0x3d, 0x00, 0xf0, 0xff, 0xff, // cmp rax, -4096
    0x77, 0x09, // ja done
    0x48, 0x83, 0xc3, CALL as u8, // add rbx, 56
    0x48, 0xff, 0xcd, // dec rbp
    0x75, 0xd2, // jnz again
    0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, // done: int3
];
const NT_X86_XSTATE: usize = 0x202;
/// More than any CPU's state without AMX.
const XSTATE_ROOM: usize = 4096;
/// Signals that the kernel sends a stopped guest program for what it did.
const PTRACE_SYSEMU: u32 = 31;

/// How long a child may take to begin.
const PATIENCE: Duration = Duration::from_secs(10);

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

/// A system call of the stub.
pub type Call = [u64; 7];

/// The process.
pub struct Jail {
    pid: i32,
    handle: OwnedFd,
    stub: u64,
    list: ptr::NonNull<u8>,
    /// The vector state in the kernel's format, and how many bytes of it there are.
    xstate: Box<[u64; XSTATE_ROOM / 8]>,
    xstate_len: usize,
    cpu: Option<usize>,
}

fn check(result: i64) -> Result<i64, Error> {
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result) }
}

/// Maps the stub's list for us to write.
fn map_list(file: &File) -> Result<ptr::NonNull<u8>, Error> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let list = unsafe {
        libc::mmap(ptr::null_mut(), PAGE as usize, prot, libc::MAP_SHARED, file.as_raw_fd(), PAGE as i64)
    };
    if list == libc::MAP_FAILED {
        return Err(Error::last_os_error());
    }
    ptr::NonNull::new(list.cast()).ok_or_else(|| Error::from_raw_os_error(libc::ENOMEM))
}

fn stub_file() -> Result<File, Error> {
    // SAFETY: a system call on a constant string.
    let fd = check(unsafe { libc::memfd_create(c"stub".as_ptr(), libc::MFD_CLOEXEC) }.into())?;
    // SAFETY: a new descriptor, ours alone.
    let file = unsafe { File::from_raw_fd(fd as i32) };
    file.set_len(STUB_LEN)?;
    file.write_all_at(&STUB, 0)?;
    Ok(file)
}

fn random_stub() -> Result<u64, Error> {
    let mut bytes = [0; 8];
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    // The filter compares the low half of addresses: no carry out of it within the stub.
    Ok(STUB_FROM + (u64::from_le_bytes(bytes) % STUB_SPAN) / 0x1_0000 * 0x1_0000)
}

impl Jail {
    /// Starts a process that can map `memory`, and has no page of it yet.
    pub fn start(memory: BorrowedFd<'_>) -> Result<Jail, Error> {
        let file = stub_file()?;
        let list = map_list(&file)?;
        let stub = random_stub()?;
        let plan = child::Plan::new(memory, &file, stub, list);
        // SAFETY: the child only makes the system calls in `child`, until it stops for us.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            child::become_jail(&plan);
        }
        let pid = check(pid.into())? as i32;
        // SAFETY: a system call about our own child, which is not waited for yet.
        let handle = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
        // SAFETY: a new descriptor, ours alone.
        let handle = unsafe { OwnedFd::from_raw_fd(handle as i32) };
        let xstate = Box::new([0; XSTATE_ROOM / 8]);
        Ok(Jail { pid, handle, stub, list, xstate, xstate_len: 0, cpu: None })
    }

    /// Makes it the calling thread's, which lets it run from now on.
    pub fn adopt(&mut self) -> Result<(), Error> {
        self.wait_until_ready()?;
        let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD;
        self.ptrace(libc::PTRACE_SEIZE, 0, options as usize)?;
        self.ptrace(libc::PTRACE_INTERRUPT, 0, 0)?;
        if self.wait() == Stop::Gone {
            return Err(Error::other("the process that was to run guest programs ended"));
        }
        let unmap = |from: u64, to: u64| [libc::SYS_munmap as u64, from, to - from, 0, 0, 0, 0];
        self.call(&[unmap(0, self.stub), unmap(self.stub + STUB_LEN, END)])?;
        self.fetch_xstate()
    }

    /// Waits until it has confined itself.
    fn wait_until_ready(&self) -> Result<(), Error> {
        let start = Instant::now();
        // SAFETY: our own page; the child writes the word once.
        while unsafe { self.list.cast::<u64>().read_volatile() } != child::READY {
            let mut status = 0;
            // SAFETY: asks for our own child.
            let ended = unsafe { libc::waitpid(self.pid, &raw mut status, libc::__WALL | libc::WNOHANG) };
            if ended != 0 || start.elapsed() > PATIENCE {
                return Err(Error::other("a process for guest programs could not confine itself"));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    /// The process's number.
    pub fn pid(&self) -> u32 {
        self.pid as u32
    }

    /// The clock of its CPU time: clock ids of processes are made of their ids (clock_getcpuclockid(3)).
    pub fn clock(&self) -> libc::clockid_t {
        !self.pid << 3 | 2
    }

    /// What signals it ([`kick`]).
    pub fn handle(&self) -> i32 {
        self.handle.as_raw_fd()
    }

    /// Address of the stub's pages.
    pub fn stub(&self) -> u64 {
        self.stub
    }

    fn ptrace(&self, request: u32, address: usize, data: usize) -> Result<i64, Error> {
        // SAFETY: about our own child; `data` is what each request below wants.
        check(unsafe { libc::ptrace(request, self.pid, address, data) })
    }

    fn wait(&mut self) -> Stop {
        let mut status = 0;
        // SAFETY: waits for our own child.
        while unsafe { libc::waitpid(self.pid, &raw mut status, libc::__WALL) } < 0 {
            if Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
                return Stop::Gone;
            }
        }
        if !libc::WIFSTOPPED(status) {
            return Stop::Gone;
        }
        match libc::WSTOPSIG(status) {
            signal if signal == libc::SIGTRAP | 0x80 => Stop::SystemCall,
            signal => {
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

    /// Reads its x87 and vector registers into [`Jail::xstate`].
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

    /// Has the stub make system calls, in order, up to the first that fails. Guest registers must be set
    /// anew afterwards.
    pub fn call(&mut self, calls: &[Call]) -> Result<(), Error> {
        calls.chunks(MOST_CALLS).try_for_each(|calls| self.call_list(calls))
    }

    fn call_list(&mut self, calls: &[Call]) -> Result<(), Error> {
        for (i, call) in calls.iter().flatten().enumerate() {
            // SAFETY: at most MOST_CALLS entries fit the page, and the child is stopped.
            unsafe { self.list.cast::<u64>().add(i).write_volatile(*call) };
        }
        let mut regs = self.registers()?;
        (regs.rip, regs.rbx, regs.rbp) = (self.stub, self.stub + PAGE, calls.len() as u64);
        (regs.orig_rax, regs.eflags) = (u64::MAX, 0x202);
        self.set_registers(&regs)?;
        loop {
            self.ptrace(libc::PTRACE_CONT, 0, 0)?;
            match self.wait() {
                Stop::Signal(libc::SIGTRAP, ..) => break,
                Stop::Signal(libc::SIGSEGV | libc::SIGSYS | libc::SIGBUS | libc::SIGILL, ..)
                | Stop::SystemCall
                | Stop::Gone => return Err(Error::other("the stub was stopped")),
                Stop::Signal(..) => {} // a kick that came late
            }
        }
        let regs = self.registers()?;
        if regs.rbp == 0 { Ok(()) } else { Err(Error::from_raw_os_error(-(regs.rax as i32))) }
    }

    /// Puts it on a CPU of the host, that of the thread which waits for it: waking each other up there is
    /// ten times as fast as across CPUs.
    pub fn pin(&mut self, cpu: usize) {
        if self.cpu != Some(cpu) && set_affinity(self.pid, cpu).is_ok() {
            self.cpu = Some(cpu);
        }
    }
}

impl Drop for Jail {
    fn drop(&mut self) {
        let mut status = 0;
        // SAFETY: ends and reaps our own child, and unmaps our own page, which nobody else has.
        unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.handle.as_raw_fd(), libc::SIGKILL, 0, 0);
            libc::waitpid(self.pid, &raw mut status, libc::__WALL);
            libc::munmap(self.list.as_ptr().cast(), PAGE as usize);
        }
    }
}

// SAFETY: the list is a mapping of our own; only the thread that started the process talks to it.
unsafe impl Send for Jail {}

/// Stops a process that runs guest code, or will. From any thread; harmless if it is gone.
pub fn kick(handle: i32) {
    // SAFETY: a system call that takes numbers; a descriptor that is no process's is refused.
    unsafe { libc::syscall(libc::SYS_pidfd_send_signal, handle, libc::SIGUSR1, 0, 0) };
}

/// Lets a thread (0 is the calling one) run on one CPU only.
pub fn set_affinity(thread: i32, cpu: usize) -> Result<(), Error> {
    // SAFETY: plain data, filled by the library's functions.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        check(libc::sched_setaffinity(thread, size_of::<libc::cpu_set_t>(), &raw const set).into()).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use mem::{Backing, Bytes, GuestAddress, GuestRam};

    use super::*;

    const CODE: u64 = 0x40_0000;
    const DATA: u64 = 0x7fff_0000_0000;

    /// A jail with a page of code and one of data, from the first pages of memory.
    fn with(code: &[u8]) -> (Jail, GuestRam) {
        let ram = GuestRam::with_backing(&[0..0x4000], Backing::Shared).unwrap();
        ram.write_slice(code, GuestAddress(0x1000)).unwrap();
        let mut jail = Jail::start(ram.file(0).unwrap().0).unwrap();
        jail.adopt().unwrap();
        let map = |at: u64, prot: i32, offset: u64| {
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            [libc::SYS_mmap as u64, at, PAGE, prot as u64, flags as u64, MEMORY_FD as u64, offset]
        };
        let (execute, write) = (libc::PROT_READ | libc::PROT_EXEC, libc::PROT_READ | libc::PROT_WRITE);
        jail.call(&[map(CODE, execute, 0x1000), map(DATA, write, 0x2000)]).unwrap();
        let mut regs = jail.registers().unwrap();
        (regs.rip, regs.rsp, regs.rdi) = (CODE, DATA + PAGE, DATA);
        (regs.rax, regs.orig_rax) = (libc::SYS_getpid as u64, u64::MAX);
        jail.set_registers(&regs).unwrap();
        (jail, ram)
    }

    #[test]
    fn it_computes_on_its_pages_and_stops_in_front_of_system_calls() {
        // mov qword [rdi], 42; syscall
        let (mut jail, ram) = with(&[0x48, 0xc7, 0x07, 42, 0, 0, 0, 0x0f, 0x05]);
        assert_eq!(jail.run(), Stop::SystemCall);
        let regs = jail.registers().unwrap();
        assert_eq!((regs.rip, regs.orig_rax), (CODE + 9, libc::SYS_getpid as u64));
        assert_ne!(regs.rax as u32, jail.pid as u32, "it was not made");
        assert_eq!(ram.read_obj::<u64>(GuestAddress(0x2000)).unwrap(), 42);
    }

    #[test]
    fn nothing_of_ours_is_there() {
        let here = 7u64;
        for address in [(&raw const here).addr() as u64, with as *const () as u64, DATA + PAGE, 0x1000] {
            // mov rax, [rsi]
            let (mut jail, _ram) = with(&[0x48, 0x8b, 0x06]);
            let mut regs = jail.registers().unwrap();
            regs.rsi = address;
            jail.set_registers(&regs).unwrap();
            let Stop::Signal(libc::SIGSEGV, _, at) = jail.run() else { panic!("{address:#x} could be read") };
            assert_eq!(at, address);
        }
    }

    #[test]
    fn only_the_stub_maps_and_only_maps() {
        let (mut jail, _ram) = with(&[0x90]);
        let open = [libc::SYS_getpid as u64, 0, 0, 0, 0, 0, 0];
        assert!(jail.call(&[open]).is_err(), "another call by the stub");
        // The stub's own SYSCALL, by guest code: mov rax, stub + 27; jmp rax
        let (mut jail, _ram) = with(&[0x90]);
        let mut regs = jail.registers().unwrap();
        (regs.rip, regs.rax, regs.orig_rax) = (jail.stub() + 27, libc::SYS_munmap as u64, u64::MAX);
        jail.set_registers(&regs).unwrap();
        assert_eq!(jail.run(), Stop::SystemCall, "it is shown to us, not made");
    }

    #[test]
    fn a_kick_stops_a_program_that_does_nothing_else() {
        let (mut jail, _ram) = with(&[0xeb, 0xfe]); // jmp to itself
        let handle = jail.handle();
        let kicker = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            kick(handle);
        });
        assert!(matches!(jail.run(), Stop::Signal(libc::SIGUSR1, ..)));
        kicker.join().unwrap();
        assert_eq!(jail.registers().unwrap().rip, CODE);
    }

    #[test]
    fn the_time_stamp_counter_is_refused() {
        let (mut jail, _ram) = with(&[0x0f, 0x31]); // rdtsc
        assert!(matches!(jail.run(), Stop::Signal(libc::SIGSEGV, libc::SI_KERNEL, _)));
    }

    #[test]
    fn vector_registers_go_there_and_come_back() {
        let (mut jail, _ram) = with(&[0x0f, 0x58, 0xc0, 0x0f, 0x05]); // addps xmm0, xmm0; syscall
        jail.fetch_xstate().unwrap();
        let area = jail.xstate();
        area[160..164].copy_from_slice(&1.5f32.to_le_bytes());
        area[512..520].copy_from_slice(&7u64.to_le_bytes());
        jail.put_xstate().unwrap();
        assert_eq!(jail.run(), Stop::SystemCall);
        jail.fetch_xstate().unwrap();
        assert_eq!(jail.xstate()[160..164], 3.0f32.to_le_bytes());
    }
}
