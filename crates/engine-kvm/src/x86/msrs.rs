//! Model-specific registers.

use std::sync::OnceLock;

use engine::Error;
use engine::x86::CpuModel;
use engine::x86::bits::msr;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

/// The registers that a saved state carries, as ranges, ascending. Not in here: what travels by its own
/// field (TSC, APIC base, TSC deadline), what the segments and EFER's own path carry, and what a guest can only
/// read (SDM 4, table 2-2): IA32_FEATURE_CONTROL ([`lock_features`]), IA32_ARCH_CAPABILITIES (0x10a) and the
/// microcode's revision (0x8b), which are KVM's for this host's CPU, as CPUID is; guests that know that a hypervisor
/// is there do not judge by the latter.
const SAVED: &[(u32, u32)] = &[
    (msr::IA32_TSC_ADJUST, msr::IA32_TSC_ADJUST),
    (msr::IA32_SPEC_CTRL, msr::IA32_SPEC_CTRL),
    (0x122, 0x122), // IA32_TSX_CTRL
    (0x140, 0x140), // MISC_FEATURES_ENABLES
    (msr::IA32_SYSENTER_CS, msr::IA32_SYSENTER_EIP),
    (msr::IA32_MCG_STATUS, msr::IA32_MCG_STATUS),
    (msr::IA32_MISC_ENABLE, msr::IA32_MISC_ENABLE),
    (msr::IA32_DEBUGCTL, msr::IA32_DEBUGCTL),
    (0x1fc, 0x1fc), // MSR_POWER_CTL
    (msr::IA32_MTRR_PHYSBASE0, 0x20f),
    (msr::IA32_MTRR_FIX64K_00000, msr::IA32_MTRR_FIX64K_00000),
    (0x258, 0x259),
    (0x268, 0x26f),
    (msr::IA32_PAT, msr::IA32_PAT),
    (msr::IA32_MTRR_DEF_TYPE, msr::IA32_MTRR_DEF_TYPE),
    (msr::IA32_XSS, msr::IA32_XSS),
    (KVM_WALL_CLOCK, KVM_SYSTEM_TIME),
    (KVM_PV_EOI, KVM_PV_EOI),
    (msr::STAR, msr::FMASK),
    (msr::KERNEL_GS_BASE, msr::TSC_AUX),
    (0xc001_0010, 0xc001_0010), // AMD SYSCFG
    (0xc001_0015, 0xc001_0015), // AMD HWCR
    (0xc001_011f, 0xc001_011f), // AMD VIRT_SPEC_CTRL
];

/// Paravirtual clock.
pub(super) const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
/// Where in guest memory the guest ends interrupts without an exit.
const KVM_PV_EOI: u32 = 0x4b56_4d04;

/// Which of [`SAVED`] the VM's CPU model and this host's KVM have; found out once a VM.
pub(crate) struct MsrTable {
    model: CpuModel,
    found: OnceLock<Vec<u32>>,
}

impl MsrTable {
    pub(crate) fn new(model: CpuModel) -> MsrTable {
        MsrTable { model, found: OnceLock::new() }
    }

    fn indices(&self, fd: &VcpuFd) -> &[u32] {
        let all = SAVED.iter().flat_map(|&(first, last)| first..=last);
        let all = all.filter(|&index| self.model.carries(index));
        self.found.get_or_init(|| all.filter(|&index| read(fd, index).is_some()).collect())
    }
}

/// One register, if there is one.
pub(super) fn read(fd: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
    let done = fd.get_msrs(&mut msrs).ok()?;
    (done == 1).then(|| msrs.as_slice()[0].data)
}

/// Sets one register; whether KVM takes it.
pub(super) fn write(fd: &VcpuFd, index: u32, data: u64) -> bool {
    let msrs = Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }]);
    msrs.is_ok_and(|msrs| fd.set_msrs(&msrs).is_ok_and(|done| done == 1))
}

/// Locks IA32_FEATURE_CONTROL with nothing in it, as firmware does on a CPU of Intel's without VMX: on every
/// engine guests find it so. A KVM that has no such register needs no lock.
pub(super) fn lock_features(fd: &VcpuFd) {
    if !write(fd, msr::IA32_FEATURE_CONTROL, 1) {
        log::debug!("KVM does not lock IA32_FEATURE_CONTROL");
    }
}

/// All registers of the saved state, ascending.
pub(super) fn save(fd: &VcpuFd, table: &MsrTable) -> Result<Vec<(u32, u64)>, Error> {
    let indices = table.indices(fd);
    let entries: Vec<_> =
        indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut msrs = Msrs::from_entries(&entries).map_err(|_| refused("reading", "them all"))?;
    let done = fd.get_msrs(&mut msrs).map_err(crate::failed("reading a vCPU's MSRs"))?;
    match indices.get(done) {
        None => Ok(msrs.as_slice().iter().map(|entry| (entry.index, entry.data)).collect()),
        Some(index) => Err(refused("reading", &format!("{index:#x}"))),
    }
}

fn refused(doing: &str, what: &str) -> Error {
    Error::BadState(format!("{doing} the model-specific registers: KVM refuses {what}"))
}

/// Sets the registers of a saved state that hold something else already. One that KVM lacks is an error
/// only if it holds something: another engine keeps registers that have no effect.
pub(super) fn restore(fd: &VcpuFd, table: &MsrTable, saved: &[(u32, u64)]) -> Result<(), Error> {
    let here = save(fd, table)?;
    let differs = |&&(index, data): &&(u32, u64)| {
        index != msr::EFER && get(&here, index).or_else(|| read(fd, index)).unwrap_or(0) != data
    };
    match saved.iter().filter(differs).find(|&&(index, data)| !write(fd, index, data)) {
        Some((index, data)) => Err(refused("setting", &format!("{index:#x} = {data:#x}"))),
        None => Ok(()),
    }
}

/// A register of a saved state.
pub(super) fn get(saved: &[(u32, u64)], index: u32) -> Option<u64> {
    let at = saved.binary_search_by_key(&index, |(index, _)| *index).ok()?;
    Some(saved[at].1)
}

/// Puts a register into a saved state.
pub(super) fn set(saved: &mut Vec<(u32, u64)>, index: u32, value: u64) {
    match saved.binary_search_by_key(&index, |(index, _)| *index) {
        Ok(at) => saved[at].1 = value,
        Err(at) => saved.insert(at, (index, value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_order() {
        let all: Vec<_> = SAVED.iter().flat_map(|&(first, last)| first..=last).collect();
        assert!(all.is_sorted_by(|a, b| a < b), "{all:x?}");
    }
}
