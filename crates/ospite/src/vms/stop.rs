//! Switching a VM off.

use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use store::Home;
use store::vm::{Folder, Process, State};
use vmm::Request;

use super::Client;
use crate::exit::Code;
use crate::failure::Failure;

/// How a VM was switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// The guest did it.
    PoweredOff,
    /// Its power was cut.
    Cut,
}

/// A guest that boots does not hear its power button, so it is pressed again.
const PRESS_AGAIN: Duration = Duration::from_secs(5);
/// How long a VM may take to end after its power was cut, before its process is killed.
const CUT: Duration = Duration::from_secs(20);
/// How long an answer is waited for.
const ANSWER: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(20);

/// Has the guest power off, and cuts its power when it has not after `timeout`. It does not come back
/// by its restart policy.
///
/// # Errors
/// It is not on, or cannot be ended.
pub fn stop(home: &Home, folder: &Folder, timeout: Duration) -> Result<Stopped, Failure> {
    must_be_on(folder)?;
    let deadline = Instant::now() + timeout;
    let mut press = Instant::now();
    while Instant::now() < deadline {
        if Instant::now() >= press {
            tell_keeper(folder);
            let pressed = ask(home, folder, Request::PowerButton);
            // A VM whose process has only just been started has no socket yet.
            press = Instant::now() + if pressed { PRESS_AGAIN } else { POLL * 5 };
        }
        if is_off(folder)? {
            return Ok(Stopped::PoweredOff);
        }
        thread::sleep(POLL);
    }
    cut(home, folder)
}

/// Cuts the power at once. What the guest has flushed to its disks is kept.
///
/// # Errors
/// It is not on, or cannot be ended.
pub fn kill(home: &Home, folder: &Folder) -> Result<Stopped, Failure> {
    must_be_on(folder)?;
    cut(home, folder)
}

fn must_be_on(folder: &Folder) -> Result<(), Failure> {
    if folder.is_on()? {
        return Ok(());
    }
    Err(not_running(folder))
}

/// Where something is asked of a VM that is off.
pub(super) fn not_running(folder: &Folder) -> Failure {
    let name = folder.name();
    Failure::new(Code::WrongState, format!("{name} is not running")).hint(format!("ospite start {name}"))
}

fn is_off(folder: &Folder) -> Result<bool, Failure> {
    Ok(!folder.is_on()?)
}

fn ask(home: &Home, folder: &Folder, request: Request) -> bool {
    let client = Client::connect(home, folder.name(), ANSWER);
    client.and_then(|mut client| client.request(request)).is_ok()
}

fn processes(folder: &Folder) -> (Option<Process>, Option<Process>) {
    // A state that cannot be read names no processes; the lock still says whether there are any.
    let state = folder.state().ok().flatten();
    state.map_or((None, None), |State { keeper, vm, .. }| (keeper, vm))
}

/// Its keeper shall not bring it back.
fn tell_keeper(folder: &Folder) {
    if let Some(keeper) = processes(folder).0 {
        keeper.signal(Signal::USR1);
    }
}

fn cut(home: &Home, folder: &Folder) -> Result<Stopped, Failure> {
    let begun = Instant::now();
    let mut asked = false;
    while begun.elapsed() < CUT {
        tell_keeper(folder);
        asked = asked || ask(home, folder, Request::Kill);
        if is_off(folder)? {
            return Ok(Stopped::Cut);
        }
        thread::sleep(POLL);
    }
    let (keeper, vm) = processes(folder);
    for process in [keeper, vm].into_iter().flatten() {
        process.signal(Signal::KILL);
    }
    while begun.elapsed() < CUT + ANSWER {
        if is_off(folder)? {
            return Ok(Stopped::Cut);
        }
        thread::sleep(POLL);
    }
    Err(Failure::new(Code::Internal, format!("{} does not end, not even killed", folder.name())).hint(
        format!(
            "does a file of the host not answer? fuser {} names who holds it",
            folder.lock_path().display()
        ),
    ))
}
