//! The whole network without a VM: smoltcp is the guest, sockets of the host are the world, and one thread
//! runs all of them in turns, so that nothing here depends on how fast the host is.

mod addresses;
mod datagrams;
mod guest;
mod harm;
mod hostile;
mod tcp;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use guest::Guest;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::*;
use crate::control::{FromVm, Hearing, ToVm, say};
use crate::{Introduction, Mac, Offloads};

/// After which something has gone wrong.
const PATIENCE: Duration = Duration::from_secs(20);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 1);

/// A network and who is attached to it.
struct World {
    network: Network,
    buffer: Vec<u8>,
    guests: Vec<Guest>,
    door: Option<std::path::PathBuf>,
    _folder: Option<tempfile::TempDir>,
}

impl World {
    /// A network with one guest, who may reach the host's loopback addresses.
    fn alone(publish: &[&str]) -> World {
        World::with(publish, &["127.0.0.0/8", "::1"])
    }

    fn with(publish: &[&str], allow: &[&str]) -> World {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let network = Network::new(Door::Private(theirs.into())).unwrap();
        let mut world =
            World { network, buffer: vec![0; MAX_PACKET], guests: Vec::new(), door: None, _folder: None };
        world.attach(ours, "alone", publish, allow).unwrap();
        world
    }

    /// A network that several may come to.
    fn shared() -> World {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("door");
        let listener = UnixListener::bind(&path).unwrap().into();
        let network = Network::new(Door::Shared { listener, name: "office".into() }).unwrap();
        World {
            network,
            buffer: vec![0; MAX_PACKET],
            guests: Vec::new(),
            door: Some(path),
            _folder: Some(folder),
        }
    }

    /// A VM comes; why it may not. Its guest is the last of `guests`.
    fn join(&mut self, name: &str, publish: &[&str]) -> Result<(), String> {
        let control = UnixStream::connect(self.door.as_ref().unwrap()).unwrap();
        self.attach(control, name, publish, &[])
    }

    fn attach(
        &mut self,
        control: UnixStream,
        name: &str,
        publish: &[&str],
        allow: &[&str],
    ) -> Result<(), String> {
        let (near, far) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let mac = Mac::of_vm(name);
        let introduction = Introduction {
            name: name.into(),
            mac,
            publish: publish.iter().map(|port| port.parse().unwrap()).collect(),
            allow: allow.iter().map(|range| range.parse().unwrap()).collect(),
            bandwidth: None,
        };
        introduction.say(&control).unwrap();
        say(&control, &FromVm::Attach, Some(std::os::fd::AsFd::as_fd(&far))).unwrap();
        control.set_nonblocking(true).unwrap();
        let (mut hearing, start) = (Hearing::default(), Instant::now());
        loop {
            self.turn();
            assert!(start.elapsed() < PATIENCE, "the network does not answer");
            let _ = hearing.hear(&control);
            match hearing.next::<ToVm>() {
                Some(Ok(ToVm::Attached { address })) => {
                    self.guests.push(Guest::new(near, mac, address, control));
                    return Ok(());
                }
                Some(Ok(ToVm::Refused(why))) => return Err(why),
                Some(Err(error)) => panic!("{error}"),
                None => {}
            }
        }
    }

    /// Everybody does what there is to do.
    fn turn(&mut self) {
        self.network.turn(&mut self.buffer, Duration::from_millis(1)).unwrap();
        self.guests.iter_mut().for_each(Guest::poll);
    }

    fn turns(&mut self, count: usize) {
        (0..count).for_each(|_| self.turn());
    }

    /// Turns until the first guest has what `look` looks for.
    fn until<T>(&mut self, what: &str, mut look: impl FnMut(&mut Guest) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(found) = look(&mut self.guests[0]) {
                return found;
            }
            assert!(start.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
            self.turn();
        }
    }

    fn guest(&mut self) -> &mut Guest {
        &mut self.guests[0]
    }

    /// The guest's driver takes all that there is.
    fn take_offloads(&mut self) {
        let all = Offloads { checksum: true, tso4: true, tso6: true };
        say(&self.guests[0].control, &FromVm::Offloads(all), None).unwrap();
        self.guests[0].take_offloads();
        self.turns(2);
    }

    /// The guest makes itself an address of the prefix that it is told.
    fn with_v6(&mut self) -> Ipv6Addr {
        let prefix = addresses::prefix(self);
        let address = Ipv6Addr::from_bits(prefix.to_bits() | 0xbeef);
        self.guest().add_v6(address);
        address
    }

    fn gateway_v6(&self) -> Ipv6Addr {
        self.network.env.plan.gateway_v6()
    }
}

/// A port of the host's loopback address that nobody has at the moment.
fn free_port() -> u16 {
    std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}
