//! The system calls that a process keeps (seccomp).
//!
//! One that is not listed is told on standard error: what made it is either our mistake or a break-in. It ends a
//! network's process, which comes back, and fails in a VM's. Lists are of what a process was seen to do
//! (`strace -f -c`), and of what the standard library and the C library may do in its place, in other versions
//! or on failure.

mod vm;

use libc::c_long;
use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

pub(crate) use self::vm::settle;
use crate::{Error, refusal};

type Failed = seccompiler::BackendError;

/// fcntl(2); `asm-generic/fcntl.h`.
const F_SETSIG: i32 = 10;
const F_SETOWN_EX: i32 = 15;

/// What a process does after it has been confined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calls {
    /// A network's: sockets of the internet, waiting for them, and what it has open; it may read files, as
    /// far as they are left to it. It starts no program, makes no thread, and maps nothing executable.
    Network,
    /// A VM's: what vCPUs, disks and consoles need of what is open, and of files that are left to it.
    Vm,
}

/// Whatever is passed to them.
const NETWORK: &[c_long] = &[
    // Sockets.
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    // Waiting.
    libc::SYS_clock_nanosleep,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    // What it has open, and files to read.
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_statx,
    libc::SYS_write,
    libc::SYS_writev,
    // Memory; maps are below.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Time, chance, who it is, and its end.
    libc::SYS_clock_gettime,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_geteuid,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_getuid,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
];

/// Takes all calls but those of the list away from the calling thread and all that it makes.
pub(crate) fn restrict(calls: Calls) -> Result<(), Error> {
    match calls {
        Calls::Network => network(),
        Calls::Vm => vm::restrict(),
    }
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Calls(error.into())
}

fn network() -> Result<(), Error> {
    let mut rules: Vec<(c_long, Vec<SeccompRule>)> = NETWORK.iter().map(|&call| (call, Vec::new())).collect();
    rules.extend(conditional().map_err(failed)?);
    let filter = SeccompFilter::new(
        rules.into_iter().collect(),
        SeccompAction::Trap,
        SeccompAction::Allow,
        std::env::consts::ARCH.try_into().map_err(failed)?,
    );
    let program: seccompiler::BpfProgram = filter.and_then(TryInto::try_into).map_err(failed)?;
    refusal::tell(refusal::Then::End).map_err(failed)?;
    seccompiler::apply_filter(&program).map_err(failed)
}

/// Those that depend on what is passed.
fn conditional() -> Result<Vec<(c_long, Vec<SeccompRule>)>, Failed> {
    let is = |argument, value: u64| one(argument, SeccompCmpOp::Eq, value);
    let without = |argument, bits: u64| one(argument, SeccompCmpOp::MaskedEq(bits), 0);
    let families = [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK]; // the last tells the host's addresses
    Ok(vec![
        (
            libc::SYS_socket,
            families.map(|family| is(0, family as u64)).into_iter().collect::<Result<_, _>>()?,
        ),
        (libc::SYS_mmap, vec![without(2, libc::PROT_EXEC as u64)?]),
        (libc::SYS_mprotect, vec![without(2, libc::PROT_EXEC as u64)?]),
        (libc::SYS_ioctl, vec![is(1, libc::FIONBIO)?]),
        (libc::SYS_fcntl, fcntl()?),
        // To end itself by a signal.
        (libc::SYS_tgkill, vec![is(0, std::process::id().into())?]),
    ])
}

/// All of fcntl but what has the kernel send signals when a descriptor is ready: it would send any signal to any
/// process of the same user.
fn fcntl() -> Result<Vec<SeccompRule>, Failed> {
    let [own, signal, own_ex] = [libc::F_SETOWN, F_SETSIG, F_SETOWN_EX].map(|command| command as u64);
    let (flags, ne) = (libc::F_SETFL as u64, SeccompCmpOp::Ne);
    Ok(vec![
        conditions(&[
            (1, ne.clone(), own),
            (1, ne.clone(), signal),
            (1, ne.clone(), own_ex),
            (1, ne, flags),
        ])?,
        conditions(&[(1, SeccompCmpOp::Eq, flags), (2, SeccompCmpOp::MaskedEq(libc::O_ASYNC as u64), 0)])?,
    ])
}

fn one(argument: u8, op: SeccompCmpOp, value: u64) -> Result<SeccompRule, Failed> {
    conditions(&[(argument, op, value)])
}

/// All of which must hold, of arguments of 32 bits.
fn conditions(all: &[(u8, SeccompCmpOp, u64)]) -> Result<SeccompRule, Failed> {
    let made = all.iter().map(|(argument, op, value)| {
        SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, op.clone(), *value)
    });
    SeccompRule::new(made.collect::<Result<_, _>>()?)
}

#[cfg(test)]
#[allow(unsafe_code)] // a call that no library makes
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Output};

    use super::*;
    use crate::{Keep, confine};

    /// A filter is for good, so that it is put on in a copy of this test.
    fn copy(what: &str) -> Output {
        let mut copy = Command::new(std::env::current_exe().unwrap());
        copy.args(["--exact", "calls::tests::inside", "--ignored", "--test-threads=1", "--nocapture"]);
        copy.env("WHAT", what).output().unwrap()
    }

    #[test]
    fn a_network_keeps_its_sockets_and_loses_all_else() {
        let output = copy("nothing");
        assert!(output.status.success(), "{output:?}");
        for (what, call) in [
            ("folder", libc::SYS_chdir),
            ("pair", libc::SYS_socketpair),
            ("unix", libc::SYS_socket),
            ("owner", libc::SYS_fcntl),
        ] {
            let output = copy(what);
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(refusal::EXIT), "{what}: {output:?}");
            assert!(text.contains(&format!("system call {call} ")) && text.contains("is refused"), "{text}");
        }
        // The C library starts programs with all signals held back: the kernel ends who tries.
        assert_eq!(copy("program").status.signal(), Some(libc::SIGSYS));
    }

    #[test]
    #[ignore = "run by the test above"]
    fn inside() {
        confine(&Keep { network: true, calls: Some(Calls::Network), ..Keep::default() }).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        client.set_nonblocking(true).unwrap();
        UdpSocket::bind("[::1]:0").map(drop).unwrap_or_default();
        match std::env::var("WHAT").unwrap().as_str() {
            "program" => drop(Command::new("/bin/true").status()),
            "folder" => drop(std::env::set_current_dir("/")),
            "pair" => drop(UnixStream::pair()),
            "unix" => drop(std::os::unix::net::UnixDatagram::unbound()),
            // SAFETY: it takes numbers only.
            "owner" => drop(unsafe { libc::fcntl(client.as_raw_fd(), libc::F_SETOWN, 1) }),
            _ => return,
        }
        panic!("that was not refused");
    }
}
