//! The register state a kernel starts with, in no engine's terms.

/// Which of the CPU's modes the kernel is entered in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit long mode with paging on.
    Long64,
    /// 32-bit protected mode, paging off.
    Protected32,
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, expanded by the granularity bit.
    pub limit: u32,
    /// Access rights as in descriptor bits 40-55: type, S, DPL, P in bits 0-7, AVL, L, D/B, G in bits 12-15.
    pub access: u16,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Complete initial state of vCPU 0. What is not named here is as after power-on reset (DR6, DR7,
/// XCR0, MSRs) or zero (the other general registers, LDTR).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The mode that the other fields add up to.
    pub mode: Mode,
    /// Instruction pointer.
    pub rip: u64,
    /// Flags: interrupts off.
    pub rflags: u64,
    /// Multiboot's magic number, else 0.
    pub rax: u64,
    /// Multiboot information or PVH start info, else 0.
    pub rbx: u64,
    /// Linux' zero page, else 0.
    pub rsi: u64,
    /// A small stack, though no protocol promises one.
    pub rsp: u64,
    /// Control register 0.
    pub cr0: u64,
    /// Page-table base; 0 with paging off.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Extended features enable register.
    pub efer: u64,
    /// Code segment.
    pub cs: Segment,
    /// DS, ES, FS, GS and SS.
    pub data: Segment,
    /// Task register: a busy TSS (PVH wants one).
    pub tr: Segment,
    /// The GDT in guest memory that describes the segments above.
    pub gdtr: DescriptorTable,
    /// No interrupt table: an exception before the kernel has its own is a triple fault.
    pub idtr: DescriptorTable,
}
