//! Stacks that instructions and events push to, or pop from, before they commit to the result.
//!
//! Nothing of the CPU changes until [`Stack::commit`], so a fault half way leaves only bytes below the
//! stack pointer behind, as it does on hardware.

use engine::x86::Segment;

use super::access::{canonical, segment_linear};
use super::cpu::Cpu;
use super::exception::{Exception, Exec, vector};
use super::op::{reg, seg};
use super::tlb::View;

/// A stack, current or about to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stack {
    /// Its segment.
    segment: Segment,
    /// Its pointer.
    pub sp: u64,
    /// Width of the pointer: 16, 32 or 64.
    bits: u8,
    view: View,
    /// What an access outside of the segment raises.
    fault: Exception,
}

impl Stack {
    /// The current stack.
    pub fn current(cpu: &Cpu) -> Stack {
        Stack {
            segment: cpu.segs[seg::SS as usize],
            sp: cpu.regs[reg::RSP as usize],
            bits: cpu.mode.stack_bits,
            view: cpu.view(),
            fault: Exception::SS0,
        }
    }

    /// The stack of a more privileged level, of legacy mode.
    pub fn inner(segment: Segment, sp: u64) -> Stack {
        let bits = if segment.access & engine::x86::bits::access::DB != 0 { 32 } else { 16 };
        let fault = Exception::with_code(vector::SS, (segment.selector & 0xfffc).into());
        Stack { segment, sp, bits, view: View::Kernel, fault }
    }

    /// A stack in long mode, at `sp`.
    pub fn long(sp: u64, view: View) -> Stack {
        Stack { segment: Segment::default(), sp, bits: 64, view, fault: Exception::SS0 }
    }

    fn mask(&self) -> u64 {
        match self.bits {
            16 => 0xffff,
            32 => 0xffff_ffff,
            _ => u64::MAX,
        }
    }

    fn linear(&self, cpu: &Cpu, offset: u64, size: u64, write: bool) -> Exec<u64> {
        if self.bits == 64 {
            let fits = canonical(offset) && canonical(offset.wrapping_add(size - 1));
            return if fits { Ok(offset) } else { Err(self.fault) };
        }
        segment_linear(&cpu.mode, &self.segment, offset, size, write).ok_or(self.fault)
    }

    /// Pushes the low `size` bytes (2, 4 or 8) of `value`.
    pub fn push(&mut self, cpu: &mut Cpu, size: u64, value: u64) -> Exec {
        let sp = self.moved(size.wrapping_neg());
        let linear = self.linear(cpu, sp & self.mask(), size, true)?;
        match size {
            2 => cpu.store_linear(self.view, linear, value as u16)?,
            4 => cpu.store_linear(self.view, linear, value as u32)?,
            _ => cpu.store_linear(self.view, linear, value)?,
        }
        self.sp = sp;
        Ok(())
    }

    /// Pops `size` bytes (2, 4 or 8).
    pub fn pop(&mut self, cpu: &mut Cpu, size: u64) -> Exec<u64> {
        let value = self.peek(cpu, size, 0)?;
        self.skip(size);
        Ok(value)
    }

    /// Reads `size` bytes at `offset` above the stack pointer.
    pub fn peek(&mut self, cpu: &mut Cpu, size: u64, offset: u64) -> Exec<u64> {
        let linear = self.linear(cpu, self.sp.wrapping_add(offset) & self.mask(), size, false)?;
        Ok(match size {
            2 => cpu.load_linear::<u16>(self.view, linear)?.into(),
            4 => cpu.load_linear::<u32>(self.view, linear)?.into(),
            _ => cpu.load_linear::<u64>(self.view, linear)?,
        })
    }

    /// Pops `bytes` without reading them.
    pub fn skip(&mut self, bytes: u64) {
        self.sp = self.moved(bytes);
    }

    /// The pointer moved by `by`; a 16-bit stack leaves the rest of ESP alone.
    fn moved(&self, by: u64) -> u64 {
        self.sp & !self.mask() | self.sp.wrapping_add(by) & self.mask()
    }

    /// Makes the pointer the CPU's.
    pub fn commit(&self, cpu: &mut Cpu) {
        let rsp = if self.bits == 64 { self.sp } else { self.sp & 0xffff_ffff };
        cpu.regs[reg::RSP as usize] = rsp;
    }
}

impl Cpu {
    /// Pushes onto the current stack.
    pub(super) fn push_value(&mut self, size: u64, value: u64) -> Exec {
        let mut stack = Stack::current(self);
        stack.push(self, size, value)?;
        stack.commit(self);
        Ok(())
    }
}
