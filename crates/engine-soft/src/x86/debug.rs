//! Debug registers, breakpoints and single-stepping (SDM 3B, chapter 17).
//!
//! Instructions run one by one, with the looks that this takes, only while something is watched: TF or
//! RF set, a breakpoint enabled, or a trap pending. Data breakpoints are seen where the TLB misses, so
//! the TLB takes no data pages while a breakpoint is enabled.

use engine::x86::bits::{cr4, rflags};

use super::cpu::Cpu;
use super::exception::{Exception, Exec, vector};

/// DR6: a `MOV DR` was caught (DR7.GD).
const DR6_BD: u64 = 1 << 13;
/// DR6: single step.
pub(super) const DR6_BS: u64 = 1 << 14;
/// DR6: breakpoints 0 to 3 were met.
const DR6_BREAKPOINTS: u64 = 0xf;
/// DR6 bits that always read as one: no RTM, no bus-lock detection.
const DR6_FIXED: u64 = 0xffff_0ff0;
const DR6_WRITABLE: u64 = 0xe00f;
const DR7_FIXED: u64 = 0x400;
const DR7_WRITABLE: u64 = 0xffff_23ff;
const DR7_GD: u64 = 1 << 13;
/// DR7: any of the four breakpoints is enabled, locally or globally.
const DR7_ENABLED: u64 = 0xff;

/// R/W fields of DR7: what a breakpoint watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Watch {
    Execute = 0,
    Write = 1,
    Io = 2,
    ReadWrite = 3,
}

impl Cpu {
    /// Whether instructions must run one by one.
    #[inline(always)]
    pub(super) fn watched(&self) -> bool {
        self.flag(rflags::TF | rflags::RF) || self.dr[7] & DR7_ENABLED != 0 || self.debug_trap != 0
    }

    /// RF spares the next instruction its breakpoint: where there is none, it is over before that begins.
    /// Every return from a page fault brings it.
    #[inline(always)]
    pub(super) fn end_idle_resume(&mut self) {
        if self.flag(rflags::RF) {
            self.rflags &= !rflags::RF;
            if self.watched() {
                self.rflags |= rflags::RF;
            }
        }
    }

    /// `#DB` with `conditions` added to DR6.
    fn debug_exception(&mut self, conditions: u64) -> Exception {
        // The breakpoint bits say what was met this time, the others gather (SDM 3B, 17.2.3).
        self.dr[6] = self.dr[6] & !0xf | conditions;
        Exception::new(vector::DB)
    }

    /// The breakpoints of one kind that `size` bytes at `address` hit, as DR6 bits; of any that match,
    /// enabled or not.
    fn matches(&self, kind: Watch, address: u64, size: u64) -> u64 {
        let dr7 = self.dr[7];
        let mut hits = 0;
        for n in 0..4 {
            let field = dr7 >> (16 + 4 * n);
            let len = if kind == Watch::Execute { 1 } else { [1, 2, 8, 4][(field >> 2 & 3) as usize] };
            let start = self.dr[n] & !(len - 1);
            let meets = address < start.wrapping_add(len) && start < address.wrapping_add(size);
            if field & 3 == kind as u64 && meets {
                hits |= 1 << n;
            }
        }
        hits
    }

    /// The same, empty unless one of them is enabled.
    fn hits(&self, kind: Watch, address: u64, size: u64) -> u64 {
        let enabled = |n: u64| self.dr[7] >> (2 * n) & 3 != 0;
        let hits = self.matches(kind, address, size);
        if (0..4).any(|n| hits >> n & 1 != 0 && enabled(n)) { hits } else { 0 }
    }

    /// Raises `#DB` before the instruction at `linear` if a breakpoint is set on its execution.
    pub(super) fn code_breakpoint(&mut self, linear: u64) -> Exec {
        match self.hits(Watch::Execute, linear, 1) {
            0 => Ok(()),
            hits => {
                let held = std::mem::take(&mut self.debug_trap);
                Err(self.debug_exception(hits | held))
            }
        }
    }

    /// What `INT1` behind a load of SS makes of the data breakpoints that the load met: they join its
    /// own `#DB`. A single step does not, it is over.
    pub(super) fn join_traps(&mut self) {
        let met = std::mem::take(&mut self.debug_trap) & DR6_BREAKPOINTS;
        if met != 0 {
            let _ = self.debug_exception(met);
        }
    }

    /// Notes an I/O access for the breakpoints behind the instruction.
    pub(super) fn watch_io(&mut self, port: u16, size: u64) {
        if self.dr[7] & DR7_ENABLED != 0 && self.cr4 & cr4::DE != 0 {
            self.debug_trap |= self.hits(Watch::Io, port.into(), size);
        }
    }

    /// Whether data breakpoints are enabled: translations must not bypass [`Cpu::watch_data`] then.
    #[inline(always)]
    pub(super) fn watches_data(&self) -> bool {
        self.dr[7] & DR7_ENABLED != 0
    }

    /// Notes a data access for the breakpoints behind the instruction.
    #[cold]
    pub(super) fn watch_data(&mut self, linear: u64, size: u64, write: bool) {
        let mut hits = self.hits(Watch::ReadWrite, linear, size);
        if write {
            hits |= self.hits(Watch::Write, linear, size);
        }
        self.debug_trap |= hits;
    }

    /// Raises the traps that the last instruction left, in front of the next.
    pub(super) fn pending_trap(&mut self) -> Exec {
        match std::mem::take(&mut self.debug_trap) {
            0 => Ok(()),
            conditions => Err(self.debug_exception(conditions)),
        }
    }

    /// `MOV from DRn`.
    pub(super) fn read_dr(&mut self, number: u8) -> Exec<u64> {
        let number = self.debug_register(number)?;
        Ok(self.dr[number])
    }

    /// `MOV to DRn`; outside of 64-bit mode the value has 32 bits.
    pub(super) fn write_dr(&mut self, number: u8, value: u64) -> Exec {
        let number = self.debug_register(number)?;
        if number >= 6 && value >> 32 != 0 {
            return Err(Exception::GP0);
        }
        let watched = self.watches_data();
        self.dr[number] = match number {
            6 => value & DR6_WRITABLE | DR6_FIXED,
            7 => value & DR7_WRITABLE | DR7_FIXED,
            _ => value,
        };
        // Only then does the TLB hold data pages that it may not. Kernels write DR6 at every step.
        if self.watches_data() && !watched {
            let pcid = self.pcid();
            self.tlb.flush_all(pcid);
        }
        self.leave_block = true;
        Ok(())
    }

    /// The register that `MOV DR` names, after the checks.
    fn debug_register(&mut self, number: u8) -> Exec<usize> {
        let number = match number {
            4 | 5 if self.cr4 & cr4::DE != 0 => return Err(Exception::UD),
            4 | 5 => number + 2,
            8.. => return Err(Exception::UD),
            _ => number,
        };
        if self.cpl != 0 {
            return Err(Exception::GP0);
        }
        if self.dr[7] & DR7_GD != 0 {
            self.rflags |= rflags::RF; // a fault, and no code breakpoint
            return Err(self.debug_exception(DR6_BD));
        }
        Ok(number.into())
    }
}

#[cfg(test)]
mod tests {
    use super::super::event::Event;
    use super::super::op::{RIP, reg};
    use super::super::systest::*;
    use super::super::testing::{CODE, DATA};
    use super::*;

    const NOP: u8 = 0x90;
    const DB: Exception = Exception::new(vector::DB);

    #[test]
    fn the_trap_flag_stops_behind_every_instruction() {
        let mut system = System::long(&[NOP, NOP]);
        system.cpu.rflags |= rflags::TF;
        assert_eq!(system.guest.step(), Err(DB));
        assert_eq!((system.rip(), system.cpu.dr[6] & 0xf00f), (CODE + 1, DR6_BS));
        system.guest.cpu.deliver(Event::Exception(DB)).unwrap();
        assert!(!system.cpu.flag(rflags::TF));
        let flags = system.get64::<3>(system.rsp())[2];
        assert_eq!(flags & (rflags::TF | rflags::RF), rflags::TF, "a trap: TF, no RF");
    }

    #[test]
    fn popf_steps_from_the_instruction_behind_it() {
        let mut system = System::long(&[0x9d, NOP]);
        system.put64(System::STACK - 8, &[0x102]);
        system.cpu.regs[reg::RSP as usize] = System::STACK - 8;
        assert_eq!(system.guest.step(), Ok(()));
        assert_eq!(system.guest.step(), Err(DB));
        assert_eq!(system.rip(), CODE + 2);
    }

    #[test]
    fn a_load_of_ss_holds_the_step_off_for_one_instruction() {
        let mut system = System::long(&[0x8e, 0xd0, NOP]); // mov ss, eax
        system.cpu.regs[0] = KERNEL_DATA.into();
        system.cpu.rflags |= rflags::TF;
        assert_eq!(system.guest.step(), Ok(()));
        assert_eq!(system.guest.step(), Err(DB));
        assert_eq!(system.rip(), CODE + 3);
    }

    #[test]
    fn behind_a_load_of_ss_a_code_breakpoint_is_lost_or_not_by_vendor() {
        let mut system = System::long(&[0x8e, 0xd0, NOP]); // mov ss, eax
        system.cpu.regs[0] = KERNEL_DATA.into();
        system.guest.cpu.write_dr(0, CODE + 2).unwrap();
        system.guest.cpu.write_dr(7, 1).unwrap();
        assert_eq!(system.guest.step(), Ok(()));
        let intel = system.cpu.vm.cpuid.is_intel();
        assert_eq!(system.guest.step(), if intel { Ok(()) } else { Err(DB) });
    }

    #[test]
    fn int1_behind_a_load_of_ss_takes_its_data_breakpoint_along() {
        let mut system = System::long(&[0x8e, 0x10, 0xf1]); // mov ss, [rax]; int1
        system.cpu.regs[0] = DATA;
        system.put64(DATA, &[KERNEL_DATA.into()]);
        system.guest.cpu.write_dr(0, DATA).unwrap();
        system.guest.cpu.write_dr(7, 1 | 3 << 16).unwrap();
        system.go().unwrap();
        system.go().unwrap();
        assert_eq!(system.rip(), HANDLERS + 16);
        assert_eq!(system.get64::<1>(system.rsp()), [CODE + 3], "one #DB, behind INT1");
        assert_eq!(system.cpu.dr[6] & 0xf00f, 1);
    }

    #[test]
    fn a_code_breakpoint_stops_in_front_and_rf_gets_past_it() {
        let mut system = System::long(&[NOP, NOP]);
        system.guest.cpu.write_dr(0, CODE + 1).unwrap();
        system.guest.cpu.write_dr(7, 1).unwrap();
        assert_eq!(system.guest.step(), Ok(()));
        assert_eq!(system.guest.step(), Err(DB));
        assert_eq!((system.rip(), system.cpu.dr[6] & 0xf00f), (CODE + 1, 1));
        system.cpu.rflags |= rflags::RF;
        assert_eq!(system.guest.step(), Ok(()));
        assert!(!system.cpu.flag(rflags::RF));
    }

    #[test]
    fn rf_is_over_at_once_where_there_is_no_breakpoint_and_only_there() {
        let mut system = System::long(&[NOP]);
        system.cpu.rflags |= rflags::RF;
        system.guest.cpu.end_idle_resume();
        assert!(!system.cpu.flag(rflags::RF));
        system.guest.cpu.write_dr(0, CODE).unwrap();
        system.guest.cpu.write_dr(7, 1).unwrap();
        system.cpu.rflags |= rflags::RF;
        system.guest.cpu.end_idle_resume();
        assert!(system.cpu.flag(rflags::RF));
        assert_eq!(system.guest.step(), Ok(()));
    }

    #[test]
    fn a_repeated_instruction_is_stepped_by_its_iterations_and_resumed_as_one() {
        let mut system = System::long(&[0xf3, 0xa4, NOP]); // rep movsb
        let registers = [(reg::RCX, 3), (reg::RSI, DATA), (reg::RDI, DATA + 0x100)];
        for (register, value) in registers {
            system.cpu.regs[register as usize] = value;
        }
        system.guest.cpu.write_dr(0, CODE).unwrap();
        system.guest.cpu.write_dr(7, 1).unwrap();
        system.cpu.rflags |= rflags::RF | rflags::TF;
        for (left, rip) in [(2, CODE), (1, CODE), (0, CODE + 2)] {
            assert_eq!(system.guest.step(), Err(DB));
            assert_eq!((system.cpu.dr[6] & 0xf00f, system.rip()), (DR6_BS, rip));
            assert_eq!(system.cpu.regs[reg::RCX as usize], left);
        }
        assert!(!system.cpu.flag(rflags::RF));
    }

    #[test]
    fn data_breakpoints_see_writes_or_all_accesses_that_overlap() {
        let run = |code: &[u8], kind: u64, len: u64, at: u64| {
            let mut system = System::long(code);
            system.cpu.regs[0] = DATA;
            system.guest.cpu.write_dr(1, at).unwrap();
            system.guest.cpu.write_dr(7, 1 << 2 | kind << 20 | len << 22).unwrap();
            let result = system.guest.step();
            (result, system.cpu.dr[6] & 0xf, system.rip() - CODE)
        };
        let (store, load): (&[u8], &[u8]) = (&[0x48, 0x89, 0x00], &[0x48, 0x8b, 0x18]);
        assert_eq!(run(store, 1, 3, DATA + 4), (Err(DB), 2, 3), "mov [rax], rax: bytes 4-7");
        assert_eq!(run(store, 1, 0, DATA + 8), (Ok(()), 0, 3));
        assert_eq!(run(load, 1, 3, DATA), (Ok(()), 0, 3), "a read does not write");
        assert_eq!(run(load, 3, 3, DATA), (Err(DB), 2, 3));
    }

    #[test]
    fn translations_stay_until_a_breakpoint_is_enabled_and_come_back_behind_it() {
        let mut system = System::long(&[0x48, 0x8b, 0x18, 0xeb, 0xfb]); // 1: mov rbx, [rax]; jmp 1b
        system.cpu.regs[0] = DATA;
        let mut kept = |registers: &[(u8, u64)]| {
            system.guest.cpu.regs[RIP as usize] = CODE;
            system.guest.step().unwrap();
            for &(number, value) in registers {
                system.guest.cpu.write_dr(number, value).unwrap();
            }
            let view = system.cpu.view();
            system.guest.cpu.tlb.read(view, DATA).is_some()
        };
        assert!(kept(&[(6, DR6_FIXED), (0, CODE + 8), (7, DR7_FIXED)]), "as a kernel does at each step");
        assert!(!kept(&[(7, 1)]));
        assert!(!kept(&[(0, DATA), (7, DR7_FIXED)]), "none were taken in between");
        assert!(kept(&[]));
    }

    #[test]
    fn general_detect_catches_the_use_of_debug_registers_once() {
        let mut system = System::long(&[0x0f, 0x21, 0xc0]); // mov rax, dr0
        system.guest.cpu.write_dr(7, DR7_GD).unwrap();
        system.go().unwrap();
        assert_eq!(system.rip(), HANDLERS + 16);
        assert_eq!(system.cpu.dr[6] & DR6_BD, DR6_BD);
        assert_eq!(system.cpu.dr[7] & DR7_GD, 0, "the handler may use them");
        assert_ne!(system.get64::<3>(system.rsp())[2] & rflags::RF, 0);
    }

    #[test]
    fn dr4_and_dr5_are_aliases_until_debug_extensions_are_on() {
        let mut system = System::long(&[0x0f, 0x21, 0xe0]); // mov rax, dr4
        assert_eq!(system.guest.step(), Ok(()));
        assert_eq!(system.cpu.regs[0], DR6_FIXED);
        system.cpu.cr4 |= cr4::DE;
        system.guest.cpu.regs[RIP as usize] = CODE;
        assert_eq!(system.guest.step(), Err(Exception::UD));
    }
}
