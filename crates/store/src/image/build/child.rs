//! Running the tools of a build.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader};
use std::ops::ControlFlow;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use super::{Listener, Progress};
use crate::image::Error;

/// How to start a tool.
pub(super) struct Tools {
    /// What makes the namespaces: a program and its arguments.
    pub(super) prefix: Vec<OsString>,
    /// `PATH`.
    pub(super) path: OsString,
}

impl Tools {
    /// A tool in namespaces of its own, in the folder `folder`.
    pub(super) fn command(&self, tool: &str, folder: &Path) -> Command {
        let mut command = Command::new(&self.prefix[0]);
        command.args(&self.prefix[1..]).arg("--").arg(tool).current_dir(folder);
        command.env("PATH", &self.path).env("LC_ALL", "C.UTF-8").env("HOME", "/root");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        // Hooks start elsewhere.
        command.env("TMPDIR", folder.join("tmp")).env("OSPITE_BUILD", folder);
        command
    }
}

/// How often somebody who waits is asked whether to go on.
const PULSE: Duration = Duration::from_millis(200);
/// How much of what a tool has printed is told when it fails.
const TAIL: usize = 15;

/// Runs a tool to its end; `what` is what it does.
pub(super) fn run(
    mut command: Command,
    what: &'static str,
    folder: &Path,
    progress: Listener<'_>,
) -> Result<(), Error> {
    let failed = |source| Error::Start { what, source };
    let (reader, writer) = io::pipe().map_err(failed)?;
    command.stdin(Stdio::null()).stdout(writer.try_clone().map_err(failed)?).stderr(writer);
    // Ctrl-C is for us to hear: we end the build.
    command.process_group(0);
    let mut child = command.spawn().map_err(failed)?;
    drop(command); // it holds the pipe's other end
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|count| count != 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            line.clear();
            if sender.send(text).is_err() {
                break;
            }
        }
    });
    let mut printed = Vec::new();
    let stopped = follow(&lines, &mut printed, progress).is_break();
    if stopped {
        let _ = child.kill(); // and with it its namespace; it may have ended
    }
    let status = child.wait().map_err(failed)?;
    match (stopped, status.success()) {
        (true, _) => Err(Error::Stopped),
        (false, true) => Ok(()),
        (false, false) => Err(why(what, folder, &printed)),
    }
}

fn follow(
    lines: &mpsc::Receiver<String>,
    printed: &mut Vec<String>,
    progress: Listener<'_>,
) -> ControlFlow<()> {
    loop {
        match lines.recv_timeout(PULSE) {
            Ok(line) => {
                progress(step(&line).map_or(Progress::Line(&line), Progress::Step))?;
                printed.push(line);
            }
            Err(RecvTimeoutError::Timeout) => progress(Progress::Alive)?,
            Err(RecvTimeoutError::Disconnected) => return ControlFlow::Continue(()),
        }
    }
}

/// What mmdebstrap says that people want to know, and in which words.
const STEPS: [(&str, &str); 5] = [
    ("I: running apt-get update", "reading the lists of packages"),
    ("I: downloading packages", "downloading packages"),
    ("I: extracting archives", "unpacking essential packages"),
    ("I: installing essential", "installing essential packages"),
    ("I: installing remaining", "installing all other packages"),
];

/// The step that a line says has begun. Our own scripts say so by `step: `.
fn step(line: &str) -> Option<&str> {
    let known = STEPS.iter().find(|(start, _)| line.starts_with(start)).map(|(_, step)| *step);
    known.or_else(|| line.strip_prefix("step: "))
}

/// What the tool's own words say of why it failed.
fn why(what: &'static str, folder: &Path, printed: &[String]) -> Error {
    if printed.iter().any(|line| line.contains("No space left on device")) {
        return Error::Full { path: folder.into() };
    }
    let find = |start: &str| printed.iter().rev().find_map(|line| line.strip_prefix(start));
    if let Some(package) = find("E: Unable to locate package ") {
        return Error::Package { package: package.into() };
    }
    if let Some(needed) = find("too-small: ").and_then(|kib| kib.parse::<u64>().ok()) {
        return Error::DoesNotFit { mib: needed.div_ceil(1024) };
    }
    let network =
        ["Temporary failure resolving", "Could not resolve", "Could not connect", "Network is unreachable"];
    if printed.iter().any(|line| network.iter().any(|sign| line.contains(sign))) {
        return Error::Network { tail: tail(printed) };
    }
    Error::Step { what, tail: tail(printed) }
}

/// The last lines, indented.
fn tail(printed: &[String]) -> String {
    let useful: Vec<&String> = printed.iter().filter(|line| !line.is_empty()).collect();
    let last = &useful[useful.len().saturating_sub(TAIL)..];
    last.iter().map(|line| format!("\n    {line}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn sh(script: &str, progress: Listener<'_>) -> Result<(), Error> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        run(command, "try", Path::new("/x"), progress)
    }

    fn fails(script: &str) -> Error {
        sh(script, &mut |_| ControlFlow::Continue(())).unwrap_err()
    }

    #[test]
    fn steps_and_lines_are_told_in_order() {
        let mut seen = Vec::new();
        sh("echo I: downloading packages with apt...; echo more >&2; echo step: x", &mut |progress| {
            seen.push(format!("{progress:?}"));
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(seen, ["Step(\"downloading packages\")", "Line(\"more\")", "Step(\"x\")"]);
    }

    #[test]
    fn a_tool_that_fails_is_quoted_and_what_people_can_mend_is_named() {
        let error = fails("echo a bad thing; exit 3").to_string();
        assert!(error.contains("cannot try") && error.contains("\n    a bad thing"), "{error}");
        assert!(
            matches!(fails("echo E: Unable to locate package nginy; exit 1"), Error::Package { package } if package == "nginy")
        );
        assert!(matches!(fails("echo cp: No space left on device; exit 1"), Error::Full { .. }));
        assert!(matches!(fails("echo too-small: 2047; exit 1"), Error::DoesNotFit { mib: 2 }));
        assert!(matches!(fails("echo Temporary failure resolving mirror; exit 1"), Error::Network { .. }));
    }

    #[test]
    fn whoever_waits_can_end_it_while_it_is_silent() {
        let start = Instant::now();
        let stopped = sh("exec sleep 60", &mut |progress| match progress {
            Progress::Alive => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        });
        assert!(matches!(stopped, Err(Error::Stopped)) && start.elapsed() < Duration::from_secs(30));
    }
}
