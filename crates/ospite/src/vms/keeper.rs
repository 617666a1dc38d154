//! `ospite vm-keeper NAME`: starts a VM's process, waits for its end, and starts it again by the VM's
//! restart policy. It does so little that nothing can go wrong with it while the VM lives.
//!
//! It also tries the VM's health check, beside the VM's process and not in it: what a break-in into that can
//! reach need not include the host's network.
//!
//! SIGUSR1: the VM shall not come back. SIGTERM: it shall end, in order, and may come back when the host does.

use std::fs;
use std::io;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use store::vm::{Definition, Folder, HealthState, LastEnd, OnFailure, Phase, Process, Restart, State, Word};
use store::{Home, Lock, Name};

use super::watch::{Watch, watch};
use super::{now, socket, start};
use crate::exit::Code;
use crate::failure::Failure;
use crate::logger::say;
use crate::vm_process::stdio;

/// The pause before the first restart; it doubles with each that follows soon.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A VM that has lived so long has not failed because of its last restart.
const SETTLED: Duration = Duration::from_secs(60);
/// How much longer than its time an ill VM may take to end before it is killed.
const OVERTIME: Duration = Duration::from_secs(20);

/// What a keeper waits for.
enum Event {
    Signal(i32),
    /// Of the VM's process that was started as number so much.
    Health(u64, HealthState),
}

/// Keeps a VM until it is off.
pub fn keep(name: &Name) -> Result<Code, Failure> {
    let home = super::home()?;
    let folder = super::find(&home, name)?;
    let lock = stdio::take_lock(&folder)?;
    let host = |error: io::Error| Failure::new(Code::Internal, format!("vm-keeper: {error}"));
    name_process();
    // Not possible for the leader of a process group, which has no terminal to lose either.
    let _ = rustix::process::setsid();
    let (teller, events) = mpsc::channel();
    listen(teller.clone()).map_err(host)?;
    let word = stdio::take_word().map_err(host)?;
    let definition = folder.definition()?;
    let state = State {
        keeper: Some(Process::this().map_err(host)?),
        vm: None,
        phase: Phase::Running,
        started: now(),
        restarts: 0,
        last_end: None,
        health: None,
        wanted: true,
    };
    let mut keeper = Keeper {
        home,
        folder,
        definition,
        lock,
        teller,
        events,
        state,
        stopped: false,
        host_stops: false,
        ill: None,
        starts: 0,
    };
    let end = keeper.run(word.into());
    let _ = fs::remove_file(socket::path(&keeper.home, name)); // the next one replaces it anyway
    keeper.state.phase = Phase::Ended;
    keeper.state.wanted = keeper.host_stops && !keeper.stopped;
    keeper.state.health = None;
    (keeper.state.keeper, keeper.state.vm) = (None, None);
    keeper.write();
    end.map_err(host)
}

/// `ps` shows the file that was executed, which is called `exe`.
pub fn name_process() {
    let _ = rustix::thread::set_name(c"ospite"); // for people's eyes only
}

fn listen(teller: Sender<Event>) -> io::Result<()> {
    let mut signals = Signals::new([SIGCHLD, SIGHUP, SIGINT, SIGTERM, SIGUSR1])?;
    let body = move || {
        signals.forever().try_for_each(|signal| teller.send(Event::Signal(signal))).unwrap_or_default()
    };
    thread::Builder::new().name("signals".into()).spawn(body).map(drop)
}

struct Keeper {
    home: Home,
    folder: Folder,
    definition: Definition,
    lock: Lock,
    teller: Sender<Event>,
    events: Receiver<Event>,
    state: State,
    /// Somebody has switched it off.
    stopped: bool,
    /// The host goes down.
    host_stops: bool,
    /// It does not do its work and is restarted for that: until when it may end by itself.
    ill: Option<Instant>,
    /// How often its process was started.
    starts: u64,
}

impl Keeper {
    fn run(&mut self, word: Stdio) -> io::Result<Code> {
        let mut word = Some(word);
        let mut pause = FIRST_PAUSE;
        loop {
            let begun = Instant::now();
            let first = word.is_some();
            let mut vm = self.spawn(word.take().unwrap_or_else(Stdio::null))?;
            let watch = self.watch();
            let status = self.wait(&mut vm)?;
            drop(watch);
            let mut end = End::of(status);
            if self.ill.take().is_some() && !self.stopped {
                end = End::ill(end);
            }
            self.state.health = None;
            self.state.last_end =
                Some(LastEnd { at: now(), code: status.code(), how: end.how.clone(), failed: end.failed });
            if self.stopped || self.host_stops || !end.comes_back(self.definition.restart, first) {
                return Ok(Code::Success);
            }
            if begun.elapsed() > SETTLED {
                pause = FIRST_PAUSE;
            }
            say(&format!("{}: {}; it comes back in {} ms", self.folder.name(), end.how, pause.as_millis()));
            if !self.rest(pause) {
                if let Some(last) = self.state.last_end.as_mut().filter(|_| self.stopped) {
                    *last = last.clone().switched_off();
                }
                return Ok(Code::Success);
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
            self.state.restarts += 1;
        }
    }

    fn spawn(&mut self, word: Stdio) -> io::Result<Child> {
        let vm = start::command(&self.folder, "vm-process", &self.lock, word)?.spawn()?;
        self.state.vm = Process::of(vm.id()).ok(); // it may have ended already
        self.state.phase = Phase::Running;
        self.state.started = now();
        let health = HealthState { word: Word::Starting, reason: None };
        self.state.health = self.definition.health.is_some().then_some(health);
        self.starts += 1;
        self.write();
        Ok(vm)
    }

    fn watch(&self) -> Option<Watch> {
        let (teller, start) = (self.teller.clone(), self.starts);
        let tell = move |health| teller.send(Event::Health(start, health)).unwrap_or_default();
        watch(self.home.clone(), self.folder.clone(), &self.definition, tell)
    }

    fn wait(&mut self, vm: &mut Child) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = vm.try_wait()? {
                return Ok(status);
            }
            let patience =
                self.ill.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()));
            match self.events.recv_timeout(patience) {
                Ok(Event::Signal(SIGUSR1)) => self.stopped = true,
                Ok(Event::Signal(SIGTERM | SIGINT | SIGHUP)) => {
                    self.host_stops = true;
                    self.signal(Signal::TERM);
                }
                Ok(Event::Signal(_)) => {}
                Ok(Event::Health(start, health)) if start == self.starts => self.hear(health),
                Ok(Event::Health(..)) => {}
                Err(RecvTimeoutError::Timeout) => {
                    self.ill = Some(Instant::now() + OVERTIME);
                    self.signal(Signal::KILL);
                }
                Err(RecvTimeoutError::Disconnected) => return vm.wait(),
            }
        }
    }

    fn signal(&self, signal: Signal) {
        if let Some(vm) = &self.state.vm {
            vm.signal(signal);
        }
    }

    /// Hears how its health is.
    fn hear(&mut self, health: HealthState) {
        let (name, policy) = (self.folder.name(), self.definition.restart);
        match (health.word, &health.reason) {
            (Word::Unhealthy, Some(reason)) => say(&format!("{name} is unhealthy: {reason}")),
            (Word::Starting, _) => {}
            (word, _) => say(&format!("{name} is {}", word.as_str())),
        }
        let restarts = self.definition.health.as_ref().is_some_and(|h| h.on_failure == OnFailure::Restart);
        if health.word == Word::Unhealthy && restarts && policy != Restart::No && self.ill.is_none() {
            say(&format!("{name} is restarted for that"));
            // It powers off in order, if its guest still can, and loses its power otherwise.
            self.signal(Signal::TERM);
            self.ill = Some(Instant::now() + Duration::from_secs(self.definition.stop_timeout) + OVERTIME);
        }
        self.state.health = Some(health);
        self.write();
    }

    /// Rests before a restart; whether it is still wanted then.
    fn rest(&mut self, pause: Duration) -> bool {
        self.state.phase = Phase::Restarting;
        self.state.vm = None;
        self.write();
        let deadline = Instant::now() + pause;
        loop {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Event::Signal(SIGCHLD) | Event::Health(..)) => {}
                Ok(Event::Signal(signal)) => {
                    (self.stopped, self.host_stops) = (signal == SIGUSR1, signal != SIGUSR1);
                    return false;
                }
                Err(RecvTimeoutError::Timeout) => return true,
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
    }

    /// Without its file the VM can still be stopped by its socket; a full disk must not end it.
    fn write(&self) {
        if let Err(error) = self.folder.set_state(&self.state) {
            say(&format!("warning: {}", vmm::chain(&error)));
        }
    }
}

/// How a VM's process ended.
struct End {
    how: String,
    failed: bool,
    /// Somebody cut the power on purpose.
    cut: bool,
    /// It could not even be started.
    never_ran: bool,
}

impl End {
    fn of(status: ExitStatus) -> End {
        let Some(number) = status.code() else {
            return End {
                how: format!("its process died: {status}"),
                failed: true,
                cut: false,
                never_ran: false,
            };
        };
        let code = Code::from_number(number);
        let how = match code {
            Some(Code::Success) => "the guest powered itself off".into(),
            Some(Code::Killed) => "its power was cut".into(),
            Some(Code::Reset) => "the guest reset itself".into(),
            Some(Code::TripleFault) => "the guest triple-faulted".into(),
            Some(Code::Usage | Code::Build | Code::Engine) => "it could not be started".into(),
            Some(_) => "ospite or the host failed".into(),
            None => format!("the guest ended it with exit code {number}"),
        };
        let cut = code == Some(Code::Killed);
        let failed = !cut && code != Some(Code::Success);
        let never_ran = matches!(code, Some(Code::Usage | Code::Build | Code::Engine));
        End { how, failed, cut, never_ran }
    }

    /// The end of a VM that was ended because it was ill.
    fn ill(end: End) -> End {
        End { how: format!("it was unhealthy, and {}", end.how), failed: true, cut: false, never_ran: false }
    }

    fn comes_back(&self, policy: Restart, first: bool) -> bool {
        let hopeless = first && self.never_ran;
        match policy {
            Restart::No => false,
            Restart::OnFailure => self.failed && !hopeless,
            Restart::Always => !self.cut && !hopeless,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn what_comes_back_by_which_policy() {
        use Restart::{Always, No, OnFailure};
        let exit = |code: Code| End::of(ExitStatus::from_raw(code.number() << 8));
        for (end, on_failure, always) in [
            (End::of(ExitStatus::from_raw(9)), true, true),
            (exit(Code::Internal), true, true),
            (exit(Code::TripleFault), true, true),
            (exit(Code::DebugExit(4)), true, true),
            (exit(Code::Success), false, true),
            (exit(Code::Killed), false, false),
        ] {
            assert!(!end.comes_back(No, false));
            assert_eq!(end.comes_back(OnFailure, false), on_failure, "{}", end.how);
            assert_eq!(end.comes_back(Always, false), always, "{}", end.how);
        }
        for code in [Code::Success, Code::Killed] {
            assert!(End::ill(exit(code)).comes_back(OnFailure, false), "an ill one, however it went");
        }
        let never = exit(Code::Build);
        assert!(!never.comes_back(Always, true), "whoever starts it is told");
        assert!(never.comes_back(Always, false), "memory may be short for a while");
    }
}
