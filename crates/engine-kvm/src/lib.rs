//! The hardware engine: guest code runs on the host's CPU, in virtual kernel mode behind nested page
//! tables. Nothing in here but KVM's ioctls and their state (Linux' `Documentation/virt/kvm/api.rst`
//! describes them).
//!
//! The local APICs are KVM's, PIC and IOAPIC are devices of the machine ("split irqchip"). The way of
//! an interrupt: device → [`engine::Vm::send_msi`] → `KVM_SIGNAL_MSI` ([`vm`]), or an event of its own for a
//! message that comes often ([`irqfd`]); level-triggered ones are made known to KVM first, so that their end
//! comes back as an exit ([`routes`]). The way of a port
//! or MMIO access: exit → [`vcpu`] → [`engine::CpuIo`].
//!
//! | what                              | file         |
//! |-----------------------------------|--------------|
//! | whether this host can             | `host.rs`    |
//! | memory slots, interrupts, log     | `vm.rs`, `routes.rs`, `irqfd.rs` |
//! | kicks of devices                  | `doorbell.rs` |
//! | writes that may come late         | `deferred.rs` |
//! | the run loop                      | `vcpu.rs`    |
//! | stopping a vCPU                   | `kick.rs`    |
//! | what the guest's CPUs say they are| `x86/cpuid.rs` |
//! | saved state                       | `x86/state.rs` and the files beside it |

mod deferred;
mod doorbell;
mod host;
mod irqfd;
mod kick;
mod routes;
mod vcpu;
mod vm;
mod x86;

use std::sync::Arc;

use engine::x86::CpuModel;
use engine::{Engine, Error, Vm, VmConfig};
use kvm_ioctls::Kvm;
use mem::GuestRam;

use x86::cpuid::Cpuid;

pub use host::{Extension, extension};
pub use vcpu::KvmVcpu;
pub use vm::KvmVm;

/// The name users type after `--engine`.
pub(crate) const NAME: &str = "kvm";

/// The hardware engine.
pub struct KvmEngine {
    kvm: Arc<Kvm>,
}

impl KvmEngine {
    /// The engine, where the CPU has hardware virtualization and the kernel lets us at it.
    pub fn new() -> Result<KvmEngine, Error> {
        host::require_hardware()?;
        KvmEngine::any()
    }

    /// The engine on whatever is behind `/dev/kvm`, hardware or not: for tests with tiny guests. What
    /// emulates KVM without `svm` or `vmx` is far too slow for an operating system.
    pub fn any() -> Result<KvmEngine, Error> {
        Ok(KvmEngine { kvm: Arc::new(host::open()?) })
    }
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        NAME
    }

    fn supports(&self, model: CpuModel) -> Result<(), Error> {
        Cpuid::new(&self.kvm, 1, model).map(drop)
    }

    fn create_vm(&self, config: &VmConfig, memory: GuestRam) -> Result<Arc<dyn Vm>, Error> {
        Ok(Arc::new(KvmVm::new(&self.kvm, config, memory)?))
    }
}

/// An ioctl's failure in the engine's words.
pub(crate) fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |errno| Error::Host { what, source: std::io::Error::from_raw_os_error(errno.errno()) }
}
