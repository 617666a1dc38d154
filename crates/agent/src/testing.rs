//! A guest whose agent answers as a test says.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::thread;

use serde_json::Value;

/// Connections to an agent that answers each request with the bytes of `script`.
pub(crate) fn guest(script: fn(&Value) -> Vec<u8>) -> impl Fn() -> io::Result<UnixStream> {
    move || {
        let (ours, theirs) = UnixStream::pair()?;
        thread::spawn(move || serve(theirs, script));
        Ok(ours)
    }
}

fn serve(socket: UnixStream, script: fn(&Value) -> Vec<u8>) -> Option<()> {
    let mut answers = socket.try_clone().ok()?;
    let mut requests = BufReader::new(socket);
    requests.read_line(&mut String::new()).ok()?;
    answers.write_all(b"port 1\n").ok()?;
    loop {
        let mut line = Vec::new();
        if requests.read_until(b'\n', &mut line).ok()? == 0 {
            return None;
        }
        let json = line.iter().position(|&byte| byte == b'{')?;
        answers.write_all(&script(&serde_json::from_slice(&line[json..]).ok()?)).ok()?;
    }
}
