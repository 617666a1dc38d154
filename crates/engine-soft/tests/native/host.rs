//! Runs cases on the host's CPU, in a child process.
//!
//! The child loads a start state by returning from a signal handler whose saved context it has
//! replaced, and gets the end state from the context of the next signal: the fault of the instruction,
//! or the `INT3` behind it. No code of ours runs in between.

#![allow(unsafe_code)] // maps memory, handles signals

use std::ptr;

use crate::state::*;

/// Cases of one child.
pub const BATCH: usize = 500;

/// What parent and child share.
#[repr(C)]
struct Exchange {
    done: u64,
    starts: [Start; BATCH],
    ends: [End; BATCH],
}

/// Order of [`Start::gpr`] in the saved context.
const GREGS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

const SIGNALS: [i32; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP];

/// The handler's state; the child has one thread.
struct Running {
    start: *const Start,
    end: *mut End,
    in_case: bool,
    gregs: [libc::greg_t; 23],
    xsave: [u8; XSAVE],
}

static mut RUNNING: Running =
    Running { start: ptr::null(), end: ptr::null_mut(), in_case: false, gregs: [0; 23], xsave: [0; XSAVE] };

extern "C" fn handler(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a context with an XSAVE area in standard format; only this handler and,
    // not at the same time, the child's main loop touch RUNNING, whose pointers are set before.
    unsafe {
        let running = &raw mut RUNNING;
        let running = &mut *running;
        let machine = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext;
        let xsave = machine.fpregs.cast::<u8>();
        if running.in_case {
            let end = &mut *running.end;
            finish(end, &machine.gregs);
            ptr::copy_nonoverlapping(xsave, end.xsave.as_mut_ptr(), XSAVE);
            machine.gregs = running.gregs;
            ptr::copy_nonoverlapping(running.xsave.as_ptr(), xsave, XSAVE);
        } else {
            running.gregs = machine.gregs;
            ptr::copy_nonoverlapping(xsave, running.xsave.as_mut_ptr(), XSAVE);
            let start = &*running.start;
            for (value, register) in start.gpr.iter().zip(GREGS) {
                machine.gregs[register as usize] = *value as i64;
            }
            machine.gregs[libc::REG_RIP as usize] = START as i64;
            machine.gregs[libc::REG_EFL as usize] = start.rflags as i64;
            load(xsave, &start.xsave);
        }
        running.in_case = !running.in_case;
    }
}

/// # Safety
/// `frame` is the XSAVE area of a signal frame.
unsafe fn load(frame: *mut u8, start: &[u8; XSAVE]) {
    // SAFETY: the caller's promise. Bytes 464-511 are the kernel's own; the header only gains bits.
    unsafe {
        ptr::copy_nonoverlapping(start.as_ptr(), frame, 416);
        ptr::copy_nonoverlapping(start[at::YMM..].as_ptr(), frame.add(at::YMM), 256);
        *frame.add(at::HEADER) |= 7;
    }
}

fn finish(end: &mut End, gregs: &[libc::greg_t; 23]) {
    let greg = |register: i32| gregs[register as usize] as u64;
    (end.vector, end.code, end.cr2) = (greg(libc::REG_TRAPNO), greg(libc::REG_ERR), greg(libc::REG_CR2));
    end.rip = greg(libc::REG_RIP);
    if end.vector == 3 {
        end.rip -= 1;
    }
    // Whatever happens elsewhere than at the instruction happens after it.
    if end.vector == 3 || end.rip != START {
        (end.vector, end.code) = (COMPLETED, 0);
    }
    for (value, register) in end.gpr.iter_mut().zip(GREGS) {
        *value = greg(register);
    }
    end.rflags = greg(libc::REG_EFL);
}

/// Maps at `address`, or anywhere if it is 0.
fn map(address: u64, bytes: usize, protection: i32, flags: i32, file: i32) -> *mut u8 {
    let fixed = if address != 0 { libc::MAP_FIXED_NOREPLACE } else { 0 };
    // SAFETY: a new mapping that replaces none.
    let at = unsafe {
        libc::mmap(
            ptr::with_exposed_provenance_mut(address as usize),
            bytes,
            protection,
            flags | fixed,
            file,
            0,
        )
    };
    assert_ne!(
        at,
        libc::MAP_FAILED,
        "mmap of {bytes} bytes at {address:#x}: {}",
        std::io::Error::last_os_error()
    );
    at.cast()
}

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Runs cases in child processes.
pub struct Host {
    exchange: *mut Exchange,
    memory: Vec<u8>,
}

/// A batch that is being run.
pub struct Batch<'a> {
    host: &'a mut Host,
    child: i32,
    count: usize,
}

impl Host {
    /// For cases that start with `memory`.
    pub fn new(memory: Vec<u8>) -> Host {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        Host { exchange: map(0, size_of::<Exchange>(), RW, flags, -1).cast(), memory }
    }

    /// Starts up to [`BATCH`] cases.
    pub fn start(&mut self, starts: &[Start]) -> Batch<'_> {
        let count = starts.len().min(BATCH);
        // SAFETY: the mapping is of that type, and no child uses it: `Batch` borrows `self`.
        let exchange = unsafe { &mut *self.exchange };
        exchange.done = 0;
        exchange.starts[..count].copy_from_slice(&starts[..count]);
        // SAFETY: the child only makes system calls and touches memory that it maps itself or shares.
        let child = unsafe { libc::fork() };
        assert!(child >= 0, "fork: {}", std::io::Error::last_os_error());
        if child == 0 {
            run_all(exchange, &self.memory, count);
            // SAFETY: ends the child without running the parent's destructors.
            unsafe { libc::_exit(0) };
        }
        Batch { host: self, child, count }
    }
}

impl Batch<'_> {
    /// Waits for the ends. `Err` says which case the child did not survive.
    pub fn wait(self) -> (&'static [End], Result<(), String>) {
        let mut status = 0;
        // SAFETY: waits for our own child.
        unsafe { libc::waitpid(self.child, &mut status, 0) };
        // SAFETY: the child is gone; the mapping lives as long as the process.
        let exchange = unsafe { &*self.host.exchange };
        let done = exchange.done as usize;
        let ends = &exchange.ends[..done];
        if status == 0 && done == self.count {
            return (ends, Ok(()));
        }
        (ends, Err(format!("the child ended with wait status {status:#x} in case {done} of {}", self.count)))
    }
}

/// The child.
fn run_all(exchange: &mut Exchange, memory: &[u8], count: usize) {
    // SAFETY: plain system calls; the memory file is mapped twice, to be written and to be executed.
    let code = unsafe {
        libc::alarm(120); // whatever hangs ends
        let file = libc::memfd_create(c"code".as_ptr(), 0);
        libc::ftruncate(file, 4096);
        let code = map(0, 4096, RW, libc::MAP_SHARED, file);
        map(CODE, 4096, libc::PROT_READ | libc::PROT_EXEC, libc::MAP_SHARED, file);
        code
    };
    let area = map(AREA, READABLE, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
    let stack = map(0, 1 << 18, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
    // SAFETY: all pointers are to the mappings just made, whose sizes hold what is written; the
    // handler has the form that SA_SIGINFO asks for.
    unsafe {
        ptr::copy_nonoverlapping(memory.as_ptr(), area, READABLE);
        libc::mprotect(area.add(WRITABLE).cast(), READABLE - WRITABLE, libc::PROT_READ);
        let alternate = libc::stack_t { ss_sp: stack.cast(), ss_flags: 0, ss_size: 1 << 18 };
        libc::sigaltstack(&alternate, ptr::null_mut());
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in SIGNALS {
            libc::sigaction(signal, &action, ptr::null_mut());
        }
        ptr::write_bytes(code, 0xcc, 4096);
        for i in 0..count {
            let (start, end) = (&exchange.starts[i], &mut exchange.ends[i]);
            ptr::copy_nonoverlapping(memory.as_ptr(), area, WRITABLE);
            ptr::write_bytes(code.add(0x800), 0xcc, 16);
            ptr::copy_nonoverlapping(start.code.as_ptr(), code.add(0x800), start.len as usize);
            let running = &raw mut RUNNING;
            (*running).start = start;
            (*running).end = end;
            // The signal of this instruction becomes the case; the signal that ends it comes back here.
            std::arch::asm!("int3", clobber_abi("sysv64"));
            ptr::copy_nonoverlapping(area, end.memory.as_mut_ptr(), WRITABLE);
            exchange.done = i as u64 + 1;
        }
    }
}
