//! Random instructions, and start states in which they do something.
//!
//! Instructions are random bytes in the shape of x86 encodings, decoded and kept if user programs may
//! execute them; those that were seen less often are preferred, so that rare ones get their share.

use iced_x86::{
    Code, CpuidFeature as F, Decoder, DecoderOptions, EncodingKind, FlowControl, Instruction, MemorySize,
    Mnemonic as M, OpKind, Register,
};

use crate::random::Random;
use crate::state::*;

/// A case: its start and the instruction in it.
pub struct Case {
    pub start: Start,
    pub ins: Instruction,
}

pub struct Generator {
    random: Random,
    /// How often each instruction was taken.
    taken: Vec<u32>,
    cases: u32,
    kinds: u32,
    memory: Vec<u8>,
}

/// Features whose instructions are tested.
const FEATURES: [F; 40] = [
    F::INTEL8086,
    F::INTEL186,
    F::INTEL286,
    F::INTEL386,
    F::INTEL486,
    F::X64,
    F::CMOV,
    F::MULTIBYTENOP,
    F::PAUSE,
    F::BMI1,
    F::BMI2,
    F::ADX,
    F::POPCNT,
    F::LZCNT,
    F::MOVBE,
    F::CX8,
    F::CMPXCHG16B,
    F::CLFSH,
    F::FPU,
    F::FPU287,
    F::FPU387,
    F::MMX,
    F::SSE,
    F::SSE2,
    F::SSE3,
    F::SSSE3,
    F::SSE4_1,
    F::SSE4_2,
    F::SSE4A,
    F::AVX,
    F::AVX2,
    F::FMA,
    F::F16C,
    F::AES,
    F::VAES,
    F::PCLMULQDQ,
    F::VPCLMULQDQ,
    F::GFNI,
    F::SHA,
    F::FXSR,
];

/// User instructions that are not compared: they switch contexts, read what differs (segments,
/// descriptor tables, clocks), trap on purpose, or could set TF.
const EXCLUDED: [M; 39] = [
    M::Syscall,
    M::Sysenter,
    M::Sysexit,
    M::Sysret,
    M::Int,
    M::Int1,
    M::Int3,
    M::Into,
    M::Iret,
    M::Iretd,
    M::Iretq,
    M::Retf,
    M::Hlt,
    M::In,
    M::Out,
    M::Insb,
    M::Insw,
    M::Insd,
    M::Outsb,
    M::Outsw,
    M::Outsd,
    M::Popf,
    M::Popfq,
    M::Cli,
    M::Sti,
    M::Lar,
    M::Lsl,
    M::Verr,
    M::Verw,
    M::Sgdt,
    M::Sidt,
    M::Sldt,
    M::Smsw,
    M::Str,
    M::Lfs,
    M::Lgs,
    M::Lss,
    M::Xgetbv,
    M::Cpuid,
];

/// May the host execute it here, and does it mean the same to the interpreter?
fn allowed(ins: &Instruction) -> bool {
    let encoding = ins.code().encoding();
    let flow = ins.flow_control();
    let plain_flow = !matches!(flow, FlowControl::Interrupt | FlowControl::XbeginXabortXend);
    let far = matches!(ins.memory_size(), MemorySize::SegPtr16 | MemorySize::SegPtr32 | MemorySize::SegPtr64);
    let strange_register = (0..ins.op_count()).any(|n| {
        let register = ins.op_register(n);
        register.is_segment_register() || register.is_cr() || register.is_dr() || register.is_tr()
    });
    let other_segment = matches!(ins.segment_prefix(), Register::FS | Register::GS);
    !ins.is_invalid()
        && matches!(encoding, EncodingKind::Legacy | EncodingKind::VEX)
        && ins.cpuid_features().iter().all(|f| FEATURES.contains(f))
        && plain_flow
        && !ins.is_privileged()
        && !(far || strange_register || other_segment)
        && !EXCLUDED.contains(&ins.mnemonic())
        && !jumps_into_itself(ins)
}

/// Intel's CPUs ignore an operand-size prefix of near branches in 64-bit mode, AMD's obey it.
fn vendors_differ(ins: &Instruction, code: &[u8]) -> bool {
    let branch =
        ins.flow_control() != FlowControl::Next || matches!(ins.mnemonic(), M::Jmp | M::Call | M::Ret);
    branch
        && code[..ins.len()]
            .iter()
            .take_while(|b| {
                matches!(b, 0x40..=0x4f | 0x66 | 0x67 | 0x2e | 0x36 | 0x3e | 0x26 | 0xf0 | 0xf2 | 0xf3)
            })
            .any(|b| *b == 0x66)
}

fn jumps_into_itself(ins: &Instruction) -> bool {
    let near = ins.op_count() > 0
        && matches!(ins.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
    near && (START..ins.next_ip()).contains(&ins.near_branch_target())
}

impl Generator {
    pub fn new(seed: u64, memory: Vec<u8>) -> Generator {
        Generator {
            random: Random::new(seed),
            taken: vec![0; Code::values().len()],
            cases: 0,
            kinds: 1,
            memory,
        }
    }

    /// How many different instructions (by opcode and operand kinds) were generated.
    pub fn kinds(&self) -> usize {
        self.taken.iter().filter(|n| **n != 0).count()
    }

    pub fn case(&mut self) -> Case {
        let (mut code, mut ins) = self.instruction();
        let mut start = self.registers();
        self.prepare(&mut start, &mut code, &mut ins);
        start.code[..15].copy_from_slice(&code);
        start.len = ins.len() as u64;
        Case { start, ins }
    }

    fn instruction(&mut self) -> ([u8; 15], Instruction) {
        let mut tries = 0;
        loop {
            let code = self.bytes();
            let ins = Decoder::with_ip(64, &code, START, DecoderOptions::NONE).decode();
            if !allowed(&ins) || vendors_differ(&ins, &code) {
                continue;
            }
            tries += 1;
            let taken = &mut self.taken[ins.code() as usize];
            if *taken > 2 * self.cases / self.kinds && tries < 300 {
                continue;
            }
            self.kinds += u32::from(*taken == 0);
            *taken += 1;
            self.cases += 1;
            return (code, ins);
        }
    }

    /// Bytes in the shape of an instruction: prefixes, opcode map, and the rest at random.
    fn bytes(&mut self) -> [u8; 15] {
        let random = &mut self.random;
        let mut bytes: Vec<u8> = Vec::with_capacity(24);
        if random.chance(16) {
            bytes.push(random.pick(&[0x67, 0x2e, 0x36, 0x3e, 0x26, 0xf0]));
        }
        let shape = random.below(8);
        let opcode = random.next() as u8;
        if shape >= 6 {
            // VEX: every map and prefix; vvvv often as instructions without a third operand want it.
            let vvvv = if random.chance(2) { 0xf } else { random.below(16) as u8 };
            let last = vvvv << 3 | (random.below(2) as u8) << 2 | random.below(4) as u8;
            // Groups and gathers take the same opcode for many instructions.
            let opcode = if random.chance(6) {
                random.pick(&[0x71, 0x72, 0x73, 0x90, 0x91, 0x92, 0x93, 0xf3])
            } else {
                opcode
            };
            if random.chance(4) {
                bytes.extend([0xc5, last | (random.below(2) as u8) << 7, opcode]);
            } else {
                let map = 1 + random.below(3) as u8;
                bytes.extend([
                    0xc4,
                    (random.below(8) as u8) << 5 | map,
                    last | (random.below(2) as u8) << 7,
                    opcode,
                ]);
            }
        } else {
            match random.below(8) {
                0..=1 => bytes.push(0x66),
                2 if random.chance(4) => bytes.extend([0x66, random.pick(&[0xf2, 0xf3])]),
                2 => bytes.push(0xf2),
                3 => bytes.push(0xf3),
                _ => {}
            }
            if random.chance(2) {
                bytes.push(0x40 | random.below(16) as u8);
            }
            match shape {
                0..=1 => bytes.push(opcode),
                2 => bytes.push(0xd8 | opcode & 7),
                3 => bytes.extend([0x0f, opcode]),
                4 => bytes.extend([0x0f, 0x38, opcode]),
                _ => bytes.extend([0x0f, 0x3a, opcode]),
            }
        }
        while bytes.len() < 15 {
            bytes.extend(random.next().to_le_bytes());
        }
        std::array::from_fn(|i| bytes[i])
    }

    /// Registers without regard to the instruction.
    fn registers(&mut self) -> Start {
        let random = &mut self.random;
        let mut start = Start { code: [0; 16], len: 0, gpr: [0; 16], rflags: 0, xsave: [0; XSAVE] };
        for value in &mut start.gpr {
            *value = if random.chance(4) { AREA + random.below(READABLE as u64) } else { random.number() };
        }
        start.gpr[4] = AREA + 0x1800 + random.below(64) * 8;
        start.gpr[5] = AREA + 0x1800 + random.below(64) * 8;
        start.rflags = random.next() & 0x8d5 | if random.chance(4) { 0x400 } else { 0 } | 0x202;
        let xsave = &mut start.xsave;
        for i in 0..16 {
            for at in [at::XMM, at::YMM] {
                let [low, high] = random.vector();
                put(xsave, at + 16 * i, low.to_le_bytes());
                put(xsave, at + 16 * i + 8, high.to_le_bytes());
            }
        }
        put(xsave, at::MXCSR, mxcsr(random).to_le_bytes());
        let (control, status) = x87(random);
        put(xsave, at::FCW, control.to_le_bytes());
        put(xsave, at::FSW, status.to_le_bytes());
        let any = random.next() as u8;
        xsave[at::FTW] = random.pick(&[0xff, 0xff, 0, 0xfe, 0x7f, any]);
        for i in 0..8 {
            let (mantissa, exponent) = random.extended();
            put(xsave, at::ST + 16 * i, mantissa.to_le_bytes());
            put(xsave, at::ST + 16 * i + 8, exponent.to_le_bytes());
        }
        start
    }

    /// Makes the instruction's memory operand point to where something is, and its counts small.
    fn prepare(&mut self, start: &mut Start, code: &mut [u8; 15], ins: &mut Instruction) {
        let gpr = |register: Register| register.full_register().number() & 15;
        if (0..ins.op_count()).any(|n| ins.op_kind(n) == OpKind::Memory) {
            self.address(start, code, ins);
        }
        let pointer = |random: &mut Random| AREA + random.below(WRITABLE as u64);
        if ins.is_string_instruction()
            || matches!(ins.mnemonic(), M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu)
        {
            start.gpr[6] = pointer(&mut self.random);
            start.gpr[7] = pointer(&mut self.random);
            if !self.random.chance(16) {
                start.gpr[1] = self.random.below(40);
            }
        }
        match ins.mnemonic() {
            M::Xlatb => start.gpr[3] = pointer(&mut self.random),
            M::Div | M::Idiv if !self.random.chance(3) => {
                start.gpr[2] = self.random.below(3);
                start.gpr[0] = self.random.number() & 0xffff_ffff;
            }
            M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b if !self.random.chance(3) => self.expect(start, ins),
            M::Jmp | M::Call if ins.op0_kind() == OpKind::Register && ins.op0_register() != Register::RSP => {
                start.gpr[gpr(ins.op0_register())] = CODE + self.random.below(0x700);
            }
            _ => {}
        }
    }

    /// Gives a compare-and-exchange what it compares with.
    fn expect(&mut self, start: &mut Start, ins: &Instruction) {
        let address = ins.virtual_address(0, 0, |register, _, _| match register {
            Register::ES | Register::CS | Register::SS | Register::DS => Some(0),
            _ => Some(start.gpr[register.full_register().number() & 15]),
        });
        let offset = address.unwrap_or(0).wrapping_sub(AREA) as usize;
        if ins.op0_kind() != OpKind::Memory || offset > WRITABLE - 16 {
            return;
        }
        let (low, high) = (get64(&self.memory, offset), get64(&self.memory, offset + 8));
        match ins.mnemonic() {
            M::Cmpxchg16b => (start.gpr[0], start.gpr[2]) = (low, high),
            M::Cmpxchg8b => (start.gpr[0], start.gpr[2]) = (low & 0xffff_ffff, low >> 32),
            _ => start.gpr[0] = low,
        }
    }

    /// An address for an operand of `size` bytes: mostly good, in all ways bad.
    fn target(&mut self, size: u64) -> u64 {
        let random = &mut self.random;
        let inside = AREA + random.below(WRITABLE as u64 - 0x300) + 0x100;
        match random.below(32) {
            0 => AREA + 4096 * (1 + random.below(2)) - 1 - random.below(size),
            1 => AREA + READABLE as u64 - 1 - random.below(2 * size),
            2 => AREA + WRITABLE as u64 - 1 - random.below(2 * size),
            3 => AREA + WRITABLE as u64 + random.below(4096 - 64),
            4 if random.chance(2) => AREA + READABLE as u64 + random.below(4096),
            4 => random.pick(&[
                0x7fff_ffff_fff8,
                0x8000_0000_0000,
                0xffff_8000_0000_0000,
                0xffff_ffff_ffff_fff9,
            ]),
            5..=10 => inside,
            11..=20 => inside & !(size.next_power_of_two().min(64) - 1),
            _ => inside & !63,
        }
    }

    /// Chooses base and index registers, or the displacement, so that the operand is at a target.
    fn address(&mut self, start: &mut Start, code: &mut [u8; 15], ins: &mut Instruction) {
        let target = self.target((ins.memory_size().size() as u64).max(1));
        let (base, index) = (ins.memory_base(), ins.memory_index());
        let displacement = ins.memory_displacement64();
        let scale = u64::from(ins.memory_index_scale());
        let number = |register: Register| register.full_register().number() & 15;
        if ins.is_vsib() {
            self.vector_index(start, number(index), ins);
            let middle = AREA + 0x1800;
            if base == Register::None {
                patch(code, ins, middle);
            } else {
                start.gpr[number(base)] = middle.wrapping_sub(displacement);
            }
            return;
        }
        match (base, index) {
            (Register::None, Register::None) => patch(code, ins, target),
            (Register::RIP | Register::EIP, _) => patch(code, ins, target),
            (base, Register::None) => start.gpr[number(base)] = target.wrapping_sub(displacement),
            (Register::None, index) => {
                start.gpr[number(index)] = target.wrapping_sub(displacement) >> scale.trailing_zeros();
            }
            (base, index) if base == index => {
                start.gpr[number(base)] = target.wrapping_sub(displacement) / (1 + scale);
            }
            (base, index) => {
                let count = if self.random.chance(4) { self.random.number() } else { self.random.below(64) };
                start.gpr[number(index)] = count;
                start.gpr[number(base)] =
                    target.wrapping_sub(displacement).wrapping_sub(count.wrapping_mul(scale));
            }
        }
    }

    /// Indices of a gather: near each other, now and then far away.
    fn vector_index(&mut self, start: &mut Start, register: usize, ins: &Instruction) {
        let wide = matches!(ins.mnemonic(), M::Vpgatherqd | M::Vpgatherqq | M::Vgatherqps | M::Vgatherqpd);
        for at in [at::XMM + 16 * register, at::YMM + 16 * register] {
            for offset in (0..16).step_by(if wide { 8 } else { 4 }) {
                let near = self.random.below(400) as i64 - 200;
                let index = if self.random.chance(30) { self.random.next() as i64 } else { near };
                if wide {
                    put(&mut start.xsave, at + offset, index.to_le_bytes());
                } else {
                    put(&mut start.xsave, at + offset, (index as i32).to_le_bytes());
                }
            }
        }
    }
}

/// Changes the displacement in the code so that the operand is at `target`.
fn patch(code: &mut [u8; 15], ins: &mut Instruction, target: u64) {
    let mut decoder = Decoder::with_ip(64, &code[..], START, DecoderOptions::NONE);
    let before = decoder.decode();
    let offsets = decoder.get_constant_offsets(&before);
    let (at, size) = (offsets.displacement_offset(), offsets.displacement_size());
    let relative = matches!(ins.memory_base(), Register::RIP | Register::EIP);
    let value = if relative { target.wrapping_sub(ins.next_ip()) } else { target };
    if size >= 4 {
        code[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
    }
    *ins = Decoder::with_ip(64, &code[..], START, DecoderOptions::NONE).decode();
}

/// MXCSR: mostly as programs have it, sometimes with other rounding, sometimes with exceptions on.
fn mxcsr(random: &mut Random) -> u32 {
    let modes = (random.next() as u32) & 0xe040;
    match random.below(10) {
        0..=5 => 0x1f80,
        6..=7 => 0x1f80 | modes,
        8 => 0x1f80 | random.next() as u32 & 0x3f,
        _ => random.next() as u32 & 0xffff,
    }
}

/// Control and status word.
fn x87(random: &mut Random) -> (u16, u16) {
    let top = (random.below(8) as u16) << 11;
    match random.below(10) {
        0..=4 => (0x37f, top),
        5..=6 => (0x7f | (random.next() as u16 & 0xf00), top | random.next() as u16 & 0x4700),
        7 => (0x37f, top | random.next() as u16 & 0x477f),
        8 => (0x340 | random.next() as u16 & 0xc3f, top | random.next() as u16 & 0x4700),
        _ => (0x40 | random.next() as u16 & 0xf3f, top | random.next() as u16 & 0x477f),
    }
}
