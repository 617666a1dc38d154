//! The frequency of the time-stamp counter (`KVM_GET_TSC_KHZ`, `KVM_SET_TSC_KHZ`).

use engine::Error;
use engine::x86::{other_frequency, same_frequency};
use kvm_ioctls::{Cap, VcpuFd};

use crate::vm::Shared;

/// Frequency in kHz; 0 if KVM does not tell.
pub(super) fn save(fd: &VcpuFd) -> u32 {
    fd.get_tsc_khz().unwrap_or(0)
}

/// Lets the counter be as fast as the guest knows it, if the host can; 0 is as it is. It comes before the counter
/// itself.
pub(super) fn restore(id: u32, fd: &VcpuFd, shared: &Shared, khz: u32) -> Result<(), Error> {
    let here = save(fd);
    if khz == 0 || khz == here {
        return Ok(());
    }
    // Without a CPU that scales it, KVM refuses lower frequencies, and imitates higher ones by jumps.
    let may = same_frequency(khz, here) || shared.fd.check_extension(Cap::TscControl);
    if may && fd.set_tsc_khz(khz).is_ok() {
        let cpuid = shared.cpuid.of_vcpu(id, Some(khz))?;
        // KVM takes no other leaves of a vCPU that has run. Then they stay what this guest has read.
        if let Err(errno) = fd.set_cpuid2(&cpuid) {
            log::debug!("CPUID of vCPU {id} goes on to name {here} kHz, not {khz}: {errno}");
        }
    } else if id == 0 && !same_frequency(khz, here) {
        log::warn!("{}", other_frequency(khz, here));
    }
    Ok(())
}
