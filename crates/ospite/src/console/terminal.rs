//! Raw mode, and the way out of it whatever happens.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr};

/// The terminal's modes before we changed them; `Some` while it is raw.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

fn before() -> MutexGuard<'static, Option<Termios>> {
    BEFORE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The terminal on standard input is raw while this lives.
pub struct RawMode(());

impl RawMode {
    /// Keys come one by one, none is a signal or an editing command, output is not touched.
    pub fn enter() -> io::Result<RawMode> {
        let mut before = before();
        let old = tcgetattr(io::stdin().as_fd())?;
        let mut raw = old.clone();
        raw.make_raw();
        tcsetattr(io::stdin().as_fd(), OptionalActions::Drain, &raw)?;
        before.get_or_insert(old);
        Ok(RawMode(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal its modes back, if it is raw.
pub fn restore() {
    if let Some(old) = before().take() {
        // A terminal that has gone needs no modes.
        let _ = tcsetattr(io::stdin().as_fd(), OptionalActions::Drain, &old);
    }
}

/// Whether the terminal is raw.
pub fn is_raw() -> bool {
    before().is_some()
}

/// Leaves raw mode while `stopped` runs: the shell has the terminal meanwhile, and may have changed it.
pub fn leave_while(stopped: impl FnOnce()) {
    let raw = is_raw();
    restore();
    stopped();
    if raw && in_foreground() {
        let _ = RawMode::enter().map(std::mem::forget);
    }
}

/// Whether this process may use the terminal on its standard input.
pub fn in_foreground() -> bool {
    tcgetpgrp(io::stdin().as_fd()).is_ok_and(|group| group == rustix::process::getpgrp())
}
