//! A panic is a defect of ours, and on any thread it is the end of the VM: a machine whose timers or disk
//! queues have stopped must not look alive.

use std::panic;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::console::terminal;

type Will = Box<dyn FnOnce() + Send>;

static HAPPENED: AtomicBool = AtomicBool::new(false);
static LAST_WILL: Mutex<Option<Will>> = Mutex::new(None);

/// From here on a panic's message is readable, and the terminal usable after it.
pub fn prepare() {
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        HAPPENED.store(true, Ordering::SeqCst);
        terminal::restore();
        print(info);
        carry_out_last_will();
    }));
}

/// What the first panic, on whichever thread, does at its end. The will may wait for other threads, for it
/// runs on one of its own: the panicking thread may hold locks.
pub fn last_will(will: impl FnOnce() + Send + 'static) {
    *LAST_WILL.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(will));
}

fn carry_out_last_will() {
    let will = LAST_WILL.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(will) = will {
        let _ = thread::Builder::new().name("last will".into()).spawn(will);
    }
}

/// Whether anything has panicked.
pub fn happened() -> bool {
    HAPPENED.load(Ordering::SeqCst)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn a_panic_on_any_thread_is_the_end_of_the_vm() {
        prepare();
        let (ended, end) = mpsc::channel();
        last_will(move || ended.send("power cut").unwrap());
        thread::spawn(|| panic!("on purpose: this test panics a thread")).join().unwrap_err();
        assert_eq!(end.recv_timeout(Duration::from_secs(10)), Ok("power cut"));
        assert!(happened());
    }
}
