//! Far jumps, calls and returns, and the return from interrupts (SDM 3A, 5.8; SDM 2 "CALL", "JMP",
//! "RET", "IRET").

use engine::x86::bits::{access, rflags};

use super::access::canonical;
use super::cpu::Cpu;
use super::descriptor::{Descriptor, Gate, gp, np, null, rpl, system, ts};
use super::exception::{Exception, Exec, vector};
use super::op::{reg, seg};
use super::segment::{null_stack, v86_segment};
use super::stack::Stack;
use super::task::Reason;
use super::tlb::View;

/// The low bits of an offset or flags image of `size` bytes.
fn cut(value: u64, size: u64) -> u64 {
    match size {
        2 => value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    }
}

/// What a return leads to.
struct Return {
    cs: Descriptor,
    rip: u64,
}

impl Cpu {
    fn real_or_v86(&self) -> bool {
        !self.mode.protected || self.mode.v86
    }

    /// Real and virtual-8086 mode: CS from the selector alone.
    fn enter_real_code(&mut self, selector: u16, rip: u64) -> Exec {
        let limit = if self.mode.v86 { 0xffff } else { self.segs[seg::CS as usize].limit };
        if rip > limit.into() {
            return Err(Exception::GP0);
        }
        if self.mode.v86 {
            self.segs[seg::CS as usize] = v86_segment(selector);
        } else {
            self.load_real_segment(seg::CS, selector);
        }
        self.next_rip = rip;
        self.update_mode();
        Ok(())
    }

    /// The offset must lie in the code segment.
    fn check_target(&self, cs: &Descriptor, rip: u64) -> Exec {
        let inside = if self.mode.long && cs.long_code() { canonical(rip) } else { rip <= cs.limit().into() };
        if inside { Ok(()) } else { Err(Exception::GP0) }
    }

    /// L and D together are reserved in long mode.
    fn reserved_code(&self, cs: &Descriptor) -> bool {
        let both = access::L | access::DB;
        self.mode.long && cs.access() & both == both
    }

    /// Checks a code segment that a direct far jump or call leads to.
    fn direct_code(&mut self, cs: &mut Descriptor) -> Exec {
        let selector = cs.selector;
        let reachable = if cs.conforming() {
            cs.dpl() <= self.cpl
        } else {
            cs.dpl() == self.cpl && rpl(selector) <= self.cpl
        };
        if !reachable || self.reserved_code(cs) {
            return Err(gp(selector));
        }
        if !cs.present() {
            return Err(np(selector));
        }
        self.mark_accessed(cs)
    }

    fn far_descriptor(&mut self, selector: u16) -> Exec<Descriptor> {
        if null(selector) {
            return Err(Exception::GP0);
        }
        self.descriptor(selector, vector::GP)
    }

    /// `JMP ptr16:xx` and `JMP m16:xx`; `size` is the operand size in bytes.
    pub(super) fn far_jump(&mut self, selector: u16, offset: u64, size: u64) -> Exec {
        let offset = cut(offset, size);
        if self.real_or_v86() {
            return self.enter_real_code(selector, offset);
        }
        let mut found = self.far_descriptor(selector)?;
        if found.code() {
            self.direct_code(&mut found)?;
            self.check_target(&found, offset)?;
            self.enter_code(&found, self.cpl, offset);
            return Ok(());
        }
        match found.system() {
            Some(system::CALL_GATE | system::CALL_GATE16) => {
                let (cs, gate) = self.call_gate(&found)?;
                let reachable = if cs.conforming() { cs.dpl() <= self.cpl } else { cs.dpl() == self.cpl };
                if !reachable {
                    return Err(gp(cs.selector));
                }
                self.check_target(&cs, gate.offset)?;
                self.enter_code(&cs, self.cpl, gate.offset);
                Ok(())
            }
            Some(system::TASK_GATE | system::TSS | system::TSS16) => self.far_task(&found, Reason::Jump),
            _ => Err(gp(selector)),
        }
    }

    /// A call gate and the code segment behind it, checked but for the rule that differs between
    /// `CALL` and `JMP`.
    fn call_gate(&mut self, found: &Descriptor) -> Exec<(Descriptor, Gate)> {
        let selector = found.selector;
        let long = self.mode.long;
        let gate = Gate::new(found.low, found.high & 0xffff_ffff);
        // In long mode the second half must say "no descriptor", and 16-bit gates are gone.
        let valid = !long || (gate.kind == system::CALL_GATE && found.high >> 40 & 0x1f == 0);
        if !valid || gate.dpl < self.cpl.max(rpl(selector)) {
            return Err(gp(selector));
        }
        if !gate.present {
            return Err(np(selector));
        }
        let mut cs = self.far_descriptor(gate.selector)?;
        let wide = access::DB;
        let fit = !long || (cs.long_code() && cs.access() & wide == 0);
        if !cs.code() || cs.dpl() > self.cpl || !fit {
            return Err(gp(gate.selector));
        }
        if !cs.present() {
            return Err(np(gate.selector));
        }
        self.mark_accessed(&mut cs)?;
        Ok((cs, gate))
    }

    /// `CALL ptr16:xx` and `CALL m16:xx`.
    pub(super) fn far_call(&mut self, selector: u16, offset: u64, size: u64) -> Exec {
        let offset = cut(offset, size);
        if self.real_or_v86() {
            let stack = self.push_return(Stack::current(self), size)?;
            self.enter_real_code(selector, offset)?;
            stack.commit(self);
            return Ok(());
        }
        let mut found = self.far_descriptor(selector)?;
        if found.code() {
            self.direct_code(&mut found)?;
            self.check_target(&found, offset)?;
            let stack = self.push_return(Stack::current(self), size)?;
            stack.commit(self);
            self.enter_code(&found, self.cpl, offset);
            return Ok(());
        }
        match found.system() {
            Some(system::CALL_GATE | system::CALL_GATE16) => self.call_through_gate(&found),
            Some(system::TASK_GATE | system::TSS | system::TSS16) => self.far_task(&found, Reason::Call),
            _ => Err(gp(selector)),
        }
    }

    /// Pushes CS and the address of the next instruction.
    fn push_return(&mut self, mut stack: Stack, size: u64) -> Exec<Stack> {
        stack.push(self, size, self.segs[seg::CS as usize].selector.into())?;
        stack.push(self, size, self.next_rip)?;
        Ok(stack)
    }

    fn call_through_gate(&mut self, found: &Descriptor) -> Exec {
        let (cs, gate) = self.call_gate(found)?;
        self.check_target(&cs, gate.offset)?;
        let size = if self.mode.long { 8 } else { gate.width() };
        if cs.conforming() || cs.dpl() == self.cpl {
            let stack = match self.mode.long {
                true => Stack::long(self.regs[reg::RSP as usize], self.view()),
                false => Stack::current(self),
            };
            let stack = self.push_return(stack, size)?;
            stack.commit(self);
            self.enter_code(&cs, self.cpl, gate.offset);
            return Ok(());
        }
        let level = cs.dpl();
        let (mut stack, ss) = if self.mode.long {
            let rsp = self.task_field::<u64>(4 + 8 * u32::from(level))?;
            if !canonical(rsp) {
                return Err(ts(self.tr.selector));
            }
            (Stack::long(rsp, View::Kernel), null_stack(level))
        } else {
            let (segment, sp) = self.inner_stack(level)?;
            (Stack::inner(segment, sp), segment)
        };
        stack.push(self, size, self.segs[seg::SS as usize].selector.into())?;
        stack.push(self, size, self.regs[reg::RSP as usize])?;
        if !self.mode.long {
            let mut outer = Stack::current(self);
            for n in (0..u64::from(gate.parameters)).rev() {
                let parameter = outer.peek(self, size, n * size)?;
                stack.push(self, size, parameter)?;
            }
        }
        let stack = self.push_return(stack, size)?;
        stack.commit(self);
        self.segs[seg::SS as usize] = ss;
        self.enter_code(&cs, level, gate.offset);
        Ok(())
    }

    /// Checks the code segment that a return leads to.
    fn return_code(&mut self, selector: u16, rip: u64) -> Exec<Return> {
        if null(selector) {
            return Err(Exception::GP0);
        }
        let mut cs = self.descriptor(selector, vector::GP)?;
        let level = rpl(selector);
        let matches = if cs.conforming() { cs.dpl() <= level } else { cs.dpl() == level };
        if !cs.code() || level < self.cpl || !matches || self.reserved_code(&cs) {
            return Err(gp(selector));
        }
        if !cs.present() {
            return Err(np(selector));
        }
        self.check_target(&cs, rip)?;
        self.mark_accessed(&mut cs)?;
        Ok(Return { cs, rip })
    }

    /// Checks the stack segment that a return to `level` brings back. Null is fine for 64-bit code
    /// above ring 3.
    fn return_stack(&mut self, to: &Return, selector: u16, level: u8) -> Exec<engine::x86::Segment> {
        if null(selector) && self.mode.long && to.cs.long_code() && level != 3 && rpl(selector) == level {
            return Ok(null_stack(level));
        }
        self.stack_segment(selector, level, vector::GP)
    }

    /// Takes on a return to an outer level, or to any level in 64-bit mode.
    fn leave_to(&mut self, to: &Return, ss: engine::x86::Segment, rsp: u64, level: u8) {
        let outer = level != self.cpl;
        self.segs[seg::SS as usize] = ss;
        self.enter_code(&to.cs, level, to.rip);
        let kept = if self.mode.stack_bits == 16 { self.regs[reg::RSP as usize] & 0xffff_0000 } else { 0 };
        self.regs[reg::RSP as usize] = match self.mode.stack_bits {
            16 => kept | rsp & 0xffff,
            32 => rsp & 0xffff_ffff,
            _ => rsp,
        };
        if outer {
            self.drop_inner_segments();
        }
    }

    /// `RETF`, which then drops `extra` bytes of parameters.
    pub(super) fn far_return(&mut self, size: u64, extra: u64) -> Exec {
        let mut stack = Stack::current(self);
        let rip = stack.pop(self, size)?;
        let selector = stack.pop(self, size)? as u16;
        stack.skip(extra);
        if self.real_or_v86() {
            self.enter_real_code(selector, rip)?;
            stack.commit(self);
            return Ok(());
        }
        let to = self.return_code(selector, rip)?;
        let level = rpl(selector);
        if level == self.cpl {
            stack.commit(self);
            self.enter_code(&to.cs, level, to.rip);
            return Ok(());
        }
        let rsp = stack.pop(self, size)?;
        let ss = stack.pop(self, size)? as u16;
        let ss = self.return_stack(&to, ss, level)?;
        self.leave_to(&to, ss, rsp.wrapping_add(extra), level);
        Ok(())
    }

    /// `IRET`.
    pub(super) fn interrupt_return(&mut self, size: u64) -> Exec {
        if self.mode.v86 && self.iopl() < 3 {
            return Err(Exception::GP0);
        }
        if self.real_or_v86() {
            self.real_interrupt_return(size)?;
        } else if self.flag(rflags::NT) {
            if self.mode.long {
                return Err(Exception::GP0);
            }
            self.task_return()?;
        } else {
            self.protected_interrupt_return(size)?;
        }
        if std::mem::take(&mut self.nmi_blocked) {
            self.vm.vcpus[self.id as usize].merge_nmis();
        }
        Ok(())
    }

    fn real_interrupt_return(&mut self, size: u64) -> Exec {
        let mut stack = Stack::current(self);
        let rip = stack.pop(self, size)?;
        let selector = stack.pop(self, size)? as u16;
        let flags = stack.pop(self, size)?;
        let mut mask = rflags::STATUS | rflags::TF | rflags::IF | rflags::DF | rflags::NT;
        if !self.mode.v86 {
            mask |= rflags::IOPL;
        }
        if size == 4 {
            mask |= rflags::RF | rflags::AC | rflags::ID;
        }
        self.enter_real_code(selector, rip)?;
        stack.commit(self);
        self.set_flags(flags, mask);
        Ok(())
    }

    fn protected_interrupt_return(&mut self, size: u64) -> Exec {
        let mut stack = Stack::current(self);
        let rip = stack.pop(self, size)?;
        let selector = stack.pop(self, size)? as u16;
        let flags = stack.pop(self, size)?;
        if flags & rflags::VM != 0 && self.cpl == 0 && size == 4 && !self.mode.long {
            return self.return_to_v86(stack, rip, selector, flags);
        }
        let mask = self.return_flags(size);
        let to = self.return_code(selector, rip)?;
        let level = rpl(selector);
        if level == self.cpl && !self.mode.long64 {
            stack.commit(self);
            self.enter_code(&to.cs, level, to.rip);
        } else {
            let rsp = stack.pop(self, size)?;
            let ss = stack.pop(self, size)? as u16;
            let ss = self.return_stack(&to, ss, level)?;
            self.leave_to(&to, ss, rsp, level);
        }
        self.set_flags(flags, mask);
        Ok(())
    }

    /// The flags that `IRET` may change at the current privilege level.
    fn return_flags(&self, size: u64) -> u64 {
        let mut mask = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
        if size != 2 {
            mask |= rflags::RF | rflags::AC | rflags::ID;
        }
        if self.cpl <= self.iopl() {
            mask |= rflags::IF;
        }
        if self.cpl == 0 {
            mask |= rflags::IOPL;
            if size != 2 {
                mask |= rflags::VIF | rflags::VIP;
            }
        }
        mask
    }

    /// Changes the flags in `mask`.
    pub(super) fn set_flags(&mut self, flags: u64, mask: u64) {
        let changed = (self.rflags ^ flags) & mask;
        self.rflags ^= changed;
        if changed & (rflags::AC | rflags::VM) != 0 {
            self.update_mode();
        }
    }

    /// `IRET` to virtual-8086 mode (SDM 3A, 21.2.5).
    fn return_to_v86(&mut self, mut stack: Stack, rip: u64, cs: u16, flags: u64) -> Exec {
        const KNOWN: u64 = 0x3f_7fd5;
        let rsp = stack.pop(self, 4)?;
        let mut selectors = [0; 6];
        selectors[seg::CS as usize] = cs;
        for index in [seg::SS, seg::ES, seg::DS, seg::FS, seg::GS] {
            selectors[index as usize] = stack.pop(self, 4)? as u16;
        }
        if rip > 0xffff {
            return Err(Exception::GP0);
        }
        self.rflags = flags & KNOWN | rflags::FIXED;
        self.segs = selectors.map(v86_segment);
        self.cpl = 3;
        self.regs[reg::RSP as usize] = rsp;
        self.next_rip = rip;
        self.update_mode();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::op::RIP;
    use super::super::systest::*;
    use super::super::testing::CODE;
    use super::*;

    /// call 0x50|3:0 in 32-bit code
    const CALL: &[u8] = &[0x9a, 0, 0, 0, 0, 0x53, 0];

    #[test]
    fn ring_3_calls_ring_0_through_a_gate_with_parameters_and_returns() {
        let mut system = System::protected(CALL);
        let target = gate(KERNEL_CODE32, HANDLERS, 0xec) | 2 << 32;
        system.put64(GDT + u64::from(FREE), &[target]);
        system.handler_code(0, &[0xca, 8, 0]); // retf 8
        system.enter_ring3();
        let sp = System::STACK - 8;
        system.put32(sp, &[0xaaaa, 0xbbbb]);
        system.cpu.regs[reg::RSP as usize] = sp;
        system.go().unwrap();
        assert_eq!((system.rip(), system.cpu.cpl, system.ss()), (HANDLERS, 0, KERNEL_DATA));
        let frame = system.get32::<6>(KERNEL_STACK - 24);
        let user = (u32::from(USER_CODE32), u32::from(USER_DATA));
        assert_eq!(frame, [CODE as u32 + 7, user.0, 0xaaaa, 0xbbbb, sp as u32, user.1]);
        system.cpu.segs[seg::FS as usize] = segment(KERNEL_DATA, 0xc093);
        system.go().unwrap();
        assert_eq!((system.rip(), system.cpu.cpl, system.ss()), (CODE + 7, 3, USER_DATA));
        assert_eq!(system.rsp(), System::STACK, "both stacks lost the parameters");
        assert!(system.cpu.segs[seg::FS as usize].unusable, "the kernel's segment does not leak");
        assert_eq!(system.cpu.segs[seg::DS as usize].selector, USER_DATA);
    }

    #[test]
    fn a_gate_above_the_callers_level_is_refused() {
        let mut system = System::protected(CALL);
        system.put64(GDT + u64::from(FREE), &[gate(KERNEL_CODE32, HANDLERS, 0x8c)]);
        system.enter_ring3();
        assert_eq!(system.guest.step(), Err(gp(FREE)));
        assert_eq!((system.rip(), system.rsp(), system.cpu.cpl), (CODE, System::STACK, 3));
    }

    #[test]
    fn a_64_bit_call_gate_leads_from_ring_3_to_the_kernels_stack() {
        // call [rip]: m16:32 behind the instruction
        let mut system = System::long(&[0xff, 0x1d, 0, 0, 0, 0, 0, 0, 0, 0, 0x53, 0]);
        system.put64(GDT + u64::from(FREE), &[gate(KERNEL_CODE, HANDLERS, 0xec), 0]);
        system.handler_code(0, &[0x48, 0xcb]); // retfq
        system.enter_ring3();
        system.go().unwrap();
        assert_eq!((system.rip(), system.cpu.cpl, system.ss()), (HANDLERS, 0, 0));
        let user = (u64::from(USER_CODE), u64::from(USER_DATA));
        assert_eq!(system.get64::<4>(KERNEL_STACK - 32), [CODE + 6, user.0, System::STACK, user.1]);
        system.go().unwrap();
        assert_eq!((system.rip(), system.cpu.cpl, system.rsp()), (CODE + 6, 3, System::STACK));
    }

    #[test]
    fn a_dropped_segment_keeps_its_base() {
        let mut system = System::long(&[0x48, 0xcf]);
        let frame = [CODE + 0x20, USER_CODE.into(), 0x202, 0x9_0000, USER_DATA.into()];
        system.put64(System::STACK - 40, &frame);
        system.cpu.regs[reg::RSP as usize] = System::STACK - 40;
        system.cpu.segs[seg::GS as usize] =
            engine::x86::Segment { base: 0x12_3000, ..segment(KERNEL_DATA, 0xc093) };
        system.go().unwrap();
        let gs = system.cpu.segs[seg::GS as usize];
        assert_eq!((system.cpu.cpl, gs.selector, gs.unusable, gs.base), (3, 0, true, 0x12_3000));
    }

    #[test]
    fn iretq_goes_to_compatibility_mode_and_a_far_jump_comes_back() {
        let mut system = System::long(&[0x48, 0xcf]);
        // jmp 0x2b:CODE + 0x40
        system.poke(CODE + 0x20, &[0xea, 0x40, 0, 1, 0, 0x2b, 0]);
        let frame = [CODE + 0x20, USER_CODE32.into(), 0x202, 0x9_0000, USER_DATA.into()];
        system.put64(System::STACK - 40, &frame);
        system.cpu.regs[reg::RSP as usize] = System::STACK - 40;
        system.go().unwrap();
        let mode = system.cpu.mode;
        assert_eq!((system.cpu.cpl, mode.code_bits, mode.long, mode.stack_bits), (3, 32, true, 32));
        assert_eq!((system.rip(), system.rsp(), system.ss()), (CODE + 0x20, 0x9_0000, USER_DATA));
        system.go().unwrap();
        assert_eq!((system.rip(), system.cs(), system.cpu.mode.long64), (CODE + 0x40, USER_CODE, true));
    }

    #[test]
    fn iretq_refuses_a_stack_or_address_that_does_not_fit_and_stays_put() {
        let attempt = |frame: [u64; 5]| {
            let mut system = System::long(&[0x48, 0xcf]);
            system.put64(System::STACK - 40, &frame);
            system.cpu.regs[reg::RSP as usize] = System::STACK - 40;
            let result = system.guest.step();
            assert_eq!((system.cpu.regs[RIP as usize], system.cpu.cpl), (CODE, 0));
            assert_eq!(system.rsp(), System::STACK - 40);
            result
        };
        let (cs, ss) = (u64::from(USER_CODE), u64::from(USER_DATA));
        assert_eq!(attempt([1 << 50, cs, 2, 0, ss]), Err(Exception::GP0), "not canonical");
        assert_eq!(attempt([CODE, cs, 2, 0, 0]), Err(Exception::GP0), "no null SS in ring 3");
        assert_eq!(attempt([CODE, cs, 2, 0, KERNEL_DATA.into()]), Err(gp(KERNEL_DATA)));
        assert_eq!(attempt([CODE, 0, 2, 0, ss]), Err(Exception::GP0));
        assert_eq!(attempt([CODE, 0x7f8, 2, 0, ss]), Err(gp(0x7f8)), "beyond the table");
    }

    #[test]
    fn user_code_cannot_raise_its_io_privilege_by_iret() {
        let mut system = System::long(&[0x48, 0xcf]);
        system.enter_ring3();
        let frame = [CODE, USER_CODE.into(), 0x3202, System::STACK, USER_DATA.into()];
        system.put64(System::STACK - 40, &frame);
        system.cpu.regs[reg::RSP as usize] = System::STACK - 40;
        system.go().unwrap();
        assert_eq!(system.cpu.rflags, rflags::FIXED, "neither IOPL nor IF");
    }

    #[test]
    fn real_mode_calls_far_and_returns() {
        let mut guest = super::super::testing::Guest::new(16, &[0x9a, 0x34, 0x12, 0x00, 0x20]);
        guest.poke(0x2_1234, &[0xcb]);
        guest.step().unwrap();
        assert_eq!(guest.cpu.segs[seg::CS as usize].base, 0x2_0000);
        assert_eq!(guest.peek::<4>(0x7ffc), [5, 0, 0, 0x10]);
        guest.step().unwrap();
        assert_eq!((guest.cpu.regs[RIP as usize], guest.cpu.segs[seg::CS as usize].base), (5, CODE));
    }
}
