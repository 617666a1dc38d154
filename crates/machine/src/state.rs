//! The saved state of a whole machine.

use engine::x86::CpuModel;
use engine::{CpuState, Vcpu};
use serde::{Deserialize, Serialize};

use crate::{ChipsetState, Error, Machine, PciState};

/// Everything a guest can observe of its machine, except the contents of its memory, which are saved
/// page by page through [`Machine::ram`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineState {
    /// Bytes of RAM, so that a state is not restored into another machine.
    pub memory: u64,
    /// What the vCPUs say they are.
    pub cpu_model: CpuModel,
    /// The vCPUs in the order of their ids.
    pub cpus: Vec<CpuState>,
    /// The chipset.
    pub chipset: ChipsetState,
    /// The PCI devices.
    pub pci: PciState,
}

impl Machine {
    /// Saves everything but memory. None of the vCPUs runs. The devices are paused from here on, so that
    /// memory can be saved to match; [`Machine::resume`] lets them go on.
    pub fn save(&self, vcpus: &[Box<dyn Vcpu>]) -> Result<MachineState, Error> {
        self.pause();
        Ok(MachineState {
            memory: self.ram.size(),
            cpu_model: self.spec.cpu_model,
            cpus: vcpus.iter().map(|vcpu| vcpu.save()).collect::<Result<_, _>>()?,
            chipset: self.chipset.save(),
            pci: self.devices.save(),
        })
    }

    /// Takes a state on, memory being restored already. None of the vCPUs runs; the devices wait for
    /// [`Machine::resume`].
    ///
    /// After an error some parts have the new state and some have none: reset or drop the machine.
    pub fn restore(&mut self, state: MachineState, vcpus: &mut [Box<dyn Vcpu>]) -> Result<(), Error> {
        let MachineState { memory, cpu_model, cpus, chipset, pci } = state;
        same("bytes of memory", memory, self.ram.size())?;
        if cpu_model != self.spec.cpu_model {
            return Err(Error::OtherCpu { saved: cpu_model, here: self.spec.cpu_model });
        }
        same("vCPUs", cpus.len() as u64, vcpus.len() as u64)?;
        self.pause();
        self.chipset.reset();
        self.devices.reset()?;
        let controllers = self.chipset.restore(chipset)?;
        self.devices.restore(pci)?;
        self.chipset.restore_controllers(controllers)?;
        // Last, so that whatever the devices' lines did on the way is not in the local APICs.
        for (vcpu, cpu) in vcpus.iter_mut().zip(&cpus) {
            vcpu.restore(cpu)?;
        }
        Ok(())
    }
}

pub(crate) fn same(what: &'static str, saved: u64, here: u64) -> Result<(), Error> {
    if saved == here { Ok(()) } else { Err(Error::OtherMachine { what, saved, here }) }
}
