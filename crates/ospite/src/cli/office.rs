//! The grammar of the commands for several VMs that a file declares.

use std::path::PathBuf;

use clap::Args;
use clap_complete::ArgValueCompleter;
use store::Name;

use crate::completions::vm_names;
use crate::output::OutputArgs;

const UP_EXAMPLES: &str = "\
Examples:
  Everything that the file declares; returns when all health checks pass
    ospite up office.toml

  One of its VMs
    ospite up office.toml web

A file:
  [vm.web]
  memory = \"256M\"             # also: cpus, disk, engine, stop-timeout
  disk-limit.bandwidth = \"20M\" # bytes a second; also: iops = 500 (requests), iops-burst, bandwidth-burst
  net-limit.bandwidth = \"10M\"  # bytes a second, each way
  network = \"office\"          # VMs of the same network reach each other by name
  publish = [\"8080:80\"]       # also: net-allow = [\"192.168.1.0/24\"]
  restart = \"always\"          # or \"on-failure\", \"no\"
  cloud-init = \"user-data.yaml\" # for images with cloud-init; applied once for each VM
  health.http = \"80/\"         # or tcp = 25, command = [\"...\"]
  health.interval = 5         # seconds; also: timeout, retries, start-period
  health.on-failure = \"restart\" # an unhealthy VM is restarted; else it is told
  image.packages = [\"nginx\"]  # also: files, users, run, size; or image = \"NAME\"";

/// `ospite up`
#[derive(Args, Debug)]
#[command(after_help = UP_EXAMPLES)]
pub struct UpArgs {
    /// The file that declares them
    #[arg(default_value = "office.toml")]
    pub file: PathBuf,

    /// Only these
    #[arg(add = ArgValueCompleter::new(vm_names))]
    pub names: Vec<Name>,

    /// How long a VM may take until its health check passes, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub timeout: u64,

    /// How to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// `ospite down`
#[derive(Args, Debug)]
pub struct DownArgs {
    /// The file that declares them
    #[arg(default_value = "office.toml")]
    pub file: PathBuf,

    /// Remove them too, with their disks
    #[arg(long)]
    pub remove: bool,

    /// How to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// `ospite ps`
#[derive(Args, Debug)]
pub struct PsArgs {
    /// The file that declares them
    #[arg(default_value = "office.toml")]
    pub file: PathBuf,

    /// How to print.
    #[command(flatten)]
    pub output: OutputArgs,
}
