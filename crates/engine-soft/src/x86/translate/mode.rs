//! What of the CPU's mode units depend on, as a part of what they are found by.

use engine::x86::Segment;
use engine::x86::bits::{access, cr0, cr4};

use super::super::cpu::Cpu;
use super::super::op::RIP;
use super::super::tlb::View;
use super::insn::Features;

/// The parts of the mode that translation depends on, as bits; the [`View`] is in the lowest two.
pub type ModeBits = u16;

/// SSE instructions run natively.
const SSE: ModeBits = 1 << 2;
/// AVX instructions run natively.
const AVX: ModeBits = 1 << 3;
/// CR4.SMAP.
const SMAP: ModeBits = 1 << 4;
/// 32-bit code: protected mode or compatibility mode.
pub const NARROW: ModeBits = 1 << 5;
/// 32-bit code, and FS can be accessed at all offsets.
const FS: ModeBits = 1 << 6;
/// Set by the translator: a unit without groups ([`groups`](super::groups)).
pub const PLAIN: ModeBits = 1 << 7;
/// 32-bit code, and GS can be accessed at all offsets.
const GS: ModeBits = 1 << 8;
/// 32-bit code with segments that are not flat, or 16-bit code: not translated.
const SEGMENTED: ModeBits = 1 << 9;
/// x87 instructions run natively.
const X87: ModeBits = 1 << 10;
/// Bits used.
pub const BITS: u32 = 11;

/// The current mode.
pub fn mode_bits(cpu: &Cpu) -> ModeBits {
    let bit = |condition: bool, bit: ModeBits| if condition { bit } else { 0 };
    let sse = cpu.cr0 & (cr0::EM | cr0::TS) == 0 && cpu.cr4 & cr4::OSFXSR != 0;
    let avx = sse && cpu.cr4 & cr4::OSXSAVE != 0 && cpu.fpu.xcr0 & 6 == 6;
    // Unmasked exceptions would be the host's.
    let masked = cpu.fpu.mxcsr & 0x1f80 == 0x1f80;
    let smap = bit(cpu.cr4 & cr4::SMAP != 0, SMAP);
    let code = if cpu.mode.long64 { 0 } else { segments(cpu) };
    let x87 = bit(super::x87::is_native(cpu), X87);
    cpu.view() as ModeBits | bit(sse && masked, SSE) | bit(avx && masked, AVX) | x87 | smap | code
}

/// Segmentation outside of 64-bit code.
fn segments(cpu: &Cpu) -> ModeBits {
    let [es, cs, ss, ds, fs, gs] = &cpu.segs;
    let wide = cpu.mode.code_bits == 32 && cpu.mode.stack_bits == 32;
    let protected = cpu.mode.protected && !cpu.mode.v86;
    let flat = [es, ss, ds].into_iter().all(|s| s.base == 0 && open(s));
    if !(wide && protected && flat && cs.base == 0 && cs.limit == u32::MAX) {
        return SEGMENTED;
    }
    NARROW | if open(fs) { FS } else { 0 } | if open(gs) { GS } else { 0 }
}

/// Whether reads and writes at all offsets are allowed: data, writable, not expanding down, 4 GiB long.
fn open(segment: &Segment) -> bool {
    let kind = segment.access & (access::S | access::CODE | access::CONFORM_DOWN | access::READ_WRITE);
    segment.limit == u32::MAX && !segment.unusable && kind == access::S | access::READ_WRITE
}

/// What an instruction's translation needs to know of the mode.
pub fn features_of(mode: ModeBits) -> Features {
    Features {
        sse: mode & SSE != 0,
        avx: mode & AVX != 0,
        x87: mode & X87 != 0,
        smap: mode & SMAP != 0,
        user: mode & 3 == View::User as ModeBits,
        fs: mode & FS != 0,
        gs: mode & GS != 0,
    }
}

/// Whether nothing is going on that only the interpreter knows.
pub fn translatable(cpu: &Cpu) -> bool {
    let rings = matches!(cpu.cpl, 0 | 3);
    let flat = || mode_bits(cpu) & SEGMENTED == 0 && cpu.regs[RIP as usize] <= u32::MAX.into();
    (cpu.mode.long64 || flat()) && rings && !cpu.mode.align_check && !cpu.interrupt_shadow && !cpu.watched()
}

/// What the jump cache tags its entries with: a user's belong to an address space, a supervisor's to all.
pub fn context_of(cpu: &Cpu, mode: ModeBits) -> u64 {
    if cpu.cpl == 3 { 1 << 32 | cpu.tlb.asid() << BITS | u64::from(mode) } else { mode.into() }
}

/// The mode that is in a context.
pub fn mode_of(context: u64) -> ModeBits {
    context as ModeBits & ((1 << BITS) - 1)
}

impl Cpu {
    /// The address of code that was counted on to here, cut to the code's width.
    pub(super) fn cut(&self, rip: u64) -> u64 {
        if self.mode.long64 { rip } else { rip & u64::from(u32::MAX) }
    }

    /// Cuts RIP.
    pub(super) fn wrap_rip(&mut self) {
        self.regs[RIP as usize] = self.cut(self.regs[RIP as usize]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::op::seg;
    use crate::x86::testing::{CODE, Guest};

    #[test]
    fn only_flat_segments_are_translated_and_fs_and_gs_count_when_they_are_used() {
        let mut guest = Guest::new(32, &[]);
        let cpu = &mut guest.cpu;
        let flat = mode_bits(cpu);
        assert!(translatable(cpu));
        assert_eq!(flat & (NARROW | FS | GS), NARROW | FS | GS);
        for index in [seg::ES, seg::CS, seg::SS, seg::DS] {
            let saved = cpu.segs[index as usize];
            let changes: [fn(&mut Segment); 3] =
                [|s| s.base = 0x1000, |s| s.limit = 0xffff, |s| s.access &= !access::DB];
            for (n, change) in changes.into_iter().enumerate() {
                change(&mut cpu.segs[index as usize]);
                cpu.update_mode();
                let width = n == 2 && matches!(index, seg::ES | seg::DS); // says nothing there
                assert_eq!(translatable(cpu), width, "{index} {n}");
                cpu.segs[index as usize] = saved;
            }
        }
        cpu.update_mode();
        cpu.segs[seg::FS as usize].base = 0x1234;
        cpu.segs[seg::GS as usize].unusable = true;
        assert_eq!((translatable(cpu), mode_bits(cpu)), (true, flat & !GS));
        cpu.segs[seg::FS as usize].access &= !access::READ_WRITE;
        assert_eq!((translatable(cpu), mode_bits(cpu)), (true, flat & !GS & !FS));
        cpu.regs[RIP as usize] = CODE | 1 << 32;
        assert!(!translatable(cpu));
    }

    #[test]
    fn real_and_virtual_8086_mode_and_inner_rings_are_interpreted() {
        let mut guest = Guest::new(16, &[]);
        assert!(!translatable(&guest.cpu));
        guest.cpu.segs = Guest::new(32, &[]).cpu.segs;
        guest.cpu.update_mode();
        assert!(!translatable(&guest.cpu), "32-bit code in real mode");
        let mut guest = Guest::new(64, &[]);
        guest.cpu.cpl = 1;
        guest.cpu.update_mode();
        assert!(!translatable(&guest.cpu));
    }
}
