//! Files and folders to and from the guest, as a tar archive through a command there.

use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::command::{Command, Exit, Output, Running, WithInput, WithOutput};
use crate::error::plain;
use crate::{Agent, Error, pack, unpack};

/// How much of the guest's complaints is kept.
const MAX_WORDS: u64 = 4096;

/// How far a copy is. Clones count the same copy.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    bytes: AtomicU64,
    files: AtomicU64,
}

impl Progress {
    /// Bytes of files so far.
    pub fn bytes(&self) -> u64 {
        self.0.bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn add_file(&self) {
        self.0.files.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count<R: Read>(&self, reader: R) -> Counted<R> {
        Counted(reader, self.clone())
    }
}

/// A reader whose bytes are counted.
pub(crate) struct Counted<R>(R, Progress);

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.0.read(bytes)?;
        self.1.0.bytes.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// What was copied.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Copied {
    /// Bytes of files.
    pub bytes: u64,
    /// Files and symbolic links.
    pub files: u64,
    /// How long it took.
    pub time: Duration,
}

impl Copied {
    fn of(progress: &Progress, started: Instant) -> Copied {
        let files = progress.0.files.load(Ordering::Relaxed);
        Copied { bytes: progress.bytes(), files, time: started.elapsed() }
    }
}

fn shell(script: &str, args: &[&str]) -> Command {
    let words = ["sh", "-c", script, "ospite-cp"].iter().chain(args).map(|&word| word.into()).collect();
    Command { words, ..Command::default() }
}

/// How many bytes a copy of `path` to a guest has.
pub fn size(path: &Path) -> Result<u64, Error> {
    pack::size(path)
}

/// Copies a file or folder of the host to `to` in the guest: into it if it is a folder, else under this
/// name.
pub fn to_guest(agent: &Agent, from: &Path, to: &str, progress: &Progress) -> Result<Copied, Error> {
    let started = Instant::now();
    std::fs::symlink_metadata(from).map_err(Error::host(from))?;
    let (folder, name) = match quiet(agent, shell("test -d \"$1\"", &[to]))? {
        true => (to.to_owned(), from.file_name().map(|name| name.to_string_lossy().into_owned())),
        false => split(to),
    };
    let name = name.ok_or_else(|| Error::Guest(format!("{} cannot be a file's name", plain(to))))?;
    let script = "cd -- \"$1\" && exec tar -xpf - --no-same-owner --warning=no-timestamp";
    let running = shell(script, &[&folder]).start(agent, true)?;
    let (from, progress_there) = (from.to_owned(), progress.clone());
    let (packed, result) = mpsc::channel();
    let feed: WithInput = Box::new(move |stream| {
        let buffered = io::BufWriter::with_capacity(1 << 16, stream);
        let _ = packed.send(pack::pack(&from, Path::new(&name), buffered, &progress_there));
    });
    let (exit, words) =
        listen(running, Some(feed), Box::new(|mut out| drop(io::copy(&mut out, &mut io::sink()))))?;
    let result = result.try_recv().unwrap_or(Ok(()));
    // Of a broken connection the guest's complaint is the cause.
    if !matches!(result, Err(Error::Broken(_))) {
        result?;
    }
    succeeded(exit, &words)?;
    Ok(Copied::of(progress, started))
}

/// Copies a file or folder of the guest to `to` in the host: into it if it is a folder, else under this
/// name.
pub fn from_guest(agent: &Agent, from: &str, to: &Path, progress: &Progress) -> Result<Copied, Error> {
    let started = Instant::now();
    let (folder, name) = split(from);
    let name = name.ok_or_else(|| Error::Guest(format!("{} cannot be a file's name", plain(from))))?;
    let to = if to.is_dir() { to.join(&name) } else { to.to_owned() };
    let script = "cd -- \"$1\" && exec tar -cf - --format=gnu --hard-dereference -- \"$2\"";
    let running = shell(script, &[&folder, &name]).start(agent, false)?;
    let progress_there = progress.clone();
    let (unpacked, result) = mpsc::channel();
    let out: WithOutput = Box::new(move |mut output| {
        let result = unpack::unpack(io::BufReader::with_capacity(1 << 16, &mut output), &to, &progress_there);
        if result.is_ok() {
            // What follows an archive's end is padding.
            let _ = io::copy(&mut output, &mut io::sink());
        }
        let _ = unpacked.send(result);
    });
    let (exit, words) = listen(running, None, out)?;
    let result = result.try_recv().unwrap_or(Ok(()));
    // Of an archive that is cut off the guest's complaint is the cause.
    if !matches!(result, Err(Error::Broken(_) | Error::Archive(_))) || words.is_empty() {
        result?;
    }
    succeeded(exit, &words)?;
    Ok(Copied::of(progress, started))
}

/// Folder and name of a path in the guest.
fn split(path: &str) -> (String, Option<String>) {
    let path = path.trim_end_matches('/');
    let (folder, name) = path.rsplit_once('/').unwrap_or((".", path));
    let folder = if folder.is_empty() { "/" } else { folder };
    let name = (!matches!(name, "" | "." | "..")).then(|| name.to_owned());
    (folder.to_owned(), name)
}

/// Whether a command succeeds.
fn quiet(agent: &Agent, command: Command) -> Result<bool, Error> {
    let sink = || -> WithOutput { Box::new(|mut output| drop(io::copy(&mut output, &mut io::sink()))) };
    Ok(command.start(agent, false)?.attend(None, sink(), sink())? == Exit(0))
}

/// Attends a command and keeps what it says on its standard error.
fn listen(running: Running, feed: Option<WithInput>, out: WithOutput) -> Result<(Exit, String), Error> {
    let (heard, words) = mpsc::channel();
    let err = Box::new(move |mut output: Output| {
        let mut bytes = Vec::new();
        let _ = (&mut output).take(MAX_WORDS).read_to_end(&mut bytes);
        let _ = heard.send(bytes);
        let _ = io::copy(&mut output, &mut io::sink());
    });
    let exit = running.attend(feed, out, err)?;
    let words = words.try_recv().unwrap_or_default();
    Ok((exit, String::from_utf8_lossy(&words).into_owned()))
}

fn succeeded(exit: Exit, words: &str) -> Result<(), Error> {
    if exit == Exit(0) {
        return Ok(());
    }
    let first = words.lines().find(|line| !line.is_empty()).unwrap_or("tar failed there");
    Err(Error::Guest(plain(first)))
}
