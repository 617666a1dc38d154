//! Software interrupts, the interrupt flag, and the flags on the stack.

use engine::x86::Activity;
use engine::x86::bits::{cr4, rflags};
use iced_x86::Code;

use super::super::cpu::Cpu;
use super::super::debug::DR6_BS;
use super::super::decode::Lower;
use super::super::event::{Interrupt, Source};
use super::super::exception::{Exception, Exec, vector};
use super::super::op::{Handler, Op, flag};
use super::super::stack::Stack;

/// Handlers for interrupts and flags.
pub fn lower(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    use Code::*;
    let handler: Handler = match l.ins.code() {
        Pushfw => return Some(pushf::<2>),
        Pushfd => return Some(pushf::<4>),
        Pushfq => return Some(pushf::<8>),
        Cli => return Some(cli),
        Clac => return Some(set_access_check::<false>),
        Stac => return Some(set_access_check::<true>),
        Popfw => popf::<2>,
        Popfd => popf::<4>,
        Popfq => popf::<8>,
        Sti => sti,
        Hlt => hlt,
        Int_imm8 => int,
        Int3 => int3,
        Into => into,
        Int1 => int1,
        _ => return None,
    };
    op.flags |= flag::ENDS_BLOCK;
    Some(handler)
}

impl Cpu {
    /// Enters the handler of a software interrupt. A fault on the way is the instruction's own.
    fn software_interrupt(&mut self, vector: u8, source: Source) -> Exec {
        let (return_rip, flags) = (self.next_rip, self.rflags);
        self.interrupt(&Interrupt { vector, code: None, source, return_rip, flags })?;
        self.debug_trap &= !DR6_BS; // TF is clear in the handler, and no step ends here
        Ok(())
    }
}

fn int(cpu: &mut Cpu, op: &Op) -> Exec {
    if cpu.mode.v86 && cpu.iopl() < 3 {
        return Err(Exception::GP0);
    }
    cpu.software_interrupt(op.imm as u8, Source::Software)
}

fn int3(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.software_interrupt(vector::BP, Source::Software)
}

fn into(cpu: &mut Cpu, _: &Op) -> Exec {
    if cpu.flag(rflags::OF) {
        return cpu.software_interrupt(vector::OF, Source::Software);
    }
    Ok(())
}

/// A privileged software exception: any gate lets it through.
fn int1(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.software_interrupt(vector::DB, Source::Hardware)
}

/// CLI and STI need IOPL, in virtual-8086 mode too (its extensions are not offered).
fn may_change_if(cpu: &Cpu) -> Exec {
    if cpu.cpl <= cpu.iopl() { Ok(()) } else { Err(Exception::GP0) }
}

fn cli(cpu: &mut Cpu, _: &Op) -> Exec {
    may_change_if(cpu)?;
    cpu.rflags &= !rflags::IF;
    Ok(())
}

fn sti(cpu: &mut Cpu, _: &Op) -> Exec {
    may_change_if(cpu)?;
    if !cpu.flag(rflags::IF) {
        cpu.rflags |= rflags::IF;
        cpu.interrupt_shadow = true;
    }
    Ok(())
}

fn hlt(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.supervisor()?;
    cpu.activity = Activity::Halted;
    Ok(())
}

fn flags_reachable(cpu: &Cpu) -> Exec {
    if cpu.mode.v86 && cpu.iopl() < 3 { Err(Exception::GP0) } else { Ok(()) }
}

/// VM and RF are never shown.
fn pushf<const SIZE: u64>(cpu: &mut Cpu, _: &Op) -> Exec {
    flags_reachable(cpu)?;
    cpu.push_value(SIZE, cpu.rflags & !(rflags::VM | rflags::RF))
}

fn popf<const SIZE: u64>(cpu: &mut Cpu, _: &Op) -> Exec {
    flags_reachable(cpu)?;
    let mut stack = Stack::current(cpu);
    let flags = stack.pop(cpu, SIZE)?;
    stack.commit(cpu);
    let mut mask = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
    if SIZE > 2 {
        mask |= rflags::AC | rflags::ID;
    }
    if cpu.cpl <= cpu.iopl() {
        mask |= rflags::IF;
    }
    if cpu.cpl == 0 {
        mask |= rflags::IOPL;
    }
    cpu.set_flags(flags, mask);
    Ok(())
}

/// `STAC` and `CLAC`. They change how the following accesses see memory, not how code is fetched: the
/// block goes on.
fn set_access_check<const ON: bool>(cpu: &mut Cpu, _: &Op) -> Exec {
    if cpu.cpl != 0 || cpu.vm.cpuid.cr4_mask() & cr4::SMAP == 0 {
        return Err(Exception::UD);
    }
    cpu.rflags = cpu.rflags & !rflags::AC | if ON { rflags::AC } else { 0 };
    cpu.update_view();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::super::op::reg;
    use super::super::super::systest::*;
    use super::super::super::testing::CODE;
    use super::*;

    fn user(code: &[u8], iopl: u64) -> System {
        let mut system = System::long(code);
        system.enter_ring3();
        system.cpu.rflags |= iopl << 12;
        system
    }

    #[test]
    fn users_change_the_interrupt_flag_only_with_io_privilege() {
        for code in [0xfa, 0xfb] {
            assert_eq!(user(&[code], 0).guest.step(), Err(Exception::GP0));
            assert_eq!(user(&[code], 3).guest.step(), Ok(()));
        }
        assert_eq!(user(&[0xf4], 3).guest.step(), Err(Exception::GP0), "HLT is the kernel's alone");
    }

    #[test]
    fn sti_opens_the_door_behind_the_next_instruction() {
        let mut system = System::long(&[0xfb, 0xfb]);
        system.guest.step().unwrap();
        assert!(system.cpu.flag(rflags::IF) && system.cpu.interrupt_shadow);
        system.guest.step().unwrap();
        assert!(!system.cpu.interrupt_shadow, "IF was set already");
    }

    #[test]
    fn popf_gives_a_user_no_more_than_it_may_have() {
        let pop = |mut system: System| {
            system.put64(System::STACK - 8, &[u64::MAX]);
            system.cpu.regs[reg::RSP as usize] = System::STACK - 8;
            system.guest.step().unwrap();
            assert_eq!(system.rsp(), System::STACK);
            system.cpu.rflags
        };
        let common = rflags::FIXED | rflags::STATUS | rflags::TF | rflags::DF;
        let common = common | rflags::NT | rflags::AC | rflags::ID;
        assert_eq!(pop(user(&[0x9d], 0)), common);
        assert_eq!(pop(user(&[0x9d], 3)), common | rflags::IF | rflags::IOPL);
        assert_eq!(pop(System::long(&[0x9d])), common | rflags::IF | rflags::IOPL);
    }

    #[test]
    fn pushf_shows_neither_rf_nor_vm() {
        let mut system = System::long(&[0x9c]);
        system.cpu.rflags |= rflags::IF | rflags::RF;
        system.guest.step().unwrap();
        assert_eq!(system.get64::<1>(System::STACK - 8), [rflags::FIXED | rflags::IF]);
    }

    #[test]
    fn int3_is_a_trap_and_int1_passes_any_gate() {
        let mut system = user(&[0xcc, 0xf1], 0);
        system.handler(3, 0xee, 0);
        system.go().unwrap();
        assert_eq!(system.rip(), HANDLERS + 3 * 16);
        assert_eq!(system.get64::<1>(system.rsp()), [CODE + 1]);
        let mut system = user(&[0xf1], 0);
        system.go().unwrap();
        assert_eq!((system.rip(), system.get64::<1>(system.rsp())), (HANDLERS + 16, [CODE + 1]));
    }

    #[test]
    fn stac_lets_the_kernel_into_user_pages() {
        let mut system = System::long(&[0x8a, 0x00, 0x0f, 0x01, 0xcb, 0x8a, 0x00, 0x0f, 0x01, 0xca]);
        system.poke(CODE + 10, &[0x8a, 0x00]);
        if system.cpu.vm.cpuid.cr4_mask() & cr4::SMAP == 0 {
            return;
        }
        // The code itself is in a user page: SMAP, without SMEP.
        system.guest.cpu.write_cr4(system.cpu.cr4 | cr4::SMAP).unwrap();
        system.cpu.regs[0] = CODE;
        let fault = system.guest.step().unwrap_err();
        assert_eq!((fault.vector(), fault.code()), (vector::PF, Some(1)));
        system.cpu.regs[super::super::super::op::RIP as usize] = CODE + 2;
        system.guest.step().unwrap();
        system.cpu.regs[0] = CODE;
        system.guest.step().unwrap();
        system.guest.step().unwrap();
        system.cpu.regs[0] = CODE;
        assert_eq!(system.guest.step(), Err(fault), "CLAC closed it again");
    }
}
