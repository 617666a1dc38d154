//! The software engine: runs guest code without hardware virtualization.
//!
//! The way of a guest load: an instruction's handler (`x86/interp`) → [`x86::access`] → TLB hit
//! ([`x86::tlb`]) and one host load; on a miss the page walker ([`x86::walk`]) → TLB fill, MMIO through
//! [`engine::CpuIo`], or a page fault precisely at that instruction ([`x86::event`]).

mod clock;
mod vcpu;
mod vm;
pub mod x86;

use std::sync::Arc;

use engine::{Engine, Error, Vm, VmConfig};
use mem::GuestRam;

pub use vcpu::SoftVcpu;
pub use vm::{Mailbox, Shared, SoftVm};

/// The software engine.
#[derive(Clone, Copy, Debug, Default)]
pub struct SoftEngine;

impl SoftEngine {
    /// The engine, if this host can run it.
    pub fn new() -> Result<SoftEngine, Error> {
        x86::fpu::stub::init().map_err(|source| Error::Host {
            what: "mapping executable memory (memfd_create, mmap)",
            source,
        })?;
        Ok(SoftEngine)
    }
}

impl Engine for SoftEngine {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn create_vm(&self, config: &VmConfig, memory: GuestRam) -> Result<Arc<dyn Vm>, Error> {
        Ok(Arc::new(SoftVm::new(config, memory)?))
    }
}
