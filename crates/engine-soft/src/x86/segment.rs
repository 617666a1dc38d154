//! Loading segment registers (SDM 3A, 3.4.3 and 5.5-5.7; 5.12 for the rules of inner stacks).

use engine::x86::Segment;
use engine::x86::bits::access;

use super::cpu::Cpu;
use super::descriptor::{Descriptor, gp, np, null, rpl, selector_fault, system};
use super::exception::{Exception, Exec, vector};
use super::op::seg;

/// A segment register after a null selector.
pub(super) fn null_segment(selector: u16) -> Segment {
    Segment { selector, unusable: true, ..Segment::default() }
}

/// SS in 64-bit mode after a null selector: only its privilege level means something.
pub(super) fn null_stack(level: u8) -> Segment {
    let access = u16::from(level) << access::DPL_SHIFT;
    Segment { selector: level.into(), access, unusable: true, ..Segment::default() }
}

/// A segment register in virtual-8086 mode (SDM 3A, 21.2.1).
pub(super) fn v86_segment(selector: u16) -> Segment {
    Segment { selector, base: u64::from(selector) << 4, limit: 0xffff, access: 0xf3, unusable: false }
}

/// A flat segment, as SYSCALL and SYSENTER load them without a descriptor.
pub(super) fn flat_segment(selector: u16, access: u16) -> Segment {
    Segment { selector, base: 0, limit: 0xffff_ffff, access, unusable: false }
}

impl Cpu {
    /// Loads any segment register but CS, as `MOV`, `POP` and `LDS` and their kin do.
    pub(super) fn load_segment(&mut self, index: u8, selector: u16) -> Exec {
        if !self.mode.protected {
            self.load_real_segment(index, selector);
        } else if self.mode.v86 {
            self.segs[index as usize] = v86_segment(selector);
        } else if index == seg::SS {
            self.load_stack_segment(selector)?;
        } else {
            self.segs[index as usize] = self.data_segment(selector, vector::GP)?;
        }
        if index == seg::SS {
            self.update_mode();
        }
        Ok(())
    }

    /// Real mode: the base follows the selector, limit and rights stay as they were.
    pub(super) fn load_real_segment(&mut self, index: u8, selector: u16) {
        let segment = &mut self.segs[index as usize];
        if segment.unusable {
            *segment = Segment { limit: 0xffff, access: 0x93, ..Segment::default() };
        }
        segment.selector = selector;
        segment.base = u64::from(selector) << 4;
        if index == seg::CS {
            segment.access = segment.access & 0xf000 | 0x9b;
        }
    }

    fn load_stack_segment(&mut self, selector: u16) -> Exec {
        let level = self.cpl;
        self.segs[seg::SS as usize] = if null(selector) {
            if !self.mode.long64 || level == 3 || rpl(selector) != level {
                return Err(Exception::GP0);
            }
            null_stack(level)
        } else {
            self.stack_segment(selector, level, vector::GP)?
        };
        Ok(())
    }

    /// Checks and reads a stack segment for privilege level `level`; what is wrong with it but its
    /// absence raises `vector`.
    pub(super) fn stack_segment(&mut self, selector: u16, level: u8, vector: u8) -> Exec<Segment> {
        if null(selector) {
            return Err(selector_fault(vector, 0));
        }
        let mut descriptor = self.descriptor(selector, vector)?;
        if rpl(selector) != level || !descriptor.writable() || descriptor.dpl() != level {
            return Err(selector_fault(vector, selector));
        }
        if !descriptor.present() {
            return Err(selector_fault(vector::SS, selector));
        }
        self.mark_accessed(&mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// Checks and reads a segment for DS, ES, FS or GS.
    pub(super) fn data_segment(&mut self, selector: u16, vector: u8) -> Exec<Segment> {
        if null(selector) {
            return Ok(null_segment(selector));
        }
        let mut descriptor = self.descriptor(selector, vector)?;
        let reachable = descriptor.conforming() || descriptor.dpl() >= self.cpl.max(rpl(selector));
        if !descriptor.readable() || !reachable {
            return Err(selector_fault(vector, selector));
        }
        if !descriptor.present() {
            return Err(np(selector));
        }
        self.mark_accessed(&mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// Makes `cs` the code segment at privilege level `level` and goes to `rip`. The checks are done and
    /// the descriptor is marked accessed.
    pub(super) fn enter_code(&mut self, cs: &Descriptor, level: u8, rip: u64) {
        self.segs[seg::CS as usize] = cs.segment(cs.selector & !3 | u16::from(level));
        self.cpl = level;
        self.next_rip = rip;
        self.update_mode();
    }

    /// On the way out to a less privileged level: takes away the data segments that it may not have
    /// (SDM 3A, 5.8.6).
    pub(super) fn drop_inner_segments(&mut self) {
        for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let segment = &mut self.segs[index as usize];
            let conforming = access::S | access::CODE | access::CONFORM_DOWN;
            let dpl = (segment.access >> access::DPL_SHIFT & 3) as u8;
            let kept = segment.unusable
                || null(segment.selector)
                || segment.access & conforming == conforming
                || dpl >= self.cpl;
            if !kept {
                *segment = null_segment(0);
            }
        }
    }

    /// Reads the descriptor for `LLDT` and for the LDT of a task; null makes LDTR unusable.
    pub(super) fn ldt_segment(&mut self, selector: u16, vector: u8) -> Exec<Segment> {
        if null(selector) {
            return Ok(null_segment(selector));
        }
        let wrong = selector_fault(vector, selector);
        if selector & 4 != 0 {
            return Err(wrong);
        }
        let descriptor = self.descriptor(selector, vector)?;
        if descriptor.system() != Some(system::LDT) {
            return Err(wrong);
        }
        if !descriptor.present() {
            return Err(if vector == vector::TS { wrong } else { np(selector) });
        }
        self.table_address(descriptor.base(), 0)?;
        Ok(descriptor.segment(selector))
    }

    /// `LTR`.
    pub(super) fn load_task_register(&mut self, selector: u16) -> Exec {
        if null(selector) {
            return Err(Exception::GP0);
        }
        if selector & 4 != 0 {
            return Err(gp(selector));
        }
        let mut tss = self.descriptor(selector, vector::GP)?;
        let available = match tss.system() {
            Some(system::TSS) => true,
            Some(system::TSS16) => !self.mode.long,
            _ => false,
        };
        if !available {
            return Err(gp(selector));
        }
        if !tss.present() {
            return Err(np(selector));
        }
        self.table_address(tss.base(), 0)?;
        self.mark_busy(&mut tss, true)?;
        self.tr = tss.segment(selector);
        Ok(())
    }
}
