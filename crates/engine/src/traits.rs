//! `Engine` makes a `Vm`, a `Vm` makes `Vcpu`s, a `Vcpu` runs and calls `CpuIo`.

use std::sync::Arc;

use mem::{Backing, GuestRam};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::{Statistics, x86};

/// Why an engine refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host lacks what the engine needs. The text says what, and what would mend it.
    #[error("the {engine} engine does not work on this host: {why}")]
    Unavailable {
        /// Name of the engine.
        engine: &'static str,
        /// What is missing, and the command that would mend it.
        why: String,
    },
    /// The VM asked for something that the engine does not do.
    #[error("the {engine} engine cannot do this: {what}")]
    Unsupported {
        /// Name of the engine.
        engine: &'static str,
        /// What was asked for.
        what: String,
    },
    /// An option that the engine does not know, or a value that it does not take.
    #[error("the {engine} engine has no option `{option}`; known are: {known}")]
    Option {
        /// Name of the engine.
        engine: &'static str,
        /// The option as it was given.
        option: String,
        /// The options that there are, with their values.
        known: &'static str,
    },
    /// A saved CPU state that this engine cannot take on.
    #[error("saved CPU state: {0}")]
    BadState(String),
    /// A call to the host failed.
    #[error("{what} failed")]
    Host {
        /// The call.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
}

/// What a VM asks of its engine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmConfig {
    /// Number of vCPUs, ids `0..cpus`.
    pub cpus: u32,
    /// What they say they are.
    pub cpu_model: x86::CpuModel,
}

/// A way to run guest code.
pub trait Engine: Send + Sync {
    /// The name users type after `--engine`.
    fn name(&self) -> &'static str;

    /// Whether vCPUs can be of this model here; the refusal names what is missing.
    fn supports(&self, _model: x86::CpuModel) -> Result<(), Error> {
        Ok(())
    }

    /// Why it is slower on this host than it could be, and what would mend that.
    fn slowed_by(&self) -> Option<String> {
        None
    }

    /// The memory that it works best with; any will do.
    fn memory(&self) -> Backing {
        Backing::Private
    }

    /// Makes a VM whose vCPUs see `memory`.
    fn create_vm(&self, config: &VmConfig, memory: GuestRam) -> Result<Arc<dyn Vm>, Error>;
}

/// A message-signalled interrupt as the CPU complex receives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    /// Target address; on x86 `0xfee0_0000` and up, with the destination in it (SDM 3A, 11.11.1).
    pub address: u64,
    /// The data written; on x86 vector, delivery and trigger mode (SDM 3A, 11.11.2).
    pub data: u32,
}

/// Where a register is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// In port space.
    Port(u16),
    /// In guest-physical space.
    Memory(u64),
}

/// The part of a VM that its vCPUs share.
pub trait Vm: Send + Sync {
    /// Makes vCPU `id`, in its power-on state; each id once. vCPU 0 is the bootstrap processor, the
    /// others wait for it to start them.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, Error>;

    /// Delivers a message. One that names no vCPU is dropped, as on a bus.
    fn send_msi(&self, msi: Msi);

    /// Level of the legacy interrupt controller's output, wired to LINT0 of vCPU 0 (or of all, as
    /// their local APICs accept it). The vCPU asks for the vector by [`CpuIo::acknowledge_extint`].
    fn set_extint(&self, high: bool);

    /// Non-maskable interrupt to a vCPU.
    fn send_nmi(&self, id: u32);

    /// From now on, until the result is dropped, a write of the guest to `address`, of any width and value,
    /// signals `event` and is no [`CpuIo::mmio_write`]. `None` where that is no faster, or cannot be had.
    fn doorbell(&self, _address: u64, _event: EventFd) -> Option<Box<dyn Send + Sync>> {
        None
    }

    /// From now on, writes of `len` bytes to this register may come late: before the next access of any vCPU
    /// that is a call on [`CpuIo`], and before [`Vcpu::run`] comes back. For registers that only say what the
    /// next access is about. An engine to which it makes no difference has nothing to do.
    fn defer_writes(&self, _register: Register, _len: u32) {}

    /// Whether the guest's writes are to be told apart by page, for [`Vm::collect_writes`]. It costs the
    /// guest time while it is on. An engine that always knows has nothing to do.
    fn log_writes(&self, _on: bool) -> Result<(), Error> {
        Ok(())
    }

    /// Marks the pages that the guest wrote since the last call in the memory's own log
    /// ([`GuestRam::take_dirty`]); all pages if [`Vm::log_writes`] is off and the engine does not know.
    /// An engine that marks them as it writes has nothing to do.
    fn collect_writes(&self) -> Result<(), Error> {
        Ok(())
    }
}

/// Where a vCPU's accesses go when they leave the CPU. Called on the vCPU's thread, in
/// mid-instruction; several vCPUs call at once.
pub trait CpuIo: Send + Sync {
    /// `IN`: fills `data` (1, 2 or 4 bytes).
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// `OUT`.
    fn port_write(&self, port: u16, data: &[u8]);
    /// A load from guest-physical space that is not RAM.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]);
    /// A store to guest-physical space that is not RAM.
    fn mmio_write(&self, gpa: u64, data: &[u8]);
    /// The vCPU takes the PIC's interrupt: its vector, or `None` if there is none any more.
    fn acknowledge_extint(&self) -> Option<u8>;
    /// A local APIC ended the level-triggered interrupt `vector` (for the IOAPICs).
    fn end_of_interrupt(&self, vector: u8);
}

/// Why [`Vcpu::run`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Somebody called [`StopHandle::stop`]. The state is at an instruction boundary; `run` goes on.
    Stopped,
    /// The CPU gave up (a triple fault on x86); the machine decides on reset or power-off.
    Shutdown,
}

/// One virtual CPU. It lives on the thread that runs it.
pub trait Vcpu: Send {
    /// Its number, from 0.
    fn id(&self) -> u32;

    /// Runs guest code until there is a reason to stop. Halted time passes in here too.
    fn run(&mut self, io: &dyn CpuIo) -> Result<Exit, Error>;

    /// Processes of the host that run its guest's code, by number. They exist from the vCPU's creation on.
    fn processes(&self) -> Vec<u32> {
        Vec::new()
    }

    /// The means to stop it from any thread.
    fn stop_handle(&self) -> Arc<dyn StopHandle>;

    /// Everything the guest can observe of this vCPU. Not while it runs.
    fn save(&self) -> Result<CpuState, Error>;

    /// Takes a state on, from this engine or another.
    fn restore(&mut self, state: &CpuState) -> Result<(), Error>;

    /// Back to the power-on state.
    fn reset(&mut self) -> Result<(), Error>;

    /// What the engine did for this vCPU so far; `None` if it was not asked to keep statistics, or keeps
    /// none.
    fn statistics(&self) -> Option<Statistics> {
        None
    }
}

/// Stops a running vCPU.
pub trait StopHandle: Send + Sync {
    /// Makes the current [`Vcpu::run`], or the next one, return [`Exit::Stopped`] soon.
    fn stop(&self);
}

/// A vCPU's state, by guest architecture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum CpuState {
    /// An x86-64 vCPU.
    X86(Box<x86::CpuState>),
}
