//! Getting a vCPU out of the guest, from any thread.
//!
//! `immediate_exit` in the vCPU's shared page makes the next `KVM_RUN` return at once, and a signal ends
//! the one that is under way. The signal's handler does nothing: it is there so that the call is
//! interrupted. Both together leave no gap through which a kick could be lost.

#![allow(unsafe_code)] // a byte in memory shared with the kernel, a signal handler, pthread_kill

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use engine::StopHandle;
use kvm_bindings::kvm_run;

/// The vCPU's thread while it runs.
struct Running {
    thread: libc::pthread_t,
    immediate_exit: *mut u8,
}

// SAFETY: the byte is only touched atomically, and only while `Kick::enter` holds the page mapped.
unsafe impl Send for Running {}

impl Running {
    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte lies in the vCPU's shared page, which is mapped while `Kick::enter` says so.
        // The kernel reads it, and we only write it atomically.
        unsafe { AtomicU8::from_ptr(self.immediate_exit) }
    }
}

/// The handle by which one vCPU is stopped.
#[derive(Default)]
pub(crate) struct Kick {
    stop: AtomicBool,
    running: Mutex<Option<Running>>,
}

/// While it lives, the vCPU is kicked by signal.
pub(crate) struct Entered<'a>(&'a Kick);

impl Kick {
    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This thread is about to run the vCPU whose shared page is `page`. With `at_once` the first
    /// `KVM_RUN` returns without entering the guest, as it does after a stop that came before.
    ///
    /// # Safety
    /// The page stays mapped until the result is dropped, which happens on this thread.
    pub(crate) unsafe fn enter(&self, page: *mut kvm_run, at_once: bool) -> Entered<'_> {
        // SAFETY: the caller says that the page is there.
        let immediate_exit = unsafe { &raw mut (*page).immediate_exit };
        // SAFETY: no preconditions.
        let running = Running { thread: unsafe { libc::pthread_self() }, immediate_exit };
        let mut slot = self.running();
        running.immediate_exit().store(u8::from(at_once), Ordering::SeqCst);
        if self.stop.load(Ordering::SeqCst) {
            running.immediate_exit().store(1, Ordering::SeqCst);
        }
        *slot = Some(running);
        Entered(self)
    }

    /// Gets the vCPU out of the guest, if it is there. It looks around and goes on.
    pub(crate) fn kick(&self) {
        if let Some(running) = &*self.running() {
            running.immediate_exit().store(1, Ordering::SeqCst);
            // SAFETY: no preconditions.
            if running.thread != unsafe { libc::pthread_self() } {
                // SAFETY: the thread is in `Kick::enter`'s scope, so it lives.
                unsafe { libc::pthread_kill(running.thread, signal()) };
            }
        }
    }
}

impl Entered<'_> {
    /// After an interrupted `KVM_RUN`: whether the vCPU is to stop.
    pub(crate) fn take_stop(&self) -> bool {
        // First the flag, then the question: who asks in between kicks once more.
        if let Some(running) = &*self.0.running() {
            running.immediate_exit().store(0, Ordering::SeqCst);
        }
        self.0.stop.swap(false, Ordering::SeqCst)
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if let Some(running) = self.0.running().take() {
            running.immediate_exit().store(0, Ordering::SeqCst);
        }
    }
}

impl StopHandle for Kick {
    fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.kick();
    }
}

/// The first real-time signal: nobody else's in this process.
fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn ignore(_: libc::c_int) {}

/// Installs the handler; without `SA_RESTART`, so that `KVM_RUN` is interrupted.
pub(crate) fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: all zeros is a valid `sigaction`; the handler touches nothing.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as usize;
            libc::sigaction(signal(), &raw const action, std::ptr::null_mut());
        }
    });
}
