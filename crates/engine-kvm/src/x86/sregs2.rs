//! `KVM_GET_SREGS2` and `KVM_SET_SREGS2` (Linux 5.14): the system registers with the page-directory pointers of
//! PAE paging, which a CPU keeps from the load of CR3 on, whatever becomes of them in memory (SDM 3A, 4.4.1).

#![allow(unsafe_code)] // ioctls that the library does not know

use std::os::fd::AsRawFd;

use engine::Error;
use kvm_bindings::{KVM_CAP_SREGS2, KVM_SREGS2_FLAGS_PDPTRS_VALID, KVMIO, kvm_sregs, kvm_sregs2};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);

/// Whether this host's kernel has them.
pub(crate) fn available(vm: &VmFd) -> bool {
    vm.check_extension_raw(KVM_CAP_SREGS2.into()) > 0
}

/// The page-directory pointers, if the vCPU uses them.
pub(super) fn pdptes(fd: &VcpuFd) -> Result<Option<[u64; 4]>, Error> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the kernel fills in a structure of this size.
    if unsafe { ioctl_with_mut_ref(fd, KVM_GET_SREGS2(), &mut sregs) } < 0 {
        let source = std::io::Error::last_os_error();
        return Err(Error::Host { what: "reading a vCPU's page-directory pointers", source });
    }
    let valid = sregs.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0;
    Ok(valid.then_some(sregs.pdptrs))
}

/// Sets the system registers and, for a vCPU with PAE paging, these page-directory pointers.
pub(super) fn set(fd: &VcpuFd, s: &kvm_sregs, pdptes: [u64; 4]) -> Result<(), kvm_ioctls::Error> {
    let sregs = kvm_sregs2 {
        cs: s.cs,
        ds: s.ds,
        es: s.es,
        fs: s.fs,
        gs: s.gs,
        ss: s.ss,
        tr: s.tr,
        ldt: s.ldt,
        gdt: s.gdt,
        idt: s.idt,
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        flags: KVM_SREGS2_FLAGS_PDPTRS_VALID.into(),
        pdptrs: pdptes,
    };
    // SAFETY: the kernel reads a structure of this size.
    match unsafe { ioctl_with_ref(&fd.as_raw_fd(), KVM_SET_SREGS2(), &sregs) } {
        0 => Ok(()),
        _ => Err(kvm_ioctls::Error::last()),
    }
}
