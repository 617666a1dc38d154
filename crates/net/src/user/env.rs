//! What all parts of a network share.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, connect, socket_with};

use super::addresses::Plan;
use super::dns::{self, Resolvers};
use super::policy::Policy;
use super::poller::Poller;
use super::port::Port;

/// What all parts of a network share.
pub(super) struct Env {
    pub(super) poller: Poller,
    pub(super) plan: Plan,
    pub(super) policy: Policy,
    pub(super) resolvers: Resolvers,
    /// When the network began.
    pub(super) start: Instant,
    next: u64,
}

impl Env {
    pub(super) fn new(poller: Poller, plan: Plan) -> Env {
        let (policy, resolvers) = (Policy::new(), Resolvers::new());
        Env { poller, plan, policy, resolvers, start: Instant::now(), next: 0 }
    }

    /// A number that nothing had before.
    pub(super) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Where in the host a guest's packets to `to` go, if they may.
    pub(super) fn target(&mut self, port: &Port, to: SocketAddr) -> Option<SocketAddr> {
        if self.plan.is_gateway(to.ip()) {
            return self.at_gateway(port, to);
        }
        let leaves = !self.plan.contains(to.ip()) && to.port() != 0;
        (leaves && self.policy.permits(to.ip(), &port.allow)).then_some(to)
    }

    /// The gateway stands for the host's resolver, and for its loopback address where that is allowed.
    fn at_gateway(&mut self, port: &Port, to: SocketAddr) -> Option<SocketAddr> {
        if to.port() == dns::PORT {
            return self.resolvers.first();
        }
        let loopback: IpAddr = match to.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        let allowed = port.allow.iter().any(|range| range.contains(loopback));
        allowed.then(|| SocketAddr::new(loopback, to.port()))
    }
}

/// A socket of the host on its way to `to`, which may have yet to be reached.
pub(super) fn dial(
    to: SocketAddr,
    kind: SocketType,
    protocol: Option<Protocol>,
) -> rustix::io::Result<OwnedFd> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, protocol)?;
    match connect(&socket, &to) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}
