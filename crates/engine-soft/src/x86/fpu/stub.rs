//! Stubs: one guest instruction each, for the host's CPU.
//!
//! A stub is a function `extern "sysv64" fn(*mut Fpu, o0, o1, o2, o3)`: `o0`..`o3` are 16 × the numbers
//! of the vector or MMX registers that are operands 0-3. It loads them into fixed registers (operand n
//! into register n + 1, for some instructions use XMM0 implicitly), executes the instruction with its
//! memory operand in [`Fpu`] and its general registers in RAX and R9, and stores what was written. So
//! one stub serves all registers and addresses. It leaves MXCSR, the x87 unit and the upper halves of
//! the vector registers as Rust code expects them.
//!
//! No stub can fault: exceptions are masked in MXCSR; unmasked x87 exceptions are only reported by
//! the next x87 instruction, and the stub ends before one; the memory operand is always there.

#![allow(unsafe_code)] // calls made code

use std::collections::HashMap;
use std::mem::offset_of;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::{io, mem};

use iced_x86::{
    Code, CpuidFeature, Encoder, EncodingKind, Instruction, InstructionInfoFactory, MemoryOperand, Mnemonic,
    OpAccess, OpKind, Register, RflagsBits,
};

use super::code::CodeMemory;
use super::{Fpu, X87};

/// What the interpreter has to do around a stub. Bits of [`Stub::plan`].
pub mod plan {
    /// The memory operand is read.
    pub const LOAD: u32 = 1 << 0;
    /// The memory operand is written.
    pub const STORE: u32 = 1 << 1;
    /// A memory operand that is not aligned to its size raises `#GP`.
    pub const ALIGNED: u32 = 1 << 2;
    /// MXCSR rules the instruction and collects its exceptions.
    pub const MXCSR: u32 = 1 << 3;
    /// Arithmetic flags are written.
    pub const FLAGS: u32 = 1 << 4;
    /// The first general-register operand is read, written; the second is read.
    pub const GPR0_IN: u32 = 1 << 5;
    /// See [`GPR0_IN`].
    pub const GPR0_OUT: u32 = 1 << 6;
    /// See [`GPR0_IN`].
    pub const GPR1_IN: u32 = 1 << 7;
    /// MMX registers are used.
    pub const MMX: u32 = 1 << 8;
    /// Operand 0 is an MMX register that is written.
    pub const MMX_OUT: u32 = 1 << 9;
    /// Legacy-encoded with vector registers.
    pub const SSE: u32 = 1 << 10;
    /// VEX-encoded.
    pub const AVX: u32 = 1 << 11;
    /// Lengths in RAX and RDX, index to RCX (`PCMPxSTRx`).
    pub const STRING_LENGTHS: u32 = 1 << 12;
    /// See [`STRING_LENGTHS`].
    pub const STRING_INDEX: u32 = 1 << 13;
    /// An x87 instruction.
    pub const X87: u32 = 1 << 14;
    /// Arithmetic flags are read.
    pub const FLAGS_IN: u32 = 1 << 15;
    /// What a plain handler needs not look at.
    pub const UNUSUAL: u32 = !(LOAD | ALIGNED | SSE | AVX);
}

/// A stub that exists.
#[derive(Clone, Copy, Debug)]
pub struct Stub {
    /// Offset in the code memory.
    pub entry: u32,
    /// See [`plan`].
    pub plan: u32,
}

/// What makes two instructions share a stub.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    code: Code,
    /// Up to two 8-bit immediates.
    immediate: u16,
    /// The memory operand's number + 1, or 0.
    memory: u8,
    /// x87: the numbers of the two registers.
    st: [u8; 2],
}

/// All stubs of this process.
pub struct Stubs {
    memory: CodeMemory,
    known: HashMap<Key, Option<Stub>>,
    info: InstructionInfoFactory,
}

static STUBS: OnceLock<(usize, Mutex<Stubs>)> = OnceLock::new();

/// Makes the code memory; later calls do nothing.
pub fn init() -> io::Result<()> {
    if STUBS.get().is_none() {
        let memory = CodeMemory::new()?;
        let stubs = Stubs { known: HashMap::new(), info: InstructionInfoFactory::new(), memory };
        let _ = STUBS.set((stubs.memory.base(), Mutex::new(stubs)));
    }
    Ok(())
}

/// The stub for an instruction; `None` if it must not be executed by the host.
pub fn prepare(ins: &Instruction) -> Option<Stub> {
    init().ok()?;
    STUBS.get()?.1.lock().unwrap_or_else(PoisonError::into_inner).prepare(ins)
}

type Entry = extern "sysv64" fn(*mut Fpu, usize, usize, usize, usize);

/// Runs the stub at `entry`; operands are 16 × register numbers.
///
/// # Safety
/// `entry` is of a [`Stub`] that [`prepare`] returned.
#[inline(always)]
pub unsafe fn call(fpu: &mut Fpu, entry: u32, operands: [u8; 4]) {
    // A stub exists, so the memory does: the value below is only for the type.
    let base = STUBS.get().map_or(0, |stubs| stubs.0);
    let entry = std::ptr::with_exposed_provenance::<()>(base + entry as usize);
    let [a, b, c, d] = operands.map(|n| usize::from(n & 0xf0));
    // SAFETY: by the caller's promise there is a stub, which only touches `Fpu` within its bounds (the
    // masks above) and follows the calling convention.
    unsafe { mem::transmute::<*const (), Entry>(entry)(fpu, a, b, c, d) }
}

/// MXCSR bits that the host's CPU has (SDM 1, 11.6.6).
pub fn mxcsr_mask() -> u32 {
    static MASK: OnceLock<u32> = OnceLock::new();
    *MASK.get_or_init(|| {
        let mut area = X87::default();
        // SAFETY: every x86-64 CPU has it; the area is 512 bytes, aligned.
        unsafe { std::arch::x86_64::_fxsave64((&raw mut area).cast()) };
        if area.mxcsr_mask == 0 { 0xffbf } else { area.mxcsr_mask }
    })
}

/// Whether an instruction of this feature may be executed: the host has it, and CPUID says so.
fn offered(feature: CpuidFeature) -> bool {
    match feature {
        CpuidFeature::FPU
        | CpuidFeature::FPU287
        | CpuidFeature::FPU387
        | CpuidFeature::CMOV
        | CpuidFeature::MMX
        | CpuidFeature::SSE
        | CpuidFeature::SSE2 => true,
        CpuidFeature::SSE3 => is_x86_feature_detected!("sse3"),
        CpuidFeature::SSSE3 => is_x86_feature_detected!("ssse3"),
        CpuidFeature::SSE4_1 => is_x86_feature_detected!("sse4.1"),
        CpuidFeature::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        CpuidFeature::SSE4A => is_x86_feature_detected!("sse4a"),
        CpuidFeature::AVX => is_x86_feature_detected!("avx"),
        CpuidFeature::AVX2 => is_x86_feature_detected!("avx2"),
        CpuidFeature::FMA => is_x86_feature_detected!("fma"),
        CpuidFeature::F16C => is_x86_feature_detected!("f16c"),
        CpuidFeature::AES => is_x86_feature_detected!("aes"),
        CpuidFeature::VAES => is_x86_feature_detected!("vaes"),
        CpuidFeature::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        CpuidFeature::VPCLMULQDQ => is_x86_feature_detected!("vpclmulqdq"),
        CpuidFeature::GFNI => is_x86_feature_detected!("gfni"),
        CpuidFeature::SHA => is_x86_feature_detected!("sha"),
        _ => false,
    }
}

/// Whether all features that an instruction needs are offered.
pub fn features_offered(ins: &Instruction) -> bool {
    !ins.cpuid_features().is_empty() && ins.cpuid_features().iter().all(|&f| offered(f))
}

/// Whether it is one of the x87 unit's.
pub fn is_x87(ins: &Instruction) -> bool {
    use CpuidFeature as F;
    ins.cpuid_features().iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387))
}

/// Instructions that rule the x87 unit instead of computing. They are never executed by the host: its
/// unit is not in the guest's state then.
pub fn is_x87_control(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Wait
            | M::Fnop
            | M::Fninit
            | M::Finit
            | M::Fnclex
            | M::Fclex
            | M::Fldcw
            | M::Fnstcw
            | M::Fstcw
            | M::Fnstsw
            | M::Fstsw
            | M::Fldenv
            | M::Fnstenv
            | M::Fstenv
            | M::Fnsave
            | M::Fsave
            | M::Frstor
            | M::Feni
            | M::Fneni
            | M::Fdisi
            | M::Fndisi
            | M::Fsetpm
            | M::Fnsetpm
            | M::Frstpm
            | M::Fstdw
            | M::Fnstdw
            | M::Fstsg
            | M::Fnstsg
    )
}

/// Whether the host's CPU is AMD's.
fn is_amd() -> bool {
    std::arch::x86_64::__cpuid(0).ebx == u32::from_le_bytes(*b"Auth")
}

/// Registers that hold general-register operands in a stub.
const GPRS: [Register; 2] = [Register::RAX, Register::R9];
/// The arithmetic flags; the library counts x87 conditions too.
const STATUS: u32 =
    RflagsBits::CF | RflagsBits::PF | RflagsBits::AF | RflagsBits::ZF | RflagsBits::SF | RflagsBits::OF;
/// Registers of the stub's arguments `o0`-`o3`.
const OFFSETS: [Register; 4] = [Register::RSI, Register::RDX, Register::RCX, Register::R8];

impl Stubs {
    fn prepare(&mut self, ins: &Instruction) -> Option<Stub> {
        if !features_offered(ins)
            || !matches!(ins.code().encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        {
            return None;
        }
        let key = key(ins);
        if let Some(&known) = self.known.get(&key) {
            return known;
        }
        let made = self.make(ins);
        self.known.insert(key, made);
        made
    }

    fn make(&mut self, ins: &Instruction) -> Option<Stub> {
        let info = self.info.info(ins);
        let access: Vec<OpAccess> = (0..ins.op_count()).map(|n| info.op_access(n)).collect();
        let shape = Shape::new(ins, &access)?;
        // Nothing may be used that the stub does not know of.
        let strangers = info.used_registers().iter().any(|used| !shape.knows(ins, used.register()));
        if strangers {
            return None;
        }
        let code = if shape.plan & plan::X87 != 0 { shape.x87(ins) } else { shape.vector(ins) }?;
        Some(Stub { entry: self.memory.add(&code)?, plan: shape.plan })
    }
}

fn key(ins: &Instruction) -> Key {
    let (mut immediate, mut memory, mut st) = (0u16, 0, [0; 2]);
    for n in 0..ins.op_count() {
        match ins.op_kind(n) {
            OpKind::Memory => memory = n as u8 + 1,
            OpKind::Register if ins.op_register(n).is_st() => {
                st[n as usize & 1] = ins.op_register(n).number() as u8
            }
            OpKind::Register => {}
            _ => immediate = immediate << 8 | ins.try_immediate(n).unwrap_or(0) as u16 & 0xff,
        }
    }
    Key { code: ins.code(), immediate, memory, st }
}

fn writes(access: OpAccess) -> bool {
    matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

fn reads(access: OpAccess) -> bool {
    matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

/// Whether MXCSR rules the instruction: those that compute with or convert floating-point numbers.
fn uses_mxcsr(ins: &Instruction) -> bool {
    const FAMILIES: [&str; 17] = [
        "add", "sub", "mul", "div", "sqrt", "min", "max", "cmp", "comis", "ucomis", "cvt", "round", "dpp",
        "hadd", "hsub", "fm", "fnm",
    ];
    const LANES: [&str; 4] = ["ps", "pd", "ss", "sd"];
    let name = format!("{:?}", ins.mnemonic()).to_lowercase();
    let name = name.strip_prefix('v').unwrap_or(&name);
    let floats = name.starts_with("cvt") || LANES.iter().any(|lanes| name.ends_with(lanes));
    floats && FAMILIES.iter().any(|family| name.starts_with(family))
}

/// What a stub does around its instruction.
struct Shape {
    plan: u32,
    /// Operands that are vector or MMX registers, and whether they are written.
    registers: Vec<(u32, Register, bool)>,
    /// Operands that are general registers.
    gprs: Vec<u32>,
    /// XMM0 is read, written without being an operand.
    implicit: (bool, bool),
}

impl Shape {
    fn new(ins: &Instruction, access: &[OpAccess]) -> Option<Shape> {
        let mut shape = Shape { plan: 0, registers: Vec::new(), gprs: Vec::new(), implicit: (false, false) };
        for (n, &access) in (0..).zip(access) {
            match ins.op_kind(n) {
                OpKind::Register => shape.register(n, ins.op_register(n), access)?,
                OpKind::Memory => shape.memory(ins, access)?,
                OpKind::Immediate8 | OpKind::Immediate8_2nd => {}
                _ => return None,
            }
        }
        shape.kind(ins);
        // What has none of its unit's registers as operands rules the unit (MXCSR, the cache, ...).
        let computes = shape.plan & (plan::X87 | plan::MXCSR) != 0 || !shape.registers.is_empty();
        if !computes || is_x87_control(ins.mnemonic()) {
            return None;
        }
        shape.specials(ins.mnemonic());
        if ins.rflags_modified() & STATUS != 0 {
            shape.plan |= plan::FLAGS;
        }
        if ins.rflags_read() & STATUS != 0 {
            shape.plan |= plan::FLAGS_IN;
        }
        Some(shape)
    }

    fn register(&mut self, n: u32, register: Register, access: OpAccess) -> Option<()> {
        if register.is_xmm() || register.is_ymm() || register.is_mm() {
            self.registers.push((n, register, writes(access)));
        } else if register.is_gpr32() || register.is_gpr64() {
            let first = self.gprs.is_empty();
            match (first, reads(access), writes(access)) {
                (true, read, write) => {
                    self.plan |=
                        if read { plan::GPR0_IN } else { 0 } | if write { plan::GPR0_OUT } else { 0 };
                }
                (false, _, false) if self.gprs.len() == 1 => self.plan |= plan::GPR1_IN,
                _ => return None,
            }
            self.gprs.push(n);
        } else if !register.is_st() {
            return None;
        }
        Some(())
    }

    fn memory(&mut self, ins: &Instruction, access: OpAccess) -> Option<()> {
        let size = ins.memory_size().size();
        if size == 0 || size > 32 || ins.is_vsib() {
            return None;
        }
        if reads(access) {
            self.plan |= plan::LOAD;
        }
        if writes(access) {
            self.plan |= plan::STORE;
        }
        let vex = ins.code().encoding() == EncodingKind::VEX;
        use Mnemonic as M;
        let aligned = match ins.mnemonic() {
            M::Movups | M::Movupd | M::Movdqu | M::Lddqu => false,
            M::Pcmpestri | M::Pcmpestri64 | M::Pcmpestrm | M::Pcmpestrm64 | M::Pcmpistri | M::Pcmpistrm => {
                false
            }
            // AMD's CPUs do not ask it of SHA.
            _ if ins.cpuid_features() == [CpuidFeature::SHA] && is_amd() => false,
            _ => !vex && size == 16,
        };
        if aligned {
            self.plan |= plan::ALIGNED;
        }
        Some(())
    }

    fn kind(&mut self, ins: &Instruction) {
        let any = |is: fn(Register) -> bool| self.registers.iter().any(|(_, r, _)| is(*r));
        let (mmx, vector) = (any(|r| r.is_mm()), any(|r| r.is_xmm() || r.is_ymm()));
        let out = self.registers.first().is_some_and(|(n, r, written)| *n == 0 && r.is_mm() && *written);
        if mmx {
            self.plan |= plan::MMX | if out { plan::MMX_OUT } else { 0 };
        }
        if ins.code().encoding() == EncodingKind::VEX {
            self.plan |= plan::AVX;
        } else if (vector || !mmx) && !is_x87(ins) {
            self.plan |= plan::SSE;
        }
        if is_x87(ins) {
            self.plan |= plan::X87;
        } else if uses_mxcsr(ins) {
            self.plan |= plan::MXCSR;
        }
    }

    fn specials(&mut self, mnemonic: Mnemonic) {
        use Mnemonic as M;
        match mnemonic {
            M::Blendvpd | M::Blendvps | M::Pblendvb | M::Sha256rnds2 => self.implicit.0 = true,
            M::Pcmpestri | M::Pcmpestri64 | M::Vpcmpestri | M::Vpcmpestri64 => {
                self.plan |= plan::STRING_LENGTHS | plan::STRING_INDEX;
            }
            M::Pcmpestrm | M::Pcmpestrm64 | M::Vpcmpestrm | M::Vpcmpestrm64 => {
                self.plan |= plan::STRING_LENGTHS;
                self.implicit.1 = true;
            }
            M::Pcmpistri | M::Vpcmpistri => self.plan |= plan::STRING_INDEX,
            M::Pcmpistrm | M::Vpcmpistrm => self.implicit.1 = true,
            _ => {}
        }
    }

    /// Whether the stub takes care of a register that the instruction uses.
    fn knows(&self, ins: &Instruction, register: Register) -> bool {
        let full = register.full_register();
        let operand = (0..ins.op_count()).any(|n| {
            ins.op_kind(n) == OpKind::Register && ins.op_register(n).full_register() == full
                || ins.op_kind(n) == OpKind::Memory
                    && [ins.memory_base().full_register(), ins.memory_index().full_register()].contains(&full)
        });
        let strings = plan::STRING_LENGTHS | plan::STRING_INDEX;
        operand
            || register.is_segment_register()
            || register.is_st() && self.plan & plan::X87 != 0
            || full == Register::ZMM0 && (self.implicit.0 || self.implicit.1)
            || [Register::RAX, Register::RCX, Register::RDX].contains(&full) && self.plan & strings != 0
    }

    /// The instruction with the stub's operands.
    fn canonical(&self, ins: &Instruction) -> Instruction {
        let mut new = *ins;
        for &(n, register, _) in &self.registers {
            new.set_op_register(n, replaced(register, n));
        }
        for (k, &n) in self.gprs.iter().enumerate() {
            let narrow = ins.op_register(n).is_gpr32();
            let register = if narrow { [Register::EAX, Register::R9D][k] } else { GPRS[k] };
            new.set_op_register(n, register);
        }
        if (0..ins.op_count()).any(|n| ins.op_kind(n) == OpKind::Memory) {
            new.set_memory_base(Register::RDI);
            new.set_memory_index(Register::None);
            new.set_memory_index_scale(1);
            new.set_memory_displacement64(offset_of!(Fpu, operand) as u64);
            new.set_memory_displ_size(8);
            new.set_segment_prefix(Register::None);
        }
        new.set_has_rep_prefix(false);
        new.set_has_repne_prefix(false);
        new.set_has_lock_prefix(false);
        new
    }

    /// Code of a stub for MMX, SSE or AVX.
    fn vector(&self, ins: &Instruction) -> Option<Vec<u8>> {
        let avx = self.plan & plan::AVX != 0;
        let mut code = Emitter::default();
        if self.plan & plan::MXCSR != 0 {
            code.with1(
                if avx { Code::VEX_Vldmxcsr_m32 } else { Code::Ldmxcsr_m32 },
                field(offset_of!(Fpu, run_mxcsr)),
            )?;
        }
        for &(n, register, _) in &self.registers {
            let (load, _) = moves(register, avx);
            code.with2(load, replaced(register, n), slot(register, n))?;
        }
        if self.implicit.0 {
            code.with2(Code::Movdqu_xmm_xmmm128, Register::XMM0, field(offset_of!(Fpu, ymm)))?;
        }
        let gpr = |k: usize| field(offset_of!(Fpu, gpr) + 8 * k);
        if self.plan & plan::GPR0_IN != 0 {
            code.with2(Code::Mov_r64_rm64, Register::RAX, gpr(0))?;
        }
        if self.plan & plan::GPR1_IN != 0 {
            code.with2(Code::Mov_r64_rm64, Register::R9, gpr(1))?;
        }
        if self.plan & plan::STRING_LENGTHS != 0 {
            code.with2(Code::Mov_r64_rm64, Register::RAX, gpr(0))?;
            code.with2(Code::Mov_r64_rm64, Register::RDX, gpr(1))?;
        }
        code.push(&self.canonical(ins))?;
        if self.plan & plan::FLAGS != 0 {
            code.flags_out()?;
        }
        if self.plan & plan::GPR0_OUT != 0 {
            code.store(gpr(0), Register::RAX)?;
        }
        if self.plan & plan::STRING_INDEX != 0 {
            code.store(gpr(2), Register::RCX)?;
        }
        for &(n, register, _) in self.registers.iter().filter(|(_, _, written)| *written) {
            let (_, store) = moves(register, avx);
            let whole = if avx { wide(replaced(register, n)) } else { replaced(register, n) };
            code.store_by(store, slot(register, n), whole)?;
        }
        if self.implicit.1 {
            let (_, store) = moves(Register::XMM0, avx);
            let whole = if avx { Register::YMM0 } else { Register::XMM0 };
            code.store_by(store, field(offset_of!(Fpu, ymm)), whole)?;
        }
        if self.plan & plan::MXCSR != 0 {
            let (store, load) = if avx {
                (Code::VEX_Vstmxcsr_m32, Code::VEX_Vldmxcsr_m32)
            } else {
                (Code::Stmxcsr_m32, Code::Ldmxcsr_m32)
            };
            code.with1(store, field(offset_of!(Fpu, run_mxcsr)))?;
            code.with1(load, field(offset_of!(Fpu, host_mxcsr)))?;
        }
        if avx {
            code.push(&Instruction::with(Code::VEX_Vzeroupper))?;
        }
        if self.plan & plan::MMX != 0 {
            code.push(&Instruction::with(Code::Emms))?;
        }
        code.finish()
    }

    /// Code of a stub for an x87 instruction.
    fn x87(&self, ins: &Instruction) -> Option<Vec<u8>> {
        let mut code = Emitter::default();
        code.with1(Code::Fxrstor64_m512byte, field(offset_of!(Fpu, x87)))?;
        if self.plan & plan::FLAGS_IN != 0 {
            code.with1(Code::Push_rm64, field(offset_of!(Fpu, flags)))?;
            code.push(&Instruction::with(Code::Popfq))?;
        }
        code.push(&self.canonical(ins))?;
        if self.plan & plan::FLAGS != 0 {
            code.flags_out()?;
        }
        code.with1(Code::Fxsave64_m512byte, field(offset_of!(Fpu, x87)))?;
        code.push(&Instruction::with(Code::Fninit))?;
        code.finish()
    }
}

/// The register that holds operand `n`, of class `register`, in a stub.
fn replaced(register: Register, n: u32) -> Register {
    let base = if register.is_mm() {
        Register::MM0
    } else if register.is_ymm() {
        Register::YMM0
    } else {
        Register::XMM0
    };
    base + (n + 1)
}

fn wide(register: Register) -> Register {
    Register::YMM0 + register.number() as u32
}

/// How a register is loaded, and stored.
fn moves(register: Register, avx: bool) -> (Code, Code) {
    if register.is_mm() {
        (Code::Movq_mm_mmm64, Code::Movq_mmm64_mm)
    } else if register.is_ymm() {
        (Code::VEX_Vmovdqu_ymm_ymmm256, Code::VEX_Vmovdqu_ymmm256_ymm)
    } else if avx {
        (Code::VEX_Vmovdqu_xmm_xmmm128, Code::VEX_Vmovdqu_ymmm256_ymm)
    } else {
        (Code::Movdqu_xmm_xmmm128, Code::Movdqu_xmmm128_xmm)
    }
}

/// Where the guest keeps operand `n`: the stub's argument is 16 × the register's number.
fn slot(register: Register, n: u32) -> MemoryOperand {
    let (scale, at) = if register.is_mm() {
        (1, offset_of!(Fpu, x87) + offset_of!(X87, st))
    } else {
        (2, offset_of!(Fpu, ymm))
    };
    let offset = OFFSETS[n as usize & 3];
    MemoryOperand::new(Register::RDI, offset, scale, at as i64, 8, false, Register::None)
}

/// A field of [`Fpu`].
fn field(at: usize) -> MemoryOperand {
    MemoryOperand::new(Register::RDI, Register::None, 1, at as i64, 8, false, Register::None)
}

/// Collects encoded instructions.
struct Emitter {
    encoder: Encoder,
}

impl Default for Emitter {
    fn default() -> Self {
        Emitter { encoder: Encoder::new(64) }
    }
}

impl Emitter {
    fn push(&mut self, ins: &Instruction) -> Option<()> {
        self.encoder.encode(ins, 0).ok().map(|_| ())
    }

    fn with1(&mut self, code: Code, memory: MemoryOperand) -> Option<()> {
        self.push(&Instruction::with1(code, memory).ok()?)
    }

    fn with2(&mut self, code: Code, register: Register, memory: MemoryOperand) -> Option<()> {
        self.push(&Instruction::with2(code, register, memory).ok()?)
    }

    fn store(&mut self, memory: MemoryOperand, register: Register) -> Option<()> {
        self.store_by(Code::Mov_rm64_r64, memory, register)
    }

    fn store_by(&mut self, code: Code, memory: MemoryOperand, register: Register) -> Option<()> {
        self.push(&Instruction::with2(code, memory, register).ok()?)
    }

    /// Stores the arithmetic flags; the stack is 8 bytes below the caller's, which is fine for a leaf.
    fn flags_out(&mut self) -> Option<()> {
        self.push(&Instruction::with(Code::Pushfq))?;
        self.with1(Code::Pop_rm64, field(offset_of!(Fpu, flags)))
    }

    fn finish(mut self) -> Option<Vec<u8>> {
        self.push(&Instruction::with(Code::Retnq))?;
        Some(self.encoder.take_buffer())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn decode(bytes: &[u8]) -> Instruction {
        Decoder::new(64, bytes, DecoderOptions::NONE).decode()
    }

    #[test]
    fn one_stub_serves_all_registers_and_addresses() {
        // paddw xmm9, xmm9; paddw xmm0, xmm3; paddw xmm0, [rax]
        let [a, b, c] =
            [&[0x66, 0x45, 0x0f, 0xfd, 0xc9][..], &[0x66, 0x0f, 0xfd, 0xc3], &[0x66, 0x0f, 0xfd, 0x00]]
                .map(|code| prepare(&decode(code)).unwrap());
        assert_eq!(a.entry, b.entry);
        assert_ne!(a.entry, c.entry);
        assert_eq!(c.plan, plan::SSE | plan::LOAD | plan::ALIGNED);
    }

    #[test]
    fn what_is_executed_is_what_cpuid_tells() {
        let guest = crate::x86::testing::Guest::new(64, &[]);
        let ask = |leaf, register: usize, bit: u32| {
            guest.cpu.vm.cpuid.query(&guest.cpu, leaf, 0)[register] >> bit & 1 != 0
        };
        for (feature, leaf, register, bit) in [
            (CpuidFeature::MMX, 1, 3, 23),
            (CpuidFeature::SSE, 1, 3, 25),
            (CpuidFeature::SSE2, 1, 3, 26),
            (CpuidFeature::SSE3, 1, 2, 0),
            (CpuidFeature::PCLMULQDQ, 1, 2, 1),
            (CpuidFeature::SSSE3, 1, 2, 9),
            (CpuidFeature::FMA, 1, 2, 12),
            (CpuidFeature::SSE4_1, 1, 2, 19),
            (CpuidFeature::SSE4_2, 1, 2, 20),
            (CpuidFeature::AES, 1, 2, 25),
            (CpuidFeature::AVX, 1, 2, 28),
            (CpuidFeature::F16C, 1, 2, 29),
            (CpuidFeature::AVX2, 7, 1, 5),
            (CpuidFeature::AVX512F, 7, 1, 16),
            (CpuidFeature::SHA, 7, 1, 29),
            (CpuidFeature::GFNI, 7, 2, 8),
            (CpuidFeature::VAES, 7, 2, 9),
            (CpuidFeature::VPCLMULQDQ, 7, 2, 10),
            (CpuidFeature::SSE4A, 0x8000_0001, 2, 6),
        ] {
            assert_eq!(offered(feature), ask(leaf, register, bit), "{feature:?}");
        }
    }
}
