//! Whether a VM does its work.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use agent::{Command, Output, Signal};
use net::{Protocol, Publish};
use store::vm::{Folder, Health, Probe};

use crate::guest;

/// How long a command may take to end once it was killed.
const STOPPED: Duration = Duration::from_secs(5);
/// The longest first line of an answer.
const LINE: usize = 256;

/// Tries once, through the ports that are published; `run` runs a command in the guest.
///
/// # Errors
/// Why the VM cannot be said to do its work, for a person.
pub fn try_once(
    health: &Health,
    published: &[Publish],
    run: impl FnOnce(&[String], Duration) -> Result<(), String>,
) -> Result<(), String> {
    let patience = Duration::from_secs(health.timeout);
    match &health.probe {
        Probe::Command(command) => run(command, patience),
        Probe::Tcp(port) => connect(*port, published, patience)
            .and_then(|stream| greets(stream).map_err(|error| format!("port {port} {}", told(&error)))),
        Probe::Http(port, path) => connect(*port, published, patience).and_then(|stream| {
            status(stream, path, patience)
                .map_err(|error| format!("port {port} {}", told(&error)))
                .and_then(judged)
        }),
    }
}

/// Runs a command of a health check in a VM, whose output nobody reads.
pub fn in_guest(folder: &Folder) -> impl FnOnce(&[String], Duration) -> Result<(), String> {
    |words, patience| {
        let agent = guest::agent(folder.name().as_str(), patience.as_secs())
            .map_err(|failure| failure.message().to_owned())?;
        let command = Command { words: words.to_vec(), env: Vec::new(), user: None, dir: None };
        let told = |error: agent::Error| vmm::chain(&error);
        let running = command.start(&agent, false).map_err(told)?;
        let signaller = running.signaller();
        let attend = move || running.attend(None, Box::new(ignore), Box::new(ignore));
        let kill = move || drop(signaller.send(Signal::Kill)); // it may have ended meanwhile
        let exit =
            within(patience, attend, kill).ok_or_else(|| format!("{:?} does not end", words.join(" ")))?;
        let exit = exit.map_err(told)?;
        if exit.0 == 0 { Ok(()) } else { Err(format!("{:?} exits with {}", words.join(" "), exit.0)) }
    }
}

/// What `work` returns, if it does within `patience`, or soon after `stop`. A guest whose disk hangs, or that means
/// harm, has commands that cannot be ended: they are left behind.
fn within<T: Send + 'static>(
    patience: Duration,
    work: impl FnOnce() -> T + Send + 'static,
    stop: impl FnOnce() + Send + 'static,
) -> Option<T> {
    let (done, end) = mpsc::channel();
    thread::spawn(move || done.send(work()));
    end.recv_timeout(patience).ok().or_else(|| {
        thread::spawn(stop);
        end.recv_timeout(STOPPED).ok()
    })
}

fn ignore(mut output: Output) {
    let _ = io::copy(&mut output, &mut io::sink()); // a check is what it returns, not what it says
}

/// The address on this host that leads to the guest's port.
fn address(port: u16, published: &[Publish]) -> Option<SocketAddr> {
    let leads = |publish: &&Publish| publish.guest == port && publish.protocol == Protocol::Tcp;
    let publish = published.iter().find(leads)?;
    let address = match publish.address {
        None => Ipv4Addr::LOCALHOST.into(),
        Some(any @ IpAddr::V4(_)) if any.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        Some(any @ IpAddr::V6(_)) if any.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        Some(address) => address,
    };
    Some(SocketAddr::new(address, publish.host))
}

fn connect(port: u16, published: &[Publish], patience: Duration) -> Result<TcpStream, String> {
    let address = address(port, published).ok_or_else(|| format!("port {port} is not published"))?;
    let opened = TcpStream::connect_timeout(&address, patience).and_then(|stream| {
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(stream)
    });
    opened.map_err(|error| format!("port {port} ({address}) {}", told(&error)))
}

fn told(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::ConnectionRefused => "is closed".into(),
        ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof => "closes without a word".into(),
        ErrorKind::TimedOut | ErrorKind::WouldBlock => "does not answer".into(),
        _ => format!("fails: {error}"),
    }
}

/// A published port accepts before anybody in the guest does, so only what it says tells that it is there.
fn greets(mut stream: TcpStream) -> io::Result<()> {
    match stream.read(&mut [0])? {
        0 => Err(ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

/// The first line of what an HTTP server answers (RFC 9112, 4). All of it has to come in time, and not only each
/// byte.
fn status(mut stream: TcpStream, path: &str, patience: Duration) -> io::Result<String> {
    let deadline = Instant::now() + patience;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < LINE && byte[0] != b'\n' {
        let left = deadline.saturating_duration_since(Instant::now());
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&line).trim_end().into())
}

fn judged(line: String) -> Result<(), String> {
    let code = line.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)?.parse::<u16>().ok());
    match code {
        Some(200..400) => Ok(()),
        Some(_) => Err(format!("answers {line:?}")),
        None => Err(format!("answers {line:?}, which is no HTTP")),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use store::vm::OnFailure;

    use super::*;

    fn check(probe: Probe, timeout: u64) -> Health {
        let on_failure = OnFailure::None;
        Health { probe, interval: 1, timeout, retries: 1, start_period: 0, on_failure }
    }

    fn served(answer: &'static [u8], probe: Probe) -> Result<(), String> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().port();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            if !answer.is_empty() {
                stream.write_all(answer).unwrap();
                let _ = stream.read(&mut [0; 512]);
            }
        });
        let publish = Publish { address: None, host, guest: 80, protocol: Protocol::Tcp };
        let health = check(probe, 5);
        let result = try_once(&health, &[publish], |_, _| unreachable!());
        server.join().unwrap();
        result
    }

    #[test]
    fn who_answers_is_well_and_who_does_not_is_told_apart() {
        let http = || Probe::Http(80, "/".into());
        served(b"HTTP/1.1 200 OK\r\n\r\n", http()).unwrap();
        served(b"HTTP/1.0 302 Found\r\n\r\n", http()).unwrap();
        assert!(served(b"HTTP/1.1 503 Oh\r\n\r\n", http()).unwrap_err().contains("503"));
        assert!(served(b"220 mail ESMTP\r\n", http()).unwrap_err().contains("no HTTP"));
        assert!(served(b"", http()).is_err());
        served(b"220 mail ESMTP\r\n", Probe::Tcp(80)).unwrap();
        assert!(served(b"", Probe::Tcp(80)).unwrap_err().contains("without a word"));
    }

    #[test]
    fn who_answers_bit_by_bit_does_not_keep_the_check() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            while stream.write_all(b"H").is_ok() {
                thread::sleep(Duration::from_millis(200));
            }
        });
        let publish = Publish { address: None, host, guest: 80, protocol: Protocol::Tcp };
        let began = Instant::now();
        let result = try_once(&check(Probe::Http(80, "/".into()), 1), &[publish], |_, _| unreachable!());
        assert!(result.unwrap_err().contains("does not answer"));
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    }

    #[test]
    fn what_cannot_be_ended_is_left_behind() {
        let moment = Duration::from_millis(50);
        let (stop, stopped) = mpsc::channel();
        let ends = move || stopped.recv().unwrap();
        assert_eq!(within(moment, ends, move || stop.send(7).unwrap()), Some(7));
        assert_eq!(within(moment, || 1, || unreachable!()), Some(1));
        let began = Instant::now();
        assert_eq!(within(moment, || thread::sleep(Duration::from_secs(3600)), || {}), None);
        assert!(began.elapsed() < STOPPED * 3);
    }

    #[test]
    fn a_port_that_is_not_published_cannot_be_asked() {
        let health = check(Probe::Tcp(80), 1);
        assert!(try_once(&health, &[], |_, _| Ok(())).unwrap_err().contains("not published"));
        let command = Health { probe: Probe::Command(vec!["true".into()]), ..health };
        try_once(&command, &[], |_, _| Ok(())).unwrap();
    }
}
