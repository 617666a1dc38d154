//! Blocks of random instructions, with memory accesses that cross pages, faults and live flags.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, RflagsBits};

use super::pair::Pair;
use crate::x86::fpu::Pointers;
use crate::x86::fpu::stub::is_x87;
use crate::x86::op::{reg, seg};
use crate::x86::testing::{CODE, DATA};

/// A small generator of numbers (xorshift64*).
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// Opcodes worth trying; what comes out is filtered.
fn opcode(random: &mut Random) -> Vec<u8> {
    let one = random.next() as u8;
    match random.below(10) {
        0..=5 => vec![one],
        6..=8 => vec![0x0f, one],
        _ => vec![0x0f, random.pick(&[0x38, 0x3a]), random.next() as u8],
    }
}

fn candidate(random: &mut Random, bits: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    if random.below(5) == 0 {
        // VEX
        bytes.extend(match random.below(2) {
            0 => vec![0xc5, random.next() as u8],
            _ => vec![0xc4, random.next() as u8 & 0xe0 | (1 + random.below(3) as u8), random.next() as u8],
        });
        bytes.extend((0..11).map(|_| random.next() as u8));
        return bytes;
    }
    if random.below(8) == 0 {
        bytes.push(random.pick(&[0x66, 0xf2, 0xf3, 0xf0, 0x67, 0x2e, 0x64, 0x65]));
    }
    if bits == 64 && random.below(2) == 0 {
        bytes.push(0x40 | random.below(16) as u8);
    }
    bytes.extend(opcode(random));
    let modrm = random.next() as u8;
    bytes.push(modrm);
    for _ in 0..9 {
        bytes.push(random.next() as u8);
    }
    bytes
}

fn wanted(ins: &Instruction) -> bool {
    use Mnemonic::*;
    let never = matches!(
        ins.mnemonic(),
        Hlt | Wrmsr
            | Rdmsr
            | Rdtsc
            | Rdtscp
            | Cpuid
            | Rdrand
            | Rdseed
            | Rdpmc
            | Rdpid
            | Pause
            | In
            | Out
            | Insb
            | Insw
            | Insd
            | Outsb
            | Outsw
            | Outsd
            | Sti
            | Cli
            | Popf
            | Popfq
            | Std
            | Clts
            | Lmsw
            | Invd
            | Wbinvd
            | Invlpg
            | Swapgs
            | Sysret
            | Sysretq
            | Iretq
            | Iretd
            | Iret
            | Rsm
            | Vmcall
            | Vmmcall
            | Xsetbv
            | Lahf
            | Lgdt
            | Lidt
            | Lldt
            | Ltr
            | Enter
            | Leave
            | Fxsave
            | Fxrstor
            | Fxsave64
            | Fxrstor64
            | Xsave
            | Xrstor
            | Xsave64
            | Xrstor64
            | Xsaveopt
            | Xsaveopt64
            | Xsavec
            | Xsavec64
            | Sgdt
            | Sidt
            | Monitor
            | Mwait
    );
    let strings = ins.is_string_instruction();
    let control = (0..ins.op_count()).any(|n| {
        ins.op_kind(n) == OpKind::Register
            && (ins.op_register(n).is_cr()
                || ins.op_register(n).is_dr()
                || ins.op_register(n).is_segment_register())
    });
    let x87 = ins.op_code().instruction_string().starts_with('F') || ins.is_stack_instruction();
    let defined = ins.rflags_undefined() & !RflagsBits::AF == 0;
    // What a failing exchange does to the upper half of a register differs between CPUs.
    let exchange = ins.mnemonic() == Cmpxchg && ins.op0_kind() == OpKind::Register;
    let touches_stack_pointer = (0..ins.op_count()).any(|n| {
        ins.op_kind(n) == OpKind::Register && ins.op_register(n).full_register() == iced_x86::Register::RSP
    });
    let unknown =
        (0..ins.op_count()).any(|n| ins.op_kind(n) == OpKind::Register && ins.op_register(n).is_mm());
    !never
        && !strings
        && !control
        && !x87
        && defined
        && !touches_stack_pointer
        && !unknown
        && !exchange
        && ins.flow_control() == FlowControl::Next
        && !ins.is_privileged()
}

fn instruction(random: &mut Random, bits: u32) -> Vec<u8> {
    loop {
        let bytes = candidate(random, bits);
        let mut decoder = Decoder::new(bits, &bytes, DecoderOptions::NONE);
        let ins = decoder.decode();
        if !ins.is_invalid() && wanted(&ins) {
            return bytes[..ins.len()].to_vec();
        }
    }
}

/// `mov reg, pointer`, often near the end of a page.
fn pointer(random: &mut Random, bits: u32) -> Vec<u8> {
    let numbers = [0u8, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    let number = random.pick(&numbers[..if bits == 64 { 15 } else { 7 }]);
    let page = DATA + 0x1000 * random.below(4);
    let address = match random.below(4) {
        0 => page + 0x1000 - random.below(9),
        1 => random.next(),
        _ => page + random.below(0xff0),
    };
    move_address(number, address, bits)
}

/// `mov reg, address`
fn move_address(number: u8, address: u64, bits: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend((bits == 64).then_some(0x48 | number >> 3));
    bytes.push(0xb8 | number & 7);
    bytes.extend(&address.to_le_bytes()[..bits as usize / 8]);
    bytes
}

/// A jump over one instruction.
fn branch(random: &mut Random, bits: u32) -> Vec<u8> {
    let body = instruction(random, bits);
    let mut bytes = vec![0x70 | random.below(16) as u8, body.len() as u8];
    bytes.extend(body);
    bytes
}

/// `stos`, `movs` or `lods` between two places, sometimes downwards.
fn string(random: &mut Random, bits: u32) -> Vec<u8> {
    let down = random.below(6) == 0;
    let mut bytes = Vec::new();
    for opcode in [0xbe, 0xbf] {
        // mov esi/edi, address
        bytes.push(opcode);
        bytes.extend((DATA as u32 + random.below(0x4000) as u32).to_le_bytes());
    }
    bytes.push(0xb9); // mov ecx, count
    bytes.extend((random.below(300) as u32).to_le_bytes());
    bytes.extend(down.then_some(0xfd));
    bytes.extend((random.below(3) != 0).then_some(0xf3));
    let sizes: &[&[u8]] = &[&[], &[0x66], &[0x48]];
    bytes.extend(random.pick(&sizes[..if bits == 64 { 3 } else { 2 }]));
    bytes.push(random.pick(&[0xa4, 0xa5, 0xaa, 0xab, 0xac, 0xad]));
    bytes.extend(down.then_some(0xfc));
    bytes
}

/// Accesses off one base register, which moves now and then, as a function does with its frame.
fn cluster(random: &mut Random, bits: u32) -> Vec<u8> {
    let wide = bits == 64;
    let base = random.pick(&[0u8, 3, 4, 5, 7, 10, 12, 13, 15][..if wide { 9 } else { 5 }]);
    let page = DATA + 0x1000 * (1 + random.below(2));
    let address = page - random.pick(&[0, 0x40, 0x800]) + random.below(0x80);
    let mut code = move_address(base, address, bits);
    for _ in 0..random.below(8) + 2 {
        let piece = match random.below(8) {
            0 => {
                let rex = wide.then_some(0x48 | base >> 3);
                let add = [0x83, random.pick(&[0xc0, 0xe8]) | base & 7, random.next() as u8]; // or sub
                rex.into_iter().chain(add).collect()
            }
            1 => vec![0x50 | random.below(8) as u8],   // push
            2 => vec![0x58 | random.pick(&[1, 2, 6])], // pop
            _ => field(random, base, wide),
        };
        if random.below(6) == 0 {
            code.extend([0x70 | random.below(16) as u8, piece.len() as u8]);
        }
        code.extend(piece);
    }
    code
}

/// An access at a short distance from `base`.
fn field(random: &mut Random, base: u8, wide: bool) -> Vec<u8> {
    let mut code = Vec::new();
    let opcode: &[u8] = random.pick(&[
        &[0x8b][..],
        &[0x89],
        &[0x03],
        &[0x01],
        &[0x11],
        &[0x39],
        &[0x88],
        &[0xff],
        &[0x0f, 0xb6],
        &[0x0f, 0x10],
        &[0x0f, 0x11],
        &[0x0f, 0x28],
    ]);
    let (reg, indexed) = (random.pick(&[1u8, 2, 6, 8, 10, 14]), random.below(4) == 0);
    let reg = if wide { reg } else { reg & 7 };
    // inc, dec, push
    let reg = if opcode == [0xff] { reg & 8 | random.pick(&[0, 1, 6]) } else { reg };
    let rex = 0x40 | (random.below(2) as u8) << 3 | reg >> 3 << 2 | base >> 3;
    code.extend(wide.then_some(rex));
    code.extend(opcode);
    let sib = if indexed { 1 << 3 | base & 7 } else { 0x20 | base & 7 }; // RCX or no index
    code.extend([0x44 | (reg & 7) << 3, sib, random.next() as u8 & !7]);
    code
}

/// A call over something, or jumps and returns to known places. It will stand at `at`.
fn flow(random: &mut Random, at: u64, bits: u32) -> Vec<u8> {
    let body = instruction(random, bits);
    let over = |length: usize| [0xeb, length as u8]; // jmp
    let mut code = Vec::new();
    match random.below(6) {
        4 => {
            // mov ecx, n; l: adc eax, x; pushf; pop edx; loop l
            code.extend([0xb9, random.below(6) as u8 + 1, 0, 0, 0]);
            let body = [0x83, 0xd0, random.next() as u8 & 0x7f, 0x9c, 0x5a];
            code.extend(body);
            code.extend([0xe2, (body.len() as u8 + 2).wrapping_neg()]);
        }
        5 => {
            // jecxz over the body
            code.extend([0xe3, body.len() as u8]);
            code.extend(body);
        }
        0 => {
            // call f; jmp end; f: push ecx; pop edx; ret; end:
            code.extend([0xe8, 2, 0, 0, 0]);
            code.extend(over(3));
            code.extend([0x51, 0x5a, 0xc3]);
        }
        1 => {
            // push end; ret 0
            let end = at + 5 + 3 + body.len() as u64;
            code.push(0x68);
            code.extend((end as u32).to_le_bytes());
            code.extend([0xc2, 0, 0]);
            code.extend(body);
        }
        2 => {
            // mov esi, end; jmp esi
            let end = at + 5 + 2 + body.len() as u64;
            code.push(0xbe);
            code.extend((end as u32).to_le_bytes());
            code.extend([0xff, 0xe6]);
            code.extend(body);
        }
        _ => {
            // mov edi, f; call edi; jmp end; f: push ebp; mov ebp, esp; push eax; leave; ret; end:
            let f = at + 5 + 2 + 2;
            code.push(0xbf);
            code.extend((f as u32).to_le_bytes());
            code.extend([0xff, 0xd7]);
            code.extend(over(6));
            code.extend([0x55, 0x89, 0xe5, 0x50, 0xc9, 0xc3]);
        }
    }
    // Whoever writes there should not write code.
    for number in [6, 7] {
        code.extend(move_address(number, DATA + 0xff8, bits));
    }
    code
}

/// An x87 or MMX instruction. Those that show the operand's address are not there: it is not kept.
fn x87(random: &mut Random, bits: u32) -> Vec<u8> {
    use Mnemonic::*;
    loop {
        let mut bytes = Vec::new();
        bytes.extend((bits == 64 && random.below(3) == 0).then_some(0x40 | random.below(16) as u8));
        match random.below(4) {
            0 => bytes.extend([0x0f, random.next() as u8]),
            _ => bytes.push(0xd8 | random.below(8) as u8),
        }
        bytes.extend((0..8).map(|_| random.next() as u8));
        let ins = Decoder::new(bits, &bytes, DecoderOptions::NONE).decode();
        let mmx =
            (0..ins.op_count()).any(|n| ins.op_kind(n) == OpKind::Register && ins.op_register(n).is_mm());
        let known = mmx || is_x87(&ins) || matches!(ins.mnemonic(), Wait | Emms);
        let shows = matches!(ins.mnemonic(), Fnstenv | Fnsave);
        // Few instructions run natively behind one that unmasks exceptions.
        let rare = matches!(ins.mnemonic(), Fldcw | Fldenv | Frstor) && random.below(16) != 0;
        if !ins.is_invalid() && known && !shows && !rare {
            return bytes[..ins.len()].to_vec();
        }
    }
}

/// A computation on the x87 unit, with its control word changed and put back as compilers do.
fn floats(random: &mut Random, bits: u32) -> Vec<u8> {
    let number = random.pick(&[3, 5, 6, 7]);
    let address = DATA + 0x1000 * random.below(3) + random.pick(&[0x100, 0xfd0, 0xff8]) + random.below(8);
    let mut code = move_address(number, address, bits);
    let field = |random: &mut Random, opcode: u8, reg: u8| {
        [opcode, 0x40 | reg << 3 | number, random.next() as u8 & 0x1c]
    };
    code.extend([0x66, 0xc7, 0x40 | number, 2]); // mov word [address + 2], 0x?7f
    code.extend([0x7f, random.pick(&[2, 3, 0xc, 0xf])]);
    for _ in 0..random.below(10) + 2 {
        match random.below(8) {
            0 => code.extend([0xd9, 0x78 | number, 0]), // fnstcw [address]
            1 => code.extend([0xd9, 0x68 | number, 2]), // fldcw
            2 => code.extend([0xdf, 0xe0]),             // fnstsw ax
            3 => {
                let opcode = random.pick(&[0xd9, 0xdd, 0xdb, 0xdf]);
                let reg = random.pick(&[0, 2, 3]);
                code.extend(field(random, opcode, reg)); // load, store
            }
            4 => {
                let opcode = random.pick(&[0xd8, 0xdc, 0xda, 0xde]);
                let reg = random.below(8) as u8;
                code.extend(field(random, opcode, reg)); // compute
            }
            _ => code.extend(x87(random, bits)),
        }
    }
    code
}

fn code(random: &mut Random, bits: u32) -> Vec<u8> {
    let mut code = Vec::new();
    for _ in 0..random.below(24) + 1 {
        let at = CODE + code.len() as u64;
        code.extend(match random.below(16) {
            13 => x87(random, bits),
            14 | 15 => floats(random, bits),
            0 | 1 => pointer(random, bits),
            8 => string(random, bits),
            9..=11 => cluster(random, bits),
            12 => flow(random, at, bits),
            2 => branch(random, bits),
            _ => instruction(random, bits),
        });
    }
    code.extend([0x0f, 0x0b]);
    code
}

fn listing(code: &[u8], bits: u32) -> String {
    use iced_x86::{Formatter, IntelFormatter};
    let mut formatter = IntelFormatter::new();
    let mut text = String::new();
    for ins in Decoder::with_ip(bits, code, CODE, DecoderOptions::NONE).iter() {
        let mut line = String::new();
        formatter.format(&ins, &mut line);
        text += &format!("{:x}: {line}\n", ins.ip());
    }
    text
}

struct Show<'a>(u64, &'a [u8], u32);

impl Drop for Show<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {:#x}:\n{}", self.0, listing(self.1, self.2));
        }
    }
}

/// Both guests' registers, and the bases of FS and GS.
fn fill(random: &mut Random, pair: &mut Pair) {
    for number in (0..16).filter(|&n| n != reg::RSP) {
        let value = match random.below(3) {
            0 => DATA + random.below(0x4000),
            1 => random.below(256),
            _ => random.next(),
        };
        pair.set(number, value);
    }
    for number in 0..16 {
        let value = std::array::from_fn(|_| match random.below(3) {
            0 => random.next(),
            1 => f64::to_bits(random.below(1000) as f64 / 7.0),
            _ => random.below(3),
        });
        pair.oracle.cpu.fpu.ymm[number] = value;
        pair.cpu.fpu.ymm[number] = value;
    }
    let control = random.pick(&[0x37f, 0x37f, 0x27f, 0x7f, 0xf7f, 0x37e]);
    let (status, tags) = (random.next() as u16 & 0x7f7f, random.next() as u8);
    for unit in [&mut pair.oracle.cpu.fpu, &mut pair.cpu.fpu] {
        (unit.x87.fcw, unit.x87.fsw, unit.x87.ftw) = (control, status, tags);
        unit.x87.summarize();
        unit.pointers = Pointers::default();
    }
    for number in 0..8 {
        let exponent = 0x3fff - 40 + random.below(80);
        let value = match random.below(6) {
            0 => [random.next(), random.next() & 0xffff],
            1 => [random.pick(&[0, 1 << 63, 3 << 62]), random.pick(&[0, 0x7fff, 0xffff, 0x8000])],
            _ => [random.next() | 1 << 63, exponent],
        };
        pair.oracle.cpu.fpu.x87.st[number] = value;
        pair.cpu.fpu.x87.st[number] = value;
    }
    pair.set_base(seg::FS, random.pick(&[0x10, 0x2000, 0xffff_ffff_ffff_f800]));
    pair.set_base(seg::GS, random.pick(&[8, 0xffff_fffc, DATA]));
}

fn agree(bits: u8) {
    let rounds = std::env::var("ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(300);
    let first: u64 = std::env::var("SEED").ok().and_then(|r| r.parse().ok()).unwrap_or(1);
    for seed in first..first + rounds {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let code = code(&mut random, bits.into());
        let _show = Show(seed, &code, bits.into());
        let mut pair = Pair::of(bits, &code);
        let data: Vec<u8> = (0..0x8000).map(|_| random.next() as u8).collect();
        pair.poke(DATA - 0x1000, &data);
        for _ in 0..2 {
            pair.restart();
            fill(&mut random, &mut pair);
            pair.run();
        }
    }
}

#[test]
fn random_blocks_do_on_the_translator_what_they_do_on_the_interpreter() {
    agree(64);
}

#[test]
fn random_blocks_of_32_bit_code_do_as_well() {
    agree(32);
}
