//! Control registers: what may be written, and what follows from it (SDM 3A, 2.5 and 4.1; SDM 2
//! "MOV—Move to/from Control Registers").

use engine::x86::bits::{access, cr0, cr4, efer};

use super::cpu::Cpu;
use super::exception::{Exception, Exec};
use super::op::seg;

const CR0_KNOWN: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;
/// Bit 63 of a value for CR3: keep the translations of the new PCID.
const NO_FLUSH: u64 = 1 << 63;
const PCID: u64 = 0xfff;
/// Reserved bits of a page-directory-pointer entry in PAE paging, below the address (SDM 3A, table 4-8).
const PDPTE_RESERVED: u64 = 0x1e6;

impl Cpu {
    /// `MOV CR0`, `LMSW`, `CLTS`.
    pub(super) fn write_cr0(&mut self, value: u64) -> Exec {
        self.check_cr0(value)?;
        let value = value & CR0_KNOWN | cr0::ET;
        let changed = value ^ self.cr0;
        let paging_on = value & cr0::PG != 0;
        if paging_on && self.efer & efer::LME == 0 && self.cr4 & cr4::PAE != 0 {
            // Any of these makes the CPU read the pointers again (SDM 3A, 4.4.1).
            if changed & (cr0::PG | cr0::CD | cr0::NW) != 0 {
                self.pdptes = self.read_pdptes(self.cr3)?;
            }
        }
        self.cr0 = value;
        if changed & cr0::PG != 0 {
            let active = paging_on && self.efer & efer::LME != 0;
            self.efer = if active { self.efer | efer::LMA } else { self.efer & !efer::LMA };
        }
        if changed & (cr0::PG | cr0::PE | cr0::WP) != 0 {
            let pcid = self.pcid();
            self.tlb.flush_all(pcid);
        }
        self.update_mode();
        Ok(())
    }

    fn check_cr0(&self, value: u64) -> Exec {
        let has = |bit| value & bit != 0;
        let mut legal =
            value >> 32 == 0 && (!has(cr0::PG) || has(cr0::PE)) && (!has(cr0::NW) || has(cr0::CD));
        let turned_on = has(cr0::PG) && self.cr0 & cr0::PG == 0;
        if turned_on && self.efer & efer::LME != 0 {
            // Into long mode: with PAE, from code without L, and not with a 16-bit task state segment.
            let long_code = self.segs[seg::CS as usize].access & access::L != 0;
            let narrow_task = self.tr.access & 8 == 0 && !self.tr.unusable && self.tr.selector & !3 != 0;
            legal &= self.cr4 & cr4::PAE != 0 && !long_code && !narrow_task;
        }
        if !has(cr0::PG) && self.cr0 & cr0::PG != 0 {
            legal &= !self.mode.long64 && self.cr4 & cr4::PCIDE == 0;
        }
        if legal { Ok(()) } else { Err(Exception::GP0) }
    }

    /// `MOV CR3`.
    pub(super) fn write_cr3(&mut self, value: u64) -> Exec {
        let pcids = self.cr4 & cr4::PCIDE != 0;
        let (value, keep) = if pcids { (value & !NO_FLUSH, value & NO_FLUSH != 0) } else { (value, false) };
        if self.mode.long {
            if value >> self.vm.cpuid.physical_bits() != 0 {
                return Err(Exception::GP0);
            }
        } else if self.mode.paging && self.cr4 & cr4::PAE != 0 {
            self.pdptes = self.read_pdptes(value)?;
        }
        self.cr3 = value;
        let pcid = self.pcid();
        if keep {
            self.tlb.switch(pcid);
        } else {
            self.tlb.flush_pcid(pcid, pcid);
        }
        self.leave_block = true;
        Ok(())
    }

    /// Reads and checks the four page-directory pointers of PAE paging (SDM 3A, 4.4.1).
    pub(super) fn read_pdptes(&mut self, cr3: u64) -> Exec<[u64; 4]> {
        let mut bytes = [0; 32];
        self.read_physical(cr3 & 0xffff_ffe0, &mut bytes);
        let above = !((1u64 << self.vm.cpuid.physical_bits()) - 1);
        let mut pdptes = [0; 4];
        for (pdpte, bytes) in pdptes.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *pdpte = u64::from_le_bytes(*bytes);
            if *pdpte & 1 != 0 && *pdpte & (above | PDPTE_RESERVED) != 0 {
                return Err(Exception::GP0);
            }
        }
        Ok(pdptes)
    }

    /// `MOV CR4`.
    pub(super) fn write_cr4(&mut self, value: u64) -> Exec {
        self.check_cr4(value)?;
        let changed = value ^ self.cr4;
        let paging = cr4::PSE | cr4::PAE | cr4::PGE | cr4::SMEP;
        if self.mode.paging && !self.mode.long && value & cr4::PAE != 0 && changed & paging != 0 {
            self.pdptes = self.read_pdptes(self.cr3)?;
        }
        self.cr4 = value;
        if changed & (paging | cr4::SMAP | cr4::PCIDE) != 0 {
            let pcid = self.pcid();
            self.tlb.flush_all(pcid);
        }
        self.update_mode();
        Ok(())
    }

    fn check_cr4(&self, value: u64) -> Exec {
        let turned = |bit| (value ^ self.cr4) & bit != 0;
        let mut legal = value & !self.vm.cpuid.cr4_mask() == 0;
        legal &= !(turned(cr4::PAE) && self.mode.long);
        if turned(cr4::PCIDE) && value & cr4::PCIDE != 0 {
            legal &= self.mode.long && self.cr3 & PCID == 0;
        }
        if legal { Ok(()) } else { Err(Exception::GP0) }
    }
}
