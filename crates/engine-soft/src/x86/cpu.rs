//! The state of one vCPU while it runs.

use std::sync::Arc;

use engine::CpuIo;
use engine::x86::bits::{access, cr0, cr4, efer, rflags};
use engine::x86::{Activity, DescriptorTable, PendingEvent, Segment};

use super::fpu::Fpu;
use super::lapic::Lapic;
use super::msr::Msrs;
use super::native::pin::Pin;
use super::native::policy::Wish;
use super::op::{MemRef, Op, RIP, seg};
use super::tlb::{Tlb, View};
use super::translate::frame::Frame;
use super::translate::lockstep::WriteLog;
use crate::vm::Shared;

/// One vCPU. Instruction handlers get it by `&mut`; everything a handler may touch is here.
///
/// Translated code addresses it too, from the stack pointer: the registers come first to be within reach
/// of a short displacement, and the alignment is that of a stack.
#[repr(C, align(64))]
pub struct Cpu {
    /// General registers 0-15, then [`super::op::ZERO`] and [`RIP`]; the rest pads to a power of two,
    /// so that a masked index needs no check.
    pub regs: [u64; 32],
    /// Address of the next instruction; a branch writes it. RIP moves there when the handler returns.
    pub next_rip: u64,
    /// RFLAGS, always complete.
    pub rflags: u64,
    /// Slots of translated code.
    pub frame: Frame,
    /// ES, CS, SS, DS, FS, GS.
    pub segs: [Segment; 6],
    /// Local descriptor table.
    pub ldtr: Segment,
    /// Task state segment.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table.
    pub idtr: DescriptorTable,
    /// Control register 0. Change it with [`Cpu::update_mode`] after.
    pub cr0: u64,
    /// Page-fault address.
    pub cr2: u64,
    /// Page-table base and PCID.
    pub cr3: u64,
    /// Control register 4. Change it with [`Cpu::update_mode`] after.
    pub cr4: u64,
    /// IA32_EFER. Change it with [`Cpu::update_mode`] after.
    pub efer: u64,
    /// Page-directory pointers as loaded with CR3 in PAE paging (SDM 3A, 4.4.1).
    pub pdptes: [u64; 4],
    /// DR0-DR3, DR6 and DR7.
    pub dr: [u64; 8],
    /// Current privilege level.
    pub cpl: u8,
    /// Derived from CR0, CR4, EFER, CS and RFLAGS by [`Cpu::update_mode`].
    pub mode: Mode,
    /// x87, SSE and AVX registers, XCR0.
    pub fpu: Fpu,
    /// Model-specific registers.
    pub msrs: Msrs,
    /// Local APIC: the half that only this vCPU touches.
    pub lapic: Lapic,
    /// Translations of this vCPU.
    pub tlb: Tlb,
    /// Running, halted, waiting.
    pub activity: Activity,
    /// NMIs wait for an `IRET`.
    pub nmi_blocked: bool,
    /// Interrupts wait for one instruction more (`STI`, `MOV SS`). Set by a handler, cleared by the
    /// dispatcher after the instruction that follows.
    pub interrupt_shadow: bool,
    /// Ticks of the host's counter that were spent halted.
    pub idle_ticks: u64,
    /// The dispatcher leaves the current block after this instruction: something it relies on changed
    /// (a written code page, an interrupt that is due).
    pub leave_block: bool,
    /// Debug traps wait for one instruction more, too (`MOV SS`). Set together with `interrupt_shadow`.
    pub debug_shadow: bool,
    /// Debug-exception conditions met by the current instruction (DR6 bits), reported behind it.
    pub debug_trap: u64,
    /// An event that a restored state was caught in the delivery of.
    pub pending: Option<PendingEvent>,
    /// What memory was before it is written, while an instruction may have to be undone (lockstep).
    pub write_log: Option<Box<WriteLog>>,
    /// Which programs run on the host's CPU.
    pub native: Wish,
    /// Where the vCPU's thread is kept meanwhile.
    pub pin: Pin,
    /// What all vCPUs share.
    pub vm: Arc<Shared>,
    /// Number of this vCPU.
    pub id: u32,
    io: IoSlot,
}

/// What of the CPU's mode is looked at often.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mode {
    /// EFER.LMA and CS.L: 64-bit code.
    pub long64: bool,
    /// EFER.LMA: long mode, 64-bit or compatibility.
    pub long: bool,
    /// CR0.PE.
    pub protected: bool,
    /// EFLAGS.VM in protected mode.
    pub v86: bool,
    /// CR0.PG.
    pub paging: bool,
    /// Default operand and address size of code: 16, 32 or 64.
    pub code_bits: u8,
    /// Width of the stack pointer: 16, 32 or 64.
    pub stack_bits: u8,
    /// CPL 3 accesses are checked for alignment (CR0.AM and RFLAGS.AC).
    pub align_check: bool,
    /// How data accesses see memory.
    pub view: Option<View>,
}

/// Where the vCPU's I/O goes while [`engine::Vcpu::run`] is on the stack.
#[derive(Clone, Copy)]
struct IoSlot(Option<std::ptr::NonNull<dyn CpuIo>>);

/// # Safety
/// The pointer is only there during `run`, on the thread that runs; it is a `&dyn CpuIo`, which is
/// `Sync`.
#[allow(unsafe_code)] // a borrowed trait object in a struct without a lifetime
mod io_slot {
    use super::*;

    // SAFETY: see above.
    unsafe impl Send for IoSlot {}

    impl Cpu {
        /// Runs `f` with `io` as the way out of the CPU.
        pub fn with_io<R>(&mut self, io: &dyn CpuIo, f: impl FnOnce(&mut Cpu) -> R) -> R {
            struct Clear<'a>(&'a mut Cpu);
            impl Drop for Clear<'_> {
                fn drop(&mut self) {
                    self.0.io = IoSlot(None);
                }
            }
            // SAFETY: only the lifetime is erased; `Clear` takes the pointer away before `io` ends,
            // whether `f` returns or unwinds.
            let io: &'static dyn CpuIo = unsafe { std::mem::transmute(io) };
            self.io = IoSlot(Some(io.into()));
            f(Clear(self).0)
        }

        /// The way out of the CPU: ports, MMIO, interrupt acknowledge.
        ///
        /// # Panics
        /// Outside of [`Cpu::with_io`].
        pub fn io(&self) -> &dyn CpuIo {
            let io = self.io.0.expect("the vCPU is running");
            // SAFETY: set in `with_io`, whose borrow outlives this one.
            unsafe { io.as_ref() }
        }
    }
}

impl Cpu {
    /// A vCPU in its power-on state.
    pub fn new(id: u32, vm: Arc<Shared>) -> Cpu {
        let lapic = Lapic::new(id, &vm);
        let mut cpu = Cpu {
            regs: [0; 32],
            next_rip: 0,
            rflags: rflags::FIXED,
            frame: Frame::default(),
            segs: [Segment::default(); 6],
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: DescriptorTable::default(),
            idtr: DescriptorTable::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            pdptes: [0; 4],
            dr: [0; 8],
            cpl: 0,
            mode: Mode::default(),
            fpu: Fpu::default(),
            msrs: Msrs::default(),
            lapic,
            tlb: Tlb::new(),
            activity: Activity::Running,
            nmi_blocked: false,
            interrupt_shadow: false,
            idle_ticks: 0,
            leave_block: false,
            debug_shadow: false,
            debug_trap: 0,
            write_log: None,
            pending: None,
            native: Wish::default(),
            pin: Pin::default(),
            vm,
            id,
            io: IoSlot(None),
        };
        cpu.init(true);
        cpu
    }

    /// The state after power-on, or after INIT, which keeps the FPU, most MSRs and the TSC
    /// (SDM 3A, table 10-1).
    pub fn init(&mut self, power_on: bool) {
        self.regs = [0; 32];
        self.regs[RIP as usize] = 0xfff0;
        self.next_rip = 0xfff0;
        self.regs[super::op::reg::RDX as usize] = u64::from(self.vm.cpuid.signature());
        self.rflags = rflags::FIXED;
        let data = Segment { limit: 0xffff, access: 0x93, ..Segment::default() };
        self.segs = [data; 6];
        self.segs[seg::CS as usize] =
            Segment { selector: 0xf000, base: 0xffff_0000, limit: 0xffff, access: 0x9b, unusable: false };
        self.ldtr = Segment { limit: 0xffff, access: 0x82, ..Segment::default() };
        self.tr = Segment { limit: 0xffff, access: 0x8b, ..Segment::default() };
        self.gdtr = DescriptorTable { base: 0, limit: 0xffff };
        self.idtr = DescriptorTable { base: 0, limit: 0xffff };
        let kept = if power_on { cr0::NW | cr0::CD } else { self.cr0 & (cr0::NW | cr0::CD) };
        self.cr0 = kept | cr0::ET;
        (self.cr2, self.cr3, self.cr4, self.efer) = (0, 0, 0, 0);
        self.pdptes = [0; 4];
        self.dr = [0; 8];
        self.dr[6] = 0xffff_0ff0;
        self.dr[7] = 0x400;
        self.cpl = 0;
        self.nmi_blocked = false;
        self.interrupt_shadow = false;
        self.leave_block = true;
        self.debug_shadow = false;
        self.debug_trap = 0;
        self.pending = None;
        if power_on {
            self.fpu = Fpu::default();
            self.msrs = Msrs::default();
        }
        self.lapic.reset(power_on, &self.vm);
        self.activity = if self.id == 0 { Activity::Running } else { Activity::WaitForSipi };
        self.tlb.flush_all(0);
        self.update_mode();
    }

    /// Works out [`Mode`] anew. Call after any change of CR0, CR4, EFER, CS, SS, CPL, or of AC or VM in RFLAGS.
    pub fn update_mode(&mut self) {
        let cs = self.segs[seg::CS as usize].access;
        let ss = self.segs[seg::SS as usize].access;
        let long = self.efer & efer::LMA != 0;
        let long64 = long && cs & access::L != 0;
        let wide = |access: u16| if access & access::DB != 0 { 32 } else { 16 };
        self.mode = Mode {
            long64,
            long,
            protected: self.cr0 & cr0::PE != 0,
            v86: self.cr0 & cr0::PE != 0 && self.rflags & rflags::VM != 0,
            paging: self.cr0 & cr0::PG != 0,
            code_bits: if long64 { 64 } else { wide(cs) },
            stack_bits: if long64 { 64 } else { wide(ss) },
            align_check: self.cpl == 3 && self.cr0 & cr0::AM != 0 && self.rflags & rflags::AC != 0,
            view: None,
        };
        self.update_view();
        self.leave_block = true;
    }

    /// The part of [`Cpu::update_mode`] that `STAC` and `CLAC` change.
    pub fn update_view(&mut self) {
        let user_off_limits = self.cr4 & cr4::SMAP != 0 && self.rflags & rflags::AC == 0;
        self.mode.view = Some(match self.cpl {
            3 => View::User,
            _ if user_off_limits => View::Kernel,
            _ => View::KernelUser,
        });
    }

    /// How data accesses of the running code see memory.
    #[inline(always)]
    pub fn view(&self) -> View {
        self.mode.view.unwrap_or(View::Kernel)
    }

    /// RIP of the instruction that is being executed.
    #[inline(always)]
    pub fn rip(&self) -> u64 {
        self.regs[RIP as usize]
    }

    /// The effective address of a memory operand, before segmentation.
    #[inline(always)]
    pub fn ea(&self, op: &Op) -> u64 {
        let MemRef { disp, mask, base, index, scale, .. } = op.mem;
        let base = self.regs[(base & 31) as usize];
        let index = self.regs[(index & 31) as usize];
        base.wrapping_add(index << (scale & 3)).wrapping_add(disp) & mask
    }

    /// Whether a flag of RFLAGS is set.
    #[inline(always)]
    pub fn flag(&self, bit: u64) -> bool {
        self.rflags & bit != 0
    }

    /// The PCID that tags translations: CR3's low bits if CR4.PCIDE is on, else 0.
    pub fn pcid(&self) -> u16 {
        if self.cr4 & cr4::PCIDE != 0 { (self.cr3 & 0xfff) as u16 } else { 0 }
    }

    /// I/O privilege level.
    pub fn iopl(&self) -> u8 {
        ((self.rflags & rflags::IOPL) >> 12) as u8
    }
}
