//! A VM's network: options, and the cable from its card to what they ask for.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use clap::Args;
use machine::NetSpec;
use net::user::Door;
use net::{
    AttachError, Attachment, Cidr, Introduction, Link, Mac, NetworkMode, NetworkSettings, Publish, TapLink,
};
use sandbox::{Calls, Keep};
use store::Lock;
use throttle::{Bytes, NetLimits};

use crate::exit::Code;
use crate::failure::Failure;

pub mod dialer;

/// What is said about a VM's network on the command line.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
#[command(next_help_heading = "Network")]
pub struct NetworkArgs {
    /// What the network card leads to: `user` is a network of the VM's own with a way to the internet; a
    /// name is the same shared with your other VMs that give the name; `tap=IF` is a tap interface of the
    /// host, which is made where root asks for it, and `,bridge=BRIDGE` puts it in a bridge; `none` is no card
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

    /// What the network card may do in a second, in each direction: `bandwidth=10M` bytes, of which a tenth may come
    /// at once after a pause, or what `bandwidth-burst=SIZE` says after a comma
    #[arg(long = "net-limit", value_name = "bandwidth=SIZE[,...]")]
    pub limits: Option<NetLimits>,
}

impl NetworkArgs {
    /// The same, as it is kept in a VM's definition.
    pub fn settings(&self) -> NetworkSettings {
        let NetworkArgs { network, publish, allow, limits } = self.clone();
        NetworkSettings { mode: network, publish, allow, limits: limits.unwrap_or_default() }
    }
}

/// `ospite network-process`
#[derive(Args, Debug)]
pub struct NetworkProcessArgs {
    /// The name of a network that VMs share; standard input is the socket that they come to. Without it,
    /// it is the one VM's
    #[arg(long)]
    pub shared: Option<String>,
}

/// `ospite network-dialer`
#[derive(Args, Debug)]
pub struct NetworkDialerArgs {
    /// Who comes and what it may have, as JSON
    #[arg(long)]
    pub introduction: String,

    /// The name of a network that VMs share
    #[arg(long)]
    pub shared: Option<String>,
}

/// The network cards of the VM called `vm`.
pub fn cards(vm: &str, settings: &NetworkSettings) -> Vec<NetSpec> {
    match settings.mode {
        NetworkMode::None => Vec::new(),
        _ => {
            let network = settings.mode.to_string();
            vec![NetSpec { mac: Mac::of_vm(vm), network, limits: settings.limits }]
        }
    }
}

/// What a VM's cards are connected through: got before the VM's process is confined, in which it could not be
/// had any more.
pub enum Prepared {
    /// There is no card.
    None,
    /// Who dials, and how many bytes a second the card takes, where that has a limit.
    Dialer(OwnedFd, Option<u64>),
    /// The interface itself.
    Tap(Box<dyn Link>),
}

/// Gets it for the VM called `vm`.
///
/// # Errors
/// The network cannot be had.
pub fn prepare(vm: &str, settings: &NetworkSettings, cards: &[NetSpec]) -> Result<Prepared, Failure> {
    let shared = match &settings.mode {
        NetworkMode::Tap { interface, bridge } => {
            return tap(interface, bridge.as_deref(), settings).map(Prepared::Tap);
        }
        NetworkMode::Named(name) => Some(name.as_str()),
        NetworkMode::User | NetworkMode::None => None,
    };
    let Some(card) = cards.first() else { return Ok(Prepared::None) };
    let NetworkSettings { publish, allow, .. } = settings.clone();
    let bandwidth = card.limits.bandwidth.map(Bytes::get);
    let introduction = Introduction { name: host_name(vm), mac: card.mac, publish, allow, bandwidth };
    let host = |error: io::Error| Failure::new(Code::Build, format!("cannot prepare the network: {error}"));
    let dialer = dialer::start(shared, &introduction).map_err(host)?;
    Ok(Prepared::Dialer(dialer, bandwidth))
}

/// Connects the VM's cards: one link for each, in their order.
///
/// # Errors
/// The network cannot be had: a port is taken, ...
pub fn attach_cards(prepared: Prepared) -> Result<Vec<Box<dyn Link>>, Failure> {
    let (dialer, bandwidth) = match prepared {
        Prepared::Dialer(dialer, bandwidth) => (dialer, bandwidth),
        Prepared::Tap(link) => return Ok(vec![link]),
        Prepared::None => return Ok(Vec::new()),
    };
    let dial: net::Dial = Box::new(move || dialer::dial(&dialer));
    match Attachment::new(bandwidth, dial) {
        Ok(attachment) => Ok(vec![Box::new(attachment)]),
        Err(AttachError::Refused(why)) => Err(Failure::new(Code::Build, why)),
        Err(error) => Err(Failure::from_error(Code::Build, &error)),
    }
}

/// A tap interface of the host, which everything else is the host's affair with.
fn tap(interface: &str, bridge: Option<&str>, settings: &NetworkSettings) -> Result<Box<dyn Link>, Failure> {
    if !settings.publish.is_empty() || !settings.allow.is_empty() {
        return Err(Failure::new(
            Code::Usage,
            "--publish and --net-allow are for user-mode networks: who reaches whom through a tap interface is \
             the host's routes' and nft's affair; leave them out, or take --network user",
        ));
    }
    match TapLink::new(interface, bridge) {
        Ok(link) => Ok(Box::new(link)),
        Err(error) => Err(Failure::from_error(Code::Build, &error)),
    }
}

/// What the VM is called in its network: its name, as far as host names go.
pub fn host_name(vm: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let name: String = vm.chars().map(plain).take(48).collect();
    let name = name.trim_matches('-');
    if name.is_empty() { "vm".into() } else { name.into() }
}

/// A process that this one has started, and may have to start again.
#[derive(Default)]
struct Process(Option<Child>);

impl Process {
    /// One for this VM alone; the connection to it.
    fn private(&mut self) -> io::Result<OwnedFd> {
        let (ours, theirs) = UnixStream::pair()?;
        self.start(OwnedFd::from(theirs), Stdio::inherit(), None)?;
        Ok(ours.into())
    }

    fn start(&mut self, door: OwnedFd, messages: Stdio, shared: Option<&str>) -> io::Result<()> {
        if let Some(mut old) = self.0.take() {
            // It has ended, most likely: how tells what went wrong.
            if let Some(status) = old.try_wait()?.filter(|status| !status.success()) {
                log::warn!("the network's process came to a bad end: {status}");
            }
            let _ = old.kill();
            old.wait()?;
        }
        let mut command = Command::new("/proc/self/exe");
        command.arg("network-process").stdin(Stdio::from(door)).stdout(Stdio::null()).stderr(messages);
        if let Some(name) = shared {
            command.args(["--shared", name]);
        }
        self.0 = Some(command.spawn()?);
        Ok(())
    }
}

/// A network that VMs of one user share. Whoever comes first starts its process.
struct Shared {
    name: String,
    socket: PathBuf,
    process: Process,
}

impl Shared {
    fn new(runtime: &Path, name: &str) -> Shared {
        let socket = runtime.join(format!("net-{name}.sock"));
        Shared { name: name.into(), socket, process: Process::default() }
    }

    fn dial(&mut self) -> io::Result<OwnedFd> {
        let _lock = Lock::wait(&self.socket.with_extension("lock"))?;
        match UnixStream::connect(&self.socket) {
            Ok(stream) => return Ok(stream.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(&self.socket)?
            }
            Err(error) => return Err(error),
        }
        let listener = UnixListener::bind(&self.socket)?;
        std::fs::set_permissions(&self.socket, std::fs::Permissions::from_mode(0o600))?;
        self.process.start(listener.into(), self.log()?.into(), Some(&self.name))?;
        Ok(UnixStream::connect(&self.socket)?.into())
    }

    /// It outlives the VM that started it, so that its words go to a file.
    fn log(&self) -> io::Result<File> {
        let path = self.socket.with_extension("log");
        OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(path)
    }
}

/// The process of a network.
///
/// # Errors
/// The host would not give what it needs.
pub fn process(args: NetworkProcessArgs) -> Result<Code, Failure> {
    let failed = |error: io::Error| Failure::from_error(Code::Internal, &error);
    // Signals to the terminal's processes are the VM's.
    let _ = rustix::process::setsid();
    let door = io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
    let door = match args.shared {
        Some(name) => Door::Shared { listener: door, name },
        None => Door::Private(door),
    };
    // The host's resolvers are all that it reads.
    let read = sandbox::replaced_file(Path::new(net::user::RESOLV_CONF));
    sandbox::confine(&Keep { read, network: true, calls: Some(Calls::Network), ..Keep::default() })
        .map_err(|error| Failure::from_error(Code::Internal, &error))?;
    net::user::run(door).map_err(failed)?;
    Ok(Code::Success)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vm_has_a_host_name() {
        for (vm, name) in [("web", "web"), ("My VM.1", "my-vm-1"), ("--", "vm"), ("é", "vm")] {
            assert_eq!(host_name(vm), name);
        }
        assert_eq!(host_name(&"x".repeat(60)).len(), 48);
    }
}
