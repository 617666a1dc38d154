//! Delivery of exceptions and interrupts through the IDT or the real-mode vector table (SDM 3A,
//! chapter 6).
//!
//! One attempt ([`Cpu::interrupt`]) either gets all the way into the handler or raises an exception
//! and leaves the CPU as it was. [`Cpu::deliver`] makes of such exceptions what table 6-5 says.

use engine::x86::Activity;
use engine::x86::bits::rflags;

use super::access::canonical;
use super::cpu::Cpu;
use super::descriptor::{Descriptor, Gate, gp, np, null, system, ts};
use super::exception::{Exception, Exec, vector};
use super::int::Int;
use super::op::{RIP, reg, seg};
use super::segment::{null_segment, null_stack};
use super::stack::Stack;
use super::task::{Reason, TaskSwitch};
use super::tlb::View;

/// DR7.GD: `MOV DR` raises `#DB`; cleared when that is delivered.
const GENERAL_DETECT: u64 = 1 << 13;
/// Bits of an error code that names a descriptor (SDM 3A, 6.13).
const EXT: u32 = 1;
const IDT_BIT: u32 = 2;

/// The CPU gave up: an exception while a double fault was being delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shutdown;

/// What is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An exception of the instruction at RIP, or a trap behind the one before.
    Exception(Exception),
    /// An `INT n`, `INT3` or `INTO` that was caught in delivery: RIP is behind the instruction.
    Software(u8),
    /// An external interrupt.
    External(u8),
    /// A non-maskable interrupt.
    Nmi,
}

/// Where an interrupt comes from, as far as its delivery differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// An exception, NMI or external interrupt, and `INT1`: gates of any DPL let it through.
    Hardware,
    /// `INT n`, `INT3`, `INTO`: needs a gate of DPL >= CPL.
    Software,
}

/// One attempt to enter a handler.
#[derive(Clone, Copy, Debug)]
pub(super) struct Interrupt {
    pub vector: u8,
    pub code: Option<u32>,
    pub source: Source,
    /// Where the handler returns to.
    pub return_rip: u64,
    /// RFLAGS as the handler finds them on the stack.
    pub flags: u64,
}

/// What a handler's code segment turned out to be.
struct Target {
    cs: Descriptor,
    /// Privilege level of the handler.
    level: u8,
}

/// Classes of exceptions for the double-fault rules (SDM 3A, table 6-4).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(exception: Exception) -> Class {
    match exception.vector() {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
        vector::PF => Class::PageFault,
        vector::DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// What an exception in the delivery of `first` becomes (SDM 3A, table 6-5).
fn escalate(first: Event, second: Exception) -> Result<Exception, Shutdown> {
    let Event::Exception(first) = first else { return Ok(second) };
    match (class(first), class(second)) {
        (Class::DoubleFault, _) => Err(Shutdown),
        (Class::Contributory, Class::Contributory)
        | (Class::PageFault, Class::Contributory | Class::PageFault) => {
            Ok(Exception::with_code(vector::DF, 0))
        }
        _ => Ok(second),
    }
}

/// Whether an exception is a fault, after which the instruction runs again with RF set (SDM 3A,
/// 17.3.1.1). `#DB` is either; who raises it as a fault other than by a code breakpoint sets RF itself.
fn is_fault(vector: u8) -> bool {
    matches!(
        vector,
        vector::DE
            | vector::BR
            | vector::UD
            | vector::NM
            | vector::TS
            | vector::NP
            | vector::SS
            | vector::GP
            | vector::PF
            | vector::MF
            | vector::AC
            | vector::XM
    )
}

/// Sets EXT in the error codes that have it.
fn external(exception: Exception) -> Exception {
    match (exception.vector(), exception.code()) {
        (vector @ (vector::TS | vector::NP | vector::SS | vector::GP), Some(code)) => {
            Exception::with_code(vector, code | EXT)
        }
        _ => exception,
    }
}

impl Cpu {
    /// Delivers an event; exceptions on the way become double faults, and those the shutdown. RIP is
    /// where the handler returns to.
    pub fn deliver(&mut self, event: Event) -> Result<(), Shutdown> {
        self.activity = Activity::Running;
        log::trace!(
            "vCPU {}: {event:x?} at {:x}:{:x}, CPL {}, CR2 {:x}, RSP {:x}",
            self.id,
            self.segs[1].selector,
            self.rip(),
            self.cpl,
            self.cr2,
            self.regs[4]
        );
        let mut event = event;
        loop {
            match self.attempt(event) {
                Ok(()) => return Ok(()),
                Err(second) => event = Event::Exception(escalate(event, second)?),
            }
        }
    }

    fn attempt(&mut self, event: Event) -> Exec {
        let (vector, code, source) = match event {
            Event::Exception(e) => (e.vector(), e.code(), Source::Hardware),
            Event::Software(vector) => (vector, None, Source::Software),
            Event::External(vector) => (vector, None, Source::Hardware),
            Event::Nmi => (vector::NMI, None, Source::Hardware),
        };
        let mut flags = self.rflags;
        if matches!(event, Event::Exception(_)) && is_fault(vector) {
            flags |= rflags::RF;
        }
        let return_rip = self.regs[RIP as usize];
        let done = self.interrupt(&Interrupt { vector, code, source, return_rip, flags });
        self.nmi_blocked |= event == Event::Nmi;
        done?;
        if matches!(event, Event::Exception(_)) && vector == vector::DB {
            self.dr[7] &= !GENERAL_DETECT;
        }
        self.regs[RIP as usize] = self.next_rip;
        Ok(())
    }

    /// Enters the handler of an interrupt: `next_rip` is its first instruction then. On `Err` nothing
    /// changed (but a task switch that got past its commit point).
    pub(super) fn interrupt(&mut self, interrupt: &Interrupt) -> Exec {
        let entered = if !self.mode.protected {
            self.enter_real(interrupt)
        } else if self.mode.long {
            self.enter_long(interrupt)
        } else {
            self.enter_legacy(interrupt)
        };
        match interrupt.source {
            Source::Hardware => entered.map_err(external),
            Source::Software => entered,
        }
    }

    /// Real mode (SDM 3A, 20.1.4).
    fn enter_real(&mut self, interrupt: &Interrupt) -> Exec {
        let at = u64::from(interrupt.vector) * 4;
        if at + 3 > self.idtr.limit.into() {
            return Err(Exception::GP0);
        }
        let entry = self.table_address(self.idtr.base, at)?;
        let target = self.load_linear::<u32>(View::Kernel, entry)?;
        let mut stack = Stack::current(self);
        stack.push(self, 2, interrupt.flags)?;
        stack.push(self, 2, self.segs[seg::CS as usize].selector.into())?;
        stack.push(self, 2, interrupt.return_rip)?;
        stack.commit(self);
        self.rflags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
        self.load_real_segment(seg::CS, (target >> 16) as u16);
        self.next_rip = (target & 0xffff).into();
        self.update_mode();
        Ok(())
    }

    /// The gate of a vector, with the checks that all modes share.
    fn gate(&mut self, interrupt: &Interrupt, kinds: &[u16]) -> Exec<Gate> {
        let code = u32::from(interrupt.vector) << 3 | IDT_BIT;
        let size: u64 = if self.mode.long { 16 } else { 8 };
        let at = u64::from(interrupt.vector) * size;
        if at + size - 1 > self.idtr.limit.into() {
            return Err(Exception::gp(code));
        }
        let entry = self.table_address(self.idtr.base, at)?;
        let low = self.load_linear::<u64>(View::Kernel, entry)?;
        let high = match size {
            16 => {
                let entry = self.table_address(self.idtr.base, at + 8)?;
                self.load_linear::<u64>(View::Kernel, entry)?
            }
            _ => 0,
        };
        let gate = Gate::new(low, high);
        if !kinds.contains(&gate.kind) || (interrupt.source == Source::Software && gate.dpl < self.cpl) {
            return Err(Exception::gp(code));
        }
        if !gate.present {
            return Err(Exception::with_code(vector::NP, code));
        }
        Ok(gate)
    }

    /// The code segment of a handler, checked and marked accessed.
    fn handler_code(&mut self, gate: &Gate) -> Exec<Target> {
        let selector = gate.selector;
        if null(selector) {
            return Err(Exception::GP0);
        }
        let mut cs = self.descriptor(selector, vector::GP)?;
        let wide = engine::x86::bits::access::DB;
        if !cs.code()
            || cs.dpl() > self.cpl
            || (self.mode.long && (!cs.long_code() || cs.access() & wide != 0))
        {
            return Err(gp(selector));
        }
        if !cs.present() {
            return Err(np(selector));
        }
        let level = if cs.conforming() { self.cpl } else { cs.dpl() };
        if self.mode.v86 && level != 0 {
            return Err(gp(selector)); // a conforming segment, or a ring between 0 and 3
        }
        self.mark_accessed(&mut cs)?;
        Ok(Target { cs, level })
    }

    /// Long mode (SDM 3A, 6.14).
    fn enter_long(&mut self, interrupt: &Interrupt) -> Exec {
        let gate = self.gate(interrupt, &[system::INTERRUPT_GATE, system::TRAP_GATE])?;
        let Target { cs, level } = self.handler_code(&gate)?;
        let inner = level != self.cpl;
        let rsp = match gate.ist {
            0 if inner => self.task_field::<u64>(4 + 8 * u32::from(level))?,
            0 => self.regs[reg::RSP as usize],
            ist => self.task_field::<u64>(0x24 + 8 * (u32::from(ist) - 1))?,
        };
        if !canonical(gate.offset) {
            return Err(Exception::GP0);
        }
        let view = if inner { View::Kernel } else { self.view() };
        let mut stack = Stack::long(rsp & !15, view);
        stack.push(self, 8, self.segs[seg::SS as usize].selector.into())?;
        stack.push(self, 8, self.regs[reg::RSP as usize])?;
        stack.push(self, 8, interrupt.flags)?;
        stack.push(self, 8, self.segs[seg::CS as usize].selector.into())?;
        stack.push(self, 8, interrupt.return_rip)?;
        if let Some(code) = interrupt.code {
            stack.push(self, 8, code.into())?;
        }
        stack.commit(self);
        if inner {
            self.segs[seg::SS as usize] = null_stack(level);
        }
        self.clear_flags(&gate);
        self.enter_code(&cs, level, gate.offset);
        Ok(())
    }

    /// Protected mode outside of long mode (SDM 3A, 6.12; virtual-8086 mode: 21.3).
    fn enter_legacy(&mut self, interrupt: &Interrupt) -> Exec {
        const KINDS: &[u16] = &[
            system::TASK_GATE,
            system::INTERRUPT_GATE16,
            system::TRAP_GATE16,
            system::INTERRUPT_GATE,
            system::TRAP_GATE,
        ];
        let gate = self.gate(interrupt, KINDS)?;
        if gate.kind == system::TASK_GATE {
            return self.enter_task(interrupt, &gate);
        }
        let Target { cs, level } = self.handler_code(&gate)?;
        if gate.offset > cs.limit().into() {
            return Err(Exception::GP0);
        }
        let (width, v86, inner) = (gate.width(), self.mode.v86, level != self.cpl);
        let (mut stack, ss) = if inner {
            let (segment, sp) = self.inner_stack(level)?;
            (Stack::inner(segment, sp), segment)
        } else {
            (Stack::current(self), self.segs[seg::SS as usize])
        };
        if v86 {
            for index in [seg::GS, seg::FS, seg::DS, seg::ES] {
                stack.push(self, width, self.segs[index as usize].selector.into())?;
            }
        }
        if inner {
            stack.push(self, width, self.segs[seg::SS as usize].selector.into())?;
            stack.push(self, width, self.regs[reg::RSP as usize])?;
        }
        stack.push(self, width, interrupt.flags)?;
        stack.push(self, width, self.segs[seg::CS as usize].selector.into())?;
        stack.push(self, width, interrupt.return_rip)?;
        if let Some(code) = interrupt.code {
            stack.push(self, width, code.into())?;
        }
        stack.commit(self);
        if v86 {
            for index in [seg::GS, seg::FS, seg::DS, seg::ES] {
                self.segs[index as usize] = null_segment(0);
            }
        }
        self.segs[seg::SS as usize] = ss;
        self.clear_flags(&gate);
        self.enter_code(&cs, level, gate.offset);
        Ok(())
    }

    /// RFLAGS of the handler.
    fn clear_flags(&mut self, gate: &Gate) {
        self.rflags &= !(rflags::TF | rflags::NT | rflags::VM | rflags::RF);
        if gate.kind & 1 == 0 {
            self.rflags &= !rflags::IF; // an interrupt gate
        }
    }

    fn enter_task(&mut self, interrupt: &Interrupt, gate: &Gate) -> Exec {
        self.switch_task(&TaskSwitch {
            selector: gate.selector,
            reason: Reason::Interrupt,
            return_rip: interrupt.return_rip,
            flags: interrupt.flags,
            code: interrupt.code,
        })
    }

    /// A field of the current task state segment.
    pub(super) fn task_field<T: Int>(&mut self, offset: u32) -> Exec<T> {
        if u64::from(offset) + T::BYTES - 1 > self.tr.limit.into() {
            return Err(ts(self.tr.selector));
        }
        let linear = self.table_address(self.tr.base, offset.into())?;
        self.load_linear(View::Kernel, linear)
    }

    /// The stack for a more privileged level from the task state segment, outside of long mode.
    pub(super) fn inner_stack(&mut self, level: u8) -> Exec<(engine::x86::Segment, u64)> {
        let level32 = u32::from(level);
        let (selector, sp) = if self.tr.access & 8 != 0 {
            let sp = self.task_field::<u32>(4 + 8 * level32)?;
            (self.task_field::<u16>(8 + 8 * level32)?, sp.into())
        } else {
            let sp = self.task_field::<u16>(2 + 4 * level32)?;
            (self.task_field::<u16>(4 + 4 * level32)?, sp.into())
        };
        Ok((self.stack_segment(selector, level, vector::TS)?, sp))
    }
}

#[cfg(test)]
mod tests {
    use super::super::systest::*;
    use super::super::testing::{CODE, DATA};
    use super::*;
    use engine::x86::bits::cr4;

    /// mov [rax], ds
    const TOUCH: &[u8] = &[0x8c, 0x18];
    const NOWHERE: u64 = 0x3f_0000;

    #[test]
    fn a_page_fault_in_ring_3_runs_its_handler_on_the_interrupt_stack_and_comes_back() {
        let mut system = System::long(TOUCH);
        system.handler(14, 0x8e, 1);
        system.handler_code(14, &[0x48, 0xcf]); // iretq
        system.enter_ring3();
        system.unmap(DATA);
        system.cpu.regs[0] = DATA;
        system.cpu.rflags |= rflags::IF;
        system.go().unwrap();
        assert_eq!((system.rip(), system.cs(), system.cpu.cpl), (HANDLERS + 14 * 16, KERNEL_CODE, 0));
        assert_eq!((system.cpu.cr2, system.ss()), (DATA, 0));
        assert!(!system.cpu.flag(rflags::IF));
        let frame = system.get64::<6>(IST_STACK - 48);
        let flags = rflags::FIXED | rflags::IF | rflags::RF;
        let selectors = (u64::from(USER_CODE), u64::from(USER_DATA));
        assert_eq!(frame, [6, CODE, selectors.0, flags, System::STACK, selectors.1]);
        assert_eq!(system.rsp(), IST_STACK - 48);

        // The handler drops the error code, mends the page, and returns.
        system.cpu.regs[reg::RSP as usize] += 8;
        system.cpu.regs[0] = DATA + 0x1000;
        system.go().unwrap();
        assert_eq!((system.rip(), system.rsp(), system.cpu.cpl), (CODE, System::STACK, 3));
        assert!(system.cpu.flag(rflags::RF) && system.cpu.flag(rflags::IF));
        system.go().unwrap();
        assert_eq!(u16::from_le_bytes(system.peek(DATA + 0x1000)), USER_DATA);
        assert!(!system.cpu.flag(rflags::RF), "RF lasts for one instruction");
    }

    #[test]
    fn an_interrupt_in_the_kernel_aligns_the_stack_and_keeps_ss() {
        let mut system = System::long(&[]);
        system.cpu.regs[reg::RSP as usize] = System::STACK - 3;
        system.cpu.rflags |= rflags::IF;
        system.guest.cpu.deliver(Event::External(0x30)).unwrap();
        assert_eq!(system.rsp(), System::STACK - 16 - 40);
        assert_eq!(system.ss(), KERNEL_DATA);
        assert_eq!(system.get64::<5>(system.rsp())[3], System::STACK - 3);
    }

    #[test]
    fn software_interrupts_need_a_gate_that_lets_users_in() {
        let mut system = System::long(&[0xcd, 0x80]); // int 0x80
        system.enter_ring3();
        system.go().unwrap();
        assert_eq!(system.rip(), HANDLERS + 13 * 16);
        let frame = system.get64::<2>(system.rsp());
        assert_eq!(frame, [0x80 * 8 + 2, CODE], "#GP names the gate, without EXT, at the INT");

        let mut system = System::long(&[0xcd, 0x80]);
        system.handler(0x80, 0xee, 0);
        system.enter_ring3();
        system.go().unwrap();
        assert_eq!(system.rip(), HANDLERS + 0x80 * 16);
        assert_eq!(system.get64::<2>(system.rsp()), [CODE + 2, USER_CODE.into()]);
        assert_eq!(system.rsp(), KERNEL_STACK - 40);
    }

    #[test]
    fn a_fault_without_a_handler_is_a_double_fault_and_without_that_the_end() {
        let mut system = System::long(&[]);
        system.put64(IDT + 16 * 13, &[0, 0]);
        system.guest.cpu.deliver(Event::Exception(Exception::gp(0x55))).unwrap();
        assert_eq!(system.rip(), HANDLERS + 8 * 16);
        assert_eq!(system.get64::<2>(system.rsp()), [0, CODE]);

        system.put64(IDT + 16 * 8, &[0, 0]);
        let end = system.guest.cpu.deliver(Event::Exception(Exception::gp(0x55)));
        assert_eq!(end, Err(Shutdown));
    }

    #[test]
    fn exceptions_escalate_as_the_table_says() {
        let (gp, ud) = (Exception::GP0, Exception::UD);
        let pf = Exception::with_code(vector::PF, 2);
        let df = Exception::with_code(vector::DF, 0);
        let on = |first, second| escalate(Event::Exception(first), second);
        assert_eq!(on(ud, gp), Ok(gp), "benign first: one after the other");
        assert_eq!(on(gp, pf), Ok(pf));
        assert_eq!((on(gp, gp), on(pf, gp), on(pf, pf)), (Ok(df), Ok(df), Ok(df)));
        assert_eq!(on(df, pf), Err(Shutdown));
        assert_eq!(escalate(Event::External(0x20), gp), Ok(gp));
    }

    #[test]
    fn an_unreachable_kernel_stack_becomes_a_double_fault_on_its_own_stack() {
        let mut system = System::long(TOUCH);
        system.handler(8, 0x8e, 1);
        system.put64(TSS + 4, &[NOWHERE]);
        system.enter_ring3();
        system.unmap(NOWHERE - 8);
        system.unmap(DATA);
        system.cpu.regs[0] = DATA;
        system.go().unwrap();
        assert_eq!(system.rip(), HANDLERS + 8 * 16);
        assert_eq!(system.cpu.cr2, NOWHERE - 8, "of the second page fault");
        assert_eq!(system.rsp(), IST_STACK - 48);
    }

    #[test]
    fn an_nmi_blocks_others_until_iret() {
        let mut system = System::long(&[]);
        system.handler_code(2, &[0x48, 0xcf]);
        system.guest.cpu.deliver(Event::Nmi).unwrap();
        assert!(system.cpu.nmi_blocked);
        assert_eq!(system.rip(), HANDLERS + 2 * 16);
        system.go().unwrap();
        assert!(!system.cpu.nmi_blocked);
        assert_eq!(system.rip(), CODE);
    }

    #[test]
    fn real_mode_goes_through_the_vector_table() {
        let mut guest = super::super::testing::Guest::new(16, &[0xcd, 0x21]);
        guest.poke(0x21 * 4, &[0x34, 0x12, 0x00, 0x20]);
        guest.cpu.rflags |= rflags::IF | rflags::CF;
        guest.step().unwrap();
        assert_eq!(guest.cpu.regs[RIP as usize], 0x1234);
        assert_eq!(guest.cpu.segs[seg::CS as usize].base, 0x2_0000);
        assert!(!guest.cpu.flag(rflags::IF));
        let frame = guest.peek::<6>(0x8000 - 6);
        assert_eq!(frame[..2], [2, 0]);
        assert_eq!(frame[4..], [0x03, 0x02], "flags with IF and CF");
    }

    #[test]
    fn protected_mode_switches_stacks_by_the_task_state_segment() {
        let mut system = System::protected(&[0xcd, 0x80]);
        system.put64(IDT + 8 * 0x80, &[gate(KERNEL_CODE32, HANDLERS, 0xef)]); // trap gate, DPL 3
        system.handler_code(0, &[0xcf]); // iretd
        system.enter_ring3();
        system.cpu.rflags |= rflags::IF;
        system.go().unwrap();
        assert_eq!((system.rip(), system.cs(), system.ss()), (HANDLERS, KERNEL_CODE32, KERNEL_DATA));
        assert!(system.cpu.flag(rflags::IF), "a trap gate leaves IF");
        let frame = system.get32::<5>(KERNEL_STACK - 20);
        let stack = [System::STACK as u32, USER_DATA.into()];
        assert_eq!(frame, [CODE as u32 + 2, USER_CODE32.into(), 0x202, stack[0], stack[1]]);
        system.go().unwrap();
        assert_eq!((system.rip(), system.rsp(), system.ss()), (CODE + 2, System::STACK, USER_DATA));
        assert!(system.cpu.segs[seg::DS as usize].selector == USER_DATA);
    }

    #[test]
    fn virtual_8086_code_is_left_and_entered_by_interrupt_and_iret() {
        let mut system = System::protected(&[0xcf]); // iretd
        system.handler_code(13, &[]);
        let frame = [0x100u32, 0x2000, 0x0002_0202, 0xff00, 0x3000, 0x11, 0x22, 0x33, 0x44];
        let rsp = System::STACK - 36;
        system.put32(rsp, &frame);
        system.poke(0x2_0100, &[0xfa]); // cli: IOPL is 0, so #GP
        system.cpu.regs[reg::RSP as usize] = rsp;
        system.go().unwrap();
        assert!(system.cpu.mode.v86 && system.cpu.cpl == 3);
        assert_eq!(
            (system.rip(), system.cs(), system.cpu.segs[seg::GS as usize].base),
            (0x100, 0x2000, 0x440)
        );
        system.go().unwrap();
        assert_eq!((system.rip(), system.cpu.cpl, system.cpu.mode.v86), (HANDLERS + 13 * 16, 0, false));
        let pushed = system.get32::<10>(KERNEL_STACK - 40);
        assert_eq!(pushed[..2], [0, 0x100]);
        assert_eq!(pushed[2..], [0x2000, 0x0003_0202, 0xff00, 0x3000, 0x11, 0x22, 0x33, 0x44]);
        assert!(system.cpu.segs[seg::DS as usize].unusable);
    }

    #[test]
    fn the_processor_reads_its_tables_as_supervisor_under_smap() {
        let mut system = System::long(&[0xcd, 0x80]);
        system.handler(0x80, 0xee, 0);
        system.enter_ring3();
        system.cpu.cr4 |= cr4::SMAP | cr4::SMEP;
        system.put64(TSS + 4, &[0xf000]); // the kernel's own page
        system.cpu.update_mode();
        system.go().unwrap();
        assert_eq!(system.rip(), HANDLERS + 0x80 * 16);
        assert_eq!(system.get64::<1>(0xf000 - 40), [CODE + 2]);
    }
}
