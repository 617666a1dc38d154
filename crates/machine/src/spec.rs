//! What a machine is asked to be.

use std::io::Write;
use std::path::PathBuf;

use engine::x86::CpuModel;
use mem::Kind;
use serde::{Deserialize, Serialize};
use throttle::{DiskLimits, NetLimits};

/// A virtual machine as its user asked for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// A name for messages and windows.
    pub name: String,
    /// Number of vCPUs.
    pub cpus: u32,
    /// What they say they are.
    #[serde(default)]
    pub cpu_model: CpuModel,
    /// Memory in bytes.
    pub memory: u64,
    /// What of the host's memory is behind it.
    #[serde(default)]
    pub memory_backing: Kind,
    /// Disks, in the order in which the guest sees them.
    pub disks: Vec<DiskSpec>,
    /// What to start.
    pub boot: BootSpec,
    /// Network cards, in the order in which the guest sees them.
    pub nets: Vec<NetSpec>,
    /// High precision event timers.
    #[serde(default)]
    pub hpet: bool,
    /// A device by which CPU test suites drive the machine.
    #[serde(default)]
    pub test_device: bool,
    /// There is a way to programs in the guest: a port for its agent, and streams.
    pub agent: bool,
}

/// A disk of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// The image or device.
    pub path: PathBuf,
    /// Its format; told by content where absent.
    pub format: Option<disk::Format>,
    /// The image that this one, an overlay, is on, whatever the overlay itself names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<PathBuf>,
    /// The guest may not write.
    pub read_only: bool,
    /// Serial number that the guest sees.
    pub serial: Option<String>,
    /// What it may do in a second.
    #[serde(default, skip_serializing_if = "DiskLimits::is_none")]
    pub limits: DiskLimits,
}

/// A network card of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetSpec {
    /// Its address.
    pub mac: net::Mac,
    /// What it leads to, for people; the link itself is in [`HostIo`].
    pub network: String,
    /// What it may do in a second.
    #[serde(default, skip_serializing_if = "NetLimits::is_none")]
    pub limits: NetLimits,
}

/// What a machine starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootSpec {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// Where the machine's lines end in the host.
pub struct HostIo {
    /// COM1.
    pub serial_out: Box<dyn Write + Send>,
    /// The virtio console's port; without it there is no virtio console.
    pub console_out: Option<Box<dyn Write + Send>>,
    /// The cables of the network cards, in their order; what is missing leads nowhere.
    pub links: Vec<Box<dyn net::Link>>,
}
