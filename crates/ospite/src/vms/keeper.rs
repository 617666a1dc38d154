//! `ospite vm-keeper NAME`: starts a VM's process, waits for its end, and starts it again by the VM's
//! restart policy. It does so little that nothing can go wrong with it while the VM lives.
//!
//! SIGUSR1: the VM shall not come back. SIGTERM: it shall end, in order.

use std::io;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use store::vm::{Definition, Folder, LastEnd, Phase, Process, Restart, State};
use store::{Lock, Name};

use super::{now, start};
use crate::exit::Code;
use crate::failure::Failure;
use crate::logger::say;
use crate::vm_process::stdio;

/// The pause before the first restart; it doubles with each that follows soon.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A VM that has lived so long has not failed because of its last restart.
const SETTLED: Duration = Duration::from_secs(60);

/// Keeps a VM until it is off.
pub fn keep(name: &Name) -> Result<Code, Failure> {
    let folder = super::find(&super::home()?, name)?;
    let lock = stdio::take_lock(&folder)?;
    let host = |error: io::Error| Failure::new(Code::Internal, format!("vm-keeper: {error}"));
    name_process();
    // Not possible for the leader of a process group, which has no terminal to lose either.
    let _ = rustix::process::setsid();
    let signals = listen().map_err(host)?;
    let word = stdio::take_word().map_err(host)?;
    let definition = folder.definition()?;
    let state = State {
        keeper: Some(Process::this().map_err(host)?),
        vm: None,
        phase: Phase::Running,
        started: now(),
        restarts: 0,
        last_end: None,
    };
    let mut keeper = Keeper { folder, definition, lock, signals, state, unwanted: false };
    let end = keeper.run(word.into());
    keeper.state.phase = Phase::Ended;
    (keeper.state.keeper, keeper.state.vm) = (None, None);
    keeper.write();
    end.map_err(host)
}

/// `ps` shows the file that was executed, which is called `exe`.
pub fn name_process() {
    let _ = rustix::thread::set_name(c"ospite"); // for people's eyes only
}

fn listen() -> io::Result<Receiver<i32>> {
    let mut signals = Signals::new([SIGCHLD, SIGHUP, SIGINT, SIGTERM, SIGUSR1])?;
    let (send, receive) = mpsc::channel();
    let body = move || signals.forever().try_for_each(|signal| send.send(signal)).unwrap_or_default();
    thread::Builder::new().name("signals".into()).spawn(body)?;
    Ok(receive)
}

struct Keeper {
    folder: Folder,
    definition: Definition,
    lock: Lock,
    signals: Receiver<i32>,
    state: State,
    /// Nobody wants it to come back.
    unwanted: bool,
}

impl Keeper {
    fn run(&mut self, word: Stdio) -> io::Result<Code> {
        let mut word = Some(word);
        let mut pause = FIRST_PAUSE;
        loop {
            let begun = Instant::now();
            let first = word.is_some();
            let mut vm = self.spawn(word.take().unwrap_or_else(Stdio::null))?;
            let status = self.wait(&mut vm)?;
            let end = End::of(status);
            self.state.last_end =
                Some(LastEnd { at: now(), code: status.code(), how: end.how.clone(), failed: end.failed });
            if self.unwanted || !end.comes_back(self.definition.restart, first) {
                return Ok(Code::Success);
            }
            if begun.elapsed() > SETTLED {
                pause = FIRST_PAUSE;
            }
            say(&format!("{}: {}; it comes back in {} ms", self.folder.name(), end.how, pause.as_millis()));
            if !self.rest(pause) {
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
        self.write();
        Ok(vm)
    }

    fn wait(&mut self, vm: &mut Child) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = vm.try_wait()? {
                return Ok(status);
            }
            match self.signals.recv() {
                Ok(SIGUSR1) => self.unwanted = true,
                Ok(SIGTERM | SIGINT | SIGHUP) => {
                    self.unwanted = true;
                    if let Some(vm) = &self.state.vm {
                        vm.signal(Signal::TERM);
                    }
                }
                Ok(_) => {}
                Err(_) => return vm.wait(),
            }
        }
    }

    /// Rests before a restart; whether it is still wanted then.
    fn rest(&mut self, pause: Duration) -> bool {
        self.state.phase = Phase::Restarting;
        self.state.vm = None;
        self.write();
        let deadline = Instant::now() + pause;
        loop {
            match self.signals.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(SIGCHLD) => {}
                Ok(_) => return false,
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
        let never = exit(Code::Build);
        assert!(!never.comes_back(Always, true), "whoever starts it is told");
        assert!(never.comes_back(Always, false), "memory may be short for a while");
    }
}
