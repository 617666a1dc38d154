//! The saved state of an x86-64 vCPU: one struct, the same for every engine.

use serde::{Deserialize, Serialize};

/// Bytes of the saved XSAVE area: the standard (non-compacted) format up to AVX-512 and PKRU
/// (SDM 1, 13.4).
pub const XSAVE_AREA_SIZE: usize = 2696;

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, expanded by the granularity bit.
    pub limit: u32,
    /// Access rights as in descriptor bits 40-55: type, S, DPL, P in bits 0-7, AVL, L, D/B, G in bits 12-15.
    pub access: u16,
    /// No descriptor: a null selector was loaded (also what a VMCS calls "unusable").
    pub unusable: bool,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// What the vCPU does between instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    /// Runs.
    #[default]
    Running,
    /// Halted until an interrupt.
    Halted,
    /// An application processor waiting for INIT.
    WaitForInit,
    /// INIT came; waits for a start-up IPI.
    WaitForSipi,
}

/// An exception or interrupt that was about to be delivered when the state was saved.
///
/// An external interrupt in here has been acknowledged: it is in service in the local APIC, or was taken
/// from the PIC. It looks like an exception without an error code, and is delivered like one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingEvent {
    /// Its vector.
    pub vector: u8,
    /// Error code, where the vector has one.
    pub error_code: Option<u32>,
    /// A software interrupt (`INT n`, `INT3`, `INTO`, `INT1`) rather than an exception.
    pub software: bool,
}

/// Local APIC: the register page as software reads it (SDM 3A, table 11-1), and what it hides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LapicState {
    /// The 32-bit registers, one per 16-byte slot: index = register offset / 16.
    pub regs: Vec<u32>,
    /// IA32_APIC_BASE.
    pub base: u64,
    /// IA32_TSC_DEADLINE; 0 when disarmed.
    pub tsc_deadline: u64,
    /// Nanoseconds until the one-shot or periodic timer next expires; `None` when it is stopped.
    pub timer_left_ns: Option<u64>,
}

/// Everything a guest can observe of one x86-64 vCPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8-R15: the order of their numbers.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS: the order of their numbers.
    pub segments: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table register.
    pub idtr: DescriptorTable,
    /// Control registers.
    pub cr0: u64,
    /// Page-fault linear address.
    pub cr2: u64,
    /// Page-table base.
    pub cr3: u64,
    /// Feature enables.
    pub cr4: u64,
    /// The page-directory pointers that a CPU with PAE paging has loaded (SDM 3A, 4.4.1). `None` without PAE
    /// paging, and where the engine does not know: then they are loaded anew from memory.
    #[serde(default)]
    pub pdptes: Option<[u64; 4]>,
    /// Task priority, 0-15.
    pub cr8: u64,
    /// DR0-DR3, then DR6 and DR7 at 6 and 7; 4 and 5 unused.
    pub dr: [u64; 8],
    /// Extended control register 0.
    pub xcr0: u64,
    /// x87, SSE and AVX state in the standard XSAVE format, [`XSAVE_AREA_SIZE`] bytes.
    pub xsave: Vec<u8>,
    /// Model-specific registers, as (index, value), ascending; IA32_APIC_BASE and IA32_TSC_DEADLINE
    /// are in [`LapicState`].
    pub msrs: Vec<(u32, u64)>,
    /// Time-stamp counter at the moment of the save.
    pub tsc: u64,
    /// Its frequency in kHz, as the guest was told. 0 where the engine does not know, and in states from before it
    /// was saved: then it is taken to be the host's.
    #[serde(default)]
    pub tsc_khz: u32,
    /// The local APIC.
    pub lapic: LapicState,
    /// Running, halted, or not yet started.
    pub activity: Activity,
    /// Event caught in delivery.
    pub pending: Option<PendingEvent>,
    /// NMI not yet taken.
    pub nmi_pending: bool,
    /// NMIs are blocked until the next `IRET`.
    pub nmi_blocked: bool,
    /// Interrupts are held off for one instruction: after `STI` or a load of SS.
    pub interrupt_shadow: bool,
    /// The paravirtual clock (KVM's, MSR 0x4b564d01) at the moment of the save, in nanoseconds. It is the
    /// same on all vCPUs of a VM; the bootstrap processor's counts.
    pub kvm_clock_ns: u64,
}
