//! The half of the console that works off its queues.

use std::io::Write;
use std::sync::{Arc, Mutex};

use mem::GuestRam;
use vmm_sys_util::eventfd::EventFd;

use super::layout::*;
use super::ports::{MAX_BUFFERED, Shared};
use crate::{Broken, Handler, Progress, Slices, VirtQueue, lock};

/// Output goes out in pieces of at most this.
const CHUNK: usize = 4096;

/// Where the console port's output goes, if there is a console.
pub(super) type Screen = Arc<Mutex<Option<Box<dyn Write + Send>>>>;

pub(super) struct Multiport {
    pub(super) shared: Arc<Shared>,
    pub(super) screen: Screen,
    pub(super) wake: EventFd,
}

/// Hands the bytes of `left` to `each` in pieces.
fn in_pieces(mut left: Slices<'_>, mut each: impl FnMut(&[u8])) {
    while !left.is_empty() {
        let mut bytes = [0; CHUNK];
        let rest = left.split_off(CHUNK);
        let count = left.read(&mut bytes);
        each(&bytes[..count]);
        left = rest;
    }
}

impl Multiport {
    fn type_keys(&self, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken> {
        loop {
            let mut input = lock(&self.shared.input);
            if input.bytes.is_empty() {
                return Ok(Progress::Waiting);
            }
            let Some(chain) = queue.pop(ram)? else { return Ok(Progress::Drained) };
            let written = chain.writable.write(input.bytes.make_contiguous());
            input.bytes.drain(..written);
            drop(input);
            self.shared.room.notify_all();
            queue.push(ram, chain.head, written)?;
        }
    }

    fn print(&self, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken> {
        let mut screen = lock(&self.screen);
        while let Some(chain) = queue.pop(ram)? {
            if let Some(out) = &mut *screen {
                in_pieces(chain.readable, |bytes| {
                    // Nobody may be looking any more; the guest must not stop for that.
                    if let Err(error) = out.write_all(bytes) {
                        log::debug!("console output is lost: {error}");
                    }
                });
            }
            queue.push(ram, chain.head, 0)?;
        }
        if let Some(Err(error)) = screen.as_mut().map(|out| out.flush()) {
            log::debug!("console output is lost: {error}");
        }
        Ok(Progress::Drained)
    }

    /// To the guest, once a program there has opened the port.
    fn deliver(&self, id: usize, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken> {
        let mut ports = lock(&self.shared.ports);
        let port = &mut ports.ports[id];
        loop {
            if port.close_when_sent() {
                self.shared.wake(CONTROL_RECEIVE);
            }
            let Some(attached) = &mut port.attached else { return Ok(Progress::Waiting) };
            if attached.to_guest.is_empty() || !port.state.guest_open {
                return Ok(Progress::Waiting);
            }
            let Some(chain) = queue.pop(ram)? else { return Ok(Progress::Drained) };
            let written = chain.writable.write(attached.to_guest.make_contiguous());
            attached.to_guest.drain(..written);
            attached.tell();
            queue.push(ram, chain.head, written)?;
        }
    }

    /// From the guest, which waits while its reader does not read. What nobody listens to is dropped.
    fn collect(&self, id: usize, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken> {
        let mut ports = lock(&self.shared.ports);
        let port = &mut ports.ports[id];
        let mut idle = true;
        while let Some(chain) = queue.pop(ram)? {
            idle = false;
            let (head, mut left) = (chain.head, chain.readable);
            if let Some(attached) = &mut port.attached {
                left = left.split_off(port.state.taken as usize);
                let rest = left.split_off(MAX_BUFFERED.saturating_sub(attached.from_guest.len()));
                port.state.taken += left.len() as u64;
                in_pieces(left, |bytes| attached.from_guest.extend(bytes));
                attached.tell();
                if !rest.is_empty() {
                    queue.unpop();
                    return Ok(Progress::Waiting);
                }
            }
            port.state.taken = 0;
            queue.push(ram, head, 0)?;
        }
        if port.state.closing && !queue.is_stopping() {
            // Only a round without a chain has seen the queue's end.
            if idle { port.closed() } else { self.shared.wake(transmit_queue(id)) }
        }
        Ok(Progress::Drained)
    }

    fn tell_driver(&self, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken> {
        let mut ports = lock(&self.shared.ports);
        while ports.has_message() {
            let Some(chain) = queue.pop(ram)? else { return Ok(Progress::Drained) };
            let message = ports.next_message().unwrap_or_default();
            let written = chain.writable.write(&message);
            queue.push(ram, chain.head, written)?;
        }
        Ok(Progress::Waiting)
    }

    fn hear_driver(&self, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken> {
        while let Some(chain) = queue.pop(ram)? {
            let mut message = [0; Control::SIZE];
            if chain.readable.read(&mut message) == Control::SIZE {
                self.hear(Control::parse(message));
            }
            queue.push(ram, chain.head, 0)?;
        }
        Ok(Progress::Drained)
    }

    fn hear(&self, message: Control) {
        lock(&self.shared.ports).control(message);
        self.shared.wake(CONTROL_RECEIVE);
        if let Some(id) = usize::try_from(message.port).ok().filter(|id| (AGENT..PORTS).contains(id)) {
            self.shared.wake(receive_queue(id));
            self.shared.wake(transmit_queue(id));
        }
    }
}

impl Handler for Multiport {
    fn process(&mut self, index: usize, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken> {
        match (index, port_of(index)) {
            (CONTROL_RECEIVE, _) => self.tell_driver(queue, ram),
            (CONTROL_TRANSMIT, _) => self.hear_driver(queue, ram),
            (_, (CONSOLE, false)) => self.type_keys(queue, ram),
            (_, (CONSOLE, true)) => self.print(queue, ram),
            (_, (id, false)) => self.deliver(id, queue, ram),
            (_, (id, true)) => self.collect(id, queue, ram),
        }
    }

    fn wake(&self) -> Option<(EventFd, usize)> {
        Some((self.wake.try_clone().ok()?, receive_queue(CONSOLE)))
    }

    fn woken(&mut self, _index: usize) -> Vec<usize> {
        self.shared.take_due()
    }
}
