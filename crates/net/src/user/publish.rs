//! Published ports: sockets of the host that listen for guests.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, accept_with, bind, listen, recvfrom,
    sendto, socket_with, sockopt,
};

use super::addresses::Plan;
use super::env::Env;
use super::poller::Token;
use super::port::Port;
use crate::{Protocol, Publish};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;
/// Connections or datagrams taken in a row.
const BURST: usize = 64;

struct Listener {
    port: u64,
    guest: u16,
    protocol: Protocol,
    socket: OwnedFd,
}

/// What comes in.
pub(super) enum Arrival {
    /// A TCP connection.
    Connection(OwnedFd),
    /// A UDP datagram.
    Datagram(Vec<u8>),
}

/// One arrival: from whom, and for which port of which guest.
pub(super) struct Incoming {
    pub(super) port: u64,
    pub(super) guest: u16,
    pub(super) client: SocketAddr,
    pub(super) arrival: Arrival,
}

/// All published ports.
#[derive(Default)]
pub(super) struct Published(HashMap<u64, Listener>);

impl Published {
    /// Listens for the guest at `port`, on all that is asked or on nothing.
    ///
    /// # Errors
    /// In words: what cannot be had, and why.
    pub(super) fn open(&mut self, env: &mut Env, port: u64, wanted: &[Publish]) -> Result<(), String> {
        let opened = wanted.iter().try_for_each(|publish| {
            self.open_one(env, port, publish).map_err(|error| explain(publish, error))
        });
        if opened.is_err() {
            self.forget(port);
        }
        opened
    }

    fn open_one(&mut self, env: &mut Env, port: u64, publish: &Publish) -> rustix::io::Result<()> {
        if let Some(address) = publish.address {
            return self.listen(env, port, publish, address);
        }
        self.listen(env, port, publish, Ipv4Addr::UNSPECIFIED.into())?;
        match self.listen(env, port, publish, Ipv6Addr::UNSPECIFIED.into()) {
            // A host without IPv6 has all its addresses by now.
            Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => Ok(()),
            result => result,
        }
    }

    fn listen(
        &mut self,
        env: &mut Env,
        port: u64,
        publish: &Publish,
        address: IpAddr,
    ) -> rustix::io::Result<()> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let (tcp, kind) = match publish.protocol {
            Protocol::Tcp => (true, SocketType::STREAM),
            Protocol::Udp => (false, SocketType::DGRAM),
        };
        let socket = socket_with(family, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
        if address.is_ipv6() {
            sockopt::set_ipv6_v6only(&socket, true)?;
        }
        if tcp {
            // Else a port stays taken for a minute after its last connection.
            sockopt::set_socket_reuseaddr(&socket, true)?;
        }
        bind(&socket, &SocketAddr::new(address, publish.host))?;
        if tcp {
            listen(&socket, BACKLOG)?;
        }
        let number = env.number();
        env.poller.watch(&socket, Token::Publish(number)).map_err(|_| Errno::NOMEM)?;
        self.0.insert(number, Listener { port, guest: publish.guest, protocol: publish.protocol, socket });
        Ok(())
    }

    /// What has come in.
    pub(super) fn take(&self, number: u64) -> Vec<Incoming> {
        let Some(listener) = self.0.get(&number) else { return Vec::new() };
        let next = || match listener.protocol {
            Protocol::Tcp => {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let socket = accept_with(&listener.socket, flags).ok()?;
                // One that is gone already has no peer.
                let client =
                    rustix::net::getpeername(&socket).ok().flatten().and_then(|peer| peer.try_into().ok());
                Some(client.map(|client| (client, Arrival::Connection(socket))))
            }
            Protocol::Udp => {
                let mut data = vec![0; 65536];
                let (length, _, from) =
                    recvfrom(&listener.socket, &mut data[..], RecvFlags::DONTWAIT).ok()?;
                data.truncate(length);
                let client = from.and_then(|from| from.try_into().ok());
                Some(client.map(|client| (client, Arrival::Datagram(data))))
            }
        };
        let incoming =
            |(client, arrival)| Incoming { port: listener.port, guest: listener.guest, client, arrival };
        std::iter::from_fn(next).take(BURST).flatten().map(incoming).collect()
    }

    /// Answers a client with a datagram; what the host does not take now is lost.
    pub(super) fn reply(&self, number: u64, client: SocketAddr, data: &[u8]) {
        if let Some(listener) = self.0.get(&number) {
            let _ = sendto(&listener.socket, data, SendFlags::DONTWAIT | SendFlags::NOSIGNAL, &client);
        }
    }

    /// A guest has gone.
    pub(super) fn forget(&mut self, port: u64) {
        self.0.retain(|_, listener| listener.port != port);
    }
}

fn explain(publish: &Publish, error: Errno) -> String {
    let what = format!("cannot publish port {publish}");
    match error {
        Errno::ADDRINUSE => format!("{what}: port {} of the host is taken; choose another one", publish.host),
        Errno::ACCESS | Errno::PERM => format!(
            "{what}: ports of the host below 1024 are root's; take a higher one, or let everybody have them with \
             sysctl net.ipv4.ip_unprivileged_port_start={}",
            publish.host
        ),
        Errno::ADDRNOTAVAIL => format!("{what}: the host does not have that address; ip address lists them"),
        error => format!("{what}: {error}"),
    }
}

/// Whom the guest sees as the client, and at which of its addresses. A client that it could not answer, as
/// one on the host's loopback interface, is the gateway to it.
pub(super) fn seen_as(plan: &Plan, port: &Port, client: SocketAddr) -> (SocketAddr, IpAddr) {
    let far = !client.ip().is_loopback() && !plan.contains(client.ip()) && !client.ip().is_unspecified();
    match client.ip() {
        IpAddr::V4(_) if far => (client, port.addresses.v4.into()),
        IpAddr::V6(address) if far && !address.is_unicast_link_local() && port.v6.is_some() => {
            (client, port.address_like(client.ip()))
        }
        _ => (SocketAddr::new(plan.gateway_v4().into(), client.port()), port.addresses.v4.into()),
    }
}
