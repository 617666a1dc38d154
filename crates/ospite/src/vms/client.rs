//! The client's end of a VM's control socket.

use std::io::{self, BufReader};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use store::{Home, Name};

use super::protocol::{self, Answer, Request, Status};
use super::socket;

/// A connection to a VM that is on.
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects. Answers are waited for up to `patience`.
    ///
    /// # Errors
    /// The VM is off, or not ready yet, or not ours.
    pub fn connect(home: &Home, name: &Name, patience: Duration) -> io::Result<Client> {
        let stream = socket::connect(&socket::path(home, name))?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Client { stream: BufReader::new(stream) })
    }

    fn ask(&mut self, request: Request) -> io::Result<Answer> {
        protocol::write_request(self.stream.get_mut(), request)?;
        protocol::read_answer(&mut self.stream)
    }

    /// Asks for what every VM can be asked.
    ///
    /// # Errors
    /// What the VM says, or that it says nothing.
    pub fn request(&mut self, request: vmm::Request) -> io::Result<Status> {
        match self.ask(Request::Vm(request))? {
            Answer::Status(status) => Ok(status),
            other => Err(unexpected(other)),
        }
    }

    /// Has the connection become a stream: of the console or of the guest agent's port. The reader may
    /// hold the stream's first bytes already.
    ///
    /// # Errors
    /// What the VM says, or that it says nothing.
    pub fn stream(mut self, request: Request) -> io::Result<BufReader<UnixStream>> {
        match self.ask(request)? {
            Answer::Stream => {
                self.stream.get_ref().set_read_timeout(None)?;
                self.stream.get_ref().set_write_timeout(None)?;
                Ok(self.stream)
            }
            other => Err(unexpected(other)),
        }
    }
}

fn unexpected(answer: Answer) -> io::Error {
    match answer {
        Answer::Error(why) => io::Error::other(why),
        _ => io::Error::other("it answers something else than it was asked"),
    }
}
