//! The host's end of a port.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::layout::{AGENT, CONTROL_RECEIVE, port_name, receive_queue, transmit_queue};
use super::ports::{Attached, MAX_BUFFERED, Shared};
use crate::lock;

/// The ports of a console device, for the host to take. Clones are the same ports.
#[derive(Clone)]
pub struct ConsolePorts(pub(super) Arc<Shared>);

impl ConsolePorts {
    /// The port of the guest agent; `None` while somebody else has it.
    pub fn agent(&self) -> io::Result<Option<PortStream>> {
        self.attach(true)
    }

    /// A port that nobody uses; `None` while there is none.
    pub fn stream(&self) -> io::Result<Option<PortStream>> {
        self.attach(false)
    }

    fn attach(&self, agent: bool) -> io::Result<Option<PortStream>> {
        let mut ports = lock(&self.0.ports);
        let Some(id) = ports.attach(agent)? else { return Ok(None) };
        let Some(attached) = &ports.ports[id].attached else { return Ok(None) };
        let event = attached.event.clone();
        drop(ports);
        self.0.wake(CONTROL_RECEIVE);
        Ok(Some(PortStream { shared: self.0.clone(), id, event }))
    }
}

/// A port as the host uses it: bytes in both directions, as many as there is room for. Nobody else has
/// it until it is dropped.
pub struct PortStream {
    shared: Arc<Shared>,
    id: usize,
    event: Arc<std::os::fd::OwnedFd>,
}

impl PortStream {
    /// What the guest calls it, in `/dev/virtio-ports`.
    pub fn name(&self) -> String {
        port_name(self.id).unwrap_or_default()
    }

    /// Its number: `/dev/vportNpM` of a Linux guest has it as M.
    pub fn number(&self) -> usize {
        self.id
    }

    /// Gives the guest as much of `bytes` as there is room for; how much that was.
    pub fn send(&self, bytes: &[u8]) -> usize {
        let count = self.with(|attached| {
            let count = bytes.len().min(MAX_BUFFERED.saturating_sub(attached.to_guest.len()));
            attached.to_guest.extend(&bytes[..count]);
            count
        });
        self.shared.wake(receive_queue(self.id));
        count.unwrap_or(0)
    }

    /// Whether [`PortStream::send`] takes something.
    pub fn has_room(&self) -> bool {
        self.with(|attached| attached.to_guest.len() < MAX_BUFFERED).unwrap_or(false)
    }

    /// Takes what the guest has sent, up to the length of `bytes`.
    pub fn receive(&self, bytes: &mut [u8]) -> usize {
        let count = self.with(|attached| {
            let count = bytes.len().min(attached.from_guest.len());
            attached.from_guest.drain(..count).zip(&mut *bytes).for_each(|(from, to)| *to = from);
            count
        });
        let count = count.unwrap_or(0);
        if count > 0 {
            self.shared.wake(transmit_queue(self.id));
        }
        count
    }

    /// Whether nothing will come any more: the guest has closed the port, or its driver is gone.
    pub fn has_ended(&self) -> bool {
        self.with(|attached| attached.ended && attached.from_guest.is_empty()).unwrap_or(true)
    }

    /// Nothing more will be sent. The guest reads to the end of what was, and then its end. The agent's
    /// port has no end.
    pub fn close_input(&self) {
        if self.id != AGENT {
            self.with(|attached| attached.input_closed = true);
            self.shared.wake(receive_queue(self.id));
        }
    }

    /// Readable once something has changed.
    pub fn changed(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Makes [`PortStream::changed`] unreadable until the next change. Look at the stream afterwards.
    pub fn clear_changed(&self) {
        let _ = rustix::io::read(&*self.event, &mut [0; 8]); // that it was not set is no error
    }

    fn with<T>(&self, act: impl FnOnce(&mut Attached) -> T) -> Option<T> {
        lock(&self.shared.ports).ports[self.id].attached.as_mut().map(act)
    }
}

impl Drop for PortStream {
    fn drop(&mut self) {
        lock(&self.shared.ports).detach(self.id);
        self.shared.wake(transmit_queue(self.id));
        self.shared.wake(CONTROL_RECEIVE);
    }
}
