//! What device, guest and host know of the ports.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::input::Input;
use super::layout::*;
use crate::worker;

/// Bytes that a stream holds in each direction before its sender has to wait.
pub(super) const MAX_BUFFERED: usize = 1 << 17;

/// What is still to be said to the guest about a port, in this order. Flags, not a list: a guest that
/// asks for ever and reads no answer makes nothing grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Untold {
    /// It is gone.
    pub remove: bool,
    /// It is there.
    pub add: bool,
    /// It is a console.
    pub console: bool,
    /// Its name.
    pub name: bool,
    /// Whether the host has it open.
    pub open: bool,
}

/// A port as guest and device have agreed on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortState {
    /// The guest is to have it.
    pub present: bool,
    /// The driver can use it.
    pub ready: bool,
    /// The host has it open.
    pub host_open: bool,
    /// A program in the guest has it open.
    pub guest_open: bool,
    /// The guest has closed it; what it sent before may still be in the queue.
    pub closing: bool,
    /// Bytes already taken of the chain at the head of the transmit queue.
    pub taken: u64,
    /// What the guest has to be told.
    pub untold: Untold,
}

/// The host's end of a port while somebody holds it.
pub(super) struct Attached {
    pub(super) to_guest: VecDeque<u8>,
    pub(super) from_guest: VecDeque<u8>,
    /// Nothing will be added to `to_guest`.
    pub(super) input_closed: bool,
    /// The guest has closed the port.
    pub(super) ended: bool,
    /// Told of every change.
    pub(super) event: Arc<OwnedFd>,
}

impl Attached {
    fn new() -> io::Result<Attached> {
        let event = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let (to_guest, from_guest) = Default::default();
        Ok(Attached { to_guest, from_guest, input_closed: false, ended: false, event })
    }

    pub(super) fn tell(&self) {
        let _ = rustix::io::write(&*self.event, &1u64.to_ne_bytes()); // fails only if it is set anyway
    }
}

#[derive(Default)]
pub(super) struct Port {
    pub(super) state: PortState,
    pub(super) attached: Option<Attached>,
}

/// All ports.
#[derive(Default)]
pub(super) struct Ports {
    /// The driver knows of several ports and is there.
    pub(super) driver_ready: bool,
    pub(super) ports: [Port; PORTS],
}

/// What the device, its handler and the host's ends share.
pub(super) struct Shared {
    pub(super) ports: Mutex<Ports>,
    pub(super) input: Mutex<Input>,
    /// There is room in `input`.
    pub(super) room: Condvar,
    pub(super) woken: EventFd,
    /// A bit for each queue that is to be looked at.
    due: AtomicU64,
}

impl Shared {
    pub(super) fn new(with_console: bool) -> io::Result<Shared> {
        let shared = Shared {
            ports: Mutex::new(Ports::power_on(with_console)),
            input: Mutex::default(),
            room: Condvar::new(),
            woken: worker::event()?,
            due: AtomicU64::new(0),
        };
        Ok(shared)
    }

    /// Has the handler look at a queue.
    pub(super) fn wake(&self, queue: usize) {
        self.due.fetch_or(1 << queue, Ordering::SeqCst);
        let _ = self.woken.write(1); // fails only if the counter is full, which is as good
    }

    /// The queues to look at, each once.
    pub(super) fn take_due(&self) -> Vec<usize> {
        let due = self.due.swap(0, Ordering::SeqCst);
        (0..QUEUES).filter(|queue| due & 1 << queue != 0).collect()
    }
}

impl Ports {
    fn power_on(with_console: bool) -> Ports {
        let mut ports = Ports::default();
        ports.ports[CONSOLE].state.present = with_console;
        ports.ports[CONSOLE].state.host_open = with_console;
        // Open for good, whoever is there to listen: an agent that finds its port closed looks again
        // ten times a second.
        let agent = &mut ports.ports[AGENT].state;
        (agent.present, agent.host_open) = (true, true);
        ports
    }

    /// The driver is gone, and with it what it knew.
    pub(super) fn reset(&mut self) {
        let with_console = self.ports[CONSOLE].state.present;
        let fresh = Ports::power_on(with_console);
        self.driver_ready = false;
        for (id, (port, fresh)) in self.ports.iter_mut().zip(fresh.ports).enumerate() {
            let before = std::mem::replace(&mut port.state, fresh.state);
            // Who waits for the agent since before the guest's driver started may wait on.
            if let Some(attached) = port.attached.as_mut().filter(|_| id != AGENT || before.guest_open) {
                attached.ended = true;
                attached.tell();
            }
        }
    }

    /// The device is gone.
    pub(super) fn end(&mut self) {
        for attached in self.ports.iter_mut().filter_map(|port| port.attached.as_mut()) {
            attached.ended = true;
            attached.tell();
        }
    }

    /// The port for a new holder, if there is one: the agent's, or any stream.
    pub(super) fn attach(&mut self, agent: bool) -> io::Result<Option<usize>> {
        let candidates = if agent { AGENT..FIRST_STREAM } else { FIRST_STREAM..PORTS };
        let free = |port: &Port| port.attached.is_none() && (agent || !port.state.guest_open);
        let Some(id) = candidates.clone().find(|&id| free(&self.ports[id])) else { return Ok(None) };
        let port = &mut self.ports[id];
        port.attached = Some(Attached::new()?);
        if !agent {
            port.state.host_open = true;
            port.state.untold.open = port.state.ready;
            port.state.untold.add |= !port.state.present && self.driver_ready;
            port.state.present = true;
        }
        Ok(Some(id))
    }

    /// The holder has gone. A guest that still has the stream open loses it, as nobody else could
    /// have it.
    pub(super) fn detach(&mut self, id: usize) {
        let port = &mut self.ports[id];
        port.attached = None;
        if id == AGENT {
            return;
        }
        let state = &mut port.state;
        if state.guest_open {
            let remove = self.driver_ready;
            *state = PortState { untold: Untold { remove, ..Untold::default() }, ..PortState::default() };
        } else {
            state.untold.open |= state.ready && state.host_open;
            state.host_open = false;
        }
    }

    /// The driver says something.
    pub(super) fn control(&mut self, Control { port: id, event, value }: Control) {
        if event == event::DEVICE_READY {
            self.driver_ready = value == 1;
            let add = self.driver_ready;
            self.ports.iter_mut().for_each(|port| port.state.untold.add = add && port.state.present);
            return;
        }
        let port = usize::try_from(id).ok().and_then(|id| self.ports.get_mut(id));
        let Some(port) = port.filter(|port| port.state.present) else {
            return log::debug!("virtio-console: event {event} of port {id}, which is not there");
        };
        match event {
            event::PORT_READY => port.ready(id as usize, value == 1),
            event::PORT_OPEN => port.opened(value == 1),
            _ => log::debug!("virtio-console: event {event} of port {id} means nothing"),
        }
    }

    /// The next message to the driver.
    pub(super) fn next_message(&mut self) -> Option<Vec<u8>> {
        self.ports.iter_mut().enumerate().find_map(|(id, port)| port.state.next_message(id))
    }

    pub(super) fn has_message(&self) -> bool {
        self.ports.iter().any(|port| port.state.untold != Untold::default())
    }
}

impl Port {
    fn ready(&mut self, id: usize, ready: bool) {
        self.state.ready = ready;
        let untold = &mut self.state.untold;
        untold.console = ready && id == CONSOLE;
        untold.name = ready && id != CONSOLE;
        untold.open = ready && self.state.host_open;
        if let Some(attached) = self.attached.as_mut().filter(|_| !ready) {
            attached.ended = true;
            attached.tell();
        }
    }

    fn opened(&mut self, open: bool) {
        if open {
            (self.state.guest_open, self.state.closing) = (true, false);
        } else {
            self.state.closing = self.state.guest_open;
        }
        if let Some(attached) = &self.attached {
            attached.tell();
        }
    }

    /// The guest has closed the port, and all it sent was taken.
    pub(super) fn closed(&mut self) {
        (self.state.guest_open, self.state.closing) = (false, false);
        if let Some(attached) = &mut self.attached {
            attached.ended = true;
            attached.to_guest.clear();
            attached.tell();
        }
    }

    /// Says that the host has closed the port, once the guest has all that came before.
    pub(super) fn close_when_sent(&mut self) -> bool {
        let sent = |attached: &Attached| attached.input_closed && attached.to_guest.is_empty();
        let close = self.state.host_open && self.attached.as_ref().is_some_and(sent);
        if close {
            self.state.host_open = false;
            self.state.untold.open = self.state.ready;
        }
        close
    }
}

impl PortState {
    fn next_message(&mut self, id: usize) -> Option<Vec<u8>> {
        let Untold { remove, add, console, name, open } = &mut self.untold;
        let steps = [
            (remove, event::PORT_REMOVE, 1),
            (add, event::PORT_ADD, 1),
            (console, event::CONSOLE_PORT, 1),
            (name, event::PORT_NAME, 1),
            (open, event::PORT_OPEN, u16::from(self.host_open)),
        ];
        let (event, value) = steps
            .into_iter()
            .find_map(|(untold, event, value)| std::mem::take(untold).then_some((event, value)))?;
        let name = port_name(id).filter(|_| event == event::PORT_NAME).unwrap_or_default();
        Some(Control { port: id as u32, event, value }.with_name(&name))
    }
}
