//! Task switches through task state segments and task gates (SDM 3A, chapter 7). Long mode has none.

use engine::x86::bits::{cr0, cr4, rflags};

use super::cpu::Cpu;
use super::descriptor::{Descriptor, gp, np, null, rpl, selector_fault, system, ts};
use super::exception::{Exception, Exec, vector};
use super::op::{RIP, seg};
use super::segment::{null_segment, v86_segment};
use super::stack::Stack;
use super::tlb::View;

/// What makes the CPU switch tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// `JMP`: the old task is done.
    Jump,
    /// `CALL`: the old task is nested around the new one.
    Call,
    /// An interrupt or exception through a task gate: nested, too.
    Interrupt,
    /// `IRET` with NT set: back to the task in the link field.
    Return,
}

impl Reason {
    fn nests(self) -> bool {
        matches!(self, Reason::Call | Reason::Interrupt)
    }
}

/// A task switch to be made.
#[derive(Clone, Copy, Debug)]
pub(super) struct TaskSwitch {
    /// Task state segment of the new task.
    pub selector: u16,
    /// Why.
    pub reason: Reason,
    /// Where the old task goes on.
    pub return_rip: u64,
    /// RFLAGS of the old task.
    pub flags: u64,
    /// Error code for the new task's stack.
    pub code: Option<u32>,
}

/// Offsets in a task state segment (SDM 3A, figures 7-2 and 7-10).
struct Layout {
    /// Bytes of a register slot.
    width: u64,
    ip: u64,
    /// FLAGS; the general registers follow.
    flags: u64,
    /// ES; CS, SS, DS and, in 32-bit segments, FS and GS follow.
    segments: u64,
    segment_count: usize,
    ldt: u64,
    /// Least limit.
    limit: u32,
}

const TSS32: Layout =
    Layout { width: 4, ip: 0x20, flags: 0x24, segments: 0x48, segment_count: 6, ldt: 0x60, limit: 0x67 };
const TSS16: Layout =
    Layout { width: 2, ip: 0x0e, flags: 0x10, segments: 0x22, segment_count: 4, ldt: 0x2a, limit: 0x2b };
/// CR3 of a 32-bit task state segment.
const CR3: u64 = 0x1c;
/// The word with the T flag (debug trap on switch) in bit 0.
const TRAP: u64 = 0x64;
/// DR6.BT: a task switch to a task with its T flag set.
const DR6_TASK: u64 = 1 << 15;

fn layout(kind: u16) -> &'static Layout {
    if kind & 8 != 0 { &TSS32 } else { &TSS16 }
}

/// What a task state segment says of its task.
struct Task {
    ip: u64,
    flags: u64,
    regs: [u64; 8],
    segments: [u16; 6],
    ldt: u16,
    cr3: Option<u64>,
    trap: bool,
}

impl Cpu {
    /// Switches tasks. Up to the point where the new task's registers are loaded an exception leaves
    /// the old task as it was; after that it is raised in the new task.
    pub(super) fn switch_task(&mut self, switch: &TaskSwitch) -> Exec {
        let mut new = self.new_task(switch)?;
        let (old_layout, new_layout) = (layout(self.tr.access), layout(new.access()));
        let (old_selector, old_base) = (self.tr.selector, self.tr.base);
        self.probe_write(View::Kernel, old_base, u64::from(old_layout.limit) + 1)?;
        self.probe_write(View::Kernel, new.base(), u64::from(new_layout.limit) + 1)?;
        let mut task = self.read_task(new.base(), new_layout)?;
        if !switch.reason.nests() {
            self.set_old_busy(old_selector, false)?;
        }
        let nested = rflags::NT;
        let flags = if switch.reason == Reason::Return { switch.flags & !nested } else { switch.flags };
        self.write_task(old_base, old_layout, switch.return_rip, flags)?;
        if switch.reason.nests() {
            self.store_linear(View::Kernel, new.base(), old_selector)?;
            task.flags |= nested;
        }
        if switch.reason != Reason::Return {
            self.mark_busy(&mut new, true)?;
        }
        // The commit point: from here on it is the new task.
        self.tr = new.segment(switch.selector);
        self.cr0 |= cr0::TS;
        self.load_task(&task, new_layout)?;
        if let Some(code) = switch.code {
            let mut stack = Stack::current(self);
            stack.push(self, new_layout.width, code.into())?;
            stack.commit(self);
        }
        if self.next_rip > self.segs[seg::CS as usize].limit.into() {
            return Err(Exception::GP0);
        }
        if task.trap {
            self.debug_trap |= DR6_TASK;
        }
        Ok(())
    }

    /// Checks the task state segment to switch to.
    fn new_task(&mut self, switch: &TaskSwitch) -> Exec<Descriptor> {
        let selector = switch.selector;
        let back = switch.reason == Reason::Return;
        let vector = if back { vector::TS } else { vector::GP };
        if null(selector) || selector & 4 != 0 {
            return Err(selector_fault(vector, selector));
        }
        let tss = self.descriptor(selector, vector)?;
        let fits = match tss.system() {
            Some(system::TSS | system::TSS16) => !back,
            Some(system::TSS_BUSY | system::TSS16_BUSY) => back,
            _ => false,
        };
        if !fits {
            return Err(selector_fault(vector, selector));
        }
        if !tss.present() {
            return Err(np(selector));
        }
        if tss.limit() < layout(tss.access()).limit {
            return Err(ts(selector));
        }
        Ok(tss)
    }

    fn set_old_busy(&mut self, selector: u16, busy: bool) -> Exec {
        match self.find_descriptor(selector & !7)? {
            Some(mut old) if !null(selector) => self.mark_busy(&mut old, busy),
            _ => Ok(()),
        }
    }

    fn task_slot(&mut self, base: u64, offset: u64, width: u64) -> Exec<u64> {
        let linear = self.table_address(base, offset)?;
        Ok(match width {
            2 => self.load_linear::<u16>(View::Kernel, linear)?.into(),
            _ => self.load_linear::<u32>(View::Kernel, linear)?.into(),
        })
    }

    fn read_task(&mut self, base: u64, layout: &Layout) -> Exec<Task> {
        let width = layout.width;
        let mut regs = [0; 8];
        for (n, reg) in (1..).zip(&mut regs) {
            *reg = self.task_slot(base, layout.flags + n * width, width)?;
        }
        let mut segments = [0; 6];
        for (n, segment) in (0..).zip(&mut segments[..layout.segment_count]) {
            *segment = self.task_slot(base, layout.segments + n * width, 2)? as u16;
        }
        let wide = width == 4;
        Ok(Task {
            ip: self.task_slot(base, layout.ip, width)?,
            flags: self.task_slot(base, layout.flags, width)?,
            regs,
            segments,
            ldt: self.task_slot(base, layout.ldt, 2)? as u16,
            cr3: if wide { Some(self.task_slot(base, CR3, 4)?) } else { None },
            trap: wide && self.task_slot(base, TRAP, 2)? & 1 != 0,
        })
    }

    /// Saves the old task: the dynamic fields only, as hardware does.
    fn write_task(&mut self, base: u64, layout: &Layout, ip: u64, flags: u64) -> Exec {
        let width = layout.width;
        let mut slots = vec![(layout.ip, ip), (layout.flags, flags)];
        slots.extend((1..).zip(&self.regs[..8]).map(|(n, &reg)| (layout.flags + n * width, reg)));
        for (offset, value) in slots {
            let linear = self.table_address(base, offset)?;
            match width {
                2 => self.store_linear(View::Kernel, linear, value as u16)?,
                _ => self.store_linear(View::Kernel, linear, value as u32)?,
            }
        }
        for n in 0..layout.segment_count {
            let linear = self.table_address(base, layout.segments + n as u64 * width)?;
            self.store_linear(View::Kernel, linear, self.segs[n].selector)?;
        }
        Ok(())
    }

    /// Loads the new task's registers, then its segments with their checks.
    fn load_task(&mut self, task: &Task, layout: &Layout) -> Exec {
        const KNOWN: u64 = 0x3f_7fd5;
        if let Some(cr3) = task.cr3
            && self.mode.paging
        {
            self.cr3 = cr3;
            if self.cr4 & cr4::PAE != 0 {
                self.pdptes = self.read_pdptes(cr3)?;
            }
            self.tlb.flush_pcid(0, 0);
        }
        let upper = if layout.width == 2 { 0xffff_0000 } else { 0 };
        for (reg, value) in self.regs[..8].iter_mut().zip(task.regs) {
            *reg = *reg & upper | value;
        }
        let vm = if layout.width == 4 { rflags::VM } else { 0 };
        self.rflags = task.flags & KNOWN & !(rflags::VM ^ vm) | rflags::FIXED;
        self.next_rip = task.ip;
        self.regs[RIP as usize] = task.ip;
        let v86 = self.rflags & rflags::VM != 0;
        self.cpl = if v86 { 3 } else { rpl(task.segments[seg::CS as usize]) };
        for (segment, &selector) in self.segs.iter_mut().zip(&task.segments) {
            *segment = if v86 { v86_segment(selector) } else { null_segment(selector) };
        }
        self.ldtr = null_segment(task.ldt);
        self.update_mode();
        self.ldtr = self.ldt_segment(task.ldt, vector::TS)?;
        if !v86 {
            self.load_task_segments(&task.segments)?;
        }
        Ok(())
    }

    fn load_task_segments(&mut self, selectors: &[u16; 6]) -> Exec {
        let level = self.cpl;
        let cs = self.task_code(selectors[seg::CS as usize])?;
        self.segs[seg::CS as usize] = cs.segment(cs.selector);
        self.segs[seg::SS as usize] = self.stack_segment(selectors[seg::SS as usize], level, vector::TS)?;
        self.update_mode();
        for index in [seg::DS, seg::ES, seg::FS, seg::GS] {
            self.segs[index as usize] = self.data_segment(selectors[index as usize], vector::TS)?;
        }
        Ok(())
    }

    fn task_code(&mut self, selector: u16) -> Exec<Descriptor> {
        if null(selector) {
            return Err(ts(selector));
        }
        let mut cs = self.descriptor(selector, vector::TS)?;
        let level = rpl(selector);
        let reachable = if cs.conforming() { cs.dpl() <= level } else { cs.dpl() == level };
        if !cs.code() || !reachable {
            return Err(ts(selector));
        }
        if !cs.present() {
            return Err(np(selector));
        }
        self.mark_accessed(&mut cs)?;
        Ok(cs)
    }

    /// A far transfer met a task state segment or task gate: switches to it after the checks of privilege.
    pub(super) fn far_task(&mut self, found: &Descriptor, reason: Reason) -> Exec {
        let reachable = found.dpl() >= self.cpl.max(rpl(found.selector));
        if !reachable || self.mode.long {
            return Err(gp(found.selector));
        }
        let selector = if found.system() == Some(system::TASK_GATE) {
            if !found.present() {
                return Err(np(found.selector));
            }
            (found.low >> 16) as u16
        } else {
            found.selector
        };
        let (return_rip, flags) = (self.next_rip, self.rflags);
        self.switch_task(&TaskSwitch { selector, reason, return_rip, flags, code: None })
    }

    /// `IRET` with NT set: back to the task that the link field names.
    pub(super) fn task_return(&mut self) -> Exec {
        let selector = self.task_field::<u16>(0)?;
        let (return_rip, flags) = (self.next_rip, self.rflags);
        self.switch_task(&TaskSwitch { selector, reason: Reason::Return, return_rip, flags, code: None })
    }
}

#[cfg(test)]
mod tests {
    use super::super::op::reg;
    use super::super::systest::*;
    use super::super::testing::CODE;
    use super::*;

    /// The other task's segment, and its selector.
    const OTHER: u64 = 0x6000;
    const OTHER_TASK: u16 = FREE;

    /// A system whose second task starts at `HANDLERS` in ring 3 with EAX = 7.
    fn two_tasks(code: &[u8]) -> System {
        let system = System::protected(code);
        system.put64(GDT + u64::from(OTHER_TASK), &[descriptor(OTHER, 0x67, 0x89, 0)]);
        system.put32(OTHER + 0x20, &[HANDLERS as u32, 0x202, 7]);
        system.put32(OTHER + 0x38, &[0x9_0000]); // ESP
        let (code, data) = (u32::from(USER_CODE32), u32::from(USER_DATA));
        system.put32(OTHER + 0x48, &[data, code, data, data, 0, 0, 0]);
        system
    }

    #[test]
    fn a_call_of_a_task_nests_it_and_iret_comes_back() {
        // call 0x50:0; and in the other task: iretd
        let mut system = two_tasks(&[0x9a, 0, 0, 0, 0, 0x50, 0]);
        system.handler_code(0, &[0xcf]);
        system.cpu.regs[reg::RBX as usize] = 0x1234;
        system.go().unwrap();
        assert_eq!((system.rip(), system.cpu.cpl, system.cpu.regs[0]), (HANDLERS, 3, 7));
        assert_eq!((system.cs(), system.ss(), system.rsp()), (USER_CODE32, USER_DATA, 0x9_0000));
        assert!(system.cpu.flag(rflags::NT) && system.cpu.cr0 & cr0::TS != 0);
        assert_eq!(system.get32::<1>(OTHER), [u32::from(TASK)], "the link back");
        let kinds = |system: &System| {
            [TASK, OTHER_TASK].map(|at| system.get64::<1>(GDT + u64::from(at))[0] >> 40 & 0xf)
        };
        assert_eq!(kinds(&system), [0xb, 0xb], "both busy");
        assert_eq!(system.get32::<1>(TSS + 0x20), [CODE as u32 + 7], "EIP of the old task");

        system.go().unwrap();
        assert_eq!((system.rip(), system.cpu.cpl), (CODE + 7, 0));
        assert_eq!((system.cpu.regs[reg::RBX as usize], system.cpu.tr.selector), (0x1234, TASK));
        assert!(!system.cpu.flag(rflags::NT));
        assert_eq!(kinds(&system), [0xb, 0x9]);
        let flags = system.get32::<1>(OTHER + 0x24)[0];
        assert_eq!(u64::from(flags) & rflags::NT, 0);
    }

    #[test]
    fn a_jump_ends_the_old_task() {
        let mut system = two_tasks(&[0xea, 0, 0, 0, 0, 0x50, 0]);
        system.go().unwrap();
        assert_eq!(system.rip(), HANDLERS);
        assert!(!system.cpu.flag(rflags::NT));
        let old = system.get64::<1>(GDT + u64::from(TASK))[0];
        assert_eq!(old >> 40 & 0xf, 9, "available again");
    }

    #[test]
    fn a_task_gate_catches_an_exception_with_its_error_code() {
        let mut system = two_tasks(&[0xcd, 0x80]); // int 0x80 through an empty gate
        system.put64(IDT + 8 * 0x80, &[0]);
        system.put64(IDT + 8 * 13, &[gate(OTHER_TASK, 0, 0x85)]);
        system.go().unwrap();
        assert_eq!((system.rip(), system.rsp()), (HANDLERS, 0x9_0000 - 4));
        assert_eq!(system.get32::<1>(0x9_0000 - 4), [0x80 * 8 + 2]);
        assert_eq!(system.get32::<1>(TSS + 0x20), [CODE as u32], "the fault returns to the INT");
    }

    #[test]
    fn a_busy_task_is_not_entered_again() {
        let mut system = two_tasks(&[0x9a, 0, 0, 0, 0, 0x40, 0]);
        assert_eq!(system.guest.step(), Err(gp(TASK)));
        assert_eq!((system.rip(), system.cpu.cr0 & cr0::TS), (CODE, 0));
    }

    #[test]
    fn a_new_task_with_a_bad_segment_faults_in_its_own_context() {
        let mut system = two_tasks(&[0xea, 0, 0, 0, 0, 0x50, 0]);
        system.put32(OTHER + 0x50, &[KERNEL_DATA.into()]); // SS of ring 0 for ring 3
        assert_eq!(system.guest.step(), Err(ts(KERNEL_DATA)));
        assert_eq!((system.rip(), system.cpu.tr.selector, system.cpu.regs[0]), (HANDLERS, OTHER_TASK, 7));
    }

    #[test]
    fn a_16_bit_task_has_its_own_layout() {
        let mut system = two_tasks(&[0x9a, 0, 0, 0, 0, 0x50, 0]);
        system.put64(GDT + u64::from(OTHER_TASK), &[descriptor(OTHER, 0x2b, 0x81, 0)]);
        system.poke(OTHER, &[0; 0x2c]);
        system.poke(OTHER + 0x0e, &[0x00, 0x50, 0x02, 0x00, 0x11, 0x22]); // IP, FLAGS, AX
        system.poke(OTHER + 0x24, &[0x38, 0, 0x10, 0]); // CS, SS
        system.go().unwrap();
        assert_eq!((system.rip(), system.cs(), system.cpu.mode.code_bits), (HANDLERS, KERNEL_CODE16, 16));
        assert_eq!(system.cpu.regs[0] as u16, 0x2211);
        assert!(system.cpu.segs[seg::DS as usize].unusable);
    }
}
