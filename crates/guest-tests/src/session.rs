//! A running guest: what it prints, what is typed, how it ends.

use std::io::{Read, Write};
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::transcript::Transcript;

/// A running `ospite run`. Dropping it kills the process.
pub struct Session {
    child: Child,
    keys: Option<Box<dyn Write + Send>>,
    console: Transcript,
    messages: Transcript,
    /// What the test has read so far.
    read: usize,
}

/// How a session ended.
#[derive(Debug)]
pub struct End {
    /// Exit code or signal.
    pub status: ExitStatus,
    /// All that the guest printed.
    pub console: String,
    /// All that ospite itself said on standard error.
    pub messages: String,
}

impl End {
    /// The exit code; panics where a signal ended it.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| panic!("{}: {}", self.status, self.messages))
    }
}

impl Session {
    /// Takes over a process and its serial line.
    pub fn new(
        mut child: Child,
        keys: impl Write + Send + 'static,
        output: impl Read + Send + 'static,
        echo: bool,
    ) -> Session {
        let console = Transcript::of(output, echo).0;
        let messages = child.stderr.take().map(|stderr| Transcript::of(stderr, false).0);
        Session {
            child,
            keys: Some(Box::new(keys)),
            console,
            messages: messages.unwrap_or_default(),
            read: 0,
        }
    }

    /// Waits until the guest prints `text`, and returns what it printed up to there since the last
    /// wait. Panics with the end of the transcript where it does not come in time.
    pub fn wait_for(&mut self, text: &str, seconds: u64) -> String {
        let started = Instant::now();
        let Some(end) = self.console.wait_for(text, self.read, started + patience(seconds)) else {
            panic!(
                "no {text:?} within {:?}; the guest's last words:\n{}\nospite says:\n{}",
                started.elapsed(),
                self.console.tail(),
                self.messages.tail()
            );
        };
        let printed = self.console.text(self.read, end);
        self.read = end;
        printed
    }

    /// What the guest has printed since the last wait, without waiting.
    pub fn printed(&mut self) -> String {
        let (start, end) = (self.read, self.console.len());
        self.read = end;
        self.console.text(start, end)
    }

    /// The same, and looks at the session all the while, twice a second.
    pub fn watch_for(&mut self, text: &str, seconds: u64, mut look: impl FnMut(&Session)) -> String {
        let deadline = Instant::now() + patience(seconds);
        while Instant::now() < deadline {
            look(self);
            let next = deadline.min(Instant::now() + Duration::from_millis(500));
            if self.console.wait_for(text, self.read, next).is_some() {
                break;
            }
        }
        self.wait_for(text, 1)
    }

    /// Types.
    pub fn send(&mut self, keys: &[u8]) {
        // A guest that has just powered off does not read; the test sees that by its end.
        if let Some(line) = &mut self.keys {
            let _ = line.write_all(keys).and_then(|()| line.flush());
        }
    }

    /// Types a line and the Enter key.
    pub fn type_line(&mut self, text: &str) {
        self.send(format!("{text}\r").as_bytes());
    }

    /// Closes the guest's keyboard: the end of our standard input.
    pub fn close_keyboard(&mut self) {
        self.keys = None;
    }

    /// Number of ospite's process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Bytes of ospite that are in the host's memory, the guest's own among them.
    pub fn resident(&self) -> u64 {
        self.status("VmRSS:")
    }

    /// The part of them that is no file's: neither the guest's memory nor translated code, with the software engine.
    pub fn anonymous(&self) -> u64 {
        self.status("RssAnon:")
    }

    /// A size in bytes out of proc_pid_status(5).
    fn status(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        kilobytes.unwrap_or_default() << 10
    }

    /// Sends a signal to ospite.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, signal);
        }
    }

    /// Waits for the process to end.
    pub fn end(mut self, seconds: u64) -> End {
        let deadline = Instant::now() + patience(seconds);
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(20)),
                other => panic!(
                    "ospite does not end within {seconds} s ({other:?}); the guest's last words:\n{}\n{}",
                    self.console.tail(),
                    self.messages.tail()
                ),
            }
        };
        self.keys = None;
        settle(&self.console);
        settle(&self.messages);
        let all = |transcript: &Transcript| transcript.text(0, transcript.len());
        End { status, console: all(&self.console), messages: all(&self.messages) }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last bytes of an ended process may still be on their way to us.
fn settle(transcript: &Transcript) {
    let mut len = usize::MAX;
    while transcript.len() != len {
        len = transcript.len();
        thread::sleep(Duration::from_millis(50));
    }
}

/// Slow hosts may be given more time: `OSPITE_PATIENCE=3` makes every wait three times as long.
pub fn patience(seconds: u64) -> Duration {
    let factor = std::env::var("OSPITE_PATIENCE").ok().and_then(|factor| factor.parse().ok());
    Duration::from_secs(seconds * factor.unwrap_or(1))
}
