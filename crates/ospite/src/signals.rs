//! Signals from the host: an orderly way out, never a torn disk.

use std::io;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP};
use signal_hook::iterator::Signals;
use signal_hook::low_level::{emulate_default_handler, signal_name};
use vmm::{Control, Request};

use crate::console::output::Output;
use crate::console::terminal;
use crate::logger::say;

/// Signals are ours from here on; they are acted upon once a VM is there.
pub struct Caught(Signals);

/// Which signal, if any, has cut the power.
#[derive(Clone, Default)]
pub struct Killer(Arc<AtomicI32>);

/// Takes the signals over.
pub fn catch() -> io::Result<Caught> {
    Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGTSTP, SIGCONT]).map(Caught)
}

impl Killer {
    /// Ends this process as the signal would have, if one has cut the power: the parent sees why.
    pub fn die_of_it(&self) {
        let signal = self.0.load(Ordering::SeqCst);
        if signal != 0 {
            terminal::restore();
            let _ = emulate_default_handler(signal);
        }
    }
}

impl Caught {
    /// Watches over the VM behind `control`.
    pub fn watch(self, control: Control, output: Output, timeout: Duration) -> io::Result<Killer> {
        let killer = Killer::default();
        let watch = Watch { control, output, timeout, killer: killer.clone(), asked: Mutex::default() };
        let watch = Arc::new(watch);
        machine::spawn("signals", move || watch.run(self.0))?;
        Ok(killer)
    }
}

struct Watch {
    control: Control,
    output: Output,
    timeout: Duration,
    killer: Killer,
    /// Set once the guest has been asked to stop; dropping it ends the countdown.
    asked: Mutex<Option<mpsc::Sender<()>>>,
}

impl Watch {
    fn run(self: Arc<Watch>, mut signals: Signals) {
        for signal in signals.forever() {
            match signal {
                SIGCONT => terminal::leave_while(|| {}),
                SIGTSTP => terminal::leave_while(|| {
                    let _ = emulate_default_handler(SIGTSTP);
                }),
                SIGQUIT => self.kill(signal, "power cut"),
                _ => self.ask(signal),
            }
        }
    }

    /// The first time the guest is asked, the second time it is not.
    fn ask(self: &Arc<Watch>, signal: i32) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.is_some() || self.timeout.is_zero() {
            return self.kill(signal, "power cut");
        }
        let seconds = self.timeout.as_secs();
        say(&format!(
            "{}: power button pressed; the power is cut in {seconds} s, or at once by another {0}",
            name(signal)
        ));
        let (keep, ended) = mpsc::channel();
        *asked = Some(keep);
        drop(asked);
        let watch = self.clone();
        let countdown = move || {
            if ended.recv_timeout(watch.timeout) == Err(mpsc::RecvTimeoutError::Timeout) {
                watch.kill(signal, "the guest did not power off in time, power cut");
            }
        };
        if machine::spawn("countdown", countdown).is_err()
            || self.control.request(Request::PowerButton).is_err()
        {
            self.kill(signal, "power cut");
        }
    }

    fn kill(&self, signal: i32, what: &str) {
        say(&format!("{}: {what}", name(signal)));
        self.killer.0.store(signal, Ordering::SeqCst);
        self.output.never_wait();
        if self.control.request(Request::Kill).is_err() {
            // The VM has ended already and we are on our way out, waiting for a slow reader.
            self.killer.die_of_it();
        }
    }
}

/// For a command whose end ends nothing else: the terminal is as it was when a signal ends it.
pub fn leave_terminal_in_order() -> io::Result<()> {
    let Caught(mut signals) = catch()?;
    let body = move || {
        for signal in signals.forever() {
            match signal {
                SIGCONT => terminal::leave_while(|| {}),
                SIGTSTP => terminal::leave_while(|| drop(emulate_default_handler(SIGTSTP))),
                _ => {
                    terminal::restore();
                    let _ = emulate_default_handler(signal);
                }
            }
        }
    };
    machine::spawn("signals", body).map(drop)
}

fn name(signal: i32) -> &'static str {
    signal_name(signal).unwrap_or("signal")
}
