//! The PCI root and what is in its slots.
//!
//! A kind of device keeps its slots, whatever else is there, so that a guest's names for its network
//! cards survive a new disk: 1 entropy, 2 console, from 3 network, from 8 (or after the network cards)
//! disks.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use device::{Bus, DoorbellSink, IrqSink, MsiSink, Snapshot};
use disk::Disk;
use mem::GuestRam;
use net::{CountingSink, Link};
use pci::{ConfigState, FunctionInfo, HostBridge, Intx, IntxRouter, PciFunction, PciRoot, Pin, Windows};
use serde::{Deserialize, Serialize};
use virtio::{Blk, Console, ConsoleInput, ConsolePorts, Net, Rng, VirtioDevice, VirtioPci, VirtioState};

use crate::chipset::lock;
use crate::describe::PciInfo;
use crate::{DiskSpec, Error, HostIo, NetSpec, VmSpec, layout};

const HOST_BRIDGE: u8 = 0;
const RNG: u8 = 1;
const CONSOLE: u8 = 2;
const FIRST_NET: u8 = 3;
const FIRST_DISK: u8 = 8;
const SLOTS: u8 = 32;
/// The length of the field that a virtio disk has for its serial number.
const SERIAL_LENGTH: usize = 20;

/// Saved state of the PCI root and its functions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciState {
    /// The address register at port 0xcf8.
    pub address: u32,
    /// The host bridge.
    pub host_bridge: ConfigState,
    /// The virtio devices with their slots, ascending.
    pub virtio: Vec<(u8, VirtioState)>,
}

/// What the devices are connected to.
pub(crate) struct Wiring<'a> {
    pub(crate) ports: &'a Arc<Bus>,
    pub(crate) mmio: &'a Arc<Bus>,
    pub(crate) ram: &'a GuestRam,
    pub(crate) msi: Arc<dyn MsiSink>,
    pub(crate) doorbells: Arc<dyn DoorbellSink>,
    pub(crate) irqs: Arc<dyn IrqSink>,
}

/// A virtio device in its slot.
struct Slot {
    number: u8,
    function: Arc<Mutex<VirtioPci>>,
    /// What is behind it in the host, for people.
    backend: String,
    /// The image, if it is a disk.
    disk: Option<PathBuf>,
}

/// The PCI devices.
pub(crate) struct Devices {
    root: Arc<PciRoot>,
    host_bridge: Arc<Mutex<HostBridge>>,
    slots: Vec<Slot>,
    console: Option<ConsoleInput>,
    ports: Option<ConsolePorts>,
}

/// Puts devices into slots.
struct Builder<'a> {
    wiring: &'a Wiring<'a>,
    intx: Arc<IntxRouter>,
    root: Arc<PciRoot>,
    slots: Vec<Slot>,
}

impl Builder<'_> {
    fn add(
        &mut self,
        number: u8,
        device: impl VirtioDevice + 'static,
        backend: String,
        disk: Option<PathBuf>,
    ) -> Result<(), Error> {
        if number >= SLOTS {
            return Err(pci::Error::Full.into());
        }
        let intx: Intx = self.intx.intx(number, Pin::A);
        let Wiring { ram, msi, .. } = self.wiring;
        let function = VirtioPci::new(device, (*ram).clone(), msi.clone(), Some(intx))
            .map_err(|source| Error::Device { slot: number, source })?;
        let function = Arc::new(Mutex::new(function));
        self.root.add(number, function.clone())?;
        self.slots.push(Slot { number, function, backend, disk });
        Ok(())
    }

    /// One device for the console and for the guest agent; it is there if either is asked for. A guest looks
    /// at each of its thirty queues while it starts, which takes longer than all other devices together.
    fn add_console(
        &mut self,
        agent: bool,
        host: &mut HostIo,
    ) -> Result<(Option<ConsoleInput>, Option<ConsolePorts>), Error> {
        let out = host.console_out.take();
        let backend = match (out.is_some(), agent) {
            (true, true) => "the host's console, guest agent",
            (true, false) => "the host's console",
            (false, true) => "guest agent",
            (false, false) => return Ok((None, None)),
        };
        let asked = out.is_some();
        let console = Console::new(out).map_err(|source| Error::Device { slot: CONSOLE, source })?;
        let (input, ports) = (asked.then(|| console.input()), agent.then(|| console.ports()));
        self.add(CONSOLE, console, backend.into(), None)?;
        Ok((input, ports))
    }

    fn add_net(&mut self, index: u32, spec: &NetSpec, link: Option<Box<dyn Link>>) -> Result<(), Error> {
        let link = link.unwrap_or_else(|| Box::new(CountingSink::new()));
        let net = Net::new(spec.mac, link).limited(&spec.limits);
        let limits = if spec.limits.is_none() { String::new() } else { format!(", {}", spec.limits) };
        let backend = format!("{}, network {}{limits}", spec.mac, spec.network);
        self.add(slot(FIRST_NET, index), net, backend, None)
    }

    fn add_disk(&mut self, first: u8, index: u32, spec: &DiskSpec) -> Result<(), Error> {
        let serial = serial_number(spec, index)?;
        let disk = match &spec.base {
            Some(base) => disk::open_overlay(&spec.path, base, spec.read_only)?,
            None => disk::open(&spec.path, spec.format, spec.read_only)?,
        };
        let backend = describe_disk(spec, &*disk, &serial);
        let blk = Blk::new(disk, &serial).limited(&spec.limits);
        self.add(slot(first, index), blk, backend, Some(spec.path.clone()))
    }
}

/// The slot of the device number `index` of those that begin at `first`; [`SLOTS`] where there is none.
fn slot(first: u8, index: u32) -> u8 {
    (u32::from(first).saturating_add(index)).min(SLOTS.into()) as u8
}

fn serial_number(spec: &DiskSpec, index: u32) -> Result<String, Error> {
    let serial = spec.serial.clone().unwrap_or_else(|| format!("ospite-{index}"));
    let fits = (1..=SERIAL_LENGTH).contains(&serial.len()) && serial.bytes().all(|b| b.is_ascii_graphic());
    if fits { Ok(serial) } else { Err(Error::Serial { path: spec.path.clone(), serial }) }
}

fn describe_disk(spec: &DiskSpec, disk: &dyn Disk, serial: &str) -> String {
    let disk::Description { format, probed, read_only, size } = disk.description();
    let told = if probed { " told by content" } else { "" };
    let mode = if read_only { ", read-only" } else { "" };
    let base = spec.base.as_ref().map(|base| format!(" on {}", base.display())).unwrap_or_default();
    let limits = if spec.limits.is_none() { String::new() } else { format!(", {}", spec.limits) };
    let path = spec.path.display();
    format!("{path} ({format}{told}{base}, {} MiB{mode}, serial number {serial}{limits})", size >> 20)
}

impl Devices {
    pub(crate) fn new(wiring: &Wiring<'_>, spec: &VmSpec, host: &mut HostIo) -> Result<Devices, Error> {
        let windows =
            Windows { io: layout::PCI_PORTS, mem32: layout::PCI_MMIO_32, mem64: layout::PCI_MMIO_64 };
        let root = PciRoot::new(wiring.mmio.clone(), wiring.ports.clone(), windows);
        root.set_doorbells(wiring.doorbells.clone());
        root.attach(wiring.mmio, layout::ECAM.start, wiring.ports)?;
        let host_bridge = Arc::new(Mutex::new(HostBridge::new()));
        root.add(HOST_BRIDGE, host_bridge.clone())?;
        let intx = IntxRouter::new(wiring.irqs.clone());
        let mut builder = Builder { wiring, intx, root: root.clone(), slots: Vec::new() };
        builder.add(RNG, Rng::new(), "the host's random numbers".into(), None)?;
        let (console, ports) = builder.add_console(spec.agent, host)?;
        let mut links = host.links.drain(..);
        for (index, net) in (0..).zip(&spec.nets) {
            builder.add_net(index, net, links.next())?;
        }
        let nets = u32::try_from(spec.nets.len()).unwrap_or(u32::MAX);
        let first_disk = slot(FIRST_NET, nets).max(FIRST_DISK);
        for (index, disk) in (0..).zip(&spec.disks) {
            builder.add_disk(first_disk, index, disk)?;
        }
        let slots = builder.slots;
        root.assign()?;
        Ok(Devices { root, host_bridge, slots, console, ports })
    }

    /// The keyboard of the virtio console.
    pub(crate) fn console(&self) -> Option<&ConsoleInput> {
        self.console.as_ref()
    }

    /// The way to the guest agent.
    pub(crate) fn ports(&self) -> Option<&ConsolePorts> {
        self.ports.as_ref()
    }

    pub(crate) fn reset(&self) -> Result<(), Error> {
        Ok(self.root.reset()?)
    }

    /// Lets requests under way finish and starts none.
    pub(crate) fn pause(&self) {
        self.slots.iter().for_each(|slot| lock(&slot.function).pause());
    }

    pub(crate) fn resume(&self) {
        self.slots.iter().for_each(|slot| lock(&slot.function).resume());
    }

    pub(crate) fn save(&self) -> PciState {
        PciState {
            address: self.root.config_address().get(),
            host_bridge: lock(&self.host_bridge).config().save(),
            virtio: self.slots.iter().map(|slot| (slot.number, lock(&slot.function).save())).collect(),
        }
    }

    pub(crate) fn restore(&self, state: PciState) -> Result<(), Error> {
        let PciState { address, host_bridge, virtio } = state;
        let (saved, here) = (virtio.len() as u64, self.slots.len() as u64);
        if saved != here {
            return Err(Error::OtherMachine { what: "virtio devices", saved, here });
        }
        for (slot, (number, state)) in self.slots.iter().zip(virtio) {
            if slot.number != number {
                let (saved, here) = (number.into(), slot.number.into());
                return Err(Error::OtherMachine { what: "as the slot of a device", saved, here });
            }
            lock(&slot.function).restore(state)?;
        }
        lock(&self.host_bridge).config_mut().restore(host_bridge)?;
        self.root.config_address().set(address);
        self.root.refresh();
        Ok(())
    }

    /// Makes what the guest wrote to its disks durable. All are tried; the first failure counts.
    pub(crate) fn flush(&self) -> Result<(), Error> {
        let mut first = Ok(());
        for slot in &self.slots {
            let result = lock(&slot.function).flush();
            if let (Err(source), Some(path)) = (result, &slot.disk) {
                first = first.and(Err(Error::Flush { path: path.clone(), source }));
            }
        }
        first
    }

    pub(crate) fn describe(&self) -> Vec<PciInfo> {
        self.root.describe().into_iter().map(|info| self.info(info)).collect()
    }

    fn info(&self, function: FunctionInfo) -> PciInfo {
        let slot = self.slots.iter().find(|slot| slot.number == function.slot);
        let name = match slot {
            Some(slot) => lock(&slot.function).name().to_owned(),
            None => "host bridge".into(),
        };
        PciInfo { name, backend: slot.map(|slot| slot.backend.clone()), function }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use throttle::DiskLimits;

    #[test]
    fn serial_numbers_that_a_guest_could_not_read_are_refused() {
        let spec = |serial: Option<&str>| DiskSpec {
            path: "disk.raw".into(),
            format: None,
            base: None,
            read_only: false,
            serial: serial.map(Into::into),
            limits: DiskLimits::default(),
        };
        assert_eq!(serial_number(&spec(None), 3).unwrap(), "ospite-3");
        assert_eq!(serial_number(&spec(Some("0123456789abcdefghij")), 0).unwrap(), "0123456789abcdefghij");
        for bad in ["", "0123456789abcdefghijk", "a b", "ö"] {
            assert!(serial_number(&spec(Some(bad)), 0).is_err(), "{bad}");
        }
    }

    #[test]
    fn slots_end_where_the_bus_does() {
        assert_eq!((slot(3, 0), slot(8, 23), slot(8, 24), slot(3, u32::MAX)), (3, 31, SLOTS, SLOTS));
    }
}
