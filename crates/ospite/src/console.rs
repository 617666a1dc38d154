//! The guest's console on the host's standard input and output.
//!
//! On a terminal: raw mode, every key goes to the guest, an escape key opens a menu. Otherwise:
//! bytes in, bytes out.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

use vmm::{Request, State, Status};

use crate::cli::EscapeKey;
use crate::logger::say;

mod keyboard;
mod keys;
pub mod output;
pub mod terminal;

pub use keyboard::Keyboard;
use keyboard::Line;
use keys::{Action, Keys, Pressed};
use output::Output;
use terminal::RawMode;

const MENU: &str = "q cut the power, p power button, r reset button, z pause or continue, i how it is, ";
const DETACH: &str = "d leave it running, ";

/// Asks the VM, which may have ended.
pub type Ask = Box<dyn Fn(Request) -> Option<Status> + Send>;

/// The VM whose console is attached.
pub struct Attached {
    /// Its name.
    pub name: String,
    /// The key that opens the menu.
    pub escape: EscapeKey,
    /// Its keyboard.
    pub keyboard: Keyboard,
    /// Asks it.
    pub ask: Ask,
    /// Leaves it alone, if it can live without this console.
    pub detach: Option<Box<dyn Fn() + Send>>,
}

/// The console while the guest runs. The terminal is as it was once this is dropped.
pub struct Console {
    _raw: Option<RawMode>,
}

impl Console {
    /// Connects standard input to the guest's keyboard and lets its output flow.
    pub fn attach(vm: Attached, output: &Output) -> Console {
        let interactive = io::stdin().is_terminal();
        let raw = if interactive { enter(&vm) } else { None };
        // A job in the background may not touch its terminal: it would be stopped.
        if !interactive || raw.is_some() {
            let Attached { escape, keyboard, ask, detach, .. } = vm;
            let keys = Keys::new(escape.0.filter(|_| raw.is_some()));
            let output = output.clone();
            let line = if raw.is_some() { Line::keys(keyboard) } else { Ok(Line::Pipe(keyboard)) };
            let started = line.and_then(|line| Input { keys, escape, line, ask, detach, output }.start());
            if let Err(error) = started {
                say(&format!("warning: the guest has no keyboard: {error}"));
            }
        }
        output.flow();
        Console { _raw: raw }
    }
}

fn enter(vm: &Attached) -> Option<RawMode> {
    if !terminal::in_foreground() {
        say("in the background: the guest has no keyboard");
        return None;
    }
    let Attached { name, escape, detach, .. } = vm;
    let what = if detach.is_some() { "this is its console" } else { "it starts" };
    match escape.0 {
        Some(_) => say(&format!("{name}: {what}; {escape} opens the menu")),
        None => say(&format!("{name}: {what}; every key goes to the guest")),
    }
    match RawMode::enter() {
        Ok(raw) => Some(raw),
        Err(error) => {
            say(&format!("warning: cannot put the terminal into raw mode: {error}"));
            None
        }
    }
}

struct Input {
    keys: Keys,
    escape: EscapeKey,
    line: Line,
    ask: Ask,
    detach: Option<Box<dyn Fn() + Send>>,
    output: Output,
}

impl Input {
    fn start(self) -> io::Result<()> {
        machine::spawn("keyboard", move || self.run()).map(drop)
    }

    fn run(mut self) {
        let mut buffer = [0; 4096];
        while let Some(count @ 1..) = read_stdin(&mut buffer) {
            for action in self.keys.feed(&buffer[..count]) {
                self.act(action);
            }
        }
    }

    fn act(&self, action: Action) {
        match action {
            Action::Send(bytes) => self.line.send(bytes),
            Action::Menu => {
                let detach = if self.detach.is_some() { DETACH } else { "" };
                say(&format!("{MENU}{detach}{} sends itself, any other key goes back", self.escape));
            }
            Action::Press(pressed) => self.press(pressed),
        }
    }

    /// Requests to a VM that has just ended have no answer, and need none.
    fn press(&self, pressed: Pressed) {
        let request = match pressed {
            Pressed::Kill => {
                say("power cut");
                self.output.never_wait();
                Request::Kill
            }
            Pressed::PowerButton => {
                say("power button pressed");
                Request::PowerButton
            }
            Pressed::Reset => {
                say("reset button pressed");
                Request::Reset
            }
            Pressed::PauseOrContinue => self.pause_or_continue(),
            Pressed::Status => Request::Status,
            Pressed::Detach => {
                return match &self.detach {
                    Some(detach) => detach(),
                    None => say("back to the guest"),
                };
            }
            Pressed::Back => return say("back to the guest"),
        };
        if let Some(status) = (self.ask)(request)
            && matches!(pressed, Pressed::Status | Pressed::PauseOrContinue)
        {
            say(&keys::describe(&status));
        }
    }

    fn pause_or_continue(&self) -> Request {
        match (self.ask)(Request::Status) {
            Some(status) if status.state == State::Paused => Request::Resume,
            _ => Request::Pause,
        }
    }
}

/// Bytes read; `None` at the end or when standard input fails for good.
fn read_stdin(buffer: &mut [u8]) -> Option<usize> {
    use rustix::io::Errno;
    let stdin = io::stdin();
    loop {
        match rustix::io::read(&stdin, &mut *buffer) {
            Ok(count) => return Some(count),
            Err(Errno::INTR) => {}
            // Somebody who shares our standard input has made it non-blocking.
            Err(Errno::AGAIN) => wait_readable(stdin.as_fd()),
            Err(_) => return None,
        }
    }
}

fn wait_readable(fd: rustix::fd::BorrowedFd<'_>) {
    use rustix::event::{PollFd, PollFlags, poll};
    let _ = poll(&mut [PollFd::new(&fd, PollFlags::IN)], None);
}
