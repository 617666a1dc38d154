//! Which pages of code the host's CPU must not run for the guest.
//!
//! Instructions that show user programs something of the CPU which the guest's system, or this engine,
//! has otherwise: they would show them the host's. The page is looked through for their bytes, and where
//! these are, whether an instruction begins there. That is a guess, since code says nowhere where its
//! instructions begin, but a good one: decoding that began at a wrong byte is back in step after a few
//! instructions. A program that hides such an instruction learns what kind of CPU the host has: the same as from
//! how fast it is. Looking at every byte would not keep that from it, since it can write the instruction once
//! the page has been looked at; and of the pages of code of bash, Python, gcc's cc1 and Node.js it would make
//! 0.4 to 1.6 % foreign (3 of 193, 3 of 691, 22 of 5060, 63 of 6799; as it is, 0, 0, 2 and 19), each of which
//! puts the program out of its jail for some time whenever it comes by. Time-stamp counters are not among them:
//! the host's CPU is told to refuse those, and `CPUID`, where it can.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use iced_x86::{Decoder, DecoderOptions, Instruction};

use super::super::decode::MAX_LEN;

/// Bytes in front of an instruction from each of which decoding begins.
pub const BEFORE: usize = 192;
/// Bytes behind the page that may make its last one such an instruction.
pub const AFTER: usize = 2;
/// The nearest of them have no say: they may not be in step yet.
const NEAR: usize = 128;

/// Verdicts that are remembered, each at the place that its page's address tells.
const REMEMBERED: usize = 1 << 13;

/// How far the host's CPU differs from the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Differences {
    /// The host's programs have more state (XCR0): `XSAVE` writes more, and `XRSTOR` accepts more.
    pub state: bool,
    /// `CPUID` shows the host's CPU.
    pub cpuid: bool,
}

/// What was found in pages. The same pages come again with each program that uses them.
#[derive(Default)]
pub struct Verdicts {
    /// A hash of what was looked through, and whether it is harmless.
    known: Vec<(u64, bool)>,
    hash: RandomState,
}

impl Verdicts {
    /// [`harmless`], for the page at guest-physical address `gpa`.
    pub fn harmless(&mut self, gpa: u64, code: [&[u8]; 3], host: Differences) -> bool {
        let [before, page, after] = code;
        let hash = self.hash.hash_one((code, host));
        self.known.resize(REMEMBERED, (0, false));
        let place = &mut self.known[(gpa / mem::PAGE_SIZE) as usize % REMEMBERED];
        if place.0 != hash {
            *place = (hash, harmless(before, page, after, host));
        }
        place.1
    }
}

/// Whether a page has no such instruction. `before` and `after` are as much as is known of what is around
/// it, up to [`BEFORE`] bytes and [`AFTER`].
fn harmless(before: &[u8], page: &[u8], after: &[u8], host: Differences) -> bool {
    let code = [before, page, after].concat();
    let mut page = before.len()..before.len() + page.len();
    !page.any(|at| code[at] == 0x0f && differs(&code[at + 1..], host) && begins(&code, at))
}

/// Bytes behind `0F`, as far as they are known (SDM 2, appendix A; AMD APM 3, appendix A).
fn differs(rest: &[u8], host: Differences) -> bool {
    let Some(&second) = rest.first() else { return true };
    let third = rest.get(1).copied().unwrap_or(0);
    let (register, memory) = (third >> 3 & 7, third < 0xc0);
    match second {
        0x00 => matches!(register, 0 | 1 | 4 | 5), // SLDT, STR, VERR, VERW
        0x01 if memory => matches!(register, 0 | 1 | 4), // SGDT, SIDT, SMSW
        0x01 => register == 4 || matches!(third, 0xd0 | 0xfd), // SMSW, XGETBV, RDPRU
        0x02 | 0x03 => true,                       // LAR, LSL
        0x34 => true,                              // SYSENTER
        0xa2 => host.cpuid,                        // CPUID
        0xae => host.state && memory && matches!(register, 4..=6), // XSAVE, XRSTOR, XSAVEOPT
        0xc7 if memory => host.state && register == 4, // XSAVEC
        0xc7 => third >= 0xf8,                     // RDPID, RDSEED
        _ => false,
    }
}

/// Whether an instruction seems to begin at `at`, or to have its prefixes in front of it.
fn begins(page: &[u8], at: usize) -> bool {
    let from = at.saturating_sub(BEFORE);
    if at == from {
        return true;
    }
    // Whether the instructions from a byte on meet `at`, known for the bytes behind that one.
    let mut meets = [false; BEFORE + 1];
    meets[at - from] = true;
    for start in (from..at).rev() {
        let next = start + length(&page[start..page.len().min(at + MAX_LEN)]);
        meets[start - from] = if next > at { is_prefixed(&page[start..=at]) } else { meets[next - from] };
    }
    let voters = &meets[..(at - from).saturating_sub(NEAR).max((at - from) / 2).max(1)];
    2 * voters.iter().filter(|meets| **meets).count() >= voters.len()
}

fn length(bytes: &[u8]) -> usize {
    let mut instruction = Instruction::default();
    Decoder::new(64, bytes, DecoderOptions::NONE).decode_out(&mut instruction);
    if instruction.is_invalid() { 1 } else { instruction.len() }
}

/// Whether all in front of the last byte are prefixes.
fn is_prefixed(bytes: &[u8]) -> bool {
    let prefix = |byte: &u8| {
        matches!(byte, 0x40..=0x4f | 0x66 | 0x67 | 0xf2 | 0xf3 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65)
    };
    bytes[..bytes.len() - 1].iter().all(prefix)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAME: Differences = Differences { state: false, cpuid: true };

    #[test]
    fn a_verdict_is_of_what_the_page_and_its_neighbours_are_now() {
        const HERE: u64 = 0x5000;
        let (mut verdicts, nops) = (Verdicts::default(), [0x90; 4096]);
        let with = |at: usize, code: &[u8]| {
            let mut page = nops;
            page[at..at + code.len()].copy_from_slice(code);
            page
        };
        let (cpuid, cut) = (with(77, &[0x0f, 0xa2]), with(4095, &[0x0f]));
        let mut ask = |gpa, page, after| verdicts.harmless(gpa, [&[], page, after], SAME);
        for _ in 0..2 {
            assert!(ask(HERE, &nops, &[]) && !ask(HERE, &cpuid, &[]));
            assert!(!ask(HERE, &cut, &[0xa2]) && ask(HERE, &cut, &[0x1f]));
            assert!(ask(HERE + REMEMBERED as u64 * mem::PAGE_SIZE, &nops, &[]));
        }
    }

    /// A page of `mov rax, [rdi + 8]` with something in it.
    fn with(code: &[u8], at: usize) -> bool {
        let mut page = [0x48, 0x8b, 0x47, 0x08].repeat(1024);
        page[at..at + code.len()].copy_from_slice(code);
        harmless(&[], &page, &[], SAME)
    }

    #[test]
    fn what_shows_the_hosts_cpu_is_found_wherever_it_is() {
        let shown: [&[u8]; 10] = [
            &[0x0f, 0xa2, 0x90, 0x90],
            &[0x0f, 0x01, 0xd0, 0x90],
            &[0x0f, 0x01, 0x04, 0x24],
            &[0x0f, 0x03, 0xc0, 0x90],
            &[0xf3, 0x0f, 0xc7, 0xf8],
            &[0x0f, 0x00, 0xc0, 0x90],
            &[0x0f, 0x34, 0x90, 0x90],
            &[0x0f, 0x01, 0xe0, 0x90],
            &[0x0f, 0x01, 0xfd, 0x90],
            &[0x0f, 0x00, 0xe0, 0x90],
        ];
        for code in shown {
            for at in [0, 4, 8, 16, 2000, 4096 - code.len()] {
                assert!(!with(code, at), "{code:x?} at {at}");
            }
        }
        assert!(!with(&[0x90, 0x90, 0x90, 0x0f], 4092));
    }

    #[test]
    fn an_instruction_that_the_hosts_cpu_refuses_is_harmless() {
        let cpuid = [0x90, 0x90, 0x0f, 0xa2];
        assert!(!harmless(&[], &cpuid, &[], SAME));
        assert!(harmless(&[], &cpuid, &[], Differences { state: false, cpuid: false }));
    }

    #[test]
    fn the_end_of_an_instruction_that_began_in_the_page_before_is_none() {
        let before = [0x48, 0x8b, 0x47, 0x08].repeat(BEFORE / 4);
        let page = [0x0f, 0x02, 0x00, 0x00, 0x90]; // add eax, 0x20f
        assert!(harmless(&[&before[..], &[0x81, 0xc0]].concat(), &page, &[], SAME));
        assert!(!harmless(&before, &page, &[], SAME));
        let end = [0x90, 0x90, 0x0f];
        assert!(harmless(&before, &end, &[0x84, 0x01], SAME));
        assert!(!harmless(&before, &end, &[0xa2, 0x90], SAME));
        assert!(!harmless(&before, &end, &[], SAME), "not known");
    }

    #[test]
    fn ordinary_code_is_harmless() {
        let ordinary: [&[u8]; 8] = [
            &[0x0f, 0x05, 0x90, 0x90],                         // syscall
            &[0x0f, 0x31, 0x90, 0x90],                         // rdtsc
            &[0x48, 0x0f, 0xc7, 0x0f],                         // cmpxchg16b
            &[0x0f, 0xc7, 0x64, 0x24, 0x40, 0x90, 0x90, 0x90], // xsavec
            &[0x0f, 0x84, 1, 0, 0, 0, 0x90, 0x90],             // jz
            &[0xb8, 0x0f, 0xa2, 0, 0, 0x90, 0x90, 0x90],       // mov eax, 0xa20f
            &[0x48, 0x8d, 0x05, 0x0f, 0x03, 0, 0, 0x90],       // lea rax, [rip + 0x30f]
            &[0xe8, 0x34, 0x0f, 0x00, 0x00, 0x90, 0x90, 0x90], // call
        ];
        for code in ordinary {
            assert!(with(code, 400), "{code:x?}");
            assert!(with(code, 8), "{code:x?} at the beginning");
        }
    }

    #[test]
    fn saving_state_is_only_harmless_where_there_is_the_same() {
        let xsavec = [0x90, 0x90, 0x90, 0x0f, 0xc7, 0x64, 0x24, 0x40];
        assert!(harmless(&[], &xsavec, &[], SAME));
        assert!(!harmless(&[], &xsavec, &[], Differences { state: true, cpuid: true }));
        let xrstor = [0x90, 0x90, 0x90, 0x0f, 0xae, 0x6c, 0x24, 0x40];
        assert!(!harmless(&[], &xrstor, &[], Differences { state: true, cpuid: true }));
        let mfence = [0x90, 0x90, 0x90, 0x0f, 0xae, 0xf0];
        assert!(harmless(&[], &mfence, &[], Differences { state: true, cpuid: true }));
    }
}
