//! A command in the guest, its streams, its end.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::plain;
use crate::{Agent, Error};

const SCRIPT: &str = include_str!("command.sh");
/// What the script exits with if the command could not be started at all.
const NOT_STARTED: u8 = 125;
/// How long an output is to be quiet after the command's end for us to leave it: what the command has
/// left behind in the background may hold it for ever.
const QUIET: Duration = Duration::from_millis(300);
/// The guest is asked for the command's end so often at first, and later less so.
const FIRST_LOOK: Duration = Duration::from_millis(30);
const LAST_LOOK: Duration = Duration::from_millis(1000);

/// What to run.
#[derive(Clone, Debug, Default)]
pub struct Command {
    /// The command and its arguments.
    pub words: Vec<String>,
    /// Variables for its environment, `NAME=VALUE`.
    pub env: Vec<String>,
    /// As whom; as root where it is absent.
    pub user: Option<String>,
    /// Where; the user's home where it is absent.
    pub dir: Option<String>,
}

/// The command's exit status, as a shell gives it: 128 and more for signals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit(pub u8);

/// What a command can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGINT
    Int,
    /// SIGTERM
    Term,
    /// SIGHUP
    Hup,
    /// SIGKILL
    Kill,
}

/// A command under way.
pub struct Running {
    agent: Agent,
    pid: i64,
    folder: String,
    exited: Arc<AtomicBool>,
    outputs: Vec<UnixStream>,
    input: Option<UnixStream>,
}

/// Writes the input, on a thread of its own; its return is the input's end.
pub type WithInput = Box<dyn FnOnce(&UnixStream) + Send>;
/// Reads an output, on a thread of its own. What is not read to its end breaks the command's pipe.
pub type WithOutput = Box<dyn FnOnce(Output) + Send>;

impl Command {
    /// Starts it. Without an input its standard input is empty.
    pub fn start(&self, agent: &Agent, with_input: bool) -> Result<Running, Error> {
        agent.ready()?;
        let (out, out_port) = agent.stream()?;
        let (err, err_port) = agent.stream()?;
        let input = with_input.then(|| agent.stream()).transpose()?;
        let in_port = input.as_ref().map_or("-".into(), |(_, port)| port.to_string());
        let folder = format!("/run/ospite-exec.{}", unique());
        let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
        let mut args = vec!["-c".into(), SCRIPT.into(), "ospite-exec".into(), folder.clone()];
        args.extend([out_port.to_string(), err_port.to_string(), in_port]);
        args.extend([or_dash(&self.user), or_dash(&self.dir), self.env.len().to_string()]);
        args.extend(self.env.iter().chain(&self.words).cloned());
        let pid = spawn(agent, &args)?;
        Ok(Running {
            agent: agent.clone(),
            pid,
            folder,
            exited: Arc::default(),
            outputs: vec![out, err],
            input: input.map(|(stream, _)| stream),
        })
    }
}

/// A name that no other command of this guest has.
fn unique() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("{}.{}", std::process::id(), now.as_nanos())
}

fn spawn(agent: &Agent, args: &[String]) -> Result<i64, Error> {
    let answer = agent.call("guest-exec", json!({ "path": "/bin/sh", "arg": args }))?;
    let pid = answer.get("pid").and_then(Value::as_i64);
    pid.ok_or_else(|| Error::Nonsense(plain(&answer.to_string())))
}

/// The answer to guest-exec-status, as far as we use it.
#[derive(Deserialize)]
struct Status {
    exited: bool,
    exitcode: Option<i64>,
    signal: Option<i64>,
}

/// Tells a command something from another thread.
#[derive(Clone)]
pub struct Signaller {
    agent: Agent,
    folder: String,
}

impl Signaller {
    /// Sends a signal to the command and to all it has started.
    pub fn send(&self, signal: Signal) -> Result<(), Error> {
        let name = match signal {
            Signal::Int => "INT",
            Signal::Term => "TERM",
            Signal::Hup => "HUP",
            Signal::Kill => "KILL",
        };
        let script = r#"pid=$(cat "$0/pid") && kill -s "$1" -- "-$pid""#;
        let args = ["-c", script, &self.folder, name].map(String::from);
        spawn(&self.agent, &args).map(drop)
    }
}

/// What a command writes. It ends with the command, if not before.
pub struct Output {
    stream: UnixStream,
    exited: Arc<AtomicBool>,
}

impl Read for Output {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            let exited = self.exited.load(Ordering::SeqCst);
            match self.stream.read(bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if exited {
                        return Ok(0);
                    }
                }
                other => return other,
            }
        }
    }
}

impl Running {
    /// The means to tell it something.
    pub fn signaller(&self) -> Signaller {
        Signaller { agent: self.agent.clone(), folder: self.folder.clone() }
    }

    /// Has its streams served, each on a thread of its own, and waits for its end and that of its outputs.
    pub fn attend(
        mut self,
        feed: Option<WithInput>,
        out: WithOutput,
        err: WithOutput,
    ) -> Result<Exit, Error> {
        if let (Some(input), Some(feed)) = (self.input.take(), feed) {
            // It may wait for a reader that never comes; nobody waits for it.
            start(move || {
                feed(&input);
                let _ = input.shutdown(std::net::Shutdown::Write);
                // The stream is there until the guest has read it all.
                let _ = (&input).read(&mut [0]);
            })?;
        }
        let (done, ended) = mpsc::channel();
        for (stream, serve) in self.outputs.drain(..).zip([out, err]) {
            stream.set_read_timeout(Some(QUIET)).map_err(Error::Broken)?;
            let (done, output) = (done.clone(), Output { stream, exited: self.exited.clone() });
            start(move || {
                serve(output);
                let _ = done.send(()); // who waited may have given up
            })?;
        }
        let exit = self.wait(&ended)?;
        Ok(exit)
    }

    fn wait(&self, ended: &Receiver<()>) -> Result<Exit, Error> {
        let (mut open, mut pause) = (2, FIRST_LOOK);
        loop {
            match ended.recv_timeout(pause) {
                Ok(()) => {
                    open -= 1;
                    pause = FIRST_LOOK;
                    if open > 0 {
                        continue;
                    }
                }
                Err(RecvTimeoutError::Timeout) => pause = (pause * 3 / 2).min(LAST_LOOK),
                Err(RecvTimeoutError::Disconnected) => thread::sleep(FIRST_LOOK),
            }
            let Some(exit) = self.look()? else { continue };
            self.exited.store(true, Ordering::SeqCst);
            let before = Instant::now();
            let never_opened = open == 2;
            ended.iter().take(open).for_each(drop);
            if exit.0 == NOT_STARTED && never_opened && before.elapsed() >= QUIET {
                let why = "it needs /run, mkfifo, setsid and the driver of the virtio console";
                return Err(Error::NotStarted(why.into()));
            }
            return Ok(exit);
        }
    }

    /// Its exit status, once it has ended.
    fn look(&self) -> Result<Option<Exit>, Error> {
        let answer = self.agent.call("guest-exec-status", json!({ "pid": self.pid }))?;
        let nonsense = || Error::Nonsense(plain(&answer.to_string()));
        let status = Status::deserialize(&answer).map_err(|_| nonsense())?;
        let code = match status {
            Status { exited: false, .. } => return Ok(None),
            Status { signal: Some(signal @ 1..128), .. } => 128 + signal,
            Status { exitcode: Some(code @ 0..256), .. } => code,
            _ => return Err(nonsense()),
        };
        Ok(Some(Exit(code as u8)))
    }
}

fn start(body: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    thread::Builder::new().name("stream".into()).spawn(body).map(drop).map_err(Error::Broken)
}
