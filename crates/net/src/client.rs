//! A VM's end of the cable to a network's process.
//!
//! Packets travel on a pair of sockets that the VM makes and keeps both ends of, one packet a message; the
//! network gets a copy of the far end. So a network that crashed is replaced behind the card's back: its
//! successor gets the same cable.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, recv, send, shutdown, socketpair,
};

use crate::control::{FromVm, Hearing, ToVm, say};
use crate::settings::queue;
use crate::{Link, Offloads};

/// Bytes on their way in each direction, as far as the host gives them: some packets of the longest kind.
const ON_THE_WAY: usize = 1 << 20;
/// The same where the card is slow: two such packets.
const LEAST_ON_THE_WAY: usize = 1 << 17;
/// How long a network may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two tries to replace a network.
const PAUSES: [u64; 6] = [0, 100, 200, 500, 1000, 5000];

/// Why a VM could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The network said why, and what to do about it.
    #[error("{0}")]
    Refused(String),
    /// It could not be started or talked to.
    #[error("the network's process cannot be reached")]
    Io(#[from] io::Error),
}

/// Makes a control connection to the network's process, on which the VM has been introduced
/// ([`Introduction`](crate::Introduction)); starts that where it is not there.
pub type Dial = Box<dyn FnMut() -> io::Result<OwnedFd> + Send>;

/// A VM's end of its cable. Dropping it leaves the network.
pub struct Attachment {
    packets: OwnedFd,
    address: Ipv4Addr,
    shared: Arc<Shared>,
}

struct Shared {
    /// The far end, for the network's process and its successors.
    far: OwnedFd,
    control: Mutex<Control>,
}

#[derive(Default)]
struct Control {
    socket: Option<OwnedFd>,
    offloads: Offloads,
    over: bool,
}

impl Attachment {
    /// Attaches the VM, whose card takes `bandwidth` bytes a second, where that has a limit.
    ///
    /// # Errors
    /// As [`AttachError`] says.
    pub fn new(bandwidth: Option<u64>, mut dial: Dial) -> Result<Attachment, AttachError> {
        let (packets, far) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(io::Error::from)?;
        let on_the_way = queue(bandwidth, LEAST_ON_THE_WAY..=ON_THE_WAY);
        for end in [&packets, &far] {
            let _ = sockopt::set_socket_send_buffer_size(end, on_the_way); // less is slower, no more
        }
        let shared = Arc::new(Shared { far, control: Mutex::default() });
        let (address, socket) = match shared.attach(&mut dial) {
            // It was about to end, as nobody was there: the next one is a new one.
            Err(AttachError::Io(_)) => shared.attach(&mut dial)?,
            result => result?,
        };
        let theirs = shared.clone();
        let keep = move || theirs.keep(dial, socket);
        thread::Builder::new().name("network".into()).spawn(keep)?;
        Ok(Attachment { packets, address, shared })
    }

    /// The address that the guest is given.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        let mut control = self.shared.lock();
        control.over = true;
        if let Some(socket) = &control.socket {
            let _ = shutdown(socket, Shutdown::Both); // the keeper hears it, if it still listens
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attach(&self, dial: &mut Dial) -> Result<(Ipv4Addr, OwnedFd), AttachError> {
        let socket = dial()?;
        let timeout =
            |value| sockopt::set_socket_timeout(&socket, Timeout::Recv, value).map_err(io::Error::from);
        timeout(Some(PATIENCE))?;
        say(&socket, &FromVm::Attach, Some(self.far.as_fd()))?;
        let mut hearing = Hearing::default();
        let answer = loop {
            if let Some(answer) = hearing.next::<ToVm>() {
                break answer?;
            }
            if !hearing.hear(&socket)? {
                return Err(io::Error::from(io::ErrorKind::ConnectionReset).into());
            }
        };
        let address = match answer {
            ToVm::Attached { address } => address,
            ToVm::Refused(why) => return Err(AttachError::Refused(why)),
        };
        timeout(None)?;
        let copy = socket.try_clone()?;
        let mut control = self.lock();
        say(&socket, &FromVm::Offloads(control.offloads), None)?;
        control.socket = Some(socket);
        Ok((address, copy))
    }

    /// Waits for the network's end and replaces it, until the VM leaves.
    fn keep(&self, mut dial: Dial, mut socket: OwnedFd) {
        loop {
            let mut hearing = Hearing::default();
            while matches!(hearing.hear(&socket), Ok(true)) {}
            log::debug!("the network's process has gone");
            match self.replace(&mut dial) {
                Some(new) => socket = new,
                None => return,
            }
        }
    }

    fn replace(&self, dial: &mut Dial) -> Option<OwnedFd> {
        for tries in 0.. {
            thread::sleep(Duration::from_millis(PAUSES[tries.min(PAUSES.len() - 1)]));
            if self.lock().over {
                return None;
            }
            match self.attach(dial) {
                Ok((_, socket)) => {
                    log::warn!("the network's process was replaced; connections through it are lost");
                    // The VM may have left meanwhile.
                    return (!self.lock().over).then_some(socket);
                }
                Err(error) => log::debug!("the network's process is not replaced yet: {error}"),
            }
        }
        None
    }
}

impl Link for Attachment {
    fn send(&self, packet: &[u8]) -> bool {
        loop {
            match send(&self.packets, packet, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOBUFS) => return false,
                _ => return true,
            }
        }
    }

    fn receive(&self, buffer: &mut [u8]) -> Option<usize> {
        loop {
            match recv(&self.packets, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((length, _)) if length > 0 => return Some(length),
                Err(Errno::INTR) => {}
                _ => return None,
            }
        }
    }

    fn readiness(&self) -> io::Result<Option<OwnedFd>> {
        self.packets.try_clone().map(Some)
    }

    fn set_offloads(&self, offloads: Offloads) {
        let mut control = self.shared.lock();
        control.offloads = offloads;
        if let Some(socket) = &control.socket {
            // A network that is gone hears it from its keeper when it is replaced.
            let _ = say(socket, &FromVm::Offloads(offloads), None);
        }
    }
}
