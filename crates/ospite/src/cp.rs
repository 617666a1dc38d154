//! `ospite cp`: files and folders between host and guest.

use std::io::{self, IsTerminal};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use agent::{Copied, Progress};
use serde::Serialize;

use crate::cli::CpArgs;
use crate::exit::Code;
use crate::failure::Failure;
use crate::guest;

/// How often a person is told how far it is.
const TELL: Duration = Duration::from_millis(200);

/// One end of a copy.
enum Place<'a> {
    Host(&'a Path),
    Guest { vm: &'a str, path: &'a str },
}

/// `VM:/path` is in a guest. The VM's part holds no colon; a file of the host that looks like it is
/// written with a slash before its first colon.
fn place(word: &str) -> Place<'_> {
    match word.split_once(":/") {
        Some((vm, _)) if !vm.is_empty() && !Path::new(word).exists() => {
            Place::Guest { vm, path: &word[vm.len() + 1..] }
        }
        _ => Place::Host(Path::new(word)),
    }
}

/// What is printed.
#[derive(Serialize)]
struct Answer {
    bytes: u64,
    files: u64,
    seconds: f64,
    bytes_per_second: u64,
}

/// Copies.
pub fn cp(args: &CpArgs) -> Result<Code, Failure> {
    let progress = Progress::default();
    let copied = match (place(&args.source), place(&args.destination)) {
        (Place::Host(from), Place::Guest { vm, path }) => {
            let agent = guest::agent(vm, args.wait)?;
            let total = agent::size(from).map_err(|error| failure(&error))?;
            show(&progress, Some(total), || agent::to_guest(&agent, from, path, &progress))
        }
        (Place::Guest { vm, path }, Place::Host(to)) => {
            let agent = guest::agent(vm, args.wait)?;
            show(&progress, None, || agent::from_guest(&agent, path, to, &progress))
        }
        _ => {
            return Err(Failure::new(Code::Usage, "one side of a copy is a guest's, and one is the host's")
                .hint("ospite cp FILE VM:/PATH, or ospite cp VM:/PATH FILE"));
        }
    };
    let copied = copied.map_err(|error| failure(&error))?;
    let answer = answer(&copied);
    args.output.print(&answer, |answer| {
        let what = if answer.files == 1 { "file" } else { "files" };
        let (bytes, rate) = (mib(answer.bytes), mib(answer.bytes_per_second));
        format!("{} {what}, {bytes} in {:.2} s, {rate}/s", answer.files, answer.seconds)
    })?;
    Ok(Code::Success)
}

fn answer(copied: &Copied) -> Answer {
    let seconds = copied.time.as_secs_f64();
    let bytes_per_second = (copied.bytes as f64 / seconds.max(1e-6)) as u64;
    Answer { bytes: copied.bytes, files: copied.files, seconds, bytes_per_second }
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn failure(error: &agent::Error) -> Failure {
    let code = if matches!(error, agent::Error::Host { .. }) { Code::Build } else { Code::Internal };
    Failure::from_error(code, error)
}

/// Tells a person on a terminal how far the copy is while `copy` makes it.
fn show<T>(progress: &Progress, total: Option<u64>, copy: impl FnOnce() -> T) -> T {
    if !io::stderr().is_terminal() {
        return copy();
    }
    let (done, ended) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || tell(progress, total, &ended));
        let result = copy();
        drop(done);
        result
    })
}

fn tell(progress: &Progress, total: Option<u64>, ended: &mpsc::Receiver<()>) {
    let started = Instant::now();
    while ended.recv_timeout(TELL) == Err(mpsc::RecvTimeoutError::Timeout) {
        let bytes = progress.bytes();
        let of = total.map(|total| format!(" of {}", mib(total))).unwrap_or_default();
        let rate = mib((bytes as f64 / started.elapsed().as_secs_f64()) as u64);
        eprint!("\r{}{of}, {rate}/s\x1b[K", mib(bytes));
    }
    eprint!("\r\x1b[K");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_and_a_slash_make_a_place_in_a_guest() {
        let guest = |word| match place(word) {
            Place::Guest { vm, path } => Some((vm, path)),
            Place::Host(_) => None,
        };
        assert_eq!(guest("web:/etc/motd"), Some(("web", "/etc/motd")));
        assert_eq!(guest("./socket:/a:/b"), Some(("./socket", "/a:/b")));
        for host in ["file", "./a:b", ":/x", "a:b", "/etc/motd"] {
            assert_eq!(guest(host), None, "{host}");
        }
    }

    #[test]
    fn a_copy_within_the_host_or_between_guests_is_a_usage_error() {
        for (source, destination) in [("a", "b"), ("a:/x", "b:/y")] {
            let output = crate::output::OutputArgs { output: crate::output::Format::Text, json: false };
            let args = CpArgs { source: source.into(), destination: destination.into(), wait: 0, output };
            assert_eq!(cp(&args).unwrap_err().tell(), Code::Usage);
        }
    }
}
