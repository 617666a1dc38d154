//! Network device (5.1): two queues, no offloads.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};

use device::BadState;
use mem::GuestRam;
use net::{Link, Mac, Receiver};
use pci::Class;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::worker::event;
use crate::{Broken, DeviceState, Handler, Kind, Progress, VirtQueue, VirtioDevice, lock};

const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];

const F_MAC: u64 = 1 << 5;
const F_STATUS: u64 = 1 << 16;
/// Link status: up (5.1.4).
const STATUS_LINK_UP: u16 = 1;

/// `struct virtio_net_hdr` with `num_buffers`, always there since version 1 (5.1.6).
const HEADER: usize = 12;
const NUM_BUFFERS: usize = 10;
/// The largest frame without offloads: 1500 bytes of payload, the Ethernet header and a VLAN tag.
const MAX_FRAME: usize = 1518;
/// Frames that wait for the guest; what comes then is lost, as on a wire.
const MAX_WAITING: usize = 256;

/// It has no state: frames on their way may be lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {}

struct Inbox {
    frames: Mutex<VecDeque<Vec<u8>>>,
    arrived: EventFd,
}

impl Receiver for Inbox {
    fn receive(&self, frame: &[u8]) -> bool {
        let mut frames = lock(&self.frames);
        if frames.len() >= MAX_WAITING || frame.len() > MAX_FRAME {
            return false;
        }
        frames.push_back(frame.to_vec());
        let _ = self.arrived.write(1); // fails only if the counter is full, which is as good
        true
    }
}

/// A network card.
pub struct Net {
    mac: Mac,
    link: Arc<Mutex<Box<dyn Link>>>,
    inbox: Arc<Inbox>,
}

impl Net {
    /// A card with address `mac` on `link`.
    pub fn new(mac: Mac, mut link: Box<dyn Link>) -> io::Result<Net> {
        let inbox = Arc::new(Inbox { frames: Mutex::default(), arrived: event()? });
        link.connect(inbox.clone());
        Ok(Net { mac, link: Arc::new(Mutex::new(link)), inbox })
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        lock(&self.link).disconnect();
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> Kind {
        Kind { id: 1, class: Class { base: 0x02, sub: 0x00, interface: 0 }, name: "net" }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_MAC | F_STATUS
    }

    /// 5.1.4: address and status.
    fn config(&self) -> Vec<u8> {
        let mut config = self.mac.0.to_vec();
        config.extend(STATUS_LINK_UP.to_le_bytes());
        config
    }

    fn handler(&self, _features: u64) -> io::Result<Box<dyn Handler>> {
        let wake = self.inbox.arrived.try_clone()?;
        Ok(Box::new(Card { link: self.link.clone(), inbox: self.inbox.clone(), wake }))
    }

    fn reset(&mut self) {
        lock(&self.inbox.frames).clear();
    }

    fn save(&self) -> DeviceState {
        DeviceState::Net(NetState {})
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), BadState> {
        match state {
            DeviceState::Net(NetState {}) => Ok(()),
            _ => Err(BadState::new("virtio-net", "it is another device's")),
        }
    }
}

struct Card {
    link: Arc<Mutex<Box<dyn Link>>>,
    inbox: Arc<Inbox>,
    wake: EventFd,
}

impl Card {
    fn transmit(&self, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken> {
        let mut link = lock(&self.link);
        let mut packet = [0; HEADER + MAX_FRAME];
        while let Some(chain) = queue.pop(ram)? {
            let length = chain.readable.read(&mut packet);
            // A longer one is a driver's mistake: sent nowhere, like a runt.
            if chain.readable.len() <= packet.len() && length > HEADER {
                link.send(&packet[HEADER..length]);
            }
            queue.push(ram, chain.head, 0)?;
        }
        Ok(Progress::Drained)
    }

    fn receive(&self, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken> {
        loop {
            let mut frames = lock(&self.inbox.frames);
            let Some(frame) = frames.front() else { return Ok(Progress::Waiting) };
            let Some(chain) = queue.pop(ram)? else { return Ok(Progress::Drained) };
            let mut packet = vec![0; HEADER];
            packet[NUM_BUFFERS] = 1;
            packet.extend(frame);
            frames.pop_front();
            drop(frames);
            // A buffer that is too small stays for a frame that fits (5.1.6.3.2).
            if chain.writable.len() < packet.len() {
                queue.unpop();
                continue;
            }
            let written = chain.writable.write(&packet);
            queue.push(ram, chain.head, written)?;
        }
    }
}

impl Handler for Card {
    fn process(&mut self, index: usize, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken> {
        match index {
            RX => self.receive(queue, ram),
            TX => self.transmit(queue, ram),
            _ => Ok(Progress::Waiting),
        }
    }

    fn wake(&self) -> Option<(EventFd, usize)> {
        Some((self.wake.try_clone().ok()?, RX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use net::CountingSink;

    #[test]
    fn frames_that_are_sent_are_counted_without_their_header() {
        let sink = CountingSink::new();
        let counters = sink.counters();
        let mut driver = Driver::start(Net::new(Mac::of_card(7), Box::new(sink)).unwrap());
        assert_eq!(driver.device_config(0), [0x52, 0x54, 0, 0, 0, 7, 1, 0]);
        driver.run(TX, &[Buf::Out(DATA, 12), Buf::Out(DATA + 12, 60)]);
        driver.run(TX, &[Buf::Out(DATA, 5), Buf::Out(DATA + 5, 1521)]);
        assert_eq!((counters.packets(), counters.bytes()), (2, 60 + 1514));
        driver.run(TX, &[Buf::Out(DATA, 12)]);
        driver.run(TX, &[Buf::Out(DATA, 70_000)]);
        assert_eq!(counters.packets(), 2, "neither runts nor giants");
        driver.board.interrupts.wait(0x42);
    }

    /// A link whose other end is the test.
    #[derive(Clone, Default)]
    struct Cable(Arc<Mutex<Option<Arc<dyn Receiver>>>>);

    impl Link for Cable {
        fn send(&mut self, _frame: &[u8]) {}
        fn connect(&mut self, receiver: Arc<dyn Receiver>) {
            *lock(&self.0) = Some(receiver);
        }
        fn disconnect(&mut self) {
            *lock(&self.0) = None;
        }
    }

    #[test]
    fn frames_that_arrive_wait_for_buffers_up_to_a_limit() {
        let cable = Cable::default();
        let mut driver = Driver::start(Net::new(Mac::of_card(0), Box::new(cable.clone())).unwrap());
        let receiver = lock(&cable.0).clone().unwrap();
        let taken = (0..300u32).filter(|i| receiver.receive(&[*i as u8; 100])).count();
        assert_eq!(taken, MAX_WAITING);
        assert!(!receiver.receive(&[0; 2000]));
        assert_eq!(driver.run(RX, &[Buf::In(DATA, 12), Buf::In(DATA + 12, 1600)]), 112);
        assert_eq!(driver.bytes(DATA, 13), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0]);
        // The others do not fit and are lost; the buffer that is too small for them stays.
        driver.add(RX, &[Buf::In(DATA, 50)]);
        driver.kick(RX);
        eventually("the frames are not dropped", || receiver.receive(&[9; 30]));
        assert_eq!(driver.wait_used(RX).1, 42);
        assert_eq!(driver.bytes(DATA + 12, 30), [9; 30]);
        drop(driver);
        assert!(lock(&cable.0).is_none(), "disconnected");
    }
}
