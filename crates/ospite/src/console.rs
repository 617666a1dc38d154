//! The guest's console on the host's standard input and output.
//!
//! On a terminal: raw mode, every key goes to the guest, an escape key opens a menu. Otherwise:
//! bytes in, bytes out.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::thread;

use vmm::{Control, Request, State};

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

/// The console while the guest runs. The terminal is as it was once this is dropped.
pub struct Console {
    _raw: Option<RawMode>,
}

impl Console {
    /// Connects standard input to the guest's `keyboard` and lets its output flow.
    pub fn attach(
        name: &str,
        escape: EscapeKey,
        keyboard: Keyboard,
        control: Control,
        output: &Output,
    ) -> Console {
        let interactive = io::stdin().is_terminal();
        let raw = if interactive { enter(name, escape) } else { None };
        // A job in the background may not touch its terminal: it would be stopped.
        if !interactive || raw.is_some() {
            let keys = Keys::new(escape.0.filter(|_| raw.is_some()));
            let output = output.clone();
            let line = if raw.is_some() { Line::keys(keyboard) } else { Ok(Line::Pipe(keyboard)) };
            let started = line.and_then(|line| Input { keys, escape, line, control, output }.start());
            if let Err(error) = started {
                say(&format!("warning: the guest has no keyboard: {error}"));
            }
        }
        output.flow();
        Console { _raw: raw }
    }
}

fn enter(name: &str, escape: EscapeKey) -> Option<RawMode> {
    if !terminal::in_foreground() {
        say("in the background: the guest has no keyboard");
        return None;
    }
    match escape.0 {
        Some(_) => say(&format!("{name} starts; {escape} opens the menu")),
        None => say(&format!("{name} starts; every key goes to the guest")),
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
    control: Control,
    output: Output,
}

impl Input {
    fn start(self) -> io::Result<()> {
        thread::Builder::new().name("keyboard".into()).spawn(move || self.run()).map(drop)
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
            Action::Menu => say(&format!("{MENU}{} sends itself, any other key goes back", self.escape)),
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
            Pressed::Back => return say("back to the guest"),
        };
        if let Ok(status) = self.control.request(request)
            && matches!(pressed, Pressed::Status | Pressed::PauseOrContinue)
        {
            say(&keys::describe(&status));
        }
    }

    fn pause_or_continue(&self) -> Request {
        match self.control.request(Request::Status) {
            Ok(status) if status.state == State::Paused => Request::Resume,
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
