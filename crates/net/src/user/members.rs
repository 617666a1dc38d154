//! Who comes to a network, and how they leave it.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketType, sockopt};

use super::addresses::Addresses;
use super::env::Env;
use super::poller::Token;
use super::port::{Port, Ports};
use super::publish::Published;
use crate::control::{FromVm, Hearing, Introduction, ToVm, say};
use crate::settings::is_name;
use crate::{Offloads, Publish};

/// Control connections at a time.
const MOST: usize = 256;
/// Those of one name: one, and what was not yet seen to have gone.
const NAMESAKES: usize = 8;

/// A control connection. Its number is that of its port.
struct Member {
    socket: OwnedFd,
    hearing: Hearing,
    /// Who it is. Said first and once.
    introduction: Option<Introduction>,
}

/// What has become of a member.
pub(super) enum News {
    /// It has said who it is.
    Met,
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
        self.0.insert(number, Member { socket, hearing: Hearing::default(), introduction: None });
        Ok(())
    }

    /// How many there are.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A member has left.
    pub(super) fn remove(&mut self, number: u64) {
        self.0.remove(&number);
    }

    /// How many of this name there are. What makes a VM's connections makes as many as it is asked to, and others
    /// shall have room.
    fn namesakes(&self, name: &str) -> usize {
        let introduced = self.0.values().filter_map(|member| member.introduction.as_ref());
        introduced.filter(|introduction| introduction.name == name).count()
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
        while let Some(message) = self.0.get_mut(&number).and_then(|member| member.hearing.next::<FromVm>()) {
            let said = match message {
                Ok(FromVm::Introduction(introduction)) => self.meet(number, introduction),
                Ok(message) => self
                    .0
                    .get_mut(&number)
                    .map_or(News::Left, |member| member.obey(env, ports, published, alone, number, message)),
                Err(_) => News::Left,
            };
            let left = matches!(said, News::Left);
            news.push(said);
            if left {
                break;
            }
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

impl Members {
    /// Somebody says who it is, before it says anything else.
    fn meet(&mut self, number: u64, introduction: Introduction) -> News {
        let crowded = self.namesakes(&introduction.name) >= NAMESAKES;
        match self.0.get_mut(&number) {
            Some(member) if member.introduction.is_none() && !crowded => {
                member.introduction = Some(introduction);
                News::Met
            }
            _ => News::Left,
        }
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
            FromVm::Introduction(_) => News::Left,
            FromVm::Attach => {
                let Some(introduction) = self.introduction.clone() else { return News::Left };
                let Some(data) = self.hearing.fd.take().filter(is_cable) else { return News::Left };
                if ports.contains_key(&number) {
                    return News::Left;
                }
                let Introduction { name, mac, publish, allow, bandwidth } = introduction;
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

/// Whether packets can travel on it. Other descriptors might be readable for ever, with nothing to be read.
fn is_cable(data: &OwnedFd) -> bool {
    let kind = sockopt::socket_type(data);
    kind == Ok(SocketType::SEQPACKET) && sockopt::socket_domain(data) == Ok(AddressFamily::UNIX)
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
