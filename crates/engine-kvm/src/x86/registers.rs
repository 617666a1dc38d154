//! General registers, segments, control and debug registers.

use engine::Error;
use engine::x86::bits::{access, cr0, cr4, efer, msr};
use engine::x86::{CpuState, DescriptorTable, Segment};
use kvm_bindings::{kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::msrs;
use crate::failed;

fn segment(s: &kvm_segment) -> Segment {
    let flag = |set: u8, bit: u16| if set != 0 { bit } else { 0 };
    let access = u16::from(s.type_ & 0xf)
        | flag(s.s, access::S)
        | u16::from(s.dpl & 3) << access::DPL_SHIFT
        | flag(s.present, access::P)
        | flag(s.avl, access::AVL)
        | flag(s.l, access::L)
        | flag(s.db, access::DB)
        | flag(s.g, access::G);
    Segment { selector: s.selector, base: s.base, limit: s.limit, access, unusable: s.unusable != 0 }
}

fn kvm_segment(s: &Segment) -> kvm_segment {
    let flag = |bit: u16| u8::from(s.access & bit != 0);
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.access & 0xf) as u8,
        // AMD's CPUs know no "unusable"; there a segment without a descriptor is one that is not present.
        present: flag(access::P) & u8::from(!s.unusable),
        dpl: (s.access >> access::DPL_SHIFT & 3) as u8,
        db: flag(access::DB),
        s: flag(access::S),
        l: flag(access::L),
        g: flag(access::G),
        avl: flag(access::AVL),
        unusable: u8::from(s.unusable),
        padding: 0,
    }
}

fn table(t: &kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: t.base, limit: t.limit }
}

fn kvm_table(t: &DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, ..Default::default() }
}

/// Fills in the general registers.
pub(super) fn save_general(fd: &VcpuFd, state: &mut CpuState) -> Result<(), Error> {
    let r = fd.get_regs().map_err(failed("reading a vCPU's registers"))?;
    state.gpr = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15,
    ];
    (state.rip, state.rflags) = (r.rip, r.rflags);
    Ok(())
}

/// Sets the general registers.
pub(super) fn restore_general(fd: &VcpuFd, state: &CpuState) -> Result<(), Error> {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gpr;
    let (rip, rflags) = (state.rip, state.rflags);
    let regs = kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    };
    fd.set_regs(&regs).map_err(failed("setting a vCPU's registers"))
}

/// Fills in segments, tables, control registers, EFER, and the local APIC's base.
pub(super) fn save_system(fd: &VcpuFd, state: &mut CpuState) -> Result<(), Error> {
    let s = fd.get_sregs().map_err(failed("reading a vCPU's system registers"))?;
    state.segments = [&s.es, &s.cs, &s.ss, &s.ds, &s.fs, &s.gs].map(segment);
    (state.ldtr, state.tr) = (segment(&s.ldt), segment(&s.tr));
    (state.gdtr, state.idtr) = (table(&s.gdt), table(&s.idt));
    (state.cr0, state.cr2, state.cr3, state.cr4, state.cr8) = (s.cr0, s.cr2, s.cr3, s.cr4, s.cr8);
    state.lapic.base = s.apic_base;
    msrs::set(&mut state.msrs, msr::EFER, s.efer);
    Ok(())
}

/// Sets segments, tables, control registers, EFER, and the local APIC's base.
///
/// The page-directory pointers of PAE paging are loaded anew from memory where the state does not carry them, or
/// the host's kernel is too old (`sregs2`).
pub(super) fn restore_system(fd: &VcpuFd, state: &CpuState, sregs2: bool) -> Result<(), Error> {
    let [es, cs, ss, ds, fs, gs] = state.segments.each_ref().map(kvm_segment);
    let sregs = kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr: kvm_segment(&state.tr),
        ldt: kvm_segment(&state.ldtr),
        gdt: kvm_table(&state.gdtr),
        idt: kvm_table(&state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: state.cr8,
        efer: msrs::get(&state.msrs, msr::EFER).unwrap_or(0),
        apic_base: state.lapic.base,
        interrupt_bitmap: [0; 4],
    };
    let pae = sregs.cr0 & cr0::PG != 0 && sregs.cr4 & cr4::PAE != 0 && sregs.efer & efer::LMA == 0;
    let set = match state.pdptes.filter(|_| sregs2 && pae) {
        Some(pdptes) => super::sregs2::set(fd, &sregs, pdptes),
        None => fd.set_sregs(&sregs),
    };
    set.map_err(|errno| {
        Error::BadState(format!(
            "the CPU refuses its system registers ({errno}): cr0 {:#x}, cr3 {:#x}, cr4 {:#x}, efer {:#x}, \
             APIC base {:#x}",
            sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer, sregs.apic_base
        ))
    })
}

/// Fills in the debug registers.
pub(super) fn save_debug(fd: &VcpuFd, state: &mut CpuState) -> Result<(), Error> {
    let d = fd.get_debug_regs().map_err(failed("reading a vCPU's debug registers"))?;
    let [dr0, dr1, dr2, dr3] = d.db;
    state.dr = [dr0, dr1, dr2, dr3, 0, 0, d.dr6, d.dr7];
    Ok(())
}

/// Sets the debug registers.
pub(super) fn restore_debug(fd: &VcpuFd, state: &CpuState) -> Result<(), Error> {
    let [dr0, dr1, dr2, dr3, _, _, dr6, dr7] = state.dr;
    let regs = kvm_debugregs { db: [dr0, dr1, dr2, dr3], dr6, dr7, ..Default::default() };
    fd.set_debug_regs(&regs)
        .map_err(|errno| Error::BadState(format!("impossible debug registers {:x?}: {errno}", state.dr)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_rights_come_back_as_they_were() {
        for access in [0xa09b, 0xc093, 0x008b, 0x0082, 0xc0f3, 0x1093] {
            let there = Segment { selector: 8, base: 0x1000, limit: 0xfffff, access, unusable: false };
            assert_eq!(segment(&kvm_segment(&there)), there);
        }
    }

    #[test]
    fn a_segment_without_a_descriptor_is_not_present() {
        let null = Segment { access: 0x93, unusable: true, ..Segment::default() };
        assert_eq!(kvm_segment(&null).present, 0);
    }
}
