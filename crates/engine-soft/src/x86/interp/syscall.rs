//! Fast system calls: `SYSCALL`, `SYSRET`, `SYSENTER`, `SYSEXIT`.
//!
//! Intel's and AMD's CPUs differ in the modes that have them; the guest sees what its CPUID's vendor
//! has (SDM 2 and AMD APM 3 under each mnemonic).

use engine::x86::bits::{efer, rflags};
use iced_x86::Code;

use super::super::access::canonical;
use super::super::cpu::Cpu;
use super::super::debug::DR6_BS;
use super::super::decode::Lower;
use super::super::exception::{Exception, Exec};
use super::super::op::{Handler, Op, flag, reg, seg};
use super::super::segment::flat_segment;

/// Access rights of the flat segments that are loaded without descriptors.
const CODE64: u16 = 0xa09b;
const CODE32: u16 = 0xc09b;
const DATA: u16 = 0xc093;
const RING3: u16 = 3 << 5;
/// The flags that `SYSRET` takes from R11 (SDM 2, "SYSRET").
const SYSRET_FLAGS: u64 = 0x3c_7fd7;

/// Handlers for fast system calls.
pub fn lower(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    use Code::*;
    let handler: Handler = match l.ins.code() {
        Syscall => syscall,
        Sysretd => sysret::<false>,
        Sysretq => sysret::<true>,
        Sysenter => sysenter,
        Sysexitd => sysexit::<false>,
        Sysexitq => sysexit::<true>,
        _ => return None,
    };
    op.flags |= flag::ENDS_BLOCK;
    Some(handler)
}

/// Loads flat code and stack segments and a privilege level.
fn enter(cpu: &mut Cpu, cs: (u16, u16), ss: u16, level: u8) {
    let rights = if level == 3 { RING3 } else { 0 };
    cpu.segs[seg::CS as usize] = flat_segment(cs.0, cs.1 | rights);
    cpu.segs[seg::SS as usize] = flat_segment(ss, DATA | rights);
    cpu.cpl = level;
    cpu.update_mode();
}

fn syscall(cpu: &mut Cpu, _: &Op) -> Exec {
    let offered = cpu.mode.long64 || !cpu.vm.cpuid.is_intel();
    if cpu.efer & efer::SCE == 0 || !cpu.mode.protected || !offered {
        return Err(Exception::UD);
    }
    let star = cpu.msrs.star;
    let selector = (star >> 32) as u16 & 0xfffc;
    let (back, flags) = (cpu.next_rip, cpu.rflags & !rflags::RF);
    if cpu.mode.long {
        cpu.regs[reg::RCX as usize] = back;
        cpu.regs[reg::R11 as usize] = flags;
        cpu.next_rip = if cpu.mode.long64 { cpu.msrs.lstar } else { cpu.msrs.cstar };
        cpu.rflags = flags & !cpu.msrs.fmask | rflags::FIXED;
        enter(cpu, (selector, CODE64), selector.wrapping_add(8), 0);
    } else {
        cpu.regs[reg::RCX as usize] = back & 0xffff_ffff;
        cpu.next_rip = star & 0xffff_ffff;
        cpu.rflags = flags & !(rflags::IF | rflags::VM);
        enter(cpu, (selector, CODE32), selector.wrapping_add(8), 0);
    }
    if !cpu.flag(rflags::TF) {
        cpu.debug_trap &= !DR6_BS; // the mask took TF away before the step ended
    }
    Ok(())
}

fn sysret<const WIDE: bool>(cpu: &mut Cpu, _: &Op) -> Exec {
    let intel = cpu.vm.cpuid.is_intel();
    let offered = cpu.mode.protected && !cpu.mode.v86 && (cpu.mode.long64 || !intel);
    if cpu.efer & efer::SCE == 0 || !offered {
        return Err(Exception::UD);
    }
    cpu.supervisor()?;
    let rcx = cpu.regs[reg::RCX as usize];
    // Intel's CPUs check the target here, at CPL 0; AMD's when the user code is fetched.
    if WIDE && intel && !canonical(rcx) {
        return Err(Exception::GP0);
    }
    let selector = (cpu.msrs.star >> 48) as u16;
    if cpu.mode.long {
        cpu.rflags = cpu.regs[reg::R11 as usize] & SYSRET_FLAGS & !rflags::RF | rflags::FIXED;
    } else {
        cpu.rflags |= rflags::IF;
    }
    let code = if WIDE { (selector.wrapping_add(16) | 3, CODE64) } else { (selector | 3, CODE32) };
    cpu.next_rip = if WIDE { rcx } else { rcx & 0xffff_ffff };
    enter(cpu, code, selector.wrapping_add(8) | 3, 3);
    Ok(())
}

/// `SYSENTER` and `SYSEXIT` are not in AMD's long mode.
fn sysenter_offered(cpu: &Cpu) -> Exec {
    if cpu.mode.long && !cpu.vm.cpuid.is_intel() {
        return Err(Exception::UD);
    }
    if !cpu.mode.protected || cpu.msrs.sysenter_cs & 0xfffc == 0 { Err(Exception::GP0) } else { Ok(()) }
}

fn sysenter(cpu: &mut Cpu, _: &Op) -> Exec {
    sysenter_offered(cpu)?;
    let selector = cpu.msrs.sysenter_cs as u16 & 0xfffc;
    let long = cpu.mode.long;
    let width = if long { u64::MAX } else { 0xffff_ffff };
    cpu.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
    cpu.regs[reg::RSP as usize] = cpu.msrs.sysenter_esp & width;
    cpu.next_rip = cpu.msrs.sysenter_eip & width;
    let code = if long { CODE64 } else { CODE32 };
    enter(cpu, (selector, code), selector.wrapping_add(8), 0);
    Ok(())
}

fn sysexit<const WIDE: bool>(cpu: &mut Cpu, _: &Op) -> Exec {
    sysenter_offered(cpu)?;
    cpu.supervisor()?;
    let (rip, rsp) = (cpu.regs[reg::RDX as usize], cpu.regs[reg::RCX as usize]);
    let selector = cpu.msrs.sysenter_cs as u16 & 0xfffc;
    if WIDE {
        if !canonical(rip) || !canonical(rsp) {
            return Err(Exception::GP0);
        }
        (cpu.next_rip, cpu.regs[reg::RSP as usize]) = (rip, rsp);
        enter(cpu, (selector.wrapping_add(32) | 3, CODE64), selector.wrapping_add(40) | 3, 3);
    } else {
        (cpu.next_rip, cpu.regs[reg::RSP as usize]) = (rip & 0xffff_ffff, rsp & 0xffff_ffff);
        enter(cpu, (selector.wrapping_add(16) | 3, CODE32), selector.wrapping_add(24) | 3, 3);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::super::op::RIP;
    use super::super::super::systest::*;
    use super::super::super::testing::CODE;
    use super::*;
    use engine::x86::bits::msr;

    const ENTRY: u64 = 0xffff_ffff_8000_0000;
    const R11: usize = reg::R11 as usize;
    const RCX: usize = reg::RCX as usize;

    /// A ring-3 program, and the MSRs as 64-bit Linux sets them.
    fn user(code: &[u8]) -> System {
        let mut system = System::long(code);
        let cpu = &mut system.guest.cpu;
        cpu.write_msr(msr::STAR, 0x001b_0008 << 32).unwrap();
        cpu.write_msr(msr::LSTAR, ENTRY).unwrap();
        cpu.write_msr(msr::FMASK, rflags::IF | rflags::TF | rflags::DF | rflags::AC).unwrap();
        system.enter_ring3();
        system
    }

    #[test]
    fn a_program_calls_the_kernel_and_gets_back() {
        let mut system = user(&[0x0f, 0x05]);
        system.cpu.rflags |= rflags::IF | rflags::DF | rflags::CF;
        system.go().unwrap();
        assert_eq!((system.rip(), system.cpu.cpl), (ENTRY, 0));
        assert_eq!((system.cs(), system.ss()), (KERNEL_CODE, KERNEL_DATA));
        assert_eq!(system.rsp(), System::STACK, "the kernel switches stacks itself");
        assert_eq!(system.cpu.rflags, rflags::FIXED | rflags::CF);
        let flags = rflags::FIXED | rflags::IF | rflags::DF | rflags::CF;
        assert_eq!((system.cpu.regs[RCX], system.cpu.regs[R11]), (CODE + 2, flags));

        system.poke(CODE + 0x20, &[0x48, 0x0f, 0x07]); // sysretq
        system.cpu.regs[RIP as usize] = CODE + 0x20;
        system.cpu.regs[R11] = flags | rflags::VM | rflags::RF;
        system.go().unwrap();
        assert_eq!((system.rip(), system.cpu.cpl, system.cpu.mode.long64), (CODE + 2, 3, true));
        assert_eq!((system.cs(), system.ss()), (USER_CODE, USER_DATA));
        assert_eq!(system.cpu.rflags, flags);
        assert_eq!(system.cpu.segs[seg::SS as usize].access, 0xc0f3);
    }

    #[test]
    fn it_is_undefined_while_disabled_and_privileged_on_the_way_out() {
        let mut system = user(&[0x0f, 0x05]);
        system.cpu.efer &= !efer::SCE;
        assert_eq!(system.guest.step(), Err(Exception::UD));
        let mut system = user(&[0x48, 0x0f, 0x07]);
        assert_eq!(system.guest.step(), Err(Exception::GP0));
    }

    #[test]
    fn sysret_to_32_bit_code_goes_to_compatibility_mode() {
        let mut system = user(&[]);
        system.cpu.cpl = 0;
        system.cpu.segs[seg::CS as usize] = segment(KERNEL_CODE, 0xa09b);
        system.poke(CODE, &[0x0f, 0x07]);
        system.cpu.regs[RCX] = 0x1_0000_0000 | (CODE + 0x80);
        system.cpu.regs[R11] = 0x202;
        system.cpu.update_mode();
        system.go().unwrap();
        assert_eq!((system.rip(), system.cs(), system.cpu.mode.code_bits), (CODE + 0x80, USER_CODE32, 32));
    }

    #[test]
    fn sysenter_and_sysexit_follow_the_vendor() {
        let mut system = user(&[0x0f, 0x34]);
        let cpu = &mut system.guest.cpu;
        (cpu.msrs.sysenter_cs, cpu.msrs.sysenter_esp) = (0x08, KERNEL_STACK);
        cpu.msrs.sysenter_eip = HANDLERS;
        let intel = cpu.vm.cpuid.is_intel();
        let result = system.guest.step();
        if !intel {
            assert_eq!(result, Err(Exception::UD), "not in AMD's long mode");
            return;
        }
        assert_eq!((system.rip(), system.rsp(), system.cpu.cpl), (HANDLERS, KERNEL_STACK, 0));
        system.poke(HANDLERS, &[0x48, 0x0f, 0x35]);
        system.cpu.regs[reg::RDX as usize] = CODE + 2;
        system.cpu.regs[RCX] = System::STACK;
        system.go().unwrap();
        assert_eq!((system.rip(), system.rsp(), system.cs()), (CODE + 2, System::STACK, 0x2b));
    }

    #[test]
    fn legacy_sysenter_works_on_both_vendors() {
        let mut system = System::protected(&[0x0f, 0x34]);
        let cpu = &mut system.guest.cpu;
        (cpu.msrs.sysenter_cs, cpu.msrs.sysenter_esp) = (0x30, KERNEL_STACK);
        cpu.msrs.sysenter_eip = HANDLERS;
        system.enter_ring3();
        system.go().unwrap();
        assert_eq!((system.rip(), system.rsp(), system.cpu.cpl), (HANDLERS, KERNEL_STACK, 0));
        assert_eq!((system.cs(), system.ss(), system.cpu.mode.code_bits), (0x30, 0x38, 32));
    }
}
