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

    #[test]
    fn registers_are_replaced_in_place_and_missing_ones_added_in_order() {
        let mut msrs = vec![(0x10, 1), (0xc000_0081, 2)];
        set_msr(&mut msrs, msr::EFER, 0x500);
        set_msr(&mut msrs, 0x10, 7);
        assert_eq!(msrs, [(0x10, 7), (msr::EFER, 0x500), (0xc000_0081, 2)]);
    }
}
