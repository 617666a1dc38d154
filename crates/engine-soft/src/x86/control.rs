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

#[cfg(test)]
mod tests {
    use super::super::op::reg;
    use super::super::systest::*;
    use super::super::testing::{CODE, DATA};
    use super::*;
    use engine::x86::Activity;

    /// From real to protected to 64-bit mode, as a boot loader does it:
    /// cli; lgdt; PE; far jump; segments; PAE and PGE; CR3; EFER.LME; PG and WP; far jump;
    /// ltr; push; hlt.
    const CLIMB: &[u8] = &[
        0xfa, 0x2e, 0x66, 0x0f, 0x01, 0x16, 0x1a, 0x00, // cli; lgdtl cs:[0x1a]
        0x0f, 0x20, 0xc0, 0x66, 0x83, 0xc8, 0x01, 0x0f, 0x22, 0xc0, // cr0 |= PE
        0x66, 0xea, 0x20, 0x00, 0x01, 0x00, 0x30, 0x00, // jmp 0x30:0x10020
        0xff, 0x00, 0x00, 0x20, 0x00, 0x00, // the GDT's limit and base
        0x66, 0xb8, 0x10, 0x00, 0x8e, 0xd8, 0x8e, 0xd0, // ds = ss = 0x10
        0xbc, 0x00, 0x70, 0x00, 0x00, // mov esp, 0x7000
        0x0f, 0x20, 0xe0, 0x0d, 0xa0, 0x00, 0x00, 0x00, 0x0f, 0x22, 0xe0, // cr4 |= PAE, PGE
        0xb8, 0x00, 0x00, 0x20, 0x00, 0x0f, 0x22, 0xd8, // cr3 = 0x200000
        0xb9, 0x80, 0x00, 0x00, 0xc0, 0x0f, 0x32, // rdmsr EFER
        0x0d, 0x01, 0x01, 0x00, 0x00, 0x0f, 0x30, // |= LME, SCE
        0x0f, 0x20, 0xc0, 0x0d, 0x00, 0x00, 0x01, 0x80, 0x0f, 0x22, 0xc0, // cr0 |= PG, WP
        0xea, 0x60, 0x00, 0x01, 0x00, 0x08, 0x00, // jmp 0x08:0x10060
        0x66, 0xb8, 0x40, 0x00, 0x0f, 0x00, 0xd8, // ltr 0x40
        0x48, 0xbb, 0xbc, 0x9a, 0x78, 0x56, 0x34, 0x12, 0x00, 0x00, 0x53, 0xf4, // mov rbx; push; hlt
    ];

    #[test]
    fn a_boot_loader_climbs_from_real_to_64_bit_mode() {
        let mut system = System::real(CLIMB);
        let mut steps = 0;
        while system.cpu.activity == Activity::Running {
            system.guest.step().unwrap();
            steps += 1;
            assert!(steps < 40, "lost at {:#x}", system.rip());
        }
        assert!(system.cpu.mode.long64 && system.cpu.efer & efer::LMA != 0);
        assert_eq!((system.rip(), system.cs()), (CODE + CLIMB.len() as u64, KERNEL_CODE));
        assert_eq!(system.get64::<1>(0x7000 - 8), [0x0000_1234_5678_9abc]);
        assert_eq!((system.cpu.tr.base, system.cpu.tr.access & 0xf), (TSS, 0xb));
        assert_eq!(system.get64::<1>(GDT + u64::from(TASK)), [descriptor(TSS, 0x67, 0x8b, 0)]);
        assert_eq!(system.cpu.segs[seg::CS as usize].access & 1, 1);
    }

    #[test]
    fn illegal_combinations_of_control_bits_are_refused_and_change_nothing() {
        let mut system = System::long(&[]);
        let cpu = &mut system.guest.cpu;
        let before = (cpu.cr0, cpu.cr3, cpu.cr4);
        assert_eq!(cpu.write_cr0(cpu.cr0 & !cr0::PE), Err(Exception::GP0), "PG without PE");
        assert_eq!(cpu.write_cr0(cpu.cr0 & !cr0::PG), Err(Exception::GP0), "in 64-bit mode");
        assert_eq!(cpu.write_cr0((cpu.cr0 | cr0::NW) & !cr0::CD), Err(Exception::GP0));
        assert_eq!(cpu.write_cr0(cpu.cr0 | 1 << 32), Err(Exception::GP0));
        assert_eq!(cpu.write_cr4(cpu.cr4 & !cr4::PAE), Err(Exception::GP0), "in long mode");
        assert_eq!(cpu.write_cr4(cpu.cr4 | cr4::LA57), Err(Exception::GP0), "not offered");
        assert_eq!(cpu.write_cr3(1 << 63), Err(Exception::GP0), "without PCIDs");
        assert_eq!((cpu.cr0, cpu.cr3, cpu.cr4), before);
    }

    #[test]
    fn a_write_of_cr3_forgets_translations_unless_it_says_not_to() {
        let mut system = System::long(&[0x8a, 0x00]); // mov al, [rax]
        if system.cpu.vm.cpuid.cr4_mask() & cr4::PCIDE == 0 {
            return; // this host has no PCIDs to offer
        }
        let tables = system.cpu.cr3;
        let pte = tables + 0x3000 + (DATA >> 12) * 8;
        system.guest.cpu.write_cr4(system.cpu.cr4 | cr4::PCIDE).unwrap();
        let mut touch = |keep: bool| {
            system.put64(pte, &[DATA | 7]);
            system.guest.cpu.write_cr3(tables | 5).unwrap();
            let look = |system: &mut System| {
                system.guest.cpu.regs[reg::RAX as usize] = DATA;
                system.guest.cpu.regs[super::super::op::RIP as usize] = CODE;
                system.guest.step()
            };
            look(&mut system).unwrap();
            system.put64(pte, &[0]);
            system.guest.cpu.write_cr3(tables | 6).unwrap();
            let flag = if keep { NO_FLUSH } else { 0 };
            system.guest.cpu.write_cr3(tables | 5 | flag).unwrap();
            look(&mut system)
        };
        assert_eq!(touch(true), Ok(()));
        assert!(touch(false).is_err());
    }

    #[test]
    fn pae_paging_checks_the_four_pointers_when_they_are_loaded() {
        let mut system = System::protected(&[]);
        system.put64(0x6000, &[0x9000 | 1, 0, 0, 0x9000 | 3]);
        let cpu = &mut system.guest.cpu;
        cpu.write_cr4(cpu.cr4 | cr4::PAE).unwrap();
        cpu.write_cr3(0x6000).unwrap();
        assert_eq!(cpu.write_cr0(cpu.cr0 | cr0::PG), Err(Exception::GP0), "bit 1 is reserved");
        assert!(!cpu.mode.paging);
        system.put64(0x6018, &[0x9001]);
        let cpu = &mut system.guest.cpu;
        cpu.write_cr0(cpu.cr0 | cr0::PG).unwrap();
        assert_eq!(cpu.pdptes, [0x9001, 0, 0, 0x9001]);
    }
}
