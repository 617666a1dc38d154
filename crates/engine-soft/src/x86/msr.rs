//! Model-specific registers.

use engine::x86::bits::{cr0, efer, msr::*};

use super::cpu::Cpu;
use super::exception::{Exception, Exec};
use super::op::seg;
use crate::clock::Clock;

/// IA32_PAT after power-on (SDM 3A, 12.12.4).
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// Variable-range MTRRs that are offered.
const VARIABLE_MTRRS: u32 = 8;
/// AMD's four legacy event selectors and counters (APM 2, 13.2.1), on every AMD CPU whatever CPUID
/// says. They count nothing: read as 0, ignore writes, so that no guest takes them for working ones.
const AMD_PERF: std::ops::RangeInclusive<u32> = 0xc001_0000..=0xc001_0007;
/// AMD's SYSCFG, HWCR and northbridge configuration: read by kernels on AMD CPUs, kept as written.
const AMD_SYSCFG: u32 = 0xc001_0010;
const AMD_HWCR: u32 = 0xc001_0015;
const AMD_NB_CFG: u32 = 0xc001_001f;
/// HWCR after power-on: TscFreqSel, the TSC counts at the P0 frequency.
const HWCR_RESET: u64 = 1 << 24;
const AMD_PATCH_LEVEL: u32 = IA32_BIOS_SIGN_ID;
const AMD_VM_HSAVE_PA: u32 = 0xc001_0117;
const AMD_DE_CFG: u32 = 0xc001_1029;
/// Paravirtual clock, as KVM defines it (MSR_KVM_WALL_CLOCK_NEW, MSR_KVM_SYSTEM_TIME_NEW).
pub const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
/// See [`KVM_WALL_CLOCK`].
pub const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;

/// The registers that are only stored; what means something elsewhere lives there.
#[derive(Clone, Debug)]
pub struct Msrs {
    /// STAR: selectors for SYSCALL and SYSRET.
    pub star: u64,
    /// SYSCALL target, 64-bit.
    pub lstar: u64,
    /// SYSCALL target, compatibility mode.
    pub cstar: u64,
    /// Flags that SYSCALL clears.
    pub fmask: u64,
    /// GS base that SWAPGS swaps in.
    pub kernel_gs_base: u64,
    /// What RDTSCP and RDPID show.
    pub tsc_aux: u64,
    /// SYSENTER code segment.
    pub sysenter_cs: u64,
    /// SYSENTER stack.
    pub sysenter_esp: u64,
    /// SYSENTER target.
    pub sysenter_eip: u64,
    /// Guest TSC = host TSC + this.
    pub tsc_offset: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// Page attribute table. Kept, without effect: all of guest memory is cached.
    pub pat: u64,
    /// MTRR default type, fixed and variable ranges. Kept, without effect.
    pub mtrr_def_type: u64,
    /// IA32_MTRR_FIX*, in the order of their numbers.
    pub mtrr_fixed: [u64; 11],
    /// IA32_MTRR_PHYSBASE/MASK pairs.
    pub mtrr_variable: [u64; 2 * VARIABLE_MTRRS as usize],
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// IA32_SPEC_CTRL. Kept, without effect.
    pub spec_ctrl: u64,
    /// IA32_DEBUGCTL.
    pub debugctl: u64,
    /// IA32_MCG_STATUS.
    pub mcg_status: u64,
    /// IA32_XSS; no supervisor state is offered.
    pub xss: u64,
    /// AMD SYSCFG, HWCR and NB_CFG. Kept, without effect.
    pub amd: [u64; 3],
    /// Paravirtual clock: wall clock page, system time page.
    pub kvm_clock: [u64; 2],
}

impl Default for Msrs {
    fn default() -> Self {
        Msrs {
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            tsc_aux: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_offset: 0,
            tsc_adjust: 0,
            pat: PAT_RESET,
            mtrr_def_type: 0,
            mtrr_fixed: [0; 11],
            mtrr_variable: [0; 16],
            misc_enable: 1,
            spec_ctrl: 0,
            debugctl: 0,
            mcg_status: 0,
            xss: 0,
            amd: [0, HWCR_RESET, 0],
            kvm_clock: [0; 2],
        }
    }
}

/// Position of a fixed-range MTRR (SDM 3A, table 12-9), if it is one.
fn fixed_mtrr(index: u32) -> Option<usize> {
    match index {
        0x250 => Some(0),
        0x258 | 0x259 => Some(index as usize - 0x257),
        0x268..=0x26f => Some(index as usize - 0x265),
        _ => None,
    }
}

fn canonical(value: u64) -> Exec<u64> {
    if super::access::canonical(value) { Ok(value) } else { Err(Exception::GP0) }
}

fn valid_pat(value: u64) -> bool {
    value.to_le_bytes().iter().all(|&t| matches!(t, 0 | 1 | 4..=7))
}

/// The registers that a saved state carries, ascending. IA32_TSC travels by its own field.
pub const SAVED: &[u32] = &[
    IA32_TSC_ADJUST,
    IA32_SPEC_CTRL,
    IA32_SYSENTER_CS,
    IA32_SYSENTER_ESP,
    IA32_SYSENTER_EIP,
    IA32_MCG_STATUS,
    IA32_MISC_ENABLE,
    IA32_DEBUGCTL,
    0x200,
    0x201,
    0x202,
    0x203,
    0x204,
    0x205,
    0x206,
    0x207,
    0x208,
    0x209,
    0x20a,
    0x20b,
    0x20c,
    0x20d,
    0x20e,
    0x20f,
    0x250,
    0x258,
    0x259,
    0x268,
    0x269,
    0x26a,
    0x26b,
    0x26c,
    0x26d,
    0x26e,
    0x26f,
    IA32_PAT,
    IA32_MTRR_DEF_TYPE,
    KVM_WALL_CLOCK,
    KVM_SYSTEM_TIME,
    EFER,
    STAR,
    LSTAR,
    CSTAR,
    FMASK,
    KERNEL_GS_BASE,
    TSC_AUX,
    AMD_SYSCFG,
    AMD_HWCR,
    AMD_NB_CFG,
];

impl Cpu {
    /// The guest's time-stamp counter now.
    #[inline(always)]
    pub fn tsc(&self) -> u64 {
        self.tsc_at(Clock::ticks())
    }

    /// The guest's time-stamp counter when the host's showed `ticks`.
    #[inline(always)]
    pub fn tsc_at(&self, ticks: u64) -> u64 {
        ticks.wrapping_add(self.msrs.tsc_offset)
    }

    /// Makes the guest's counter show `value` now.
    pub fn set_tsc(&mut self, value: u64) {
        self.msrs.tsc_offset = value.wrapping_sub(Clock::ticks());
        self.rearm_tsc_deadline();
    }

    /// The host's counter at the moment when the guest's shows `guest`; far-off values become "never".
    pub fn guest_to_host_tsc(&self, guest: u64) -> u64 {
        let ahead = guest.wrapping_sub(self.tsc());
        let now = Clock::ticks();
        if ahead as i64 <= 0 { now } else { now.saturating_add(ahead) }
    }

    fn idle_counter(&self, index: u32) -> bool {
        !self.vm.cpuid.is_intel() && AMD_PERF.contains(&index)
    }

    fn rearm_tsc_deadline(&mut self) {
        match self.tsc_deadline() {
            0 => {}
            deadline => self.set_tsc_deadline(deadline),
        }
    }

    /// `RDMSR`, after the privilege check.
    pub fn read_msr(&self, index: u32) -> Exec<u64> {
        let m = &self.msrs;
        if let Some(n) = fixed_mtrr(index) {
            return Ok(m.mtrr_fixed[n]);
        }
        if self.idle_counter(index) {
            return Ok(0);
        }
        Ok(match index {
            IA32_TSC => self.tsc(),
            IA32_APIC_BASE => self.apic_base(),
            IA32_TSC_ADJUST => m.tsc_adjust,
            IA32_SPEC_CTRL if self.vm.cpuid.spec_ctrl() => m.spec_ctrl,
            IA32_MTRRCAP => 1 << 10 | 1 << 8 | u64::from(VARIABLE_MTRRS),
            IA32_ARCH_CAPABILITIES if self.vm.cpuid.arch_capabilities().is_some() => {
                self.vm.cpuid.arch_capabilities().unwrap_or(0)
            }
            IA32_SYSENTER_CS => m.sysenter_cs,
            IA32_SYSENTER_ESP => m.sysenter_esp,
            IA32_SYSENTER_EIP => m.sysenter_eip,
            IA32_MCG_CAP | AMD_VM_HSAVE_PA => 0,
            IA32_MCG_STATUS => m.mcg_status,
            IA32_MISC_ENABLE => m.misc_enable,
            IA32_DEBUGCTL => m.debugctl,
            IA32_FEATURE_CONTROL => 1, // locked, without VMX
            IA32_MTRR_PHYSBASE0..=0x20f => m.mtrr_variable[(index - IA32_MTRR_PHYSBASE0) as usize],
            IA32_PAT => m.pat,
            IA32_MTRR_DEF_TYPE => m.mtrr_def_type,
            IA32_TSC_DEADLINE => self.tsc_deadline(),
            X2APIC_FIRST..=X2APIC_LAST => return self.read_x2apic(index),
            IA32_XSS if self.vm.cpuid.xsaves() => m.xss,
            EFER => self.efer,
            STAR => m.star,
            LSTAR => m.lstar,
            CSTAR => m.cstar,
            FMASK => m.fmask,
            FS_BASE => self.segs[seg::FS as usize].base,
            GS_BASE => self.segs[seg::GS as usize].base,
            KERNEL_GS_BASE => m.kernel_gs_base,
            TSC_AUX => m.tsc_aux,
            AMD_SYSCFG => m.amd[0],
            AMD_HWCR => m.amd[1],
            AMD_NB_CFG => m.amd[2],
            // LFENCE serializes: what spares the guest a slower mitigation.
            AMD_DE_CFG => 1 << 1,
            AMD_PATCH_LEVEL => self.vm.cpuid.patch_level(),
            KVM_WALL_CLOCK => m.kvm_clock[0],
            KVM_SYSTEM_TIME => m.kvm_clock[1],
            _ => {
                log::debug!("vCPU {}: RDMSR {index:#x}: no such register", self.id);
                return Err(Exception::GP0);
            }
        })
    }

    /// `WRMSR`, after the privilege check.
    pub fn write_msr(&mut self, index: u32, value: u64) -> Exec {
        if let Some(n) = fixed_mtrr(index) {
            self.msrs.mtrr_fixed[n] = value;
            return Ok(());
        }
        if self.idle_counter(index) {
            return Ok(());
        }
        let m = &mut self.msrs;
        match index {
            IA32_TSC => {
                let delta = value.wrapping_sub(self.tsc());
                self.msrs.tsc_adjust = self.msrs.tsc_adjust.wrapping_add(delta);
                self.set_tsc(value);
            }
            IA32_APIC_BASE => return self.set_apic_base(value),
            IA32_TSC_ADJUST => {
                let delta = value.wrapping_sub(m.tsc_adjust);
                m.tsc_adjust = value;
                m.tsc_offset = m.tsc_offset.wrapping_add(delta);
                self.rearm_tsc_deadline();
            }
            IA32_SPEC_CTRL if self.vm.cpuid.spec_ctrl() => {
                if value & !7 != 0 {
                    return Err(Exception::GP0);
                }
                m.spec_ctrl = value;
            }
            IA32_PRED_CMD if self.vm.cpuid.spec_ctrl() => {
                if value & !1 != 0 {
                    return Err(Exception::GP0);
                }
            }
            IA32_SYSENTER_CS => m.sysenter_cs = value,
            IA32_SYSENTER_ESP => m.sysenter_esp = canonical(value)?,
            IA32_SYSENTER_EIP => m.sysenter_eip = canonical(value)?,
            IA32_MCG_STATUS => m.mcg_status = value,
            IA32_MISC_ENABLE => m.misc_enable = value,
            IA32_DEBUGCTL => m.debugctl = value & 3,
            IA32_BIOS_SIGN_ID | AMD_DE_CFG | AMD_VM_HSAVE_PA => {}
            IA32_MTRR_PHYSBASE0..=0x20f => m.mtrr_variable[(index - IA32_MTRR_PHYSBASE0) as usize] = value,
            IA32_PAT if valid_pat(value) => m.pat = value,
            IA32_MTRR_DEF_TYPE if value & !0xcff == 0 => m.mtrr_def_type = value,
            IA32_TSC_DEADLINE => self.set_tsc_deadline(value),
            X2APIC_FIRST..=X2APIC_LAST => return self.write_x2apic(index, value),
            IA32_XSS if self.vm.cpuid.xsaves() && value == 0 => {}
            EFER => return self.write_efer(value),
            STAR => m.star = value,
            LSTAR => m.lstar = canonical(value)?,
            CSTAR => m.cstar = canonical(value)?,
            FMASK => m.fmask = value & 0xffff_ffff,
            FS_BASE => self.segs[seg::FS as usize].base = canonical(value)?,
            GS_BASE => self.segs[seg::GS as usize].base = canonical(value)?,
            KERNEL_GS_BASE => m.kernel_gs_base = canonical(value)?,
            TSC_AUX if value >> 32 == 0 => m.tsc_aux = value,
            AMD_SYSCFG => m.amd[0] = value,
            AMD_HWCR => m.amd[1] = value,
            AMD_NB_CFG => m.amd[2] = value,
            KVM_WALL_CLOCK => {
                m.kvm_clock[0] = value;
                super::pvclock::write_wall_clock(self, value);
            }
            KVM_SYSTEM_TIME => {
                m.kvm_clock[1] = value;
                super::pvclock::write_system_time(self, value);
            }
            _ => {
                log::debug!("vCPU {}: WRMSR {index:#x} = {value:#x}: refused", self.id);
                return Err(Exception::GP0);
            }
        }
        Ok(())
    }

    fn write_efer(&mut self, value: u64) -> Exec {
        let known = efer::SCE | efer::LME | efer::LMA | efer::NXE | efer::FFXSR | efer::AUTOIBRS;
        let toggles_long = (value ^ self.efer) & efer::LME != 0;
        if value & !known != 0 || (toggles_long && self.cr0 & cr0::PG != 0) {
            return Err(Exception::GP0);
        }
        // LMA follows LME and CR0.PG; software cannot write it.
        self.efer = value & !efer::LMA | self.efer & efer::LMA;
        let pcid = self.pcid();
        self.tlb.flush_all(pcid);
        self.update_mode();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Guest;

    #[test]
    fn counters_that_every_amd_cpu_has_are_there_and_idle() {
        let mut guest = Guest::new(64, &[]);
        let there = !guest.cpu.vm.cpuid.is_intel();
        for index in 0xc001_0000..=0xc001_0007 {
            assert_eq!(guest.cpu.write_msr(index, 0x43_0076).is_ok(), there, "{index:#x}");
            assert_eq!(guest.cpu.read_msr(index).ok(), there.then_some(0), "{index:#x}");
        }
    }
}
