//! The state in which vCPU 0 starts the kernel.

use boot::Entry;
use engine::CpuState;
use engine::x86::bits::msr;
use engine::x86::{Activity, CpuState as X86State, DescriptorTable, Segment};

use crate::Error;

/// `power_on`, changed to what the boot protocol promises.
pub(crate) fn at_entry(power_on: CpuState, entry: &Entry) -> Result<CpuState, Error> {
    let CpuState::X86(mut cpu) = power_on else { return Err(Error::WrongCpu) };
    set_registers(&mut cpu, entry);
    set_system(&mut cpu, entry);
    Ok(CpuState::X86(cpu))
}

fn set_registers(cpu: &mut X86State, entry: &Entry) {
    const RAX: usize = 0;
    const RBX: usize = 3;
    const RSP: usize = 4;
    const RSI: usize = 6;
    cpu.gpr = [0; 16];
    cpu.gpr[RAX] = entry.rax;
    cpu.gpr[RBX] = entry.rbx;
    cpu.gpr[RSP] = entry.rsp;
    cpu.gpr[RSI] = entry.rsi;
    cpu.rip = entry.rip;
    cpu.rflags = entry.rflags;
    cpu.activity = Activity::Running;
}

fn set_system(cpu: &mut X86State, entry: &Entry) {
    let [data, code] = [segment(&entry.data), segment(&entry.cs)];
    cpu.segments = [data, code, data, data, data, data]; // ES, CS, SS, DS, FS, GS
    cpu.ldtr = Segment { unusable: true, ..Segment::default() };
    cpu.tr = segment(&entry.tr);
    cpu.gdtr = table(&entry.gdtr);
    cpu.idtr = table(&entry.idtr);
    cpu.cr0 = entry.cr0;
    cpu.cr2 = 0;
    cpu.cr3 = entry.cr3;
    cpu.cr4 = entry.cr4;
    set_msr(&mut cpu.msrs, msr::EFER, entry.efer);
}

fn segment(s: &boot::Segment) -> Segment {
    Segment { selector: s.selector, base: s.base, limit: s.limit, access: s.access, unusable: false }
}

fn table(t: &boot::DescriptorTable) -> DescriptorTable {
    DescriptorTable { base: t.base, limit: t.limit }
}

fn set_msr(msrs: &mut Vec<(u32, u64)>, index: u32, value: u64) {
    match msrs.binary_search_by_key(&index, |(index, _)| *index) {
        Ok(at) => msrs[at].1 = value,
        Err(at) => msrs.insert(at, (index, value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::x86::bits::{access, cr0, cr4, efer};
    use engine::x86::{LapicState, XSAVE_AREA_SIZE};

    fn power_on() -> X86State {
        X86State {
            gpr: [7; 16],
            rip: 0xfff0,
            rflags: 2,
            segments: [Segment::default(); 6],
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: DescriptorTable::default(),
            idtr: DescriptorTable::default(),
            cr0: 0x6000_0010,
            cr2: 5,
            cr3: 0,
            cr4: 0,
            pdptes: None,
            cr8: 0,
            dr: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
            xcr0: 1,
            xsave: vec![0; XSAVE_AREA_SIZE],
            msrs: vec![(msr::IA32_PAT, 0x0007_0406_0007_0406), (msr::EFER, 0), (msr::STAR, 9)],
            tsc: 77,
            tsc_khz: 0,
            lapic: LapicState { regs: vec![1; 64], base: 0xfee0_0900, tsc_deadline: 0, timer_left_ns: None },
            activity: Activity::WaitForSipi,
            pending: None,
            nmi_pending: false,
            nmi_blocked: false,
            interrupt_shadow: false,
            kvm_clock_ns: 0,
        }
    }

    fn flat(selector: u16, access: u16) -> boot::Segment {
        boot::Segment { selector, base: 0, limit: u32::MAX, access }
    }

    #[test]
    fn a_64_bit_kernel_starts_in_long_mode_with_everything_else_as_after_reset() {
        let present = access::P | access::S | access::READ_WRITE | access::G;
        let entry = Entry {
            mode: boot::Mode::Long64,
            rip: 0x100_0200,
            rflags: 2,
            rax: 0,
            rbx: 0,
            rsi: 0x7000,
            rsp: 0x9000,
            cr0: cr0::PE | cr0::PG,
            cr3: 0x9000,
            cr4: cr4::PAE,
            efer: efer::LME | efer::LMA,
            cs: flat(0x10, present | access::CODE | access::L),
            data: flat(0x18, present | access::DB),
            tr: boot::Segment { selector: 0x20, base: 0, limit: 0x67, access: 0x8b },
            gdtr: boot::DescriptorTable { base: 0x500, limit: 0x2f },
            idtr: boot::DescriptorTable::default(),
        };
        let before = power_on();
        let CpuState::X86(cpu) = at_entry(CpuState::X86(Box::new(before.clone())), &entry).unwrap() else {
            unreachable!()
        };
        assert_eq!((cpu.rip, cpu.gpr[6], cpu.gpr[4], cpu.gpr[2]), (0x100_0200, 0x7000, 0x9000, 0));
        assert_eq!((cpu.cr0, cpu.cr3, cpu.cr4, cpu.cr2), (entry.cr0, 0x9000, cr4::PAE, 0));
        assert!(
            cpu.msrs.contains(&(msr::EFER, efer::LME | efer::LMA)) && cpu.msrs.len() == before.msrs.len()
        );
        let [es, cs, ss, ..] = cpu.segments;
        assert_eq!((es.selector, cs.selector, ss), (0x18, 0x10, es));
        assert_eq!((cs.access & access::L, cpu.tr.access, cpu.ldtr.unusable), (access::L, 0x8b, true));
        assert_eq!((cpu.gdtr.base, cpu.gdtr.limit), (0x500, 0x2f));
        assert_eq!(cpu.activity, Activity::Running);
        assert_eq!(
            (cpu.dr, cpu.xcr0, cpu.tsc, &cpu.lapic),
            (before.dr, before.xcr0, before.tsc, &before.lapic)
        );
    }

    #[test]
    fn registers_are_replaced_in_place_and_missing_ones_added_in_order() {
        let mut msrs = vec![(0x10, 1), (0xc000_0081, 2)];
        set_msr(&mut msrs, msr::EFER, 0x500);
        set_msr(&mut msrs, 0x10, 7);
        assert_eq!(msrs, [(0x10, 7), (msr::EFER, 0x500), (0xc000_0081, 2)]);
    }
}
