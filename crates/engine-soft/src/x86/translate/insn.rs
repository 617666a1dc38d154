//! What kind of translation each guest instruction gets.

use iced_x86::{
    Code, CodeSize, FlowControl, Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic,
    OpAccess, OpCodeOperandKind, OpKind, Register,
};

use super::super::cpu::Mode;
use super::super::decode::{decode_full, is_cmov, is_setcc};
use super::super::exception::Exec;
use super::super::op::{Op, flag, seg};
use super::raw::Raw;
use super::regs::{SP, host_of};
use super::x87::Use;

/// The arithmetic flags, in iced's numbering: OF, SF, ZF, AF, CF, PF.
pub const ARITHMETIC: u32 = 0x3f;

/// How an instruction is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// By a call of its interpreter handler.
    Handler,
    /// It does nothing.
    Nothing,
    /// Its bytes as they are: its operands are RAX, RDX and immediates.
    Copy,
    /// Its bytes with other register numbers, memory operand checked.
    Generic,
    /// `div` and `idiv` of 32 and 64 bits.
    Divide,
    /// `cli`
    Cli,
    /// `sti`
    Sti,
    /// `stac`
    Stac,
    /// `clac`
    Clac,
    /// `swapgs`
    Swapgs,
    /// `lea`
    Lea,
    /// `fldcw`
    Fldcw,
    /// `cld`
    Cld,
    /// `pushf`
    PushFlags,
    /// `lods`, not repeated
    LoadString,
    /// `bt` and its kin with a memory operand and the bit's number in a register.
    BitString,
    /// `stos` and `movs`
    String,
    /// `mov reg, imm` and `bswap`, `xchg rax, reg`, `inc` and `dec`: the register is in the opcode.
    OpcodeReg,
    /// Stack.
    Push,
    /// Stack.
    Pop,
    /// `leave`
    Leave,
    /// `jmp` to a fixed target.
    Jump,
    /// Conditional jump.
    Branch,
    /// `loop`, `jecxz` and `jrcxz`
    Loop,
    /// `call` to a fixed target.
    Call,
    /// `ret`
    Return,
    /// `jmp` through a register or memory.
    JumpIndirect,
    /// `call` through a register or memory.
    CallIndirect,
}

/// A guest instruction on its way through translation.
pub struct Insn {
    /// As iced sees it, decoded at address 0.
    pub ins: Instruction,
    /// As the interpreter runs it.
    pub op: Op,
    /// Its bytes.
    pub bytes: [u8; 15],
    /// Offset in its page.
    pub at: u32,
    /// How it is translated.
    pub class: Class,
    /// Taken apart, if it has a ModRM byte that can be rewritten.
    pub raw: Option<Raw>,
    /// Arithmetic flags that it reads, or keeps while it writes others.
    pub reads: u32,
    /// Arithmetic flags that it may write.
    pub writes: u32,
    /// Arithmetic flags that it surely writes (or leaves undefined).
    pub kills: u32,
    /// Arithmetic flags that are live behind it.
    pub live_after: u32,
    /// What it does to its memory operand.
    pub memory: Option<Access>,
    /// What it does to its register operands, where one of them has no host register: bit `2 n` if
    /// operand `n` must be loaded before, bit `2 n + 1` if it must be stored after.
    pub slots: u32,
    /// General registers that it may write, as bits. All, if a handler executes it.
    pub written: u16,
    /// Works on vector registers.
    pub vector: bool,
    /// Works on x87 or MMX registers.
    pub x87: Use,
    /// Alignment in bytes that it asks of its memory operand.
    pub alignment: u8,
    /// In the shadow of `STI`: attention is looked at behind it, wherever that is.
    pub shadow: bool,
}

/// A memory access.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// Bytes.
    pub size: u32,
    /// Whether it is written (too).
    pub write: bool,
}

impl Insn {
    /// Flags live in front of it.
    pub fn live_before(&self) -> u32 {
        self.live_after & !self.kills | self.reads
    }

    /// Arithmetic flags that must be in the host's flags while it executes.
    pub fn needs(&self) -> u32 {
        if self.writes == 0 { self.reads } else { self.reads | self.live_after & !self.kills }
    }

    /// Has the handler execute it.
    pub fn hand_over(&mut self) {
        self.class = Class::Handler;
        (self.reads, self.writes, self.kills) = (ARITHMETIC, ARITHMETIC, 0);
    }

    /// Length in bytes.
    pub fn length(&self) -> u32 {
        self.op.len.into()
    }

    /// Offset in the page of what follows it.
    pub fn end(&self) -> u32 {
        self.at + self.length()
    }

    /// 32-bit code: addresses, and what is pushed and popped, have 32 bits.
    pub fn narrow(&self) -> bool {
        self.ins.code_size() != CodeSize::Code64
    }

    /// Bytes that a push, a pop, a call or a return moves.
    pub fn word(&self) -> u32 {
        if self.narrow() { 4 } else { 8 }
    }

    /// Displacement of its memory operand.
    pub fn displacement(&self) -> i64 {
        let disp = self.ins.memory_displacement64();
        if self.narrow() { disp as i32 as i64 } else { disp as i64 }
    }

    /// Target of a direct branch, relative to the start of its page.
    pub fn target(&self) -> i64 {
        let offset = self.ins.near_branch_target();
        let offset = if self.narrow() { offset as i32 as i64 } else { offset as i64 };
        offset + i64::from(self.at)
    }
}

/// What translation needs to know of the mode beyond [`Mode`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// SSE instructions run natively.
    pub sse: bool,
    /// AVX instructions run natively.
    pub avx: bool,
    /// x87 and MMX instructions run natively.
    pub x87: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// CPL 3 (else CPL 0).
    pub user: bool,
    /// 32-bit code: which of FS and GS can be accessed at all offsets.
    pub fs: bool,
    /// See [`Features::fs`].
    pub gs: bool,
}

/// Decodes and classifies the instruction at `bytes`, which is at offset `at` of its page. `None` if it
/// does not end within the bytes.
pub fn decode(
    bytes: &[u8],
    at: u32,
    mode: &Mode,
    features: Features,
    factory: &mut InstructionInfoFactory,
) -> Exec<Option<Insn>> {
    let Some((ins, op)) = decode_full(bytes, mode)? else { return Ok(None) };
    let mut copy = [0; 15];
    let len = usize::from(op.len);
    copy[..len].copy_from_slice(&bytes[..len]);
    let mut insn = Insn {
        class: Class::Handler,
        raw: None,
        reads: ARITHMETIC,
        writes: ARITHMETIC,
        kills: 0,
        live_after: ARITHMETIC,
        memory: None,
        slots: 0,
        written: u16::MAX,
        vector: false,
        x87: Use::None,
        alignment: 1,
        shadow: false,
        ins,
        op,
        bytes: copy,
        at,
    };
    insn.class = classify(&mut insn, mode, features, factory);
    if insn.class != Class::Handler {
        flags_of(&mut insn);
        insn.written = written(&insn.ins, factory);
    }
    Ok(Some(insn))
}

fn written(ins: &Instruction, factory: &mut InstructionInfoFactory) -> u16 {
    let info = factory.info_options(ins, InstructionInfoOptions::NO_MEMORY_USAGE);
    let reads = |access| {
        matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess)
    };
    let written =
        info.used_registers().iter().filter(|used| used.register().is_gpr() && !reads(used.access()));
    written.fold(0, |mask, used| mask | 1 << used.register().full_register().number())
}

/// Flags that an instruction reads and writes. One that may leave them as they were keeps them alive.
fn flags_of(insn: &mut Insn) {
    let ins = &insn.ins;
    let (read, modified) = (ins.rflags_read() & ARITHMETIC, ins.rflags_modified() & ARITHMETIC);
    (insn.reads, insn.writes, insn.kills) = (read, modified, modified);
    if modified == 0 {
        return;
    }
    if !surely_writes(ins) {
        insn.kills = 0;
    }
}

/// Whether an instruction that may write flags always does: shifts leave them alone if the count is zero.
pub fn surely_writes(ins: &Instruction) -> bool {
    use Mnemonic::*;
    let shift = matches!(ins.mnemonic(), Shl | Shr | Sar | Sal | Rol | Ror | Rcl | Rcr | Shld | Shrd);
    let last = ins.op_count().wrapping_sub(1);
    let string = ins.is_string_instruction();
    !string && (!shift || ins.op_kind(last) == OpKind::Immediate8 && ins.immediate8() & 0x1f != 0)
}

fn simple(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Add | Or
            | Adc
            | Sbb
            | And
            | Sub
            | Xor
            | Cmp
            | Test
            | Mov
            | Movzx
            | Movsx
            | Movsxd
            | Imul
            | Mul
            | Neg
            | Not
            | Inc
            | Dec
            | Shl
            | Sal
            | Shr
            | Sar
            | Rol
            | Ror
            | Rcl
            | Rcr
            | Shld
            | Shrd
            | Bt
            | Bts
            | Btr
            | Btc
            | Xchg
            | Xadd
            | Cmpxchg
            | Bsf
            | Bsr
            | Tzcnt
            | Lzcnt
            | Popcnt
            | Andn
            | Bextr
            | Blsi
            | Blsr
            | Blsmsk
            | Bzhi
            | Mulx
            | Pdep
            | Pext
            | Rorx
            | Sarx
            | Shlx
            | Shrx
            | Movbe
            | Crc32
            | Movnti
            | Adcx
            | Adox
            | Cmpxchg8b
            | Cmpxchg16b
    ) || is_setcc(mnemonic)
        || is_cmov(mnemonic)
}

fn nothing(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Nop | Endbr64
            | Endbr32
            | Prefetcht0
            | Prefetcht1
            | Prefetcht2
            | Prefetchnta
            | Prefetchw
            | Prefetch
            | Reservednop
    )
}

fn classify(insn: &mut Insn, mode: &Mode, features: Features, factory: &mut InstructionInfoFactory) -> Class {
    let ins = &insn.ins;
    let mnemonic = ins.mnemonic();
    if nothing(mnemonic) {
        return Class::Nothing;
    }
    if !plain_address(ins) || insn.narrow() && !narrow_address(insn, features) {
        return Class::Handler;
    }
    if let Some(class) = control_flow(insn) {
        if ins.op0_kind() == OpKind::Memory {
            insn.memory = Some(Access { size: insn.word(), write: false });
        }
        return class;
    }
    if !features.user
        && let Some(class) = supervisor(mnemonic, features)
    {
        return class;
    }
    if insn.op.has(flag::ENDS_BLOCK) {
        return Class::Handler;
    }
    if let Some(class) = super::strings::classify(insn, features) {
        return class;
    }
    use Mnemonic::*;
    match mnemonic {
        Cld => return Class::Cld,
        Pushfq | Pushfd if insn.op.has(flag::ENDS_BLOCK) || !pushes_word(insn) => return Class::Handler,
        Pushfq | Pushfd => return Class::PushFlags,
        Bt | Bts | Btr | Btc if is_bit_string(insn) => {
            let (size, write) = (ins.memory_size().size() as u32, mnemonic != Bt);
            insn.memory = Some(Access { size, write });
            return with_raw(insn, mode, Class::BitString);
        }
        Lea => return with_raw(insn, mode, Class::Lea),
        Push | Pop => return stack(insn),
        Leave if !ins_has_prefix(insn) => {
            insn.memory = Some(Access { size: insn.word(), write: false });
            return Class::Leave;
        }
        Div | Idiv => return divide(insn),
        Bswap | Mov | Xchg | Inc | Dec if opcode_register(ins).is_some() => return in_opcode(ins),
        Mov if absolute(ins) => return move_absolute(insn),
        Cwd | Cdq | Cqo | Cbw | Cwde | Cdqe | Stc | Clc | Cmc | Lahf | Sahf | Lfence | Mfence | Sfence
        | Pause => return Class::Copy,
        _ => {}
    }
    if features.x87
        && let Some(class) = super::x87::classify(insn, mode, factory)
    {
        return class;
    }
    if simple(mnemonic) {
        return integer(insn, mode, factory);
    }
    if features.sse {
        return super::vector::classify(insn, mode, features, factory);
    }
    Class::Handler
}

/// `pushf` of a whole word.
fn pushes_word(insn: &Insn) -> bool {
    insn.ins.stack_pointer_increment() == -(insn.word() as i32)
}

/// Whether the bit is anywhere in memory: its number is in a register of 32 or 64 bits.
fn is_bit_string(insn: &Insn) -> bool {
    let ins = &insn.ins;
    let whole = insn.narrow() || insn.op.mem.mask == u64::MAX;
    whole
        && ins.op0_kind() == OpKind::Memory
        && ins.op1_kind() == OpKind::Register
        && ins.op1_register().size() >= 4
}

/// Whether the memory operand, if any, has an address form that [`super::memory`] knows.
fn plain_address(ins: &Instruction) -> bool {
    let (base, index) = (ins.memory_base(), ins.memory_index());
    base != Register::EIP && !base.is_gpr16() && !index.is_gpr16() && !index.is_vector_register()
}

/// The same for 32-bit code, where segments count: those that the mode says are flat do, and CS, which is
/// not written through, does not.
fn narrow_address(insn: &Insn, features: Features) -> bool {
    if (0..insn.ins.op_count()).all(|n| insn.ins.op_kind(n) != OpKind::Memory) {
        return true;
    }
    insn.op.mem.mask == u64::from(u32::MAX) && narrow_segment(insn.op.mem.seg, features)
}

/// Whether 32-bit code may be translated that accesses a segment.
pub(super) fn narrow_segment(segment: u8, features: Features) -> bool {
    match segment {
        seg::CS => false,
        seg::FS => features.fs,
        seg::GS => features.gs,
        _ => true,
    }
}

fn ins_has_prefix(insn: &Insn) -> bool {
    insn.length() != 1
}

/// Which operand is a register in the opcode byte.
fn opcode_register(ins: &Instruction) -> Option<u32> {
    use OpCodeOperandKind::*;
    (0..ins.op_count())
        .find(|&n| matches!(ins.op_code().op_kind(n), r8_opcode | r16_opcode | r32_opcode | r64_opcode))
}

/// `mov` between rAX and an absolute address.
fn absolute(ins: &Instruction) -> bool {
    use OpCodeOperandKind::*;
    (0..ins.op_count()).any(|n| ins.op_code().op_kind(n) == mem_offs)
}

/// That, in 32-bit code, as the instruction with a ModRM byte that does the same.
fn move_absolute(insn: &mut Insn) -> Class {
    if !insn.narrow() {
        return Class::Handler;
    }
    let store = insn.ins.op0_kind() == OpKind::Memory;
    let size = insn.ins.memory_size().size() as u32;
    insn.memory = Some(Access { size, write: store });
    insn.raw = Some(Raw::move_a(size, store));
    Class::Generic
}

/// System instructions that are translated at CPL 0.
fn supervisor(mnemonic: Mnemonic, features: Features) -> Option<Class> {
    match mnemonic {
        Mnemonic::Cli => Some(Class::Cli),
        Mnemonic::Sti => Some(Class::Sti),
        Mnemonic::Swapgs => Some(Class::Swapgs),
        Mnemonic::Stac if features.smap => Some(Class::Stac),
        Mnemonic::Clac if features.smap => Some(Class::Clac),
        _ => None,
    }
}

/// An instruction whose register is in its opcode byte.
fn in_opcode(ins: &Instruction) -> Class {
    match gpr(ins.op0_register()) {
        None => Class::Copy, // AH to BH
        Some(number) if host_of(number).is_none() && ins.op0_register().size() < 4 => Class::Handler,
        Some(_) if ins.mnemonic() == Mnemonic::Bswap && ins.op0_register().size() < 4 => Class::Handler,
        Some(_) => Class::OpcodeReg,
    }
}

fn control_flow(insn: &Insn) -> Option<Class> {
    let ins = &insn.ins;
    let narrow = insn.narrow();
    let near = |kind| kind == if narrow { OpKind::NearBranch32 } else { OpKind::NearBranch64 };
    match ins.flow_control() {
        FlowControl::UnconditionalBranch if near(ins.op0_kind()) => Some(Class::Jump),
        FlowControl::ConditionalBranch if near(ins.op0_kind()) && ins.is_jcc_short_or_near() => {
            Some(Class::Branch)
        }
        FlowControl::ConditionalBranch if near(ins.op0_kind()) => {
            let whole = match ins.code() {
                Code::Loop_rel8_64_RCX | Code::Jrcxz_rel8_64 => !narrow,
                Code::Loop_rel8_32_ECX | Code::Jecxz_rel8_32 => narrow,
                _ => false,
            };
            whole.then_some(Class::Loop)
        }
        FlowControl::Call if near(ins.op0_kind()) && ins.mnemonic() == Mnemonic::Call => Some(Class::Call),
        FlowControl::Return => {
            let whole = match ins.code() {
                Code::Retnq | Code::Retnq_imm16 => !narrow,
                Code::Retnd | Code::Retnd_imm16 => narrow,
                _ => false,
            };
            whole.then_some(Class::Return)
        }
        FlowControl::IndirectBranch | FlowControl::IndirectCall => {
            let whole = match ins.code() {
                Code::Jmp_rm64 | Code::Call_rm64 => !narrow,
                Code::Jmp_rm32 | Code::Call_rm32 => narrow,
                _ => false,
            };
            let call = ins.flow_control() == FlowControl::IndirectCall;
            whole.then_some(if call { Class::CallIndirect } else { Class::JumpIndirect })
        }
        _ => None,
    }
}

pub(super) fn with_raw(insn: &mut Insn, mode: &Mode, class: Class) -> Class {
    insn.raw = Raw::parse(&insn.bytes[..insn.op.len.into()], mode.long64);
    if insn.raw.is_some() { class } else { Class::Handler }
}

fn divide(insn: &mut Insn) -> Class {
    use OpCodeOperandKind::*;
    match insn.ins.op_code().op_kind(0) {
        r32_or_mem | r64_or_mem => {}
        _ => return Class::Handler,
    }
    if insn.ins.op0_kind() == OpKind::Memory {
        insn.memory = Some(Access { size: insn.ins.memory_size().size() as u32, write: false });
    }
    Class::Divide
}

/// `push` and `pop` of a whole register, immediate or memory operand.
fn stack(insn: &mut Insn) -> Class {
    let ins = &insn.ins;
    let (push, word) = (ins.mnemonic() == Mnemonic::Push, insn.word());
    match ins.op0_kind() {
        OpKind::Register if ins.op0_register().is_gpr() && ins.op0_register().size() == word as usize => {}
        OpKind::Immediate8to64 | OpKind::Immediate32to64 if push => {}
        OpKind::Immediate8to32 | OpKind::Immediate32 if push && insn.narrow() => {}
        OpKind::Memory if push && ins.memory_size().size() == word as usize => {
            insn.memory = Some(Access { size: word, write: false });
        }
        _ => return Class::Handler,
    }
    if push { Class::Push } else { Class::Pop }
}

/// An integer instruction all of whose operands can be mapped.
fn integer(insn: &mut Insn, mode: &Mode, factory: &mut InstructionInfoFactory) -> Class {
    use OpCodeOperandKind::*;
    let code = insn.ins.op_code();
    let mut modrm = false;
    let mut memory: Option<u32> = Option::None;
    for n in 0..insn.ins.op_count() {
        match code.op_kind(n) {
            r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem | mem | r8_reg | r16_reg | r32_reg | r64_reg
            | r32_rm | r64_rm | r16_rm => modrm = true,
            r32_vvvv | r64_vvvv | al | cl | ax | eax | rax | imm8 | imm8_const_1 | imm8sex16 | imm8sex32
            | imm8sex64 | imm16 | imm32 | imm32sex64 => {}
            _ => return Class::Handler,
        }
        if insn.ins.op_kind(n) == OpKind::Memory {
            memory = Some(n);
        }
    }
    if !modrm {
        return Class::Copy;
    }
    let Some(slots) = slot_count(&insn.ins, memory.is_some()) else { return Class::Handler };
    if slots > 0 {
        insn.slots = slot_accesses(&insn.ins, factory);
    }
    if let Some(n) = memory {
        // The bit string forms address memory by the bit offset in the register.
        let bits =
            matches!(insn.ins.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
        if bits && insn.ins.op1_kind() == OpKind::Register {
            return Class::Handler;
        }
        let info = factory.info_options(&insn.ins, InstructionInfoOptions::NO_REGISTER_USAGE);
        insn.memory = access(&insn.ins, info.op_access(n));
        if insn.memory.is_none() {
            return Class::Handler;
        }
    }
    if insn.ins.mnemonic() == Mnemonic::Cmpxchg16b {
        insn.alignment = 16;
    }
    let class = with_raw(insn, mode, Class::Generic);
    if insn.narrow() && super::vector::wide_only(insn) { Class::Handler } else { class }
}

/// How many registers need scratch registers, AH to BH beside a memory operand among them; `None` if there
/// are not enough, or if AH to BH would have to stand beside a register that needs a REX prefix.
pub(super) fn slot_count(ins: &Instruction, memory: bool) -> Option<usize> {
    let registers =
        || (0..ins.op_count()).filter(|&n| ins.op_kind(n) == OpKind::Register).map(|n| ins.op_register(n));
    let mut slots = [None; 4];
    let mut count = 0;
    for number in registers().filter_map(gpr).filter(|&number| host_of(number).is_none()) {
        if !slots.contains(&Some(number)) {
            slots[count] = Some(number);
            count += 1;
        }
    }
    let high = registers().any(|r| high_byte(r).is_some());
    if memory {
        // One of AH to BH comes by a scratch register.
        return (count + usize::from(high) <= 1).then_some(count + usize::from(high));
    }
    let prefixed = count > 0 || registers().any(|r| gpr(r).and_then(host_of) == Some(SP));
    (count <= 2 && !(high && prefixed)).then_some(count)
}

/// [`Insn::slots`].
pub(super) fn slot_accesses(ins: &Instruction, factory: &mut InstructionInfoFactory) -> u32 {
    let info = factory.info_options(ins, InstructionInfoOptions::NO_MEMORY_USAGE);
    let mut slots = 0;
    for n in 0..ins.op_count().min(5) {
        if ins.op_kind(n) != OpKind::Register {
            continue;
        }
        let register = ins.op_register(n);
        if gpr(register).or(high_byte(register)).is_none() {
            continue;
        }
        let whole = register.size() >= 4 || high_byte(register).is_some();
        let (read, write) = match info.op_access(n) {
            OpAccess::Write => (!whole, true),
            OpAccess::Read | OpAccess::CondRead => (true, false),
            OpAccess::None | OpAccess::NoMemAccess => (false, false),
            OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => (true, true),
        };
        slots |= (u32::from(read) | u32::from(write) << 1) << (2 * n);
    }
    slots
}

/// Size and direction of a memory operand.
pub fn access(ins: &Instruction, access: OpAccess) -> Option<Access> {
    let size = ins.memory_size().size() as u32;
    let write = match access {
        OpAccess::Read | OpAccess::CondRead => false,
        OpAccess::Write | OpAccess::ReadWrite | OpAccess::ReadCondWrite => true,
        _ => return None,
    };
    (size != 0 && size <= 32).then_some(Access { size, write })
}

/// The number of AH to BH in encodings without a REX prefix.
pub(super) fn high_byte(register: Register) -> Option<u8> {
    match register {
        Register::AH => Some(4),
        Register::CH => Some(5),
        Register::DH => Some(6),
        Register::BH => Some(7),
        _ => None,
    }
}

/// Number of a general register, without regard to its width. `None` for AH to BH and others.
pub fn gpr(register: Register) -> Option<u8> {
    let high = matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
    (register.is_gpr() && !high).then(|| register.full_register().number() as u8)
}
