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
            hits => Err(self.debug_exception(hits)),
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
        self.dr[number] = match number {
            6 => value & DR6_WRITABLE | DR6_FIXED,
            7 => value & DR7_WRITABLE | DR7_FIXED,
            _ => value,
        };
        let pcid = self.pcid();
        self.tlb.flush_all(pcid);
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
