//! What is said on a VM's control socket: a line of JSON each way.
//!
//! ```json
//! { "version": 1, "request": { "vm": "power-button" } }
//! { "version": 1, "answer": { "status": { "state": "running", "resets": 0, ... } } }
//! ```
//!
//! A connection may ask one thing after another. After `console` and `agent` are answered by `stream` it is
//! no longer lines, but the bytes of a console, or what [`vmm::guest_ports`] makes of it: a port of the guest.

use std::io::{self, BufRead, Read, Write};

use serde::{Deserialize, Serialize};

/// The version of this protocol. A request or field that is added needs no new one.
pub const VERSION: u32 = 1;
/// The longest line, in bytes.
pub const LONGEST: u64 = 64 << 10;

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Something that every VM can be asked.
    Vm(vmm::Request),
    /// This connection becomes the console. It begins with the last `lines` lines that the guest printed.
    Console {
        /// How many; what is not in memory any more is left out.
        lines: usize,
    },
    /// This connection becomes one to [`vmm::guest_ports`].
    Agent,
}

/// The answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// How things stand now.
    Status(Status),
    /// From the next byte on this is a stream.
    Stream,
    /// It cannot be done, and why.
    Error(String),
}

/// How a VM is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// What every VM can tell.
    #[serde(flatten)]
    pub vm: vmm::Status,
    /// The engine that was chosen.
    pub engine: String,
}

#[derive(Serialize, Deserialize)]
struct Asked {
    version: u32,
    request: Request,
}

#[derive(Serialize, Deserialize)]
struct Answered {
    version: u32,
    answer: Answer,
}

fn invalid(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

/// A line that is not too long; `None` at the end.
fn read_line(from: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    from.take(LONGEST).read_until(b'\n', &mut line)?;
    match line.last() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(line)),
        Some(_) if line.len() as u64 == LONGEST => Err(invalid(format!("a line is at most {LONGEST} bytes"))),
        Some(_) => Err(invalid("the line has no end")),
    }
}

fn parse<T: for<'a> Deserialize<'a>>(line: &[u8]) -> io::Result<T> {
    let value: serde_json::Value =
        serde_json::from_slice(line).map_err(|error| invalid(error.to_string()))?;
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(version) if version == u64::from(VERSION) => {
            serde_json::from_value(value).map_err(|error| invalid(error.to_string()))
        }
        Some(version) => {
            Err(invalid(format!("version {version} was sent; version {VERSION} is spoken here")))
        }
        None => Err(invalid("the version is missing")),
    }
}

fn write_line(to: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// The next request; `None` at the end.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] where it is none, in words.
pub fn read_request(from: &mut impl BufRead) -> io::Result<Option<Request>> {
    read_line(from)?.map(|line| parse(&line).map(|asked: Asked| asked.request)).transpose()
}

/// Asks.
pub fn write_request(to: &mut impl Write, request: Request) -> io::Result<()> {
    write_line(to, &Asked { version: VERSION, request })
}

/// The next answer.
///
/// # Errors
/// What the host says, or that there is no more or no valid answer.
pub fn read_answer(from: &mut impl BufRead) -> io::Result<Answer> {
    let line = read_line(from)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    parse(&line).map(|answered: Answered| answered.answer)
}

/// Answers.
pub fn write_answer(to: &mut impl Write, answer: Answer) -> io::Result<()> {
    write_line(to, &Answered { version: VERSION, answer })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str) -> io::Result<Option<Request>> {
        read_request(&mut text.as_bytes())
    }

    #[test]
    fn requests_and_answers_are_lines_that_people_can_read_and_write() {
        for (text, asked) in [
            (r#"{"version":1,"request":{"vm":"power-button"}}"#, Request::Vm(vmm::Request::PowerButton)),
            (r#"{"version":1,"request":{"console":{"lines":7}}}"#, Request::Console { lines: 7 }),
            (r#"{"version":1,"request":"agent"}"#, Request::Agent),
        ] {
            let line = format!("{text}\n");
            assert_eq!(request(&line).unwrap(), Some(asked));
            let mut written = Vec::new();
            write_request(&mut written, asked).unwrap();
            assert_eq!(String::from_utf8(written).unwrap(), line);
        }
        assert_eq!(request("").unwrap(), None);
    }

    #[test]
    fn a_status_survives_its_line() {
        let vm = vmm::Status {
            state: vmm::State::Paused,
            resets: 3,
            uptime: std::time::Duration::from_millis(1500),
        };
        for answer in [Answer::Status(Status { vm, engine: "soft".into() }), Answer::Stream] {
            let mut line = Vec::new();
            write_answer(&mut line, answer.clone()).unwrap();
            assert_eq!(read_answer(&mut &line[..]).unwrap(), answer);
        }
    }

    #[test]
    fn what_is_no_request_is_told_why() {
        for (line, why) in [
            ("hello\n".to_owned(), "expected value"),
            ("{}\n".into(), "version is missing"),
            ("{\"version\":2,\"request\":\"agent\"}\n".into(), "version 1 is spoken"),
            ("{\"version\":1,\"request\":\"fly\"}\n".into(), "unknown variant `fly`"),
            ("{\"version\":1,\"request\":{\"console\":{\"lines\":-1}}}\n".into(), "invalid value"),
            ("{\"version\":1".into(), "no end"),
            ("x".repeat(1 << 20), "at most"),
            ("[".repeat(60_000) + "\n", "recursion"),
        ] {
            let error = request(&line).unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
        }
    }
}
