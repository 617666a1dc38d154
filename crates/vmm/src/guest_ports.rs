//! A socket becomes a port of the guest: its agent's, or a stream for a command that the agent starts.
//!
//! The client says which one with a line, [`AGENT`] or [`STREAM`]. Once the port is the client's, the
//! answer is a line `port NUMBER`; from there on the socket is the port. The end of what the client sends
//! is the end of what the guest reads (not for the agent, which has none); the end of what the guest sends
//! is ours. A client that goes away gives the port back.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use machine::{ConsolePorts, PortStream};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

/// Asks for the agent's port.
pub const AGENT: &str = "agent";
/// Asks for a stream.
pub const STREAM: &str = "stream";

/// The longest request line, in bytes.
const MAX_REQUEST: usize = 16;
const PIECE: usize = 1 << 15;
/// How often a client that waits for its turn is looked after.
const TURN: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };

/// Serves one client on a thread of its own.
pub fn serve(ports: &ConsolePorts, client: UnixStream) -> io::Result<()> {
    let ports = ports.clone();
    let body = move || {
        if let Err(error) = attend(&ports, client) {
            log::debug!("a client of the guest's ports: {error}");
        }
    };
    machine::spawn("guest-port", body).map(drop)
}

fn attend(ports: &ConsolePorts, mut client: UnixStream) -> io::Result<()> {
    let agent = match request(&mut client)?.as_str() {
        AGENT => true,
        STREAM => false,
        other => return Err(io::Error::other(format!("{other:?} is no port"))),
    };
    let Some(port) = turn(ports, agent, &client)? else { return Ok(()) };
    client.write_all(format!("port {}\n", port.number()).as_bytes())?;
    client.set_nonblocking(true)?;
    Pump { client, port, to_client: Vec::new(), to_port: Vec::new(), client_ended: false, told_end: false }
        .run()
}

/// Reads up to the end of the line and not a byte more.
fn request(client: &mut UnixStream) -> io::Result<String> {
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        client.read_exact(&mut byte)?;
        match byte {
            [b'\n'] => return String::from_utf8(line).map_err(io::Error::other),
            _ if line.len() == MAX_REQUEST => return Err(io::Error::other("the request does not end")),
            [byte] => line.push(byte),
        }
    }
}

/// Waits for a free port; `None` if the client does not.
fn turn(ports: &ConsolePorts, agent: bool, client: &UnixStream) -> io::Result<Option<PortStream>> {
    loop {
        if let Some(port) = if agent { ports.agent()? } else { ports.stream()? } {
            return Ok(Some(port));
        }
        let mut fds = [PollFd::new(client, PollFlags::RDHUP)];
        if wait(&mut fds, Some(&TURN))? && !fds[0].revents().is_empty() {
            return Ok(None);
        }
    }
}

fn wait(fds: &mut [PollFd<'_>], timeout: Option<&Timespec>) -> io::Result<bool> {
    match poll(fds, timeout) {
        Err(rustix::io::Errno::INTR) => Ok(false),
        other => Ok(other? > 0),
    }
}

struct Pump {
    client: UnixStream,
    port: PortStream,
    to_client: Vec<u8>,
    to_port: Vec<u8>,
    client_ended: bool,
    told_end: bool,
}

impl Pump {
    fn run(mut self) -> io::Result<()> {
        loop {
            self.port.clear_changed();
            while self.guest_to_client()? || self.client_to_guest()? {}
            if self.told_end {
                return Ok(()); // what the client has yet to read is in its socket
            }
            let mut interest = PollFlags::empty();
            interest.set(PollFlags::IN, !self.client_ended && self.to_port.is_empty());
            interest.set(PollFlags::OUT, !self.to_client.is_empty());
            let changed = self.port.changed();
            let mut fds = [PollFd::new(&self.client, interest), PollFd::new(&changed, PollFlags::IN)];
            wait(&mut fds, None)?;
            // Gone for good, both ways: a half that is closed is no hang-up.
            if fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR) {
                return Ok(());
            }
        }
    }

    /// One step from the guest to the client; whether there was one.
    fn guest_to_client(&mut self) -> io::Result<bool> {
        if self.to_client.is_empty() {
            self.to_client.resize(PIECE, 0);
            let count = self.port.receive(&mut self.to_client);
            self.to_client.truncate(count);
        }
        if self.to_client.is_empty() {
            if self.port.has_ended() && !self.told_end {
                self.told_end = true;
                self.client.shutdown(std::net::Shutdown::Write)?;
            }
            return Ok(false);
        }
        let Some(count) = unless_blocked((&self.client).write(&self.to_client))? else { return Ok(false) };
        self.to_client.drain(..count);
        Ok(true)
    }

    /// One step from the client to the guest; whether there was one.
    fn client_to_guest(&mut self) -> io::Result<bool> {
        if self.to_port.is_empty() && !self.client_ended {
            let mut piece = [0; PIECE];
            let Some(count) = unless_blocked((&self.client).read(&mut piece))? else { return Ok(false) };
            self.to_port.extend(&piece[..count]);
            if count == 0 {
                self.client_ended = true;
                self.port.close_input();
            }
        }
        let count = self.port.send(&self.to_port);
        self.to_port.drain(..count);
        Ok(count > 0)
    }
}

fn unless_blocked(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Some(0)),
        other => other.map(Some),
    }
}

/// Takes clients on a socket until the process ends.
pub fn listen(ports: ConsolePorts, listener: UnixListener) -> io::Result<()> {
    let body = move || {
        for client in listener.incoming() {
            if let Err(error) = client.and_then(|client| serve(&ports, client)) {
                log::warn!("the guest's ports: {error}");
            }
        }
    };
    machine::spawn("guest-ports", body).map(drop)
}
