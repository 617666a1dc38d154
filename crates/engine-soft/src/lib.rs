//! The software engine: runs guest code without hardware virtualization.
//!
//! The way of a guest load: an instruction's handler (`x86/interp`) → [`x86::access`] → TLB hit
//! ([`x86::tlb`]) and one host load; on a miss the page walker ([`x86::walk`]) → TLB fill, MMIO through
//! [`engine::CpuIo`], or a page fault precisely at that instruction ([`x86::event`]).

mod clock;
mod profile;
mod ticker;
mod vcpu;
mod vm;
pub mod x86;

use std::sync::Arc;

use engine::x86::CpuModel;
use engine::{Engine, Error, Options, Vm, VmConfig};
use mem::{Backing, GuestRam};

use x86::cpuid::Cpuid;

pub use vcpu::SoftVcpu;
pub use vm::{Mailbox, Shared, SoftVm};

/// How guest code is run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tier {
    /// One instruction after another: the reference, and what runs where translation does not reach.
    Interpreter,
    /// Translated to host code.
    Translator,
    /// The same, and user programs that compute run as they are, on the host's CPU.
    #[default]
    Native,
    /// Each unit of translated code on both, and the results compared. Slow; for tests.
    Lockstep,
}

/// Bytes that the engine takes for each vCPU beside the guest's memory, at most: translated code, decoded
/// blocks, and what is remembered of them. In lockstep it is more.
pub const MEMORY_PER_VCPU: usize = 512 << 20;
const _: () = assert!(x86::translate::translator::MEMORY_LIMIT + x86::block::MEMORY_LIMIT <= MEMORY_PER_VCPU);

/// What people can choose.
const OPTIONS: &str = "tier=interpreter|translator|native|lockstep";

/// The software engine.
#[derive(Clone, Copy, Debug, Default)]
pub struct SoftEngine {
    tier: Tier,
    statistics: bool,
}

impl SoftEngine {
    /// The engine, if this host can run it.
    pub fn new() -> Result<SoftEngine, Error> {
        SoftEngine::with_options(&Options::default())
    }

    /// The same with options: `tier` is how guest code is run ([`Tier`]).
    pub fn with_options(options: &Options) -> Result<SoftEngine, Error> {
        let mut engine = SoftEngine { statistics: options.statistics, ..SoftEngine::default() };
        for (name, value) in &options.values {
            engine.tier = match (name.as_str(), value.as_str()) {
                ("tier", "interpreter") => Tier::Interpreter,
                ("tier", "translator") => Tier::Translator,
                ("tier", "native") => Tier::Native,
                ("tier", "lockstep") => Tier::Lockstep,
                _ => {
                    let option = format!("{name}={value}");
                    return Err(Error::Option { engine: "soft", option, known: OPTIONS });
                }
            };
        }
        x86::fpu::stub::init().map_err(|source| Error::Host {
            what: "mapping executable memory (memfd_create, mmap)",
            source,
        })?;
        Ok(engine)
    }
}

impl Engine for SoftEngine {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn supports(&self, model: CpuModel) -> Result<(), Error> {
        Cpuid::new(1, model).map(drop)
    }

    fn slowed_by(&self) -> Option<String> {
        x86::native::try_host().err().map(|error| {
            format!(
                "programs that compute are translated, not run on the host's CPU: {error}; that takes a process \
                 of ospite's that it may trace: see `sysctl kernel.yama.ptrace_scope`, or the container's \
                 seccomp profile"
            )
        })
    }

    fn memory(&self) -> Backing {
        if self.tier == Tier::Native { Backing::Shared } else { Backing::Private }
    }

    fn create_vm(&self, config: &VmConfig, memory: GuestRam) -> Result<Arc<dyn Vm>, Error> {
        Ok(Arc::new(SoftVm::new(config, memory, self.tier, self.statistics)?))
    }
}
