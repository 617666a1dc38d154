//! What the child does to become a [jail](super::jail): system calls only, and then it is no Rust program
//! any more.

#![allow(unsafe_code)] // raw system calls between fork and the end of Rust code

use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use mem::PAGE_SIZE;

use super::jail::MEMORY_FD;
use super::stub::Stub;

/// Where the stub's file is put for a moment; above all descriptors that are kept.
const STUB_FD: i32 = 4;
/// The signature of `rseq` areas on x86, as glibc registers them.
const RSEQ_SIGNATURE: u32 = 0x5305_3053;
const RSEQ_UNREGISTER: i32 = 1;
const NOWHERE: usize = 0;
/// Bytes of a `struct robust_list_head`.
const ROBUST_LIST_HEAD: usize = 24;
/// Where the kernel's code is put for programs, the vDSO, before it goes with all the rest: a system call of
/// 32-bit code continues there even then, at an address that would tell where it was in our process.
const VDSO: usize = 0x1_0000;
const MOST_VDSO_PAGES: usize = 16;
/// Offsets in `struct seccomp_data`.
const NR: u32 = 0;
const ARCH: u32 = 4;
const IP_LOW: u32 = 8;
const IP_HIGH: u32 = 12;

/// System calls of 64-bit code (audit.h), whose numbers are others than those of 32-bit code.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

/// Written to the stub's list once the child has confined itself.
pub const READY: u64 = 0x4552_5448_4159_4441;
/// Written in its place if the CPU refuses `CPUID` there.
pub const READY_WITHOUT_CPUID: u64 = READY + 1;
/// Subfunction of arch_prctl(2), which says whether programs may use `CPUID`.
const ARCH_SET_CPUID: usize = 0x1012;

/// What it needs to know, prepared before the fork.
pub struct Plan {
    memory: i32,
    file: i32,
    stub: u64,
    filter: [libc::sock_filter; 14],
    /// Where it writes [`READY`].
    list: NonNull<u64>,
    rseq: Option<(usize, u32)>,
    /// Where the vDSO is in our process; 0 if there is none.
    vdso: u64,
    parent: i32,
}

fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

fn jump(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: (libc::BPF_JMP | code | libc::BPF_K) as u16, jt, jf, k }
}

/// Allows `mmap` and `munmap` at the stub's one `SYSCALL`, and to wait; nothing else and nowhere else.
fn filter(stub: u64) -> [libc::sock_filter; 14] {
    let load = |offset| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset);
    let equal = |value, jt, jf| jump(libc::BPF_JEQ, value, jt, jf);
    [
        load(ARCH),
        equal(AUDIT_ARCH_X86_64, 0, 10),
        load(NR),
        equal(libc::SYS_pause as u32, 9, 0),
        load(IP_HIGH),
        equal((stub >> 32) as u32, 0, 6),
        load(IP_LOW),
        jump(libc::BPF_JGE, stub as u32, 0, 4),
        jump(libc::BPF_JGE, (stub as u32).wrapping_add(PAGE_SIZE as u32), 3, 0),
        load(NR),
        equal(libc::SYS_mmap as u32, 2, 0),
        equal(libc::SYS_munmap as u32, 1, 0),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_TRAP),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ]
}

/// The area that the host's kernel writes to at any time as long as it is registered, if glibc did that.
fn rseq() -> Option<(usize, u32)> {
    // SAFETY: names of glibc's variables, or nothing; the thread's area is at that offset of its pointer.
    unsafe {
        let offset = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()).cast::<isize>();
        let size = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_size".as_ptr()).cast::<u32>();
        if offset.is_null() || size.is_null() || *size == 0 {
            return None;
        }
        let thread: usize;
        std::arch::asm!("mov {}, fs:0", out(reg) thread, options(nostack, readonly, preserves_flags));
        Some((thread.wrapping_add_signed(*offset), (*size).max(32)))
    }
}

impl Plan {
    /// For a jail with that guest memory and that stub.
    pub fn new(memory: BorrowedFd<'_>, stub: &Stub) -> Plan {
        let (memory, file, address) = (memory.as_raw_fd(), stub.file().as_raw_fd(), stub.address());
        Plan {
            memory,
            file,
            stub: address,
            filter: filter(address),
            list: stub.list(),
            rseq: rseq(),
            // SAFETY: reads what the kernel told this process when it began.
            vdso: unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) },
            parent: std::process::id().cast_signed(),
        }
    }
}

/// In the child. Waits, when all is done, for the parent to take over; or the child ends.
pub fn become_jail(plan: &Plan) -> ! {
    // SAFETY: system calls of a process that is a copy of its parent's thread, and owns all it touches.
    unsafe {
        let Some(ready) = prepare(plan) else { libc::_exit(1) };
        plan.list.write_volatile(ready);
        loop {
            libc::pause();
        }
    }
}

fn done(result: impl Into<i64>) -> Option<()> {
    (result.into() >= 0).then_some(())
}

/// What is to be written when it is done.
///
/// # Safety
/// Only in the child, which uses nothing of the parent afterwards.
unsafe fn prepare(plan: &Plan) -> Option<u64> {
    // SAFETY: the caller's promise.
    unsafe {
        done(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        if libc::getppid() != plan.parent {
            return None; // it ended before
        }
        done(libc::prctl(libc::PR_SET_NAME, c"guest-program".as_ptr()))?;
        // The guest's time-stamp counter is not the host's.
        done(libc::prctl(libc::PR_SET_TSC, libc::PR_TSC_SIGSEGV))?;
        // Neither is its CPU; most of them can refuse this too.
        let refused = libc::syscall(libc::SYS_arch_prctl, ARCH_SET_CPUID, 0_usize) == 0;
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        done(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()))?;
        keep_two_files(plan)?;
        map_stub(plan)?;
        done(libc::close(STUB_FD))?;
        forget_addresses(plan)?;
        done(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        let program =
            libc::sock_fprog { len: plan.filter.len() as u16, filter: plan.filter.as_ptr().cast_mut() };
        done(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program))?;
        Some(if refused { READY_WITHOUT_CPUID } else { READY })
    }
}

/// Has the kernel forget what it writes to, or goes on at, in a process with our memory: the guest's pages
/// will be there.
///
/// # Safety
/// As for [`prepare`].
unsafe fn forget_addresses(plan: &Plan) -> Option<()> {
    // SAFETY: the caller's promise.
    unsafe {
        if let Some((area, size)) = plan.rseq {
            // Refused if it was never registered.
            libc::syscall(libc::SYS_rseq, area, size, RSEQ_UNREGISTER, RSEQ_SIGNATURE);
        }
        done(libc::syscall(libc::SYS_set_tid_address, NOWHERE))?;
        done(libc::syscall(libc::SYS_set_robust_list, NOWHERE, ROBUST_LIST_HEAD))?;
        if plan.vdso != 0 {
            move_vdso(plan.vdso)?;
        }
        Some(())
    }
}

/// # Safety
/// As for [`prepare`].
unsafe fn move_vdso(from: u64) -> Option<()> {
    let from = std::ptr::without_provenance_mut(from as usize);
    let to = std::ptr::without_provenance_mut::<libc::c_void>(VDSO);
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // The kernel moves it whole or not at all, and says nowhere how large it is.
    let moved = (1..=MOST_VDSO_PAGES).map(|pages| pages * PAGE_SIZE as usize).any(|len| {
        // SAFETY: the caller's promise; nothing is where it goes.
        unsafe { libc::mremap(from, len, len, flags, to) == to }
    });
    moved.then_some(())
}

/// # Safety
/// As for [`prepare`].
unsafe fn map_stub(plan: &Plan) -> Option<()> {
    let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE;
    let map = |at: u64, prot, offset: u64| {
        let at = std::ptr::without_provenance_mut(at as usize);
        // SAFETY: where nothing is.
        let mapped = unsafe { libc::mmap(at, PAGE_SIZE as usize, prot, flags, STUB_FD, offset as i64) };
        (mapped == at).then_some(())
    };
    map(plan.stub, libc::PROT_READ | libc::PROT_EXEC, 0)?;
    map(plan.stub + PAGE_SIZE, libc::PROT_READ, PAGE_SIZE)
}

/// # Safety
/// As for [`prepare`].
unsafe fn keep_two_files(plan: &Plan) -> Option<()> {
    // SAFETY: the caller's promise.
    unsafe {
        // Out of the way first: either of them may be where the other one goes.
        let memory = libc::fcntl(plan.memory, libc::F_DUPFD, 16);
        let file = libc::fcntl(plan.file, libc::F_DUPFD, 16);
        done(libc::dup2(memory, MEMORY_FD))?;
        done(libc::dup2(file, STUB_FD))?;
        done(libc::syscall(libc::SYS_close_range, STUB_FD + 1, u32::MAX, 0))?;
        done(libc::syscall(libc::SYS_close_range, 0, MEMORY_FD - 1, 0))
    }
}
