//! What must be equal at the end of a case.

use iced_x86::{Code, Instruction, Mnemonic as M, OpKind};

use crate::state::*;

/// CF, PF, AF, ZF, SF, OF.
const STATUS: u64 = 0x8d5;
const DF: u64 = 0x400;
const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// The differences between what the host did and what the interpreter did.
pub fn differences(ins: &Instruction, host: &End, guest: &End) -> Vec<String> {
    let mut found = Differences { list: Vec::new() };
    let addresses = 12..=14;
    if (in_parts(ins) || pushes_a_target(ins))
        && addresses.contains(&host.vector)
        && addresses.contains(&guest.vector)
    {
        return found.list;
    }
    found.number("exception", host.vector, guest.vector);
    if host.vector != guest.vector {
        return found.list;
    }
    found.faults(host, guest, if by_page(ins) { !0xfff } else { !0 });
    found.number("rip", host.rip, guest.rip);
    for (i, name) in NAMES.into_iter().enumerate() {
        found.number(name, host.gpr[i], guest.gpr[i]);
    }
    let defined = (STATUS | DF) & !undefined_flags(ins, host);
    found.number("flags", host.rflags & defined, guest.rflags & defined);
    let stopped = host.vector == 19 && several_steps(ins);
    found.extended(&host.xsave, &guest.xsave, if stopped { !0x3f } else { !0 });
    found.memory(host, guest);
    found.list
}

/// The operand is accessed in parts, in an order of the CPU's own, and what is there already stays.
fn in_parts(ins: &Instruction) -> bool {
    let environment = matches!(ins.mnemonic(), M::Fnstenv | M::Fldenv);
    ins.is_save_restore_instruction() || environment || matches!(ins.memory_size().size(), 10 | 33..)
}

/// Intel's CPUs look at the target of a call before they push, AMD's do not.
fn pushes_a_target(ins: &Instruction) -> bool {
    ins.mnemonic() == M::Call
}

/// Whether a fault names the page only: which byte of it was touched first is the CPU's business.
fn by_page(ins: &Instruction) -> bool {
    matches!(ins.mnemonic(), M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu)
}

/// Multiplications, then additions, each with its own exceptions.
fn several_steps(ins: &Instruction) -> bool {
    matches!(ins.mnemonic(), M::Dpps | M::Dppd | M::Vdpps | M::Vdppd)
}

/// Flags that may be anything.
fn undefined_flags(ins: &Instruction, host: &End) -> u64 {
    use iced_x86::RflagsBits as R;
    let pairs = [(R::CF, 0x1), (R::PF, 0x4), (R::AF, 0x10), (R::ZF, 0x40), (R::SF, 0x80), (R::OF, 0x800)];
    let undefined: u64 =
        pairs.into_iter().filter(|(bit, _)| ins.rflags_undefined() & bit != 0).map(|(_, flag)| flag).sum();
    match host.vector {
        0 => STATUS, // a division that did not take place
        _ => undefined,
    }
}

struct Differences {
    list: Vec<String>,
}

impl Differences {
    fn number(&mut self, what: &str, host: u64, guest: u64) {
        if host != guest {
            self.list.push(format!("{what}: host {host:#x}, interpreter {guest:#x}"));
        }
    }

    fn faults(&mut self, host: &End, guest: &End, address: u64) {
        if host.vector == 14 {
            self.number("page-fault address", host.cr2 & address, guest.cr2 & address);
            // The kernel hides whether its own pages are present.
            let visible = if host.cr2 >= 0x7fff_ffff_f000 { !1 } else { !0 };
            self.number("page-fault code", host.code & visible, guest.code & visible);
        } else if host.vector != COMPLETED {
            self.number("error code", host.code, guest.code);
        }
    }

    fn extended(&mut self, host: &[u8; XSAVE], guest: &[u8; XSAVE], mxcsr_bits: u32) {
        let host = &normalized(host);
        for (what, at) in [("fcw", at::FCW), ("fsw", at::FSW)] {
            self.number(what, get16(host, at).into(), get16(guest, at).into());
        }
        self.number("ftw", host[at::FTW].into(), guest[at::FTW].into());
        // With an overflow or underflow to be reported, whether the result is inexact is asked of the
        // result with an unbounded exponent, which masked execution does not tell.
        let [mxcsr, other] = [host, guest].map(|area| get32(area, at::MXCSR));
        let scaled = mxcsr & !(mxcsr >> 7) & 0b11000 != 0;
        let compared = mxcsr_bits & if scaled { !(1 << 5) } else { !0 };
        self.number("mxcsr", (mxcsr & compared).into(), (other & compared).into());
        // AMD's CPUs show the last instruction only while its exception is pending.
        if get16(host, at::FSW) >> 7 & 1 != 0 {
            self.number("fop", get16(host, at::FOP).into(), get16(guest, at::FOP).into());
            for (what, at) in [("fip", at::FIP), ("fdp", at::FDP)] {
                // How many bits an address has is the CPU's.
                self.number(what, get64(host, at) << 16, get64(guest, at) << 16);
            }
        }
        for i in 0..8 {
            let at = at::ST + 16 * i;
            let register = |area: &[u8]| (get16(area, at + 8), get64(area, at));
            if register(host) != register(guest) {
                self.list.push(format!(
                    "st{i}: host {:x?}, interpreter {:x?}",
                    register(host),
                    register(guest)
                ));
            }
        }
        for i in 0..16 {
            for (what, at) in [("xmm", at::XMM + 16 * i), ("ymm (upper half)", at::YMM + 16 * i)] {
                let half = |area: &[u8]| u128::from(get64(area, at + 8)) << 64 | u128::from(get64(area, at));
                if half(host) != half(guest) {
                    self.list.push(format!(
                        "{what} {i}: host {:#034x}, interpreter {:#034x}",
                        half(host),
                        half(guest)
                    ));
                }
            }
        }
    }

    fn memory(&mut self, host: &End, guest: &End) {
        let differs = |i: &usize| host.memory[*i] != guest.memory[*i];
        if let Some(first) = (0..WRITABLE).find(differs) {
            let last = (0..WRITABLE).rev().find(differs).unwrap_or(first);
            let show = |end: &End| format!("{:x?}", &end.memory[first..=last.min(first + 31)]);
            self.list.push(format!(
                "memory {:#x}..={:#x}: host {}, interpreter {}",
                AREA + first as u64,
                AREA + last as u64,
                show(host),
                show(guest)
            ));
        }
    }
}

/// The area with components that it leaves out in their initial configuration.
fn normalized(area: &[u8; XSAVE]) -> [u8; XSAVE] {
    let mut area = *area;
    if area[at::HEADER] & 1 == 0 {
        area[..at::MXCSR].fill(0);
        area[at::ST..at::XMM].fill(0);
        put(&mut area, at::FCW, 0x37fu16.to_le_bytes());
    }
    if area[at::HEADER] & 2 == 0 {
        area[at::XMM..at::XMM + 256].fill(0);
    }
    if area[at::HEADER] & 4 == 0 {
        area[at::YMM..at::YMM + 256].fill(0);
    }
    area
}

/// Whether the manuals say what the instruction does from this start.
pub fn defined(ins: &Instruction, start: &Start) -> bool {
    match ins.mnemonic() {
        M::Bswap => ins.op0_register().size() > 2,
        // Shifts by more than the operand's size.
        M::Shld | M::Shrd if matches!(ins.code(), Code::Shld_rm16_r16_CL | Code::Shrd_rm16_r16_CL) => {
            start.gpr[1] & 31 <= 16
        }
        M::Shld | M::Shrd if matches!(ins.code(), Code::Shld_rm16_r16_imm8 | Code::Shrd_rm16_r16_imm8) => {
            ins.immediate8() & 31 <= 16
        }
        // Repeat prefixes mean something to AMD's loops; Intel has registers in prefetches.
        M::Loop | M::Loope | M::Loopne => !ins.has_rep_prefix() && !ins.has_repne_prefix(),
        // With REX.B it is an exchange of RAX with R8 for some CPUs.
        M::Pause => start.code[..start.len as usize].iter().all(|byte| byte & 0xf1 != 0x41),
        // Intel's CPUs read a word here, AMD's a doubleword.
        M::Movsxd => ins.code() != Code::Movsxd_r16_rm16,
        M::Reservednop | M::Prefetch => ins.op0_kind() == OpKind::Memory,
        _ => true,
    }
}
