//! What must be equal at the end of a case.

use iced_x86::{Instruction, Mnemonic as M};

use crate::state::*;

/// CF, PF, AF, ZF, SF, OF.
const STATUS: u64 = 0x8d5;
const DF: u64 = 0x400;
const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// The differences between what the host did and what the interpreter did.
pub fn differences(ins: &Instruction, start: &Start, host: &End, guest: &End) -> Vec<String> {
    let mut found = Differences { list: Vec::new() };
    found.number("exception", host.vector, guest.vector);
    if host.vector != guest.vector {
        return found.list;
    }
    found.faults(host, guest);
    found.number("rip", host.rip, guest.rip);
    for (i, name) in NAMES.into_iter().enumerate() {
        found.number(name, host.gpr[i], guest.gpr[i]);
    }
    let defined = (STATUS | DF) & !undefined_flags(ins, start, host);
    found.number("flags", host.rflags & defined, guest.rflags & defined);
    found.extended(&host.xsave, &guest.xsave);
    found.memory(host, guest);
    found.list
}

/// Flags that may be anything.
fn undefined_flags(ins: &Instruction, _start: &Start, host: &End) -> u64 {
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

    fn faults(&mut self, host: &End, guest: &End) {
        if host.vector == 14 {
            self.number("page-fault address", host.cr2, guest.cr2);
            // The kernel hides whether its own pages are present.
            let visible = if host.cr2 >> 47 != 0 { !1 } else { !0 };
            self.number("page-fault code", host.code & visible, guest.code & visible);
        } else if host.vector != COMPLETED {
            self.number("error code", host.code, guest.code);
        }
    }

    fn extended(&mut self, host: &[u8; XSAVE], guest: &[u8; XSAVE]) {
        let host = &normalized(host);
        for (what, at) in [("fcw", at::FCW), ("fsw", at::FSW), ("fop", at::FOP)] {
            self.number(what, get16(host, at).into(), get16(guest, at).into());
        }
        self.number("ftw", host[at::FTW].into(), guest[at::FTW].into());
        self.number("mxcsr", get32(host, at::MXCSR).into(), get32(guest, at::MXCSR).into());
        for (what, at) in [("fip", at::FIP), ("fdp", at::FDP)] {
            self.number(what, get64(host, at), get64(guest, at));
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

/// Instructions whose results the manuals leave open, with what they leave open in mind.
pub fn comparable(ins: &Instruction) -> bool {
    // BSWAP of a 16-bit register is undefined.
    !(ins.mnemonic() == M::Bswap && ins.op0_register().size() == 2)
}
