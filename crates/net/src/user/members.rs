//! Who comes to a network, and how they leave it.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;

use rustix::net::sockopt;

use super::addresses::Addresses;
use super::env::Env;
use super::poller::Token;
use super::port::{Port, Ports};
use super::publish::Published;
use crate::control::{FromVm, Hearing, ToVm, say};
use crate::settings::is_name;
use crate::{Offloads, Publish};

/// Control connections at a time.
const MOST: usize = 256;

/// A control connection. Its number is that of its port.
struct Member {
    socket: OwnedFd,
    hearing: Hearing,
}

/// What has become of a member.
pub(super) enum News {
    /// It is attached.
    Came,
    /// Its guest's driver takes something else.
    Offloads(Offloads),
    /// It has left.
    Left,
}

/// All control connections.
#[derive(Default)]
pub(super) struct Members(HashMap<u64, Member>);

impl Members {
    /// Takes a connection on, if it is of the same user.
    pub(super) fn admit(&mut self, env: &mut Env, socket: OwnedFd) -> io::Result<()> {
        let peer = sockopt::socket_peercred(&socket)?;
        if peer.uid != rustix::process::geteuid() || self.0.len() >= MOST {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        rustix::io::ioctl_fionbio(&socket, true)?;
        let number = env.number();
        env.poller.watch(&socket, Token::Control(number))?;
        self.0.insert(number, Member { socket, hearing: Hearing::default() });
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Hears what a member says.
    pub(super) fn hear(
        &mut self,
        env: &mut Env,
        ports: &mut Ports,
        published: &mut Published,
        alone: bool,
        number: u64,
    ) -> Vec<News> {
        let Some(member) = self.0.get_mut(&number) else { return Vec::new() };
        let mut news = Vec::new();
        let open = match member.hearing.hear(&member.socket) {
            Ok(open) => open,
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        };
        while let Some(message) = member.hearing.next::<FromVm>() {
            let Ok(message) = message else {
                news.push(News::Left);
                break;
            };
            news.push(member.obey(env, ports, published, alone, number, message));
        }
        if !open {
            news.push(News::Left);
        }
        if news.iter().any(|news| matches!(news, News::Left)) {
            self.0.remove(&number);
        }
        news
    }
}

impl Member {
    fn obey(
        &mut self,
        env: &mut Env,
        ports: &mut Ports,
        published: &mut Published,
        alone: bool,
        number: u64,
        message: FromVm,
    ) -> News {
        match message {
            FromVm::Offloads(offloads) => News::Offloads(offloads),
            FromVm::Attach { .. } if ports.contains_key(&number) => News::Left,
            FromVm::Attach { name, mac, publish, allow, bandwidth } => {
                let Some(data) = self.hearing.fd.take() else { return News::Left };
                let answer =
                    place(env, ports, published, alone, number, &name, &publish).and_then(|addresses| {
                        let watched = env.poller.watch(&data, Token::Data(number));
                        watched.map_err(|error| format!("the network cannot take another VM: {error}"))?;
                        let port = Port::new(number, (name, mac), addresses, allow, data, bandwidth);
                        ports.insert(number, port);
                        Ok(addresses.v4)
                    });
                let attached = answer.is_ok();
                let answer = answer.map_or_else(ToVm::Refused, |address| ToVm::Attached { address });
                let said = say(&self.socket, &answer, None);
                if attached && said.is_ok() { News::Came } else { News::Left }
            }
        }
    }
}

/// Finds a place for the VM called `name`.
fn place(
    env: &mut Env,
    ports: &Ports,
    published: &mut Published,
    alone: bool,
    number: u64,
    name: &str,
    publish: &[Publish],
) -> Result<Addresses, String> {
    if !is_name(name) {
        return Err(format!(
            "{name:?} cannot be a VM's name in a network: take 1 to 48 of a-z, 0-9 and '-', a letter or a digit \
             first and last"
        ));
    }
    if ports.values().any(|port| port.name == name) {
        return Err(format!("a VM called {name} is in the network already; choose another --name"));
    }
    let free = match alone {
        true => Some(env.plan.only()),
        false => env.plan.assign(name, |address| ports.values().any(|port| port.addresses.v4 == address)),
    };
    let addresses = free.ok_or("the network has no address left")?;
    published.open(env, number, publish)?;
    Ok(addresses)
}
