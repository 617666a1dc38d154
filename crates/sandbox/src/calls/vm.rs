//! The system calls of a VM's process.
//!
//! What is left reads, writes, waits, and maps memory: enough for vCPUs, translated code, disks, and the
//! console, in threads that come and go. What is gone: other programs, sockets that lead anywhere but to who
//! is connected, other namespaces, and the rarely used parts of the kernel, in which most ways out of a
//! sandbox begin.

use libc::{c_int, c_long};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq, Ne};
use seccompiler::{BpfProgram, SeccompAction, SeccompCmpOp, SeccompFilter, SeccompRule};

use super::{Failed, conditions, failed, fcntl};
use crate::{Error, refusal};

/// Kept whatever their arguments are.
const KEPT: &[c_long] = &[
    // Files that are open, or that Landlock lets in.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_openat,
    libc::SYS_open,
    libc::SYS_fstat,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_statfs,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_flock,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fadvise64,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_umask,
    // Waiting.
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_select,
    libc::SYS_pselect6,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    libc::SYS_pause,
    // Memory: the guest's, and translated code.
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_msync,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_munlock,
    libc::SYS_brk,
    libc::SYS_memfd_create,
    libc::SYS_membarrier,
    // Sockets whose other end is connected already.
    libc::SYS_accept4,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    // Threads.
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_rseq,
    libc::SYS_set_tid_address,
    libc::SYS_gettid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_arch_prctl,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    // Signals.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_sigsuspend,
    libc::SYS_sigaltstack,
    // What one knows.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_time,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getpgid,
    libc::SYS_getpgrp,
    libc::SYS_getsid,
    libc::SYS_capget,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_getrusage,
    libc::SYS_times,
    libc::SYS_getrlimit,
    libc::SYS_getcpu,
    // Refused more politely, see below.
    libc::SYS_clone3,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_vfork,
    // Processes that an engine starts before the guest does: how it drives them, and how they confine
    // themselves further. [`settle`] leaves it no others.
    libc::SYS_fork,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_kill,
    libc::SYS_tgkill,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_seccomp,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
];

/// `CLONE_NEW...` (clone(2)).
const NAMESPACES: u64 = 0x7e02_0000;
const TIOCLINUX: u64 = 0x541c;
/// `asm-generic/sockios.h`: whose signals those of a socket are.
const FIOSETOWN: u64 = 0x8901;
const SIOCSPGRP: u64 = 0x8902;
const PR_SET_VMA: c_int = 0x5356_4d41;

/// Takes all other calls away from this thread and those that it starts. One that is missed here fails, and is
/// told: a VM need not end over it.
pub(super) fn restrict() -> Result<(), Error> {
    refusal::tell(refusal::Then::Fail).map_err(failed)?;
    let call = |number| (number, Vec::new());
    // Its arguments are in memory, where no filter looks: the C library falls back to clone.
    let unknown = vec![call(libc::SYS_clone3)];
    // The C library holds SIGSYS back while it starts programs, and so could not be told.
    let refused = [libc::SYS_execve, libc::SYS_execveat, libc::SYS_vfork].map(call).to_vec();
    apply(&filter(unknown, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?)?;
    apply(&filter(refused, SeccompAction::Allow, SeccompAction::Errno(libc::EPERM as u32))?)?;
    apply(&filter(kept().map_err(failed)?, SeccompAction::Trap, SeccompAction::Allow)?)
}

/// See [`crate::settle`].
pub(crate) fn settle(children: &[u32]) -> Result<(), Error> {
    let rules = settled(children).map_err(failed)?;
    let program = filter(rules, SeccompAction::Allow, SeccompAction::Errno(libc::EPERM as u32))?;
    seccompiler::apply_filter_all_threads(&program).map_err(failed)
}

fn apply(program: &BpfProgram) -> Result<(), Error> {
    seccompiler::apply_filter(program).map_err(failed)
}

type Rules = Vec<(c_long, Vec<SeccompRule>)>;

fn filter(rules: Rules, others: SeccompAction, these: SeccompAction) -> Result<BpfProgram, Error> {
    let target = std::env::consts::ARCH.try_into().map_err(failed)?;
    let filter = SeccompFilter::new(rules.into_iter().collect(), others, these, target);
    filter.and_then(TryInto::try_into).map_err(failed)
}

fn kept() -> Result<Rules, Failed> {
    let mut rules: Rules = KEPT.iter().map(|&call| (call, Vec::new())).collect();
    let thread = libc::CLONE_THREAD as u64;
    let one = |argument, op: SeccompCmpOp, value| conditions(&[(argument, op, value)]);
    rules.push((libc::SYS_clone, vec![one(0, MaskedEq(thread), thread)?, one(0, MaskedEq(NAMESPACES), 0)?]));
    rules.push((libc::SYS_socketpair, vec![one(0, Eq, libc::AF_UNIX as u64)?]));
    // What types on the keyboard of the terminal that we were started from, and what has the kernel send signals
    // when a descriptor is ready.
    let ioctls = [libc::TIOCSTI, TIOCLINUX, FIOSETOWN, SIOCSPGRP, libc::FIOASYNC];
    rules.push((libc::SYS_ioctl, vec![conditions(&ioctls.map(|request| (1, Ne, request)))?]));
    rules.push((libc::SYS_fcntl, fcntl()?));
    // Names, and what a child gives up.
    let prctl = [
        libc::PR_SET_NAME,
        libc::PR_GET_NAME,
        PR_SET_VMA,
        libc::PR_SET_TIMERSLACK,
        libc::PR_SET_PDEATHSIG,
        libc::PR_SET_NO_NEW_PRIVS,
        libc::PR_SET_SECCOMP,
        libc::PR_SET_TSC,
    ];
    let prctl = prctl.iter().map(|&what| one(0, Eq, what as u64)).collect::<Result<_, _>>()?;
    rules.push((libc::SYS_prctl, prctl));
    // To look at limits, not to change them, and not at other processes.
    rules.push((libc::SYS_prlimit64, vec![conditions(&[(0, Eq, 0), (2, Eq, 0)])?]));
    Ok(rules)
}

/// What is refused from then on.
fn settled(children: &[u32]) -> Result<Rules, Failed> {
    let nobody_of = |argument, known: &[u32]| -> Result<Vec<SeccompRule>, Failed> {
        let others: Vec<_> = known.iter().map(|&pid| (argument, Ne, pid.into())).collect();
        if others.is_empty() { Ok(Vec::new()) } else { Ok(vec![conditions(&others)?]) }
    };
    let family: Vec<u32> = children.iter().copied().chain([std::process::id()]).collect();
    let kept_on_cpus: Vec<u32> = children.iter().copied().chain([0]).collect(); // 0 is the calling thread
    Ok(vec![
        (libc::SYS_clone, vec![conditions(&[(0, MaskedEq(libc::CLONE_THREAD as u64), 0)])?]),
        (libc::SYS_fork, Vec::new()),
        (libc::SYS_pidfd_open, Vec::new()),
        (libc::SYS_kill, nobody_of(0, &family)?),
        (libc::SYS_tgkill, nobody_of(0, &family)?),
        (libc::SYS_rt_tgsigqueueinfo, nobody_of(0, &family)?),
        (libc::SYS_sched_setaffinity, nobody_of(0, &kept_on_cpus)?),
        (libc::SYS_ptrace, nobody_of(1, children)?),
        (libc::SYS_process_vm_readv, nobody_of(0, children)?),
        (libc::SYS_process_vm_writev, nobody_of(0, children)?),
    ])
}

#[cfg(test)]
#[allow(unsafe_code)] // calls that no library makes
mod tests {
    use std::io::{self, Read, Write};
    use std::net::UdpSocket;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use std::process::Command;
    use std::sync::mpsc;
    use std::thread;

    use rustix::process::{Pid, Signal, kill_process, test_kill_process};
    use rustix::thread::{sched_getaffinity, sched_setaffinity};

    use crate::{Calls, Keep, confine, settle};

    /// It is for good, so that it happens in a copy of this test.
    #[test]
    fn a_vms_process_goes_on_without_what_it_is_refused() {
        let mut copy = Command::new(std::env::current_exe().unwrap());
        copy.args(["--exact", "calls::vm::tests::inside", "--ignored", "--test-threads=1", "--nocapture"]);
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let output = copy.env("CHILD", child.id().to_string()).output().unwrap();
        let alive = child.try_wait().unwrap().is_none();
        child.kill().unwrap();
        child.wait().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{told}");
        assert!(told.contains("system call 41 "), "socket(2): {told}");
        assert!(alive, "the signal after it was settled came");
    }

    #[test]
    #[ignore = "run by the test above"]
    fn inside() {
        let child: i32 = std::env::var("CHILD").unwrap().parse().unwrap();
        let child = Pid::from_raw(child).unwrap();
        let (ask, asked) = mpsc::channel::<()>();
        confine(&Keep { calls: Some(Calls::Vm), ..Keep::default() }).unwrap();
        let denied = |error: io::Error| error.kind() == io::ErrorKind::PermissionDenied;
        assert!(denied(UdpSocket::bind("127.0.0.1:0").unwrap_err()));
        assert!(denied(Command::new("/bin/true").status().unwrap_err()));
        assert!(denied(UnixStream::connect("/run/nobody").unwrap_err()));
        let other = thread::spawn(move || {
            asked.recv().unwrap();
            kill_process(child, Signal::KILL)
        });
        settle(&[]).unwrap();
        assert!(test_kill_process(child).is_err(), "it is none of ours");
        let cpus = sched_getaffinity(None).unwrap();
        assert!(sched_setaffinity(Some(child), &cpus).is_err() && sched_setaffinity(None, &cpus).is_ok());
        ask.send(()).unwrap();
        assert!(other.join().unwrap().is_err(), "threads that were there are settled, too");
        assert!(denied(Command::new("/bin/true").status().unwrap_err()));
        let sum = thread::spawn(|| (1..=4).sum::<i32>()).join().unwrap();
        assert_eq!(sum, 10, "threads still come and go");
        let (mut one, mut other) = UnixStream::pair().unwrap();
        has_the_kernel_kill(&one, child);
        one.write_all(b"!").unwrap();
        other.read_exact(&mut [0]).unwrap();
        rustix::fs::fcntl_setfl(&one, rustix::fs::OFlags::NONBLOCK).unwrap();
    }

    /// When `socket` is ready, in every way that there is.
    fn has_the_kernel_kill(socket: &UnixStream, child: Pid) {
        let (fd, pid, on) = (socket.as_raw_fd(), child.as_raw_nonzero().get(), 1);
        // SAFETY: they take numbers, or point to one that outlives the call.
        let results = unsafe {
            [
                libc::fcntl(fd, libc::F_SETOWN, pid),
                libc::fcntl(fd, super::super::F_SETSIG, libc::SIGKILL),
                libc::fcntl(fd, super::super::F_SETOWN_EX, &[1, pid]),
                libc::fcntl(fd, libc::F_SETFL, libc::O_ASYNC),
                libc::ioctl(fd, super::FIOSETOWN, &pid),
                libc::ioctl(fd, super::SIOCSPGRP, &pid),
                libc::ioctl(fd, libc::FIOASYNC, &on),
            ]
        };
        assert_eq!(results, [-1; 7]);
    }
}
