//! What was chosen, for people and programs: nothing that a guest can see is on a hidden default.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

use engine::x86::CpuModel;
use mem::Kind;
use pci::FunctionInfo;
use serde::Serialize;

use crate::{Machine, memory};

/// A machine as it was built.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Description {
    /// Its name.
    pub name: String,
    /// The board.
    pub board: &'static str,
    /// The engine.
    pub engine: &'static str,
    /// Number of vCPUs.
    pub cpus: u32,
    /// What they say they are.
    pub cpu_model: CpuModel,
    /// Guest-physical ranges of RAM.
    pub memory: Vec<Range<u64>>,
    /// What of the host's memory is behind it.
    pub memory_backing: Kind,
    /// What it starts.
    pub kernel: KernelInfo,
    /// Devices at fixed places.
    pub devices: Vec<DeviceInfo>,
    /// Devices in PCI slots.
    pub pci: Vec<PciInfo>,
}

/// What a machine starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KernelInfo {
    /// The file.
    pub path: PathBuf,
    /// Its boot protocol.
    pub protocol: String,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The command line.
    pub cmdline: String,
}

/// A device at a fixed place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceInfo {
    /// What it is.
    pub name: &'static str,
    /// `ports` or `memory`.
    pub space: &'static str,
    /// Where it is.
    pub range: Range<u64>,
    /// Its interrupt line.
    pub irq: Option<u32>,
}

/// A device in a PCI slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PciInfo {
    /// What it is.
    pub name: String,
    /// What is behind it in the host.
    pub backend: Option<String>,
    /// Slot, identity, BARs.
    #[serde(flatten)]
    pub function: FunctionInfo,
}

impl DeviceInfo {
    pub(crate) fn ports(name: &'static str, range: Range<u64>, irq: Option<u32>) -> DeviceInfo {
        DeviceInfo { name, space: "ports", range, irq }
    }

    pub(crate) fn memory(name: &'static str, range: Range<u64>) -> DeviceInfo {
        DeviceInfo { name, space: "memory", range, irq: None }
    }
}

impl Machine {
    /// What was chosen.
    pub fn describe(&self) -> Description {
        let boot = &self.spec.boot;
        Description {
            name: self.spec.name.clone(),
            board: "pc",
            engine: self.engine,
            cpus: self.spec.cpus,
            cpu_model: self.spec.cpu_model,
            memory: memory::ranges(self.spec.memory).unwrap_or_default(),
            memory_backing: self.spec.memory_backing,
            kernel: KernelInfo {
                path: boot.kernel.clone(),
                protocol: self.firmware.kernel.kind().to_string(),
                initrd: boot.initrd.clone(),
                cmdline: boot.cmdline.clone(),
            },
            devices: self.chipset.describe(),
            pci: self.devices.describe(),
        }
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "machine   {} (board {}, engine {})", self.name, self.board, self.engine)?;
        writeln!(f, "vCPUs     {} (model {})", self.cpus, self.cpu_model)?;
        for range in &self.memory {
            let (mib, backing) = ((range.end - range.start) >> 20, self.memory_backing);
            writeln!(f, "memory    {range:#x?} ({mib} MiB, backing {backing})")?;
        }
        let kernel = &self.kernel;
        writeln!(f, "kernel    {} ({})", kernel.path.display(), kernel.protocol)?;
        if let Some(initrd) = &kernel.initrd {
            writeln!(f, "initrd    {}", initrd.display())?;
        }
        writeln!(f, "cmdline   {}", kernel.cmdline)?;
        self.devices.iter().try_for_each(|device| writeln!(f, "device    {device}"))?;
        self.pci.iter().try_for_each(|info| writeln!(f, "PCI       {info}"))
    }
}

impl fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = self.range.end.saturating_sub(1);
        write!(f, "{}: {} {:#x}-{last:#x}", self.name, self.space, self.range.start)?;
        self.irq.map_or(Ok(()), |irq| write!(f, ", IRQ {irq}"))
    }
}

impl fmt::Display for PciInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FunctionInfo { slot, vendor, device, class: _, bars } = &self.function;
        write!(f, "00:{slot:02x}.0 {vendor:04x}:{device:04x} {}", self.name)?;
        if let Some(backend) = &self.backend {
            write!(f, ": {backend}")?;
        }
        bars.iter().filter(|bar| bar.address != 0).try_for_each(|bar| {
            write!(f, ", BAR {} at {:#x} ({} KiB)", bar.bar, bar.address, bar.size.div_ceil(1024))
        })
    }
}
