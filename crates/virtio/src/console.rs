//! Console device (5.3) with several ports: a console, the guest agent's, and streams.
//!
//! | port | what | in a Linux guest |
//! |---|---|---|
//! | 0 | the console, where it is asked for | `hvc0` |
//! | 1 | the guest agent | `/dev/virtio-ports/org.qemu.guest_agent.0` |
//! | 2… | streams, announced when the host first needs them | `/dev/vport*pN` |
//!
//! A driver without VIRTIO_CONSOLE_F_MULTIPORT sees port 0 alone. Everything that waits, in either
//! direction, is bounded: a guest that sends to a host that does not read has to wait, and the other way
//! round.

mod handler;
mod input;
mod layout;
mod ports;
mod stream;
#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use device::BadState;
use pci::Class;
use serde::{Deserialize, Serialize};

use crate::{DeviceState, Handler, Kind, VirtioDevice, lock};

use handler::{Multiport, Screen};
pub use input::ConsoleInput;
use input::MAX_INPUT;
use layout::{CONSOLE, FIRST_STREAM, PORTS, QUEUE_SIZES};
pub use ports::{PortState, Untold};
use ports::{Ports, Shared};
pub use stream::{ConsolePorts, PortStream};

/// VIRTIO_CONSOLE_F_MULTIPORT (5.3.3)
const F_MULTIPORT: u64 = 1 << 1;

/// What was typed and not yet read, and how far guest and device have got with the ports. Streams end
/// with the process that held their other end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// The bytes, oldest first.
    pub input: Vec<u8>,
    /// The driver is there and knows of several ports.
    pub driver_ready: bool,
    /// The ports in the order of their numbers.
    pub ports: Vec<PortState>,
}

/// A console.
pub struct Console {
    shared: Arc<Shared>,
    screen: Screen,
}

impl Console {
    /// A device whose console, if there is to be one, writes to `out`.
    pub fn new(out: Option<Box<dyn Write + Send>>) -> io::Result<Console> {
        let shared = Arc::new(Shared::new(out.is_some())?);
        Ok(Console { shared, screen: Arc::new(Mutex::new(out)) })
    }

    /// The keyboard of its console.
    pub fn input(&self) -> ConsoleInput {
        ConsoleInput(self.shared.clone())
    }

    /// Its other ports.
    pub fn ports(&self) -> ConsolePorts {
        ConsolePorts(self.shared.clone())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        lock(&self.shared.input).closed = true;
        self.shared.room.notify_all();
        lock(&self.shared.ports).end();
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> Kind {
        Kind { id: 3, class: Class { base: 0x07, sub: 0x80, interface: 0 }, name: "console" }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_MULTIPORT
    }

    /// No size, no emergency write: of 5.3.4 only the number of ports is not 0.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 4];
        config.extend((PORTS as u32).to_le_bytes());
        config.extend([0; 4]);
        config
    }

    fn handler(&self, _features: u64) -> io::Result<Box<dyn Handler>> {
        let wake = self.shared.woken.try_clone()?;
        Ok(Box::new(Multiport { shared: self.shared.clone(), screen: self.screen.clone(), wake }))
    }

    /// What was typed stays typed: a guest that boots shall not miss it.
    fn reset(&mut self) {
        lock(&self.shared.ports).reset();
    }

    fn flush(&self) -> io::Result<()> {
        lock(&self.screen).as_mut().map_or(Ok(()), |out| out.flush())
    }

    fn save(&self) -> DeviceState {
        let Ports { driver_ready, ports } = &*lock(&self.shared.ports);
        DeviceState::Console(ConsoleState {
            input: lock(&self.shared.input).bytes.iter().copied().collect(),
            driver_ready: *driver_ready,
            ports: ports.iter().map(|port| port.state.clone()).collect(),
        })
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), BadState> {
        let bad = |what| BadState::new("virtio-console", what);
        let DeviceState::Console(ConsoleState { input, driver_ready, ports: states }) = state else {
            return Err(bad("it is another device's"));
        };
        if input.len() > MAX_INPUT {
            return Err(bad("more was typed than there is room for"));
        }
        let mut ports = lock(&self.shared.ports);
        if states.len() != PORTS || states[CONSOLE].present != ports.ports[CONSOLE].state.present {
            return Err(bad("it has other ports"));
        }
        ports.reset();
        ports.driver_ready = driver_ready;
        for (port, state) in ports.ports.iter_mut().zip(states) {
            port.state = state;
        }
        (FIRST_STREAM..PORTS).for_each(|id| ports.detach(id));
        lock(&self.shared.input).bytes = input.into();
        self.shared.room.notify_all();
        Ok(())
    }
}
