//! Network device (5.1): a receive and a transmit queue, checksums and TCP segmentation left to whoever is
//! behind the link, packets in as many buffers as they need.
//!
//! Both queues are one thread's, which also waits for the link: a packet is one system call away from the
//! network's process, and copied once on its way between that call and the guest's memory.
//!
//! Where the card has a limit, packets that are over it wait: those of the guest in its queue, those for it in the
//! link and in one buffer here.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use device::BadState;
use mem::GuestRam;
use net::{HEADER, Header, Link, MAX_PACKET, Mac, Offloads};
use pci::Class;
use serde::{Deserialize, Serialize};
use throttle::{Bucket, NetLimits};

use crate::{
    Broken, Chain, DeviceState, Handler, Kind, Progress, VirtQueue, VirtioDevice, Wake, WakeOn, lock,
};

const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// Feature bits (5.1.3).
mod feature {
    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const STATUS: u64 = 1 << 16;
}

/// Link status: up (5.1.4).
const STATUS_LINK_UP: u16 = 1;
/// `num_buffers` in the header (5.1.6).
const NUM_BUFFERS: usize = 10;
/// An Ethernet header.
const LEAST_FRAME: usize = 14;
/// What a new driver is spared: packets to the one before it.
const STALE: usize = 1024;

/// It has no state: frames on their way may be lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {}

/// A network card.
pub struct Net {
    mac: Mac,
    link: Arc<dyn Link>,
    /// Of what it sends and of what it receives.
    meters: [Meter; 2],
}

/// The limit of one direction, counted in bytes of frames. It is the card's, since a driver that resets it must
/// not get a new one; only the handler locks it.
#[derive(Clone, Default)]
struct Meter(Option<Arc<Mutex<Bucket>>>);

impl Meter {
    fn new(limits: &NetLimits) -> Meter {
        Meter(limits.bucket().map(|bucket| Arc::new(Mutex::new(bucket))))
    }

    /// Whether a packet of that length with its header may pass now, or when.
    fn ready(&self, length: usize) -> Result<(), Instant> {
        self.0.as_ref().map_or(Ok(()), |bucket| lock(bucket).ready(frame(length), Instant::now()))
    }

    /// It has passed.
    fn count(&self, length: usize) {
        if let Some(bucket) = &self.0 {
            lock(bucket).take(frame(length), Instant::now());
        }
    }
}

fn frame(length: usize) -> u64 {
    length.saturating_sub(HEADER) as u64
}

impl Net {
    /// A card with address `mac` on `link`.
    pub fn new(mac: Mac, link: Box<dyn Link>) -> Net {
        Net { mac, link: link.into(), meters: Default::default() }
    }

    /// Holds it to `limits`.
    pub fn limited(mut self, limits: &NetLimits) -> Net {
        self.meters = [Meter::new(limits), Meter::new(limits)];
        self
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
        use feature::*;
        CSUM | GUEST_CSUM | MAC | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6 | MRG_RXBUF | STATUS
    }

    /// 5.1.4: address and status.
    fn config(&self) -> Vec<u8> {
        let mut config = self.mac.0.to_vec();
        config.extend(STATUS_LINK_UP.to_le_bytes());
        config
    }

    fn handler(&self, features: u64) -> io::Result<Box<dyn Handler>> {
        let card = Card::new(self.link.clone(), self.meters.clone(), features);
        let mut stale = [0; HEADER];
        for _ in 0..STALE {
            if self.link.receive(&mut stale).is_none() {
                break;
            }
        }
        self.link.set_offloads(card.takes);
        Ok(Box::new(card))
    }

    fn reset(&mut self) {
        self.link.set_offloads(Offloads::default());
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
    link: Arc<dyn Link>,
    /// What the driver takes.
    takes: Offloads,
    /// What the driver may send.
    sends: Offloads,
    /// Packets may lie in several chains.
    mergeable: bool,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
    /// The length of the packet in `incoming` that waits for buffers or for its time.
    held: Option<usize>,
    sent: Meter,
    received: Meter,
}

impl Card {
    fn new(link: Arc<dyn Link>, [sent, received]: [Meter; 2], features: u64) -> Card {
        let has = |bit| features & bit != 0;
        let offloads = |checksum, tso4, tso6| Offloads {
            checksum: has(checksum),
            tso4: has(checksum) && has(tso4),
            tso6: has(checksum) && has(tso6),
        };
        Card {
            link,
            takes: offloads(feature::GUEST_CSUM, feature::GUEST_TSO4, feature::GUEST_TSO6),
            sends: offloads(feature::CSUM, feature::HOST_TSO4, feature::HOST_TSO6),
            mergeable: has(feature::MRG_RXBUF),
            outgoing: vec![0; MAX_PACKET],
            incoming: vec![0; MAX_PACKET],
            held: None,
            sent,
            received,
        }
    }

    fn transmit(&mut self, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken> {
        while let Some(chain) = queue.pop(ram)? {
            let length = chain.readable.read(&mut self.outgoing);
            let packet = &self.outgoing[..length];
            // Runts, giants and what was not agreed upon are a driver's mistakes: sent nowhere.
            let sound = length >= HEADER + LEAST_FRAME
                && chain.readable.len() <= MAX_PACKET
                && Header::parse(packet).is_some_and(|header| header.suits(self.sends));
            if sound {
                if let Err(later) = self.sent.ready(length) {
                    queue.unpop();
                    return Ok(Progress::Until(later));
                }
                if !self.link.send(packet) {
                    queue.unpop();
                    return Ok(Progress::Full);
                }
                self.sent.count(length);
            }
            queue.push(ram, chain.head, 0)?;
        }
        Ok(Progress::Drained)
    }

    fn receive(&mut self, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken> {
        loop {
            // What has room nowhere, or suits nobody, may arrive without end.
            if queue.is_stopping() {
                return Ok(Progress::Waiting);
            }
            let Some(length) = self.held.take().or_else(|| self.link.receive(&mut self.incoming)) else {
                return Ok(Progress::Waiting);
            };
            // A link may still have what an earlier driver took.
            if !Header::parse(&self.incoming[..length]).is_some_and(|header| header.suits(self.takes)) {
                continue;
            }
            if let Err(later) = self.received.ready(length) {
                self.held = Some(length);
                return Ok(Progress::Until(later));
            }
            let Some(chains) = self.room_for(length, queue, ram)? else {
                self.held = Some(length);
                return Ok(Progress::Drained);
            };
            // What has room nowhere is lost.
            if !chains.is_empty() {
                self.deliver(length, &chains, queue, ram)?;
                self.received.count(length);
            }
        }
    }

    /// Buffers for a packet: nothing where they are yet to come, an empty list where they never will.
    fn room_for<'m>(
        &self,
        length: usize,
        queue: &mut VirtQueue,
        ram: &'m GuestRam,
    ) -> Result<Option<Vec<Chain<'m>>>, Broken> {
        let (mut chains, mut room) = (Vec::new(), 0);
        while room < length {
            let chain = queue.pop(ram)?;
            // A buffer that is too small alone stays for a packet that fits (5.1.6.3.2).
            let hopeless = match &chain {
                Some(_) => !self.mergeable && !chains.is_empty(),
                None => chains.len() >= queue.size().into() || !self.mergeable && !chains.is_empty(),
            };
            let empty = chain.is_none();
            if let Some(chain) = chain {
                room += chain.writable.len();
                chains.push(chain);
            }
            if hopeless || empty || (!self.mergeable && room < length) {
                chains.iter().for_each(|_| queue.unpop());
                let never = hopeless || !empty;
                return Ok(never.then(Vec::new));
            }
        }
        Ok(Some(chains))
    }

    fn deliver(
        &mut self,
        length: usize,
        chains: &[Chain<'_>],
        queue: &mut VirtQueue,
        ram: &GuestRam,
    ) -> Result<(), Broken> {
        let count = chains.len() as u16; // as many as the queue has room for
        self.incoming[NUM_BUFFERS..HEADER].copy_from_slice(&count.to_le_bytes());
        let mut rest = &self.incoming[..length];
        let mut used = Vec::with_capacity(chains.len());
        for chain in chains {
            let written = chain.writable.write(rest);
            used.push((chain.head, written));
            rest = &rest[written..];
        }
        queue.push_all(ram, &used)
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

    fn wakes(&self) -> Vec<Wake> {
        let fd = || {
            let fd = self.link.readiness();
            fd.inspect_err(|error| log::error!("virtio-net: nothing will arrive: {error}")).ok().flatten()
        };
        let arrives = fd().map(|fd| Wake { queue: RX, on: WakeOn::Readable(fd) });
        let leaves = fd().map(|fd| Wake { queue: TX, on: WakeOn::Writable(fd) });
        arrives.into_iter().chain(leaves).collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;
    use std::sync::Mutex;

    use std::time::Duration;

    use super::*;
    use crate::testing::*;
    use net::{CountingSink, GSO_TCPV4, NEEDS_CSUM};

    #[test]
    fn frames_that_are_sent_are_counted_without_their_header() {
        let sink = CountingSink::new();
        let counters = sink.counters();
        let mut driver = Driver::start(Net::new(Mac::of_card(7), Box::new(sink)));
        assert_eq!(driver.device_config(0), [0x52, 0x54, 0, 0, 0, 7, 1, 0]);
        driver.run(TX, &[Buf::Out(DATA, 12), Buf::Out(DATA + 12, 60)]);
        driver.run(TX, &[Buf::Out(DATA, 5), Buf::Out(DATA + 5, 1521)]);
        assert_eq!((counters.packets(), counters.bytes()), (2, 60 + 1514));
        driver.run(TX, &[Buf::Out(DATA, 12)]);
        driver.run(TX, &[Buf::Out(DATA, 70_000)]);
        driver.fill(DATA, &[0, 3]); // UDP fragmentation, which was not offered
        driver.run(TX, &[Buf::Out(DATA, 100)]);
        assert_eq!(counters.packets(), 2, "neither runts nor giants, nor what was not agreed upon");
        driver.board.interrupts.wait(0x42);
    }

    /// A link whose other end is the test.
    #[derive(Clone)]
    pub(crate) struct Cable {
        near: Arc<UnixDatagram>,
        offloads: Arc<Mutex<Offloads>>,
    }

    pub(crate) fn cable() -> (Cable, UnixDatagram) {
        let (near, far) = UnixDatagram::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        (Cable { near: Arc::new(near), offloads: Arc::default() }, far)
    }

    impl Link for Cable {
        fn send(&self, packet: &[u8]) -> bool {
            self.near.send(packet).is_ok()
        }
        fn receive(&self, buffer: &mut [u8]) -> Option<usize> {
            self.near.recv(buffer).ok()
        }
        fn readiness(&self) -> io::Result<Option<OwnedFd>> {
            self.near.try_clone().map(|near| Some(near.into()))
        }
        fn set_offloads(&self, offloads: Offloads) {
            *lock(&self.offloads) = offloads;
        }
    }

    fn packet(length: usize, fill: u8) -> Vec<u8> {
        [&Header::default().bytes()[..], &vec![fill; length]].concat()
    }

    #[test]
    fn a_packet_that_arrives_fills_as_many_buffers_as_it_needs() {
        let (cable, far) = cable();
        let mut driver = Driver::start(Net::new(Mac::of_card(0), Box::new(cable.clone())));
        eventually("the driver's offloads are not told", || lock(&cable.offloads).tso4);
        let gso = Header { flags: NEEDS_CSUM, gso_type: GSO_TCPV4, gso_size: 1448, ..Header::default() };
        far.send(&[&gso.bytes()[..], &[7; 2988]].concat()).unwrap();
        for buffer in 0..3 {
            driver.add(RX, &[Buf::In(DATA + buffer * 1000, 1000)]);
            driver.kick(RX);
            assert!(buffer == 2 || driver.used_index(RX) == 0, "none of it before all of it has room");
        }
        for _ in 0..3 {
            assert_eq!(driver.wait_used(RX).1, 1000);
        }
        assert_eq!(driver.bytes(DATA, 14), [1, 1, 0, 0, 0xa8, 5, 0, 0, 0, 0, 3, 0, 7, 7]);
        far.send(&packet(60, 9)).unwrap();
        assert_eq!(driver.run(RX, &[Buf::In(DATA, 1000)]), 72);
        assert_eq!(driver.bytes(DATA + 10, 3), [1, 0, 9]);
    }

    #[test]
    fn a_driver_without_offloads_is_not_sent_what_it_does_not_take() {
        let (cable, far) = cable();
        let mut driver = Driver::find(Board::new(Net::new(Mac::of_card(0), Box::new(cable.clone()))));
        driver.board.enable_msix();
        driver.initialize(TRANSPORT);
        assert_eq!(*lock(&cable.offloads), Offloads::default());
        far.send(&[&Header { flags: NEEDS_CSUM, ..Header::default() }.bytes()[..], &[1; 60]].concat())
            .unwrap();
        far.send(&packet(100, 2)).unwrap();
        far.send(&packet(30, 3)).unwrap();
        // Too small for the second, which is lost; it stays for the third.
        assert_eq!(driver.run(RX, &[Buf::In(DATA, 50)]), 42);
        assert_eq!(driver.bytes(DATA + 12, 30), [3; 30]);
    }

    #[test]
    fn what_there_is_no_room_for_is_sent_when_there_is() {
        let (cable, far) = cable();
        let mut driver = Driver::start(Net::new(Mac::of_card(0), Box::new(cable)));
        driver.fill(DATA, &packet(60_000, 4));
        let sent: Vec<_> = (0..40).map(|_| driver.add(TX, &[Buf::Out(DATA, 60_012)])).collect();
        driver.kick(TX);
        let mut buffer = vec![0; MAX_PACKET];
        for _ in &sent {
            assert_eq!(far.recv(&mut buffer).unwrap(), 60_012);
        }
        for head in sent {
            assert_eq!(driver.wait_used(TX).0, u32::from(head));
        }
    }

    fn limited(cable: Cable, limits: &str) -> Driver {
        let card = Net::new(Mac::of_card(0), Box::new(cable)).limited(&limits.parse().unwrap());
        Driver::start(card)
    }

    #[test]
    fn packets_over_the_limit_wait_in_both_directions_and_none_is_lost() {
        let (cable, far) = cable();
        let mut driver = limited(cable, "bandwidth=100K,bandwidth-burst=1K");
        let begun = Instant::now();
        driver.fill(DATA, &packet(1024, 1));
        let sent: Vec<_> = (0..20).map(|_| driver.add(TX, &[Buf::Out(DATA, 1036)])).collect();
        let room = |number: u8| DATA + 0x1_0000 + u64::from(number) * 2048;
        for number in 0..20 {
            driver.add(RX, &[Buf::In(room(number), 2048)]);
            far.send(&packet(1024, number)).unwrap();
        }
        driver.kick(TX);
        driver.kick(RX);
        for head in sent {
            assert_eq!(driver.wait_used(TX).0, u32::from(head));
        }
        for number in 0..20 {
            assert_eq!(driver.wait_used(RX).1, 1036);
            assert_eq!(driver.bytes(room(number) + HEADER as u64, 1), [number]);
        }
        assert!(begun.elapsed() >= Duration::from_millis(180), "19 of 20 had to wait, 10 ms each");
        assert!(begun.elapsed() < PATIENCE);
    }

    #[test]
    fn a_direction_that_has_to_wait_holds_up_neither_the_other_nor_a_reset() {
        let (cable, far) = cable();
        let mut driver = limited(cable, "bandwidth=1K");
        driver.fill(DATA, &packet(60_000, 4));
        let (first, second) =
            (driver.add(TX, &[Buf::Out(DATA, 60_012)]), driver.add(TX, &[Buf::Out(DATA, 60_012)]));
        driver.kick(TX);
        let mut buffer = vec![0; MAX_PACKET];
        assert_eq!(far.recv(&mut buffer).unwrap(), 60_012, "larger than the bucket");
        assert_eq!(driver.wait_used(TX).0, u32::from(first));
        far.send(&packet(60, 9)).unwrap();
        assert_eq!(driver.run(RX, &[Buf::In(DATA, 1000)]), 72);
        driver.initialize(u64::MAX); // resets it first, and the second packet has a minute to wait
        far.set_nonblocking(true).unwrap();
        assert!(far.recv(&mut buffer).is_err() && second != first);
    }
}
