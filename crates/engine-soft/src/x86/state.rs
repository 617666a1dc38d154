//! Saving and restoring a vCPU.

use engine::Error;
use engine::x86::CpuState;

use super::cpu::Cpu;

impl Cpu {
    /// Copies out everything that the guest can observe.
    pub fn save(&self) -> Result<CpuState, Error> {
        Err(Error::BadState("saving is not there yet".into()))
    }

    /// Takes a state on.
    pub fn restore(&mut self, _state: &CpuState) -> Result<(), Error> {
        Err(Error::BadState("restoring is not there yet".into()))
    }
}
