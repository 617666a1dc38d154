//! Waiting for descriptors.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

/// What an event is about. Numbers are never used twice, so that an event of something that is gone
/// means nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// Somebody wants to attach.
    Listener,
    /// A port's control connection.
    Control(u64),
    /// A port's packets.
    Data(u64),
    /// A published port.
    Publish(u64),
    /// A TCP connection's socket.
    Tcp(u64),
    /// A UDP flow's socket.
    Udp(u64),
    /// A socket for echo requests.
    Echo(u64),
    /// A DNS query's socket.
    Dns(u64),
}

const SHIFT: u32 = 56;

impl Token {
    fn to_u64(self) -> u64 {
        let (kind, number) = match self {
            Token::Listener => (0u64, 0),
            Token::Control(n) => (1, n),
            Token::Data(n) => (2, n),
            Token::Publish(n) => (3, n),
            Token::Tcp(n) => (4, n),
            Token::Udp(n) => (5, n),
            Token::Echo(n) => (6, n),
            Token::Dns(n) => (7, n),
        };
        kind << SHIFT | number
    }

    fn from_u64(data: u64) -> Token {
        let number = data & ((1 << SHIFT) - 1);
        match data >> SHIFT {
            0 => Token::Listener,
            1 => Token::Control(number),
            2 => Token::Data(number),
            3 => Token::Publish(number),
            4 => Token::Tcp(number),
            5 => Token::Udp(number),
            6 => Token::Echo(number),
            _ => Token::Dns(number),
        }
    }
}

/// What happened to a descriptor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ready {
    pub(super) token: Token,
    pub(super) readable: bool,
    pub(super) writable: bool,
}

pub(super) struct Poller {
    epoll: OwnedFd,
    events: Vec<Event>,
}

impl Poller {
    pub(super) fn new() -> io::Result<Poller> {
        Ok(Poller { epoll: epoll::create(CreateFlags::CLOEXEC)?, events: Vec::with_capacity(256) })
    }

    /// Tells as long as there is something to read.
    pub(super) fn watch(&self, fd: impl AsFd, token: Token) -> io::Result<()> {
        self.add(fd, token, EventFlags::IN)
    }

    /// Tells whenever it becomes readable or writable.
    pub(super) fn watch_edges(&self, fd: impl AsFd, token: Token) -> io::Result<()> {
        self.add(fd, token, EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET)
    }

    /// Of a watched one, whether it also tells as long as there is room to write.
    pub(super) fn want_room(&self, fd: impl AsFd, token: Token, want: bool) {
        let flags = if want { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
        // It is watched already, so that this cannot fail.
        let _ = epoll::modify(&self.epoll, fd, EventData::new_u64(token.to_u64()), flags);
    }

    fn add(&self, fd: impl AsFd, token: Token, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, EventData::new_u64(token.to_u64()), flags)?)
    }

    /// Waits for events, up to `milliseconds`.
    pub(super) fn wait(&mut self, milliseconds: u64) -> io::Result<Vec<Ready>> {
        let timeout = Timespec {
            tv_sec: (milliseconds / 1000) as i64,
            tv_nsec: (milliseconds % 1000 * 1_000_000) as i64,
        };
        self.events.clear();
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut self.events), Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(self.events.iter().map(ready).collect())
    }
}

fn ready(event: &Event) -> Ready {
    // Copied out: the fields may be packed.
    let (data, flags) = (event.data, event.flags);
    let broken = flags.intersects(EventFlags::ERR | EventFlags::HUP);
    Ready {
        token: Token::from_u64(data.u64()),
        readable: broken || flags.intersects(EventFlags::IN | EventFlags::RDHUP),
        writable: broken || flags.contains(EventFlags::OUT),
    }
}
