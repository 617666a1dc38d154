//! One run of the script somewhere: start it, time the marks as they arrive.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
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
pub fn run(mut command: Command, limit: Duration) -> Result<Times, Error> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let start = Instant::now();
    let mut child = command.spawn().map_err(|source| Error::Start { program: program.clone(), source })?;
    let stdout = child.stdout.take();
    let mut guard = Kill(child);
    let (tx, rx) = mpsc::channel();
    thread::spawn(move || {
        for line in stdout.into_iter().flat_map(|out| lines(BufReader::new(out))) {
            if tx.send((Instant::now(), line)).is_err() {
                return;
            }
        }
    });
    let mut times = Times::new();
    let mut tail: Vec<String> = Vec::new();
    let mut started = start;
    loop {
        let incomplete = |what: &str, tail: &[String]| {
            Err(Error::Incomplete { program: program.clone(), what: what.into(), tail: tail.join("\n") })
        };
        match rx.recv_timeout(limit.saturating_sub(start.elapsed())) {
            Ok((at, line)) => {
                let line = line.trim();
                if let Some((_, _name)) = line.split_once(&format!("{START} ")) {
                    times.entry(BOOT.into()).or_insert_with(|| (at - start).as_secs_f64());
                    started = at;
                } else if let Some((_, name)) = line.split_once(&format!("{END} ")) {
                    times.insert(name.into(), (at - started).as_secs_f64());
                } else if line.contains(DONE) {
                    let _ = guard.0.kill();
                    return Ok(times);
                }
                tail.push(line.into());
                if tail.len() > 12 {
                    tail.remove(0);
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                return incomplete(&format!("was not done after {limit:?}"), &tail);
            }
            Err(RecvTimeoutError::Disconnected) => return incomplete("ended too early", &tail),
        }
    }
}

/// Lines of whatever bytes a console sends.
fn lines(mut reader: BufReader<impl Read>) -> impl Iterator<Item = String> {
    std::iter::from_fn(move || {
        let mut bytes = Vec::new();
        match reader.read_until(b'\n', &mut bytes) {
            Ok(n) if n > 0 => Some(String::from_utf8_lossy(&bytes).into_owned()),
            _ => None,
        }
    })
}

struct Kill(Child);

impl Drop for Kill {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
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
    fn an_early_end_says_what_was_printed_last() {
        let error = run(sh("echo Kernel panic"), Duration::from_secs(20)).unwrap_err().to_string();
        assert!(error.contains("ended too early") && error.contains("Kernel panic"), "{error}");
    }
}
