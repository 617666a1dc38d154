//! Compares integer instructions with the CPU that the tests run on: results and all flags, the
//! undefined ones included where the interpreter means to do as this CPU's vendor does.

#![allow(unsafe_code)] // runs generated code

use engine::x86::bits::rflags::{AF, CF, OF, PF, SF, STATUS, ZF};

use crate::x86::op::{RIP, reg};
use crate::x86::testing::{CODE, Guest};

/// RAX, RCX, RDX, RBX, RFLAGS.
type State = [u64; 5];

/// An executable page.
struct Page(*mut u8);

impl Page {
    fn new() -> Page {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        let rights = ProtFlags::READ | ProtFlags::WRITE | ProtFlags::EXEC;
        // SAFETY: a new mapping, wherever the kernel likes it.
        Page(unsafe { mmap_anonymous(std::ptr::null_mut(), 4096, rights, MapFlags::PRIVATE) }.unwrap().cast())
    }

    /// Runs one instruction that works on RAX, RCX, RDX and RBX only.
    fn run(&self, instruction: &[u8], state: &mut State) {
        let before = [
            0x53, 0x57, 0xff, 0x77, 0x20, 0x9d, // push rbx; push rdi; push [rdi + 32]; popfq
            0x48, 0x8b, 0x07, 0x48, 0x8b, 0x4f, 0x08, 0x48, 0x8b, 0x57, 0x10, 0x48, 0x8b, 0x5f, 0x18,
        ];
        let behind = [
            0x9c, 0x8f, 0x47, 0x20, // pushfq; pop [rdi + 32]
            0x48, 0x89, 0x07, 0x48, 0x89, 0x4f, 0x08, 0x48, 0x89, 0x57, 0x10, 0x48, 0x89, 0x5f, 0x18, //
            0x5f, 0x5b, 0xc3, // pop rdi; pop rbx; ret
        ];
        let code = [&before[..], instruction, &behind].concat();
        // SAFETY: the page is larger than the code, which keeps to the C calling convention.
        unsafe {
            self.0.copy_from_nonoverlapping(code.as_ptr(), code.len());
            let run: extern "C" fn(*mut State) = std::mem::transmute(self.0);
            run(state);
        }
    }
}

/// Xorshift.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number of the kind that finds mistakes.
    fn operand(&mut self) -> u64 {
        const EDGES: [u64; 12] =
            [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fff_ffff, 0x8000_0000, 1 << 63, u64::MAX];
        match self.next() % 4 {
            0 => EDGES[self.next() as usize % EDGES.len()],
            1 => self.next() & 0xff,
            _ => self.next(),
        }
    }
}

struct Bench {
    page: Page,
    guest: Guest,
    random: Random,
}

impl Bench {
    fn new() -> Bench {
        Bench { page: Page::new(), guest: Guest::new(64, &[]), random: Random(0x1234_5678_9abc_def1) }
    }

    /// Compares an instruction on random states, all but the flags in `ignore`.
    fn check(&mut self, name: &str, code: &[u8], ignore: u64, prepare: impl Fn(&mut State)) {
        self.guest.poke(CODE, &[code, &[0x90; 15]].concat());
        self.guest.forget_code();
        for _ in 0..60 {
            let mut state: State = std::array::from_fn(|_| self.random.operand());
            state[4] = state[4] & STATUS | 0x202;
            prepare(&mut state);
            let (start, mut host) = (state, state);
            self.page.run(code, &mut host);
            let cpu = &mut self.guest.cpu;
            cpu.regs[..4].copy_from_slice(&state[..4]);
            (cpu.rflags, cpu.regs[usize::from(RIP)]) = (state[4], CODE);
            assert_eq!(self.guest.step(), Ok(()), "{name} {code:02x?} of {start:x?}");
            let cpu = &self.guest.cpu;
            assert_eq!(cpu.rip(), CODE + code.len() as u64, "{name} {code:02x?}");
            state[..4].copy_from_slice(&cpu.regs[..4]);
            state[4] = cpu.rflags;
            let differ = (state[4] ^ host[4]) & STATUS;
            let mask = !(STATUS & ignore);
            let same = state[..4] == host[..4] && differ & mask == 0;
            assert!(
                same,
                "{name} {code:02x?} of {start:x?}: {state:x?}, the host {host:x?}, flags differ by {differ:#x}"
            );
        }
    }

    /// An instruction without a prefix, with an operand size prefix, with REX.W.
    fn check_sizes(&mut self, name: &str, code: &[u8], ignore: u64) {
        self.check(name, code, ignore, |_| {});
        self.check(name, &[&[0x66], code].concat(), ignore, |_| {});
        self.check(name, &[&[0x48], code].concat(), ignore, |_| {});
    }
}

/// ModRM: `rax, rbx`.
const AB: u8 = 0xd8;
/// ModRM: `ah, bl`.
const HB: u8 = 0xdc;
/// Flags that are not compared, where all are defined.
const NONE: u64 = 0;

/// Flags that the manuals leave undefined, but for those in which the interpreter does as AMD's CPUs.
fn undefined(flags: u64, as_amd: u64) -> u64 {
    let vendor = std::arch::x86_64::__cpuid(0).ebx.to_le_bytes();
    if vendor == *b"Auth" { flags & !as_amd } else { flags }
}

#[test]
fn arithmetic_does_as_the_host() {
    let mut bench = Bench::new();
    for op in 0..8u8 {
        bench.check_sizes("alu", &[op << 3 | 1, AB], NONE);
        bench.check_sizes("alu imm", &[0x83, 0xc0 | op << 3, 0x85], NONE);
        for modrm in [AB, HB] {
            bench.check("alu byte", &[op << 3, modrm], NONE, |_| {});
        }
    }
    for (group, name) in [(0xd0u8, "not"), (0xd8, "neg")] {
        bench.check_sizes(name, &[0xf7, group], NONE);
        bench.check(name, &[0xf6, group], NONE, |_| {});
    }
    for group in [0xc0u8, 0xc8] {
        bench.check_sizes("inc dec", &[0xff, group], NONE);
        bench.check("inc dec", &[0xfe, group], NONE, |_| {});
    }
    for opcode in [0xc0u8, 0xb0] {
        bench.check("xadd cmpxchg", &[0x0f, opcode, AB], NONE, |_| {});
        bench.check_sizes("xadd cmpxchg", &[0x0f, opcode | 1, AB], NONE);
        bench.check("cmpxchg equal", &[0x0f, opcode | 1, 0xd9], NONE, |s| s[1] = s[0]);
    }
    bench.check("adcx", &[0x66, 0x0f, 0x38, 0xf6, 0xc3], NONE, |_| {});
    bench.check("adox", &[0xf3, 0x48, 0x0f, 0x38, 0xf6, 0xc3], NONE, |_| {});
    bench.check("test", &[0x84, AB], NONE, |_| {});
    bench.check_sizes("test", &[0x85, AB], NONE);
}

#[test]
fn moves_do_as_the_host() {
    let mut bench = Bench::new();
    for opcode in [0xb6u8, 0xb7, 0xbe, 0xbf] {
        bench.check_sizes("movzx movsx", &[0x0f, opcode, 0xc3], NONE);
    }
    for code in [[0x63, 0xc3], [0x87, 0xc3], [0x0f, 0xcb]] {
        bench.check_sizes("movsxd xchg bswap", &code, NONE);
    }
    for code in [0x98u8, 0x99, 0x93] {
        bench.check_sizes("cwde cdq xchg", &[code], NONE);
    }
    for condition in 0..16u8 {
        bench.check_sizes("cmov", &[0x0f, 0x40 | condition, 0xc3], NONE);
        bench.check("setcc", &[0x0f, 0x90 | condition, 0xc4], NONE, |_| {});
    }
    bench.check_sizes("lea", &[0x8d, 0x44, 0x8b, 0x80], NONE);
    bench.check("lea", &[0x67, 0x48, 0x8d, 0x44, 0x8b, 0x80], NONE, |_| {});
}

#[test]
fn shifts_do_as_the_host() {
    let mut bench = Bench::new();
    let ignore = undefined(AF | OF, OF);
    for group in 0..8u8 {
        let modrm = 0xc0 | group << 3;
        bench.check("shift byte by cl", &[0xd2, modrm], ignore, |_| {});
        bench.check_sizes("shift by cl", &[0xd3, modrm], ignore);
        bench.check_sizes("shift by 1", &[0xd1, modrm], AF);
        for count in [0, 1, 7, 8, 9, 15, 16, 17, 18, 31, 32, 33, 63] {
            bench.check("shift byte", &[0xc0, modrm, count], ignore, |_| {});
            bench.check_sizes("shift", &[0xc1, modrm, count], ignore);
        }
    }
    for opcode in [0xa4u8, 0xac] {
        bench.check("double by cl", &[0x0f, opcode | 1, AB], ignore, |_| {});
        bench.check("double by cl", &[0x48, 0x0f, opcode | 1, AB], ignore, |_| {});
        for count in [0, 1, 7, 15, 32, 33, 47] {
            bench.check_sizes("double", &[0x0f, opcode, AB, count], ignore);
        }
    }
    for w in [0, 0x80] {
        for pp in [1, 2, 3] {
            bench.check("shlx sarx shrx", &[0xc4, 0xe2, w | 0x70 | pp, 0xf7, 0xc3], NONE, |_| {});
        }
        bench.check("rorx", &[0xc4, 0xe3, w | 0x7b, 0xf0, 0xc3, 13], NONE, |_| {});
    }
}

#[test]
fn products_and_quotients_do_as_the_host() {
    let mut bench = Bench::new();
    let ignore = undefined(SF | ZF | AF | PF, STATUS);
    for modrm in [0xe3u8, 0xeb] {
        bench.check("mul", &[0xf6, modrm], ignore, |_| {});
        bench.check_sizes("mul", &[0xf7, modrm], ignore);
    }
    bench.check_sizes("imul", &[0x0f, 0xaf, 0xc3], ignore);
    bench.check_sizes("imul", &[0x6b, 0xc3, 0xf9], ignore);
    for w in [0, 0x80] {
        bench.check("mulx", &[0xc4, 0xe2, w | 0x73, 0xf6, 0xc3], NONE, |_| {});
        bench.check("mulx same", &[0xc4, 0xe2, w | 0x7b, 0xf6, 0xc3], NONE, |_| {});
    }
    for modrm in [0xf3u8, 0xfb] {
        bench.check("div", &[0xf6, modrm], STATUS, |s| (s[0], s[3]) = (s[0] & 0x7f, s[3] | 1));
        for prefix in [&[][..], &[0x66], &[0x48]] {
            let (code, top) = ([prefix, &[0xf7, modrm]].concat(), [1 << 31, 1 << 15, 1 << 63]);
            let top = if prefix.is_empty() { top[0] } else { top[1 + usize::from(prefix[0] == 0x48)] };
            bench.check("div", &code, STATUS, |s| (s[0], s[2], s[3]) = (s[0] & !top, 0, s[3] | 1));
        }
    }
    bench.check("div wide", &[0x48, 0xf7, 0xf3], STATUS, |s| (s[2], s[3]) = (s[2] >> 1, s[3] | 1 << 63));
    bench.check("idiv wide", &[0x48, 0xf7, 0xfb], STATUS, |s| {
        s[2] = (s[2] as i64 >> 4) as u64;
        s[3] = s[3] & !(1 << 63) | 1 << 62;
    });
}

#[test]
fn bits_do_as_the_host() {
    let mut bench = Bench::new();
    let of_test = undefined(OF | SF | AF | PF, STATUS);
    let of_scan = undefined(STATUS & !ZF, STATUS);
    let of_count = undefined(OF | SF | AF | PF, NONE);
    let of_mask = undefined(AF | PF, PF);
    for opcode in [0xa3u8, 0xab, 0xb3, 0xbb] {
        bench.check_sizes("bt", &[0x0f, opcode, AB], of_test);
    }
    for group in 4..8u8 {
        bench.check_sizes("bt imm", &[0x0f, 0xba, 0xc0 | group << 3, 77], of_test);
    }
    for opcode in [0xbcu8, 0xbd, 0xb8] {
        if opcode != 0xb8 {
            bench.check_sizes("bsf bsr", &[0x0f, opcode, 0xc3], of_scan);
        }
        for code in [&[0xf3, 0x0f][..], &[0x66, 0xf3, 0x0f], &[0xf3, 0x48, 0x0f]] {
            let ignore = if opcode == 0xb8 { NONE } else { of_count };
            bench.check("counts", &[code, &[opcode, 0xc3]].concat(), ignore, |_| {});
        }
    }
    for w in [0, 0x80] {
        for (vvvv_pp, opcode, modrm) in
            [(0x60, 0xf2, 0xc1), (0x78, 0xf3, 0xcb), (0x78, 0xf3, 0xd3), (0x78, 0xf3, 0xdb)]
        {
            bench.check("bmi", &[0xc4, 0xe2, w | vvvv_pp, opcode, modrm], of_mask, |_| {});
        }
        bench.check("bextr", &[0xc4, 0xe2, w | 0x70, 0xf7, 0xc3], SF | AF | PF, |_| {});
        for pp in [0, 2, 3] {
            bench.check("bzhi pext pdep", &[0xc4, 0xe2, w | 0x60 | pp, 0xf5, 0xc1], of_mask, |_| {});
        }
        let rex = 0x48 | w >> 4;
        bench.check("crc32", &[0xf2, rex, 0x0f, 0x38, 0xf1, 0xc3], NONE, |_| {});
    }
    bench.check("crc32", &[0xf2, 0x0f, 0x38, 0xf0, 0xc3], NONE, |_| {});
    bench.check("crc32", &[0xf2, 0x0f, 0x38, 0xf1, 0xc3], NONE, |_| {});
    bench.check("crc32", &[0x66, 0xf2, 0x0f, 0x38, 0xf1, 0xc3], NONE, |_| {});
}

#[test]
fn single_flags_do_as_the_host() {
    let mut bench = Bench::new();
    for opcode in [0xf8u8, 0xf9, 0xf5, 0x9e, 0x9f] {
        bench.check("clc stc cmc sahf lahf", &[opcode], NONE, |_| {});
    }
    assert_eq!(usize::from(reg::RBX), 3, "the order of State");
    assert_eq!(CF | PF | AF | ZF | SF | OF, STATUS);
}
