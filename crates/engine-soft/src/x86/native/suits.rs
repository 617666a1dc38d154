//! Which programs the host's CPU runs as the guest's would.

#![allow(unsafe_code)] // reads a register of the host

use engine::x86::Activity;
use engine::x86::bits::{cr0, cr4, rflags};

use super::super::cpu::Cpu;
use super::super::fpu::component;
use super::super::op::{RIP, seg};
use super::{jail, state};

/// Whether the host's CPU would do with the program what the guest's does: the state has nothing that the
/// host would not let a program have, or show it differently.
pub fn suits(cpu: &Cpu) -> bool {
    let selector = |number: u8| cpu.segs[number as usize].selector;
    let data = |number: u8| selector(number) & !3 == 0 || selector(number) == state::USER_DATA;
    let vectors = component::X87 | component::SSE | component::AVX;
    cpu.mode.long64
        && cpu.activity == Activity::Running
        && (selector(seg::CS), selector(seg::SS)) == (state::USER_CODE, state::USER_DATA)
        && [seg::DS, seg::ES, seg::FS, seg::GS].into_iter().all(data)
        && cpu.rflags & (rflags::IF | rflags::IOPL) == rflags::IF
        && !cpu.watched()
        && !(cpu.interrupt_shadow || cpu.debug_shadow || cpu.nmi_blocked)
        && cpu.cr0 & (cr0::TS | cr0::EM) == 0
        && cpu.cr4 & (cr4::OSFXSR | cr4::OSXSAVE) == cr4::OSFXSR | cr4::OSXSAVE
        && cpu.fpu.xcr0 & vectors == host_xcr0() & vectors
        && cpu.fpu.x87.fsw & 0x80 == 0
        && cpu.pending.is_none()
        && cpu.regs[RIP as usize] < jail::END
}

/// The state components that the host's programs have.
pub fn host_xcr0() -> u64 {
    if !std::arch::is_x86_feature_detected!("xsave") {
        return 0;
    }
    let (low, high): (u32, u32);
    // SAFETY: the CPU has XSAVE, and the host's system lets programs use it.
    unsafe {
        std::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack))
    };
    u64::from(high) << 32 | u64::from(low)
}
