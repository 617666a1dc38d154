//! The software engine: runs guest code without hardware virtualization.
//!
//! The way of a guest load: an instruction's handler (`x86/interp`) → [`x86::access`] → TLB hit
//! ([`x86::tlb`]) and one host load; on a miss the page walker ([`x86::walk`]) → TLB fill, MMIO through
//! [`engine::CpuIo`], or a page fault precisely at that instruction ([`x86::event`]).

mod clock;
mod ticker;
mod vcpu;
mod vm;
pub mod x86;

use std::sync::Arc;

use engine::x86::CpuModel;
use engine::{Engine, Error, Vm, VmConfig};
use mem::GuestRam;

use x86::cpuid::Cpuid;

pub use vcpu::SoftVcpu;
pub use vm::{Mailbox, Shared, SoftVm};

/// How guest code is run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tier {
    /// One instruction after another: the reference, and what runs where translation does not reach.
    Interpreter,
    /// Translated to host code.
    #[default]
    Translator,
    /// Each unit of translated code on both, and the results compared. Slow; for tests.
    Lockstep,
}

/// The software engine.
#[derive(Clone, Copy, Debug, Default)]
pub struct SoftEngine {
    tier: Tier,
}

impl SoftEngine {
    /// The engine, if this host can run it. `OSPITE_TIER` (interpreter, translator, lockstep) chooses
    /// another tier than the usual one.
    pub fn new() -> Result<SoftEngine, Error> {
        let tier = match std::env::var("OSPITE_TIER").as_deref() {
            Ok("interpreter") => Tier::Interpreter,
            Ok("lockstep") => Tier::Lockstep,
            Ok("translator") | Err(_) => Tier::Translator,
            Ok(other) => {
                let why = format!("OSPITE_TIER={other} (interpreter, translator or lockstep)");
                return Err(Error::Unavailable { engine: "soft", why });
            }
        };
        x86::fpu::stub::init().map_err(|source| Error::Host {
            what: "mapping executable memory (memfd_create, mmap)",
            source,
        })?;
        Ok(SoftEngine { tier })
    }

    /// The engine with a tier of choice.
    pub fn with_tier(tier: Tier) -> SoftEngine {
        SoftEngine { tier }
    }
}

impl Engine for SoftEngine {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn supports(&self, model: CpuModel) -> Result<(), Error> {
        Cpuid::new(1, model).map(drop)
    }

    fn create_vm(&self, config: &VmConfig, memory: GuestRam) -> Result<Arc<dyn Vm>, Error> {
        Ok(Arc::new(SoftVm::new(config, memory, self.tier)?))
    }
}
