//! Which port has which queues (5.3.2), and what the control queues carry (5.3.6.2).

/// The port of the console, hvc0 in a Linux guest.
pub(super) const CONSOLE: usize = 0;
/// The port of the guest agent.
pub(super) const AGENT: usize = 1;
/// From here on the ports are streams between programs in the guest and in the host.
pub(super) const FIRST_STREAM: usize = 2;
/// Four commands with three streams each.
const STREAMS: usize = 12;
/// How many ports there are at most.
pub(super) const PORTS: usize = FIRST_STREAM + STREAMS;

/// The device's messages to the driver.
pub(super) const CONTROL_RECEIVE: usize = 2;
/// The driver's messages to the device.
pub(super) const CONTROL_TRANSMIT: usize = 3;
/// Two for each port and two for control.
pub(super) const QUEUES: usize = 2 * PORTS + 2;
/// A Linux driver keeps as many receive buffers of a page each for every port.
pub(super) const QUEUE_SIZES: [u16; QUEUES] = [64; QUEUES];

/// The queue with which the guest receives from `port`.
pub(super) const fn receive_queue(port: usize) -> usize {
    if port == CONSOLE { 0 } else { 2 * port + 2 }
}

/// The queue with which the guest transmits to `port`.
pub(super) const fn transmit_queue(port: usize) -> usize {
    receive_queue(port) + 1
}

/// The port of a queue, and whether the guest transmits with it. Not for the control queues.
pub(super) const fn port_of(queue: usize) -> (usize, bool) {
    (if queue < CONTROL_RECEIVE { CONSOLE } else { queue / 2 - 1 }, queue % 2 == 1)
}

/// What `/dev/virtio-ports` of a guest calls the port. The agent's name is what QEMU and every
/// distribution's agent agreed upon.
pub(super) fn port_name(port: usize) -> Option<String> {
    match port {
        CONSOLE => None,
        AGENT => Some("org.qemu.guest_agent.0".into()),
        port => Some(format!("org.ospite.stream.{port}")),
    }
}

/// What a control message is about.
pub(super) mod event {
    /// The driver is there.
    pub(in super::super) const DEVICE_READY: u16 = 0;
    /// There is a port.
    pub(in super::super) const PORT_ADD: u16 = 1;
    /// It is gone.
    pub(in super::super) const PORT_REMOVE: u16 = 2;
    /// The driver can use it.
    pub(in super::super) const PORT_READY: u16 = 3;
    /// It is a console.
    pub(in super::super) const CONSOLE_PORT: u16 = 4;
    /// The other side has opened or closed it.
    pub(in super::super) const PORT_OPEN: u16 = 6;
    /// Its name.
    pub(in super::super) const PORT_NAME: u16 = 7;
}

/// `struct virtio_console_control`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Control {
    pub(super) port: u32,
    pub(super) event: u16,
    pub(super) value: u16,
}

impl Control {
    pub(super) const SIZE: usize = 8;

    pub(super) fn parse(bytes: [u8; Control::SIZE]) -> Control {
        let [a, b, c, d, event0, event1, value0, value1] = bytes;
        Control {
            port: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes([event0, event1]),
            value: u16::from_le_bytes([value0, value1]),
        }
    }

    /// The message, followed by a name where it has one.
    pub(super) fn with_name(self, name: &str) -> Vec<u8> {
        let mut bytes = self.port.to_le_bytes().to_vec();
        bytes.extend(self.event.to_le_bytes());
        bytes.extend(self.value.to_le_bytes());
        bytes.extend(name.as_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_and_ports_belong_together_as_the_specification_numbers_them() {
        assert_eq!((receive_queue(0), transmit_queue(0)), (0, 1));
        assert_eq!((receive_queue(1), transmit_queue(1)), (4, 5));
        assert_eq!((receive_queue(2), transmit_queue(2)), (6, 7));
        for port in 0..PORTS {
            assert_eq!(port_of(receive_queue(port)), (port, false));
            assert_eq!(port_of(transmit_queue(port)), (port, true));
        }
        assert_eq!(transmit_queue(PORTS - 1), QUEUES - 1);
    }
}
