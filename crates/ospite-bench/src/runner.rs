//! One run of something that prints on its standard output: start it, time what it prints as it arrives.

use std::collections::BTreeMap;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::workload::{DONE, END, START};

/// Seconds by item.
pub type Times = BTreeMap<String, f64>;

/// The name under which the time from start to the first mark is listed.
pub const BOOT: &str = "boot to init";

/// Why a run gave no times.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program could not be started.
    #[error("cannot start {program}")]
    Start {
        /// Which.
        program: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It ended, or took too long, before all items were done.
    #[error("{program} {what}; its last lines:\n{tail}")]
    Incomplete {
        /// Which.
        program: String,
        /// What went wrong.
        what: String,
        /// What it printed last.
        tail: String,
    },
}

/// Runs `command`, whose standard output carries the marks.
pub fn run(command: Command, limit: Duration) -> Result<Times, Error> {
    let mut running = Running::start(command, limit)?;
    let mut times = Times::new();
    let mut started = running.start;
    loop {
        let (at, line) = running.line()?;
        if let Some((_, _name)) = line.split_once(&format!("{START} ")) {
            times.entry(BOOT.into()).or_insert_with(|| (at - running.start).as_secs_f64());
            started = at;
        } else if let Some((_, name)) = line.split_once(&format!("{END} ")) {
            times.insert(name.into(), (at - started).as_secs_f64());
        } else if line.contains(DONE) {
            return Ok(times);
        }
    }
}

/// Seconds until `command` prints a line, or the beginning of one, that ends with `prompt`.
pub fn until(command: Command, prompt: &str, limit: Duration) -> Result<f64, Error> {
    let mut running = Running::start(command, limit)?;
    loop {
        let (at, line) = running.line()?;
        if line.ends_with(prompt) {
            return Ok((at - running.start).as_secs_f64());
        }
    }
}

/// A program and what it prints. Dropping it ends the program.
struct Running {
    program: String,
    child: Child,
    start: Instant,
    limit: Duration,
    lines: Receiver<(Instant, String)>,
    tail: Vec<String>,
}

impl Running {
    fn start(mut command: Command, limit: Duration) -> Result<Running, Error> {
        let program = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let start = Instant::now();
        let mut child =
            command.spawn().map_err(|source| Error::Start { program: program.clone(), source })?;
        let (tx, lines) = mpsc::channel();
        if let Some(stdout) = child.stdout.take() {
            thread::spawn(move || pieces(stdout, |line| tx.send((Instant::now(), line)).is_ok()));
        }
        Ok(Running { program, child, start, limit, lines, tail: Vec::new() })
    }

    /// The next line, or what there is of one.
    fn line(&mut self) -> Result<(Instant, String), Error> {
        match self.lines.recv_timeout(self.limit.saturating_sub(self.start.elapsed())) {
            Ok((at, line)) => {
                let line = line.trim_end_matches(['\r', '\n']).to_owned();
                self.tail.push(line.clone());
                if self.tail.len() > 12 {
                    self.tail.remove(0);
                }
                Ok((at, line))
            }
            Err(RecvTimeoutError::Timeout) => {
                Err(self.incomplete(format!("was not done after {:?}", self.limit)))
            }
            Err(RecvTimeoutError::Disconnected) => Err(self.incomplete("ended too early".into())),
        }
    }

    fn incomplete(&self, what: String) -> Error {
        Error::Incomplete { program: self.program.clone(), what, tail: self.tail.join("\n") }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Hands on whole lines, and after each read what there is of the last one, as a prompt has no end; until
/// `hand_on` says no. A console sends any bytes.
fn pieces(mut reader: impl Read, mut hand_on: impl FnMut(String) -> bool) {
    let mut pending = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = reader.read(&mut buffer) {
        pending.extend_from_slice(&buffer[..n]);
        while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            if !hand_on(String::from_utf8_lossy(&line).into_owned()) {
                return;
            }
        }
        if pending.ends_with(b" ") && !hand_on(String::from_utf8_lossy(&pending).into_owned()) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn marks_are_timed_from_one_to_the_next() {
        let script =
            "echo noise; echo BENCH-START a b; sleep 0.2; echo BENCH-END a b; echo BENCH-DONE; sleep 60";
        let times = run(sh(script), Duration::from_secs(20)).unwrap();
        assert!(times["a b"] >= 0.2 && times.contains_key(BOOT), "{times:?}");
    }

    #[test]
    fn a_prompt_is_seen_though_its_line_has_no_end() {
        let script = "echo 'no login: here'; sleep 0.2; printf 'host login: '; sleep 60";
        let seconds = until(sh(script), "login: ", Duration::from_secs(20)).unwrap();
        assert!((0.2..20.0).contains(&seconds), "{seconds}");
    }

    #[test]
    fn an_early_end_says_what_was_printed_last() {
        let error = run(sh("echo Kernel panic"), Duration::from_secs(20)).unwrap_err().to_string();
        assert!(error.contains("ended too early") && error.contains("Kernel panic"), "{error}");
    }
}
