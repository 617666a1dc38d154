//! The QEMU guest agent protocol (docs/interop/qemu-ga-ref of QEMU): JSON, a line each way.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Error;
use crate::error::plain;

/// The longest answer that is read, in bytes.
const MAX_ANSWER: usize = 1 << 17;
/// The longest answer to the request for a port.
const MAX_PORT_LINE: usize = 32;
/// Ends whatever the agent has half read, and begins its answer to a synchronization.
const DELIMITER: u8 = 0xff;
/// How long a command of the agent may take: none that we use waits for anything.
const ANSWER_TIME: Duration = Duration::from_secs(30);
/// How long an unanswered synchronization waits until the next: an agent that starts late has not seen it.
const SYNC_TIME: Duration = Duration::from_secs(2);

/// Makes a connection to the VM on which a port of its guest can be asked for.
pub trait Connect: Send + Sync {
    /// A new connection.
    fn connect(&self) -> io::Result<UnixStream>;
}

impl<F: Fn() -> io::Result<UnixStream> + Send + Sync> Connect for F {
    fn connect(&self) -> io::Result<UnixStream> {
        self()
    }
}

/// The agent of a guest. Clones are the same agent.
#[derive(Clone)]
pub struct Agent {
    connect: Arc<dyn Connect>,
    /// How long to wait for an agent that does not answer yet.
    patience: Duration,
}

impl Agent {
    /// The agent behind `connect`; a guest that still boots is given `patience` to start it.
    pub fn new(connect: impl Connect + 'static, patience: Duration) -> Agent {
        Agent { connect: Arc::new(connect), patience }
    }

    /// Waits until the agent answers.
    pub fn ready(&self) -> Result<(), Error> {
        self.call("guest-ping", json!({})).map(drop)
    }

    /// Has one command of the agent carried out. The port is ours for so long only, so that several may
    /// talk to one agent.
    pub(crate) fn call(&self, command: &str, arguments: Value) -> Result<Value, Error> {
        let deadline = Instant::now() + self.patience;
        let mut line = self.synchronize(deadline)?;
        line.send(None, &json!({ "execute": command, "arguments": arguments }))?;
        let answer = line.line(Instant::now() + ANSWER_TIME).map_err(|error| self.explain(error))?;
        result(&answer)
    }

    fn synchronize(&self, deadline: Instant) -> Result<Line, Error> {
        loop {
            let (mut line, _) = self.port("agent", deadline)?;
            let until = deadline.min(Instant::now() + SYNC_TIME);
            match line.synchronize(until) {
                Ok(()) => return Ok(line),
                // Too late, or the guest has just restarted.
                Err(Error::Broken(_)) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) => return Err(self.explain(error)),
            }
        }
    }

    fn explain(&self, error: Error) -> Error {
        match error {
            Error::Broken(source) if timed_out(&source) => Error::Silent(self.patience),
            other => other,
        }
    }

    /// A stream to a program in the guest, and the number of its port.
    pub(crate) fn stream(&self) -> Result<(UnixStream, u32), Error> {
        let busy = |error| match error {
            Error::Broken(source) if timed_out(&source) => Error::Busy,
            other => other,
        };
        let (line, port) = self.port("stream", Instant::now() + ANSWER_TIME).map_err(busy)?;
        line.0.set_read_timeout(None).map_err(Error::Broken)?;
        line.0.set_write_timeout(None).map_err(Error::Broken)?;
        Ok((line.0, port))
    }

    fn port(&self, which: &str, deadline: Instant) -> Result<(Line, u32), Error> {
        let mut line = Line(self.connect.connect().map_err(Error::Connect)?);
        line.0.set_write_timeout(Some(ANSWER_TIME)).map_err(Error::Broken)?;
        line.0.write_all(format!("{which}\n").as_bytes()).map_err(Error::Broken)?;
        let answer = line.read_until(b'\n', MAX_PORT_LINE, deadline)?;
        let number = std::str::from_utf8(&answer).ok().and_then(|text| text.strip_prefix("port "));
        let number = number.and_then(|number| number.parse().ok());
        Ok((line, number.ok_or_else(|| Error::Nonsense("no port".into()))?))
    }
}

fn timed_out(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// A port that is ours.
struct Line(UnixStream);

impl Line {
    /// Throws away what is left of earlier conversations.
    fn synchronize(&mut self, deadline: Instant) -> Result<(), Error> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed) ^ std::process::id() << 8;
        let request = json!({ "execute": "guest-sync-delimited", "arguments": { "id": id } });
        self.send(Some(DELIMITER), &request)?;
        loop {
            self.read_until(DELIMITER, MAX_ANSWER, deadline)?;
            let answer = self.line(deadline)?;
            if result(&answer).is_ok_and(|value| value == json!(id)) {
                return Ok(());
            }
        }
    }

    fn send(&mut self, first: Option<u8>, message: &Value) -> Result<(), Error> {
        let mut bytes = Vec::from_iter(first);
        bytes.extend(message.to_string().bytes());
        bytes.push(b'\n');
        self.0.write_all(&bytes).map_err(Error::Broken)
    }

    fn line(&mut self, deadline: Instant) -> Result<Vec<u8>, Error> {
        self.read_until(b'\n', MAX_ANSWER, deadline)
    }

    /// What comes before `end`. A byte at a time: answers are short, and nothing behind them is taken.
    fn read_until(&mut self, end: u8, limit: usize, deadline: Instant) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        let mut byte = [0];
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.0.set_read_timeout(Some(left)).map_err(Error::Broken)?;
            self.0.read_exact(&mut byte).map_err(Error::Broken)?;
            match byte {
                [byte] if byte == end => return Ok(bytes),
                _ if bytes.len() == limit => return Err(Error::Nonsense("it does not end".into())),
                [byte] => bytes.push(byte),
            }
        }
    }
}

/// The value of an answer.
fn result(answer: &[u8]) -> Result<Value, Error> {
    let nonsense = || Error::Nonsense(plain(&String::from_utf8_lossy(answer)));
    let mut value: Value = serde_json::from_slice(answer).map_err(|_| nonsense())?;
    let answer = value.as_object_mut().ok_or_else(nonsense)?;
    if let Some(value) = answer.remove("return") {
        return Ok(value);
    }
    let reason = answer.get("error").and_then(|error| error.get("desc")).and_then(Value::as_str);
    Err(reason.map_or_else(nonsense, |reason| Error::Refused(plain(reason))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::guest;

    fn agent(script: fn(&Value) -> Vec<u8>) -> Agent {
        Agent::new(guest(script), Duration::from_millis(300))
    }

    #[test]
    fn an_answer_comes_after_whatever_was_left_over() {
        let agent = agent(|request| match request["execute"].as_str() {
            Some("guest-sync-delimited") => {
                let id = &request["arguments"]["id"];
                format!("left over}}\n\u{0}{{}}\n\u{ff}{{\"return\":1}}\n\u{ff}{{\"return\":{id}}}\n")
                    .chars()
                    .map(|c| c as u8)
                    .collect()
            }
            _ => b"{\"return\":{\"pid\":7}}\n".to_vec(),
        });
        assert_eq!(agent.call("guest-exec", json!({})).unwrap(), json!({ "pid": 7 }));
    }

    #[test]
    fn refusals_nonsense_floods_and_silence_are_errors_that_say_so() {
        fn sync(request: &Value) -> Option<Vec<u8>> {
            let id = request["arguments"].get("id")?;
            let mut answer = vec![DELIMITER];
            answer.extend(format!("{{\"return\":{id}}}\n").bytes());
            Some(answer)
        }
        let says = |script| agent(script).ready().unwrap_err().to_string();
        let refused =
            says(|request| sync(request).unwrap_or(b"{\"error\":{\"desc\":\"no\\u001b[2J\"}}\n".to_vec()));
        assert_eq!(refused, "the guest agent refuses: no\\u{1b}[2J");
        assert!(says(|request| sync(request).unwrap_or(b"[1]\n".to_vec())).contains("makes no sense"));
        assert!(says(|request| sync(request).unwrap_or(vec![b'x'; 2 * MAX_ANSWER])).contains("not end"));
        assert!(says(|_| vec![]).contains("does not answer"));
        assert!(says(|_| vec![b'x'; 2 * MAX_ANSWER]).contains("not end"));
    }
}
