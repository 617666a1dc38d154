//! Segment descriptors and gates as they lie in the descriptor tables (SDM 3A, 3.4.5, 3.5, 5.8).

use engine::x86::Segment;
use engine::x86::bits::access;

use super::access::canonical;
use super::cpu::Cpu;
use super::exception::{Exception, Exec, vector};
use super::tlb::View;

/// Types of system descriptors (SDM 3A, table 3-2).
#[allow(missing_docs)]
pub mod system {
    pub const TSS16: u16 = 0x1;
    pub const LDT: u16 = 0x2;
    pub const TSS16_BUSY: u16 = 0x3;
    pub const CALL_GATE16: u16 = 0x4;
    pub const TASK_GATE: u16 = 0x5;
    pub const INTERRUPT_GATE16: u16 = 0x6;
    pub const TRAP_GATE16: u16 = 0x7;
    pub const TSS: u16 = 0x9;
    pub const TSS_BUSY: u16 = 0xb;
    pub const CALL_GATE: u16 = 0xc;
    pub const INTERRUPT_GATE: u16 = 0xe;
    pub const TRAP_GATE: u16 = 0xf;
    /// The bit that tells a busy task state segment from an available one.
    pub const BUSY: u16 = 0x2;
}

/// An exception whose error code names a selector.
pub fn selector_fault(vector: u8, selector: u16) -> Exception {
    Exception::with_code(vector, (selector & 0xfffc).into())
}

/// `#GP(selector)`.
pub fn gp(selector: u16) -> Exception {
    selector_fault(vector::GP, selector)
}

/// `#NP(selector)`.
pub fn np(selector: u16) -> Exception {
    selector_fault(vector::NP, selector)
}

/// `#TS(selector)`.
pub fn ts(selector: u16) -> Exception {
    selector_fault(vector::TS, selector)
}

/// Requested privilege level of a selector.
pub fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

/// Whether a selector is null: index 0 of the GDT.
pub fn null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// A descriptor, with where it came from.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    /// Its first 8 bytes.
    pub low: u64,
    /// The second 8 bytes of a system descriptor in long mode; else 0.
    pub high: u64,
    /// The selector that found it.
    pub selector: u16,
    /// Linear address of its first byte.
    pub linear: u64,
}

impl Descriptor {
    /// Access rights in the layout of [`Segment::access`].
    pub fn access(&self) -> u16 {
        (self.low >> 40) as u16 & 0xf0ff
    }

    /// Present.
    pub fn present(&self) -> bool {
        self.access() & access::P != 0
    }

    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.access() >> access::DPL_SHIFT & 3) as u8
    }

    /// The type of a system descriptor; `None` for code and data.
    pub fn system(&self) -> Option<u16> {
        (self.access() & access::S == 0).then_some(self.access() & 0xf)
    }

    /// A code segment.
    pub fn code(&self) -> bool {
        self.access() & (access::S | access::CODE) == access::S | access::CODE
    }

    /// A conforming code segment.
    pub fn conforming(&self) -> bool {
        self.code() && self.access() & access::CONFORM_DOWN != 0
    }

    /// A writable data segment.
    pub fn writable(&self) -> bool {
        let mask = access::S | access::CODE | access::READ_WRITE;
        self.access() & mask == access::S | access::READ_WRITE
    }

    /// Data, or code that may be read.
    pub fn readable(&self) -> bool {
        let access = self.access();
        access & access::S != 0 && (access & access::CODE == 0 || access & access::READ_WRITE != 0)
    }

    /// 64-bit code.
    pub fn long_code(&self) -> bool {
        self.access() & access::L != 0
    }

    /// Limit in bytes.
    pub fn limit(&self) -> u32 {
        let limit = (self.low & 0xffff | self.low >> 32 & 0xf_0000) as u32;
        if self.access() & access::G != 0 { limit << 12 | 0xfff } else { limit }
    }

    /// Base address; 64 bits wide for system segments in long mode.
    pub fn base(&self) -> u64 {
        self.low >> 16 & 0xff_ffff | (self.low >> 56) << 24 | self.high << 32
    }

    /// What the segment register holds after loading it through `selector`.
    pub fn segment(&self, selector: u16) -> Segment {
        let access = self.access();
        Segment { selector, base: self.base(), limit: self.limit(), access, unusable: false }
    }
}

/// The parts of a call, interrupt, trap or task gate.
#[derive(Clone, Copy, Debug)]
pub struct Gate {
    /// Target code segment, or task state segment.
    pub selector: u16,
    /// Target offset.
    pub offset: u64,
    /// Its type ([`system`]).
    pub kind: u16,
    /// Descriptor privilege level.
    pub dpl: u8,
    /// Present.
    pub present: bool,
    /// Interrupt stack table entry, of long-mode interrupt and trap gates.
    pub ist: u8,
    /// Parameters that a 16- or 32-bit call gate copies.
    pub parameters: u8,
}

impl Gate {
    /// Takes a gate apart. `high` is its second half in long mode, else 0.
    pub fn new(low: u64, high: u64) -> Gate {
        let kind = (low >> 40 & 0x1f) as u16;
        let wide = kind & 8 != 0;
        let upper = if wide { low >> 32 & 0xffff_0000 } else { 0 };
        Gate {
            selector: (low >> 16) as u16,
            offset: low & 0xffff | upper | high << 32,
            kind,
            dpl: (low >> 45 & 3) as u8,
            present: low >> 47 & 1 != 0,
            ist: (low >> 32 & 7) as u8,
            parameters: (low >> 32 & 31) as u8,
        }
    }

    /// Bytes of what the gate pushes outside of long mode: 2 or 4.
    pub fn width(&self) -> u64 {
        if self.kind & 8 != 0 { 4 } else { 2 }
    }
}

impl Cpu {
    /// Linear address of a byte in a descriptor table or task state segment.
    pub(super) fn table_address(&self, base: u64, offset: u64) -> Exec<u64> {
        let linear = base.wrapping_add(offset);
        match self.mode.long {
            true if canonical(linear) => Ok(linear),
            true => Err(Exception::GP0),
            false => Ok(linear & 0xffff_ffff),
        }
    }

    /// Reads the descriptor that `selector` names; `None` if it is outside of its table. In long mode,
    /// system descriptors are 16 bytes.
    pub(super) fn find_descriptor(&mut self, selector: u16) -> Exec<Option<Descriptor>> {
        let (base, limit) = match selector & 4 {
            0 => (self.gdtr.base, u32::from(self.gdtr.limit)),
            _ if self.ldtr.unusable || null(self.ldtr.selector) => return Ok(None),
            _ => (self.ldtr.base, self.ldtr.limit),
        };
        let at = u32::from(selector & 0xfff8);
        if at + 7 > limit {
            return Ok(None);
        }
        let linear = self.table_address(base, at.into())?;
        let low = self.load_linear::<u64>(View::Kernel, linear)?;
        let mut found = Descriptor { low, high: 0, selector, linear };
        if self.mode.long && found.system().is_some() {
            if at + 15 > limit {
                return Ok(None);
            }
            let linear = self.table_address(base, u64::from(at) + 8)?;
            found.high = self.load_linear(View::Kernel, linear)?;
        }
        Ok(Some(found))
    }

    /// Reads the descriptor that `selector` names; one outside of its table raises `vector(selector)`.
    pub(super) fn descriptor(&mut self, selector: u16, vector: u8) -> Exec<Descriptor> {
        self.find_descriptor(selector)?.ok_or_else(|| selector_fault(vector, selector))
    }

    /// Sets the accessed bit of a code or data descriptor in its table, if it is not set yet.
    pub(super) fn mark_accessed(&mut self, descriptor: &mut Descriptor) -> Exec {
        self.change_type(descriptor, |kind| kind | access::ACCESSED as u8)
    }

    /// Sets or clears the busy bit of a task state segment's descriptor in its table.
    pub(super) fn mark_busy(&mut self, descriptor: &mut Descriptor, busy: bool) -> Exec {
        let bit = system::BUSY as u8;
        self.change_type(descriptor, |kind| if busy { kind | bit } else { kind & !bit })
    }

    /// Changes the type byte of a descriptor, atomically, in the table and in the copy.
    fn change_type(&mut self, descriptor: &mut Descriptor, change: impl Fn(u8) -> u8) -> Exec {
        let old = (descriptor.low >> 40) as u8;
        let new = change(old);
        if new != old {
            let linear = descriptor.linear.wrapping_add(5);
            let view = self.mode.view.replace(View::Kernel);
            let done = self.rmw_linear::<u8>(linear, true, |_, byte| change(byte));
            self.mode.view = view;
            done?;
            descriptor.low = descriptor.low & !(0xff << 40) | u64::from(new) << 40;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A flat 4 GiB descriptor with access byte and flags nibble.
    fn flat(access: u64, flags: u64) -> Descriptor {
        let low = 0xffff | access << 40 | 0xf << 48 | flags << 52;
        Descriptor { low, high: 0, selector: 8, linear: 0 }
    }

    #[test]
    fn a_descriptor_is_taken_apart_as_the_manual_draws_it() {
        let code = flat(0xfa, 0xc);
        assert!(code.code() && code.readable() && !code.conforming() && !code.writable());
        assert_eq!((code.dpl(), code.limit(), code.access()), (3, 0xffff_ffff, 0xc0fa));
        let tss = Descriptor { low: 0x1200_8956_789a_0067, high: 0xffff_8000, selector: 0x40, linear: 0 };
        assert_eq!(tss.system(), Some(system::TSS));
        assert_eq!((tss.base(), tss.limit()), (0xffff_8000_1256_789a, 0x67));
    }

    #[test]
    fn gates_join_their_offsets() {
        let low = 0x5678 | 0x10 << 16 | 3u64 << 32 | 0xee00 << 32 | 0x1234 << 48;
        let gate = Gate::new(low, 0xffff_ffff);
        assert_eq!((gate.offset, gate.selector, gate.ist), (0xffff_ffff_1234_5678, 0x10, 3));
        assert_eq!((gate.kind, gate.dpl, gate.present), (system::INTERRUPT_GATE, 3, true));
        let narrow = Gate::new(low & !(8 << 40), 0);
        assert_eq!((narrow.offset, narrow.width()), (0x5678, 2));
    }
}
