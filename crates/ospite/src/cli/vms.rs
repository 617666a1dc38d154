//! The grammar of the commands for VMs that last.

use clap::{Args, ValueEnum};
use clap_complete::ArgValueCompleter;
use store::vm::Restart;
use store::{Name, Size};
use throttle::DiskLimits;

use super::{EscapeKey, MachineArgs};
use crate::completions::{image_names, vm_names};
use crate::output::OutputArgs;

const CREATE_EXAMPLES: &str = "\
Examples:
  A VM from an image, with a disk of its own
    ospite create web --image debian --disk-size 10G -m 1G -p 8080:80

  One that leaves the others their share of the disk
    ospite create build --image debian --disk-limit iops=500,bandwidth=20M

  A VM from files, that comes back when its process dies
    ospite create web -c 2 -m 1G -d web.qcow2 --restart on-failure \\
        --kernel vmlinuz --initrd initrd.img \\
        --append 'console=ttyS0 root=/dev/vda rw'

  Switch it on, look at its console, switch it off
    ospite start web
    ospite console web
    ospite stop web";

/// `ospite create`
#[derive(Args, Debug)]
#[command(after_help = CREATE_EXAMPLES)]
pub struct CreateArgs {
    /// Its name: a-z, 0-9 and `-`
    pub name: Name,

    /// What it starts.
    #[command(flatten)]
    pub image: ImageArgs,

    /// The machine.
    #[command(flatten)]
    pub machine: MachineArgs,

    /// How it lives.
    #[command(flatten)]
    pub life: LifeArgs,

    /// How to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// The image that a VM starts.
#[derive(Args, Debug)]
pub struct ImageArgs {
    /// An image: the VM gets a disk of its own that begins as the image's. `ospite image list` shows them
    #[arg(long, value_name = "NAME", conflicts_with_all = ["kernel", "initrd"], add = ArgValueCompleter::new(image_names))]
    pub image: Option<Name>,

    /// The size of that disk: 10G [default: the image's]
    #[arg(long, value_name = "SIZE", requires = "image")]
    pub disk_size: Option<Size>,

    /// What that disk may do in a second: `iops=500` requests, `bandwidth=20M` bytes, or both after a comma; with
    /// `iops-burst` and `bandwidth-burst` as of --disk
    #[arg(long, value_name = "LIMIT=VALUE[,...]", requires = "image")]
    pub disk_limit: Option<DiskLimits>,
}

/// How a VM that lasts lives.
#[derive(Args, Debug)]
#[command(next_help_heading = "Life")]
pub struct LifeArgs {
    /// Whether it comes back by itself: never, when its process fails or is killed, or also when the guest
    /// powers itself off. What `stop` and `kill` have ended stays off
    #[arg(long, value_name = "POLICY", value_enum, default_value_t = RestartArg::No)]
    pub restart: RestartArg,

    /// How long a guest that was asked to stop may take, in seconds, before its power is cut
    #[arg(long, value_name = "SECONDS", default_value_t = 90)]
    pub stop_timeout: u64,

    /// Something to remember about it; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    pub labels: Vec<(String, String)>,
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err("write KEY=VALUE".into()),
    }
}

/// See [`Restart`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RestartArg {
    /// It stays off
    No,
    /// When its process failed or was killed
    OnFailure,
    /// Also when the guest powered itself off
    Always,
}

impl From<RestartArg> for Restart {
    fn from(arg: RestartArg) -> Restart {
        match arg {
            RestartArg::No => Restart::No,
            RestartArg::OnFailure => Restart::OnFailure,
            RestartArg::Always => Restart::Always,
        }
    }
}

/// Which VMs.
#[derive(Args, Debug)]
pub struct WhichArgs {
    /// Their names
    #[arg(value_name = "NAME", required_unless_present = "all", add = ArgValueCompleter::new(vm_names))]
    pub names: Vec<Name>,

    /// All that this can be done with
    #[arg(long, conflicts_with = "names")]
    pub all: bool,

    /// How to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// `ospite stop`, `ospite restart`
#[derive(Args, Debug)]
pub struct StopArgs {
    /// Which.
    #[command(flatten)]
    pub which: WhichArgs,

    /// How long the guest may take, in seconds, before its power is cut [default: what it was created with]
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
}

/// `ospite rm`
#[derive(Args, Debug)]
pub struct RmArgs {
    /// Which.
    #[command(flatten)]
    pub which: WhichArgs,

    /// Cut the power of those that run
    #[arg(short, long)]
    pub force: bool,
}

/// `ospite list`
#[derive(Args, Debug)]
pub struct VmListArgs {
    /// How to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// `ospite info`
#[derive(Args, Debug)]
pub struct VmInfoArgs {
    /// Its name
    #[arg(add = ArgValueCompleter::new(vm_names))]
    pub name: Name,

    /// How to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// `ospite logs`
#[derive(Args, Debug)]
pub struct LogsArgs {
    /// Its name
    #[arg(add = ArgValueCompleter::new(vm_names))]
    pub name: Name,

    /// Go on with what comes, until the VM is off
    #[arg(short, long)]
    pub follow: bool,

    /// Only the last lines
    #[arg(short = 'n', long, value_name = "LINES")]
    pub tail: Option<usize>,

    /// What ospite itself had to say about the VM, instead of what the guest printed
    #[arg(long, conflicts_with_all = ["follow", "tail"])]
    pub messages: bool,
}

/// `ospite console`
#[derive(Args, Debug)]
pub struct ConsoleArgs {
    /// Its name
    #[arg(add = ArgValueCompleter::new(vm_names))]
    pub name: Name,

    /// Begin with the last lines that the guest printed
    #[arg(short = 'n', long, value_name = "LINES", default_value_t = 20)]
    pub tail: usize,

    /// The key that opens the console's menu: ctrl-] or another letter or one of @[\]^_ after `ctrl-`;
    /// `none` gives every key to the guest
    #[arg(long, value_name = "KEY", default_value = "ctrl-]")]
    pub escape: EscapeKey,
}

/// `ospite autostart`
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  sudo sh -c 'ospite autostart --unit > /etc/systemd/system/ospite.service'\n  sudo systemctl enable ospite"
)]
pub struct AutostartArgs {
    /// Print a unit that has systemd do it when the host starts; as root for root's VMs, else for yours
    #[arg(long)]
    pub unit: bool,

    /// How to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// The processes of a VM; not for people.
#[derive(Args, Debug)]
pub struct ProcessArgs {
    /// The VM's name
    pub name: Name,
}
