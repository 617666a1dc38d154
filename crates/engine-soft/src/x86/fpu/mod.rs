//! x87, MMX, SSE and AVX registers, and how instructions on them are executed: by the host's own CPU.
//!
//! The arithmetic of these instruction sets is not modelled here. An instruction is copied, with its
//! operands replaced by fixed ones, into a [`stub`] that loads the guest's registers from [`Fpu`],
//! executes it and stores the results back. Only instructions of features that the host's CPU has and
//! that the guest is told of are executed so; see [`stub::Stubs::prepare`].

mod area;
pub mod code;
pub mod stub;

use super::cpu::Cpu;
use super::exception::{Exception, Exec, vector};
use engine::x86::bits::{cr0, cr4};

pub use area::{AREA_SIZE, AVX_OFFSET, LEGACY_SIZE, Width, header_of, mxcsr_of};

/// MXCSR after a reset, and what Rust code expects in the host's register.
pub const MXCSR_RESET: u32 = 0x1f80;
/// The exception flags in MXCSR.
pub const MXCSR_FLAGS: u32 = 0x3f;
/// The exception masks in MXCSR.
pub const MXCSR_MASKS: u32 = 0x3f << 7;
/// Flush to zero.
pub const MXCSR_FTZ: u32 = 1 << 15;
/// AMD's misaligned-exception mask: 16-byte operands need not be aligned.
pub const MXCSR_MM: u32 = 1 << 17;

/// x87 control word after `FNINIT`.
pub const FCW_INIT: u16 = 0x37f;
/// x87 control word after power-on (SDM 3A, table 10-1).
const FCW_RESET: u16 = 0x40;
/// The exceptions in the x87 control and status words.
pub const X87_EXCEPTIONS: u16 = 0x3f;
/// A control word as the unit keeps it: bit 6 is one, reserved bits are zero.
pub fn control(value: u16) -> u16 {
    value & 0x1f7f | 0x40
}
/// Exception summary and busy in the x87 status word.
const ES_B: u16 = 0x8080;

/// XCR0 and XSTATE_BV bits.
pub mod component {
    /// x87 and MMX.
    pub const X87: u64 = 1 << 0;
    /// XMM registers and MXCSR.
    pub const SSE: u64 = 1 << 1;
    /// Upper halves of the YMM registers.
    pub const AVX: u64 = 1 << 2;
}

/// A YMM register; its first half is the XMM register.
pub type Ymm = [u64; 4];

/// An `FXSAVE64` image, as the stubs of x87 instructions load and store it, and the beginning of an
/// `XSAVE64` area, as translated code does. The pointers, opcode and SSE part are the host's and mean
/// nothing to the guest.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct X87 {
    /// Control word.
    pub fcw: u16,
    /// Status word, with TOP. ES and B are always what control and status imply.
    pub fsw: u16,
    /// A bit per physical register: 1 if it is in use.
    pub ftw: u8,
    _reserved: u8,
    _fop: u16,
    _fip: u64,
    _fdp: u64,
    mxcsr: u32,
    mxcsr_mask: u32,
    /// ST(0) to ST(7): 80 bits each in 16 bytes.
    pub st: [[u64; 2]; 8],
    _sse: [u64; 32],
    _rest: [u64; 12],
    /// `XSAVE`'s header: which components are here.
    pub components: u64,
    _header: [u64; 7],
}

/// The last x87 instruction and its operand, which the host's registers cannot know. Their segments are
/// not recorded (CPUID says so: "deprecates FPU CS and DS"); in real mode both are linear addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pointers {
    /// Instruction.
    pub fip: u64,
    /// Its memory operand.
    pub fdp: u64,
    /// Low 11 bits of the opcode.
    pub fop: u16,
}

/// The extended state of a vCPU. Stubs know its layout.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct Fpu {
    /// x87 and MMX registers.
    pub x87: X87,
    /// Vector registers.
    pub ymm: [Ymm; 16],
    /// The memory operand of an instruction while a stub executes it.
    pub operand: [u64; 8],
    /// Its general-register operands.
    pub gpr: [u64; 4],
    /// Its arithmetic flags.
    pub flags: u64,
    /// MXCSR for the stub, and what it left there.
    pub run_mxcsr: u32,
    /// MXCSR of Rust code.
    host_mxcsr: u32,
    /// SSE control and status.
    pub mxcsr: u32,
    /// Where the last x87 instruction was.
    pub pointers: Pointers,
    /// XCR0: which state components are enabled.
    pub xcr0: u64,
}

impl Default for X87 {
    fn default() -> Self {
        X87 {
            fcw: FCW_RESET,
            fsw: 0,
            ftw: 0xff,
            _reserved: 0,
            _fop: 0,
            _fip: 0,
            _fdp: 0,
            mxcsr: MXCSR_RESET,
            mxcsr_mask: 0,
            st: [[0; 2]; 8],
            _sse: [0; 32],
            _rest: [0; 12],
            components: 0,
            _header: [0; 7],
        }
    }
}

impl Default for Fpu {
    fn default() -> Self {
        Fpu {
            x87: X87::default(),
            ymm: [[0; 4]; 16],
            operand: [0; 8],
            gpr: [0; 4],
            flags: 0,
            run_mxcsr: MXCSR_RESET,
            host_mxcsr: MXCSR_RESET,
            mxcsr: MXCSR_RESET,
            pointers: Pointers::default(),
            xcr0: 1,
        }
    }
}

impl X87 {
    /// Index of the physical register that is ST(0).
    pub fn top(&self) -> usize {
        usize::from(self.fsw >> 11 & 7)
    }

    /// Makes physical register `top` ST(0); the registers stay where they are.
    pub fn set_top(&mut self, top: usize) {
        let by = (top & 7).wrapping_sub(self.top()) & 7;
        self.st.rotate_left(by);
        self.fsw = self.fsw & !0x3800 | (top as u16 & 7) << 11;
    }

    /// An exception that is not masked waits to be reported.
    #[inline(always)]
    pub fn pending(&self) -> bool {
        self.fsw & ES_B != 0
    }

    /// Sets ES and B to what the exceptions and their masks imply.
    pub fn summarize(&mut self) {
        let pending = self.fsw & !self.fcw & X87_EXCEPTIONS != 0;
        self.fsw = self.fsw & !ES_B | if pending { ES_B } else { 0 };
    }

    /// `FNINIT` (SDM 2A): the registers keep their contents.
    pub fn reset(&mut self) {
        self.set_top(0);
        (self.fcw, self.fsw, self.ftw) = (FCW_INIT, 0, 0);
    }

    /// What every MMX instruction does first: MM registers are the physical registers, all in use
    /// (SDM 1, 9.5.1).
    #[inline(always)]
    pub fn enter_mmx(&mut self) {
        if self.fsw & 0x3800 != 0 {
            self.set_top(0);
        }
        self.ftw = 0xff;
    }

    /// A written MM register has all ones above its 64 bits.
    #[inline(always)]
    pub fn set_mm(&mut self, number: u8, value: u64) {
        self.st[usize::from(number & 7)] = [value, 0xffff];
    }

    /// An MM register; after [`X87::enter_mmx`].
    #[inline(always)]
    pub fn mm(&self, number: u8) -> u64 {
        self.st[usize::from(number & 7)][0]
    }
}

impl Fpu {
    /// The state of the host's bits that a guest may set in MXCSR (SDM 1, 11.6.6).
    pub fn mxcsr_mask() -> u32 {
        stub::mxcsr_mask()
    }

    /// The low half of a vector register.
    #[inline(always)]
    pub fn xmm(&self, number: u8) -> [u64; 2] {
        let [a, b, ..] = self.ymm[usize::from(number & 15)];
        [a, b]
    }

    /// Writes the low half; the upper one stays.
    #[inline(always)]
    pub fn set_xmm(&mut self, number: u8, value: [u64; 2]) {
        self.ymm[usize::from(number & 15)][..2].copy_from_slice(&value);
    }

    /// Writes the low half and clears the upper one, as VEX-encoded instructions do.
    #[inline(always)]
    pub fn set_xmm_clear(&mut self, number: u8, [a, b]: [u64; 2]) {
        self.ymm[usize::from(number & 15)] = [a, b, 0, 0];
    }
}

impl Cpu {
    /// May a legacy SSE instruction execute? (SDM 2A, table 2-20 and its kin)
    #[inline(always)]
    pub fn check_sse(&self) -> Exec {
        if self.cr0 & (cr0::EM | cr0::TS) == 0 && self.cr4 & cr4::OSFXSR != 0 {
            return Ok(());
        }
        Err(self.refuse_sse())
    }

    #[cold]
    fn refuse_sse(&self) -> Exception {
        let disabled = self.cr0 & cr0::EM != 0 || self.cr4 & cr4::OSFXSR == 0;
        if disabled { Exception::UD } else { Exception::NM }
    }

    /// May a VEX-encoded vector instruction execute?
    #[inline(always)]
    pub fn check_avx(&self) -> Exec {
        let both = component::SSE | component::AVX;
        let enabled = self.cr4 & cr4::OSXSAVE != 0 && self.fpu.xcr0 & both == both;
        if enabled && self.cr0 & cr0::TS == 0 && self.mode.protected && !self.mode.v86 {
            return Ok(());
        }
        let known = enabled && self.mode.protected && !self.mode.v86;
        Err(if known { Exception::NM } else { Exception::UD })
    }

    /// May an MMX instruction execute?
    #[inline(always)]
    pub fn check_mmx(&mut self) -> Exec {
        if self.cr0 & (cr0::EM | cr0::TS) != 0 {
            return Err(if self.cr0 & cr0::EM != 0 { Exception::UD } else { Exception::NM });
        }
        self.check_pending_x87()
    }

    /// May an x87 instruction execute? Pending exceptions are another question.
    #[inline(always)]
    pub fn check_x87(&self) -> Exec {
        if self.cr0 & (cr0::EM | cr0::TS) != 0 { Err(Exception::NM) } else { Ok(()) }
    }

    /// Reports a pending x87 exception: `#MF`, or with CR0.NE clear nothing – the interrupt that a PC
    /// would raise by its IRQ 13 is not wired, as with IGNNE# always on.
    #[inline(always)]
    pub fn check_pending_x87(&self) -> Exec {
        if self.fpu.x87.pending() && self.cr0 & cr0::NE != 0 {
            return Err(Exception::new(vector::MF));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn physical_registers_stay_when_top_moves() {
        let mut x87 = X87::default();
        for (i, st) in x87.st.iter_mut().enumerate() {
            st[0] = i as u64;
        }
        x87.set_top(3);
        assert_eq!((x87.top(), x87.st[0][0], x87.st[7][0]), (3, 3, 2));
        x87.enter_mmx();
        assert_eq!((x87.top(), x87.mm(0), x87.mm(7), x87.ftw), (0, 0, 7, 0xff));
    }

    #[test]
    fn the_summary_follows_the_masks() {
        let mut x87 = X87 { fcw: FCW_INIT, fsw: 0x8081, ..X87::default() };
        x87.summarize();
        assert_eq!(x87.fsw, 1);
        x87.fcw &= !1;
        x87.summarize();
        assert!(x87.pending());
        assert_eq!(x87.fsw, 0x8081);
    }
}
