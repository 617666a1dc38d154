//! What a VM and its network say to each other, apart from packets: lines of JSON over a Unix socket.
//!
//! Who comes, and what it may have, is not the VM's process's to say, which a guest may have taken over: whoever
//! makes the connection says it ([`Introduction`]) before handing it on. What the VM says first carries the
//! descriptor of the socket that packets travel on.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Cidr, Mac, Offloads, Publish};

/// The longest line.
const LONGEST: usize = 1 << 16;

/// Who comes to a network, and what it may have there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Introduction {
    /// The VM's name, and its host name in the network.
    pub name: String,
    /// Its card's address.
    pub mac: Mac,
    /// Ports of the host that lead to it.
    pub publish: Vec<Publish>,
    /// What it may reach besides the internet.
    pub allow: Vec<Cidr>,
    /// Bytes that its card takes in a second, where that has a limit.
    #[serde(default)]
    pub bandwidth: Option<u64>,
}

impl Introduction {
    /// Says so on a new connection to a network's process. Nothing that is said on it later changes that.
    ///
    /// # Errors
    /// The network has gone.
    pub fn say(&self, connection: impl AsFd) -> io::Result<()> {
        say(connection, &FromVm::Introduction(self.clone()), None)
    }
}

/// From a VM to its network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum FromVm {
    /// Comes first, from who has made the connection.
    Introduction(Introduction),
    /// Comes then, with the packets' socket.
    Attach,
    /// What its driver takes has changed.
    Offloads(Offloads),
}

/// From a network to a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ToVm {
    /// It is attached.
    Attached {
        /// The address that the guest is given.
        address: Ipv4Addr,
    },
    /// It cannot be: why, and what to do about it.
    Refused(String),
}

/// Sends a line, and a descriptor with it.
pub(crate) fn say(socket: impl AsFd, message: &impl Serialize, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    let mut sent = sendmsg(&socket, &[IoSlice::new(&line)], &mut control, SendFlags::NOSIGNAL)?;
    while sent < line.len() {
        sent += rustix::net::send(&socket, &line[sent..], SendFlags::NOSIGNAL)?;
    }
    Ok(())
}

/// What has been heard and is not a whole line yet.
#[derive(Default)]
pub(crate) struct Hearing {
    bytes: Vec<u8>,
    /// The last descriptor that came.
    pub(crate) fd: Option<OwnedFd>,
}

impl Hearing {
    /// Takes what is there, or waits for it where the socket does; `false` at the end.
    ///
    /// # Errors
    /// `WouldBlock`, or the other end broke.
    pub(crate) fn hear(&mut self, socket: impl AsFd) -> io::Result<bool> {
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received =
            recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fd = fds.last();
            }
        }
        self.bytes.extend(&bytes[..received.bytes]);
        if self.bytes.len() > LONGEST {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(received.bytes > 0)
    }

    /// The next whole line.
    ///
    /// # Errors
    /// It is not a message.
    pub(crate) fn next<T: DeserializeOwned>(&mut self) -> Option<io::Result<T>> {
        let end = self.bytes.iter().position(|&byte| byte == b'\n')?;
        let line: Vec<u8> = self.bytes.drain(..=end).collect();
        Some(serde_json::from_slice(&line).map_err(io::Error::from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn messages_arrive_in_order_and_the_first_with_its_descriptor() {
        let (vm, network) = UnixStream::pair().unwrap();
        let (packets, _) = UnixStream::pair().unwrap();
        say(&vm, &FromVm::Attach, Some(packets.as_fd())).unwrap();
        let offloads = FromVm::Offloads(Offloads { checksum: true, ..Offloads::default() });
        say(&vm, &offloads, None).unwrap();
        let mut hearing = Hearing::default();
        hearing.hear(&network).unwrap();
        assert_eq!(hearing.next::<FromVm>().unwrap().unwrap(), FromVm::Attach);
        assert!(hearing.fd.take().is_some());
        while hearing.bytes.is_empty() {
            hearing.hear(&network).unwrap();
        }
        assert_eq!(hearing.next::<FromVm>().unwrap().unwrap(), offloads);
        assert!(hearing.next::<FromVm>().is_none());
        drop(vm);
        assert!(!hearing.hear(&network).unwrap());
    }

    #[test]
    fn who_talks_without_end_is_not_heard() {
        let (vm, network) = UnixStream::pair().unwrap();
        let mut hearing = Hearing::default();
        let babble = [b'x'; 4096];
        let heard = (0..20).try_for_each(|_| {
            rustix::net::send(&vm, &babble, SendFlags::empty()).unwrap();
            hearing.hear(&network).map(|_| ())
        });
        assert!(heard.is_err());
    }
}
