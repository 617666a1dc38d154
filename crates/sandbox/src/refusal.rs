//! What is said when a process makes a system call that it does not have any more.
#![allow(unsafe_code)] // a signal handler

use std::io;
use std::mem::{MaybeUninit, replace, size_of};
use std::sync::atomic::{AtomicU32, Ordering};

use libc::{c_int, c_void, siginfo_t};

/// The exit code of a process that was refused one: as of a shell for SIGSYS.
pub(crate) const EXIT: c_int = 128 + libc::SIGSYS;

/// Where `siginfo_t` has `si_syscall` (sigaction(2)): after three numbers, padding, and the address of the
/// instruction.
const SI_SYSCALL: usize = 16 + size_of::<*const c_void>();

/// As many calls that failed are told; a process could make them for ever.
const TOLD: u32 = 20;

/// What comes of a refusal.
pub(crate) enum Then {
    /// The process ends.
    End,
    /// The call fails, as if the kernel had refused it by itself.
    Fail,
}

/// Has refusals told on standard error.
pub(crate) fn tell(then: Then) -> io::Result<()> {
    let handler: Handler = match then {
        Then::End => refused,
        Then::Fail => failed,
    };
    // SAFETY: all zeroes are a `struct sigaction`: no flags, no signals masked.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for, and calls only what a handler may.
    let result = unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

type Handler = extern "C" fn(c_int, *const siginfo_t, *mut c_void);

extern "C" fn refused(_signal: c_int, info: *const siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a `siginfo_t`, which is longer than that, and for SIGSYS has a number there.
    let call = unsafe { info.cast::<u8>().add(SI_SYSCALL).cast::<c_int>().read() };
    let mut text =
        *b"ospite: error: system call ..... is refused to this process, which ends (ausyscall names it)\n";
    digits(call, &mut text[27..32]);
    // SAFETY: both may be called by a handler; the text is as long as it says.
    unsafe {
        libc::write(2, text.as_ptr().cast(), text.len());
        libc::_exit(EXIT)
    }
}

extern "C" fn failed(_signal: c_int, _info: *const siginfo_t, context: *mut c_void) {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    // SAFETY: the kernel passes the context of the thread that it has interrupted, which is ours alone until
    // the handler returns. At SIGSYS by seccomp, RAX holds the call's number.
    let call = unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        replace(&mut context.uc_mcontext.gregs[libc::REG_RAX as usize], -i64::from(libc::EPERM))
    };
    if COUNT.fetch_add(1, Ordering::Relaxed) >= TOLD {
        return;
    }
    let mut text =
        *b"ospite: warning: system call ..... is refused to this process, please report it (ausyscall names it)\n";
    digits(call as c_int, &mut text[29..34]);
    // SAFETY: it may be called by a handler; the text is as long as it says.
    unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
}

/// Writes a number and blanks; there is no memory to be had in a handler.
fn digits(mut number: c_int, text: &mut [u8]) {
    text.fill(b' ');
    let length = (1..text.len()).find(|&length| number < 10_i32.pow(length as u32)).unwrap_or(text.len());
    for digit in text[..length].iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_without_help() {
        for (number, expected) in [(0, b"0    "), (59, b"59   "), (425, b"425  "), (99999, b"99999")] {
            let mut text = [0; 5];
            digits(number, &mut text);
            assert_eq!(&text, expected);
        }
    }
}
