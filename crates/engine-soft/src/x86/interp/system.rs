//! Control, debug and model-specific registers, TLB and cache control, identification.

use engine::x86::bits::{cr0, cr4};
use iced_x86::Code;

use super::super::access::canonical;
use super::super::cpu::Cpu;
use super::super::decode::Lower;
use super::super::exception::{Exception, Exec};
use super::super::int::Int;
use super::super::op::{Handler, Op, flag, reg, seg};

/// What KVM answers to a hypercall that it does not know (its KVM_ENOSYS).
const UNKNOWN_HYPERCALL: i64 = -1000;

/// Handlers for system instructions.
pub fn lower(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    use Code::*;
    let handler: Handler = match l.ins.code() {
        Mov_r32_cr => return Some(read_cr::<u32>),
        Mov_r64_cr => return Some(read_cr::<u64>),
        Mov_r32_dr => return Some(read_dr::<u32>),
        Mov_r64_dr => return Some(read_dr::<u64>),
        Rdmsr => return Some(rdmsr),
        Rdtsc => return Some(rdtsc),
        Rdtscp => return Some(rdtscp),
        Rdpid_r32 | Rdpid_r64 => return Some(rdpid),
        Rdpmc => return Some(no_counters),
        Cpuid => return Some(cpuid),
        Swapgs => return Some(swapgs),
        Wbinvd | Wbnoinvd | Invd => return Some(caches),
        Mov_cr_r32 => write_cr::<u32>,
        Mov_cr_r64 => write_cr::<u64>,
        Mov_dr_r32 => write_dr::<u32>,
        Mov_dr_r64 => write_dr::<u64>,
        Clts => clts,
        Wrmsr => wrmsr,
        Invlpg_m => invlpg,
        Invpcid_r32_m128 => invpcid::<u32>,
        Invpcid_r64_m128 => invpcid::<u64>,
        Vmcall | Vmmcall => hypercall,
        _ => return None,
    };
    op.flags |= flag::ENDS_BLOCK;
    Some(handler)
}

fn pair(cpu: &Cpu) -> u64 {
    u64::from(u32::get(cpu, reg::RDX)) << 32 | u64::from(u32::get(cpu, reg::RAX))
}

fn set_pair(cpu: &mut Cpu, value: u64) {
    u32::set(cpu, reg::RAX, value as u32);
    u32::set(cpu, reg::RDX, (value >> 32) as u32);
}

fn read_cr<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = match op.src {
        0 => cpu.cr0,
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4,
        8 => cpu.lapic.cr8(),
        _ => return Err(Exception::UD),
    };
    cpu.supervisor()?;
    T::set(cpu, op.dst, T::cut(value));
    Ok(())
}

fn write_cr<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    if !matches!(op.dst, 0 | 2 | 3 | 4 | 8) {
        return Err(Exception::UD);
    }
    cpu.supervisor()?;
    let value = T::get(cpu, op.src).zx();
    match op.dst {
        0 => cpu.write_cr0(value),
        2 => {
            cpu.cr2 = value;
            Ok(())
        }
        3 => cpu.write_cr3(value),
        4 => cpu.write_cr4(value),
        _ => cpu.set_cr8(value),
    }
}

fn read_dr<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.read_dr(op.src)?;
    T::set(cpu, op.dst, T::cut(value));
    Ok(())
}

fn write_dr<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = T::get(cpu, op.src).zx();
    cpu.write_dr(op.dst, value)
}

fn clts(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.supervisor()?;
    cpu.cr0 &= !cr0::TS;
    Ok(())
}

fn rdmsr(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.supervisor()?;
    let value = cpu.read_msr(u32::get(cpu, reg::RCX))?;
    set_pair(cpu, value);
    Ok(())
}

fn wrmsr(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.supervisor()?;
    cpu.write_msr(u32::get(cpu, reg::RCX), pair(cpu))
}

fn counter_reachable(cpu: &Cpu) -> Exec {
    if cpu.cpl != 0 && cpu.cr4 & cr4::TSD != 0 { Err(Exception::GP0) } else { Ok(()) }
}

fn rdtsc(cpu: &mut Cpu, _: &Op) -> Exec {
    counter_reachable(cpu)?;
    let tsc = cpu.tsc();
    set_pair(cpu, tsc);
    Ok(())
}

fn rdtscp(cpu: &mut Cpu, op: &Op) -> Exec {
    rdtsc(cpu, op)?;
    let aux = cpu.msrs.tsc_aux as u32;
    u32::set(cpu, reg::RCX, aux);
    Ok(())
}

fn rdpid(cpu: &mut Cpu, op: &Op) -> Exec {
    let aux = cpu.msrs.tsc_aux;
    u64::set(cpu, op.dst, aux);
    Ok(())
}

/// There are no performance counters: every index is out of range.
fn no_counters(_: &mut Cpu, _: &Op) -> Exec {
    Err(Exception::GP0)
}

fn cpuid(cpu: &mut Cpu, _: &Op) -> Exec {
    let vm = cpu.vm.clone();
    let leaf = vm.cpuid.query(cpu, u32::get(cpu, reg::RAX), u32::get(cpu, reg::RCX));
    for (register, value) in [reg::RAX, reg::RBX, reg::RCX, reg::RDX].into_iter().zip(leaf) {
        u32::set(cpu, register, value);
    }
    Ok(())
}

fn swapgs(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.supervisor()?;
    std::mem::swap(&mut cpu.segs[seg::GS as usize].base, &mut cpu.msrs.kernel_gs_base);
    Ok(())
}

/// Guest memory is always coherent: nothing to write back.
fn caches(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.supervisor()
}

fn invlpg(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.supervisor()?;
    let segment = &cpu.segs[op.mem.seg as usize & 7];
    let flat = cpu.mode.long64 && op.mem.seg < seg::FS;
    let mut linear = cpu.ea(op).wrapping_add(if flat { 0 } else { segment.base });
    if !cpu.mode.long64 {
        linear &= 0xffff_ffff;
    }
    let pcid = cpu.pcid();
    cpu.tlb.flush_page(linear, pcid);
    Ok(())
}

fn invpcid<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    if !cpu.mode.protected || cpu.mode.v86 {
        return Err(if cpu.mode.v86 { Exception::GP0 } else { Exception::UD });
    }
    cpu.supervisor()?;
    let kind = T::get(cpu, op.dst).zx();
    let at = cpu.ea(op);
    let pcid = cpu.load::<u64>(op.mem.seg, at)?;
    let linear = cpu.load::<u64>(op.mem.seg, at.wrapping_add(8) & op.mem.mask)?;
    let current = cpu.pcid();
    let named = kind > 1 || pcid == 0 || cpu.cr4 & cr4::PCIDE != 0;
    if kind > 3 || pcid > 0xfff || !named || (kind == 0 && !canonical(linear)) {
        return Err(Exception::GP0);
    }
    match kind {
        0 => cpu.tlb.flush_page(linear, current),
        1 => cpu.tlb.flush_pcid(pcid as u16, current),
        2 => cpu.tlb.flush_all(current),
        _ => cpu.tlb.flush_non_global(current),
    }
    Ok(())
}

/// KVM's hypercall interface, without a call in it.
fn hypercall(cpu: &mut Cpu, _: &Op) -> Exec {
    if !cpu.mode.protected || cpu.cpl != 0 {
        return Err(Exception::UD);
    }
    if cpu.mode.long64 {
        u64::set(cpu, reg::RAX, UNKNOWN_HYPERCALL as u64);
    } else {
        u32::set(cpu, reg::RAX, UNKNOWN_HYPERCALL as u32);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::super::op::RIP;
    use super::super::super::systest::*;
    use super::super::super::testing::{CODE, DATA};
    use super::*;
    use engine::x86::bits::msr;

    const RAX: usize = reg::RAX as usize;

    #[test]
    fn system_instructions_are_the_kernels_alone() {
        let codes: &[&[u8]] = &[
            &[0x0f, 0x20, 0xc0],             // mov rax, cr0
            &[0x0f, 0x22, 0xd8],             // mov cr3, rax
            &[0x0f, 0x23, 0xf8],             // mov dr7, rax
            &[0x0f, 0x30],                   // wrmsr
            &[0x0f, 0x32],                   // rdmsr
            &[0x0f, 0x01, 0x38],             // invlpg [rax]
            &[0x0f, 0x01, 0xf8],             // swapgs
            &[0x0f, 0x06],                   // clts
            &[0x0f, 0x09],                   // wbinvd
            &[0x0f, 0x01, 0x10],             // lgdt [rax]
            &[0x0f, 0x01, 0x18],             // lidt [rax]
            &[0x0f, 0x00, 0xd8],             // ltr ax
            &[0x0f, 0x00, 0xd0],             // lldt ax
            &[0x0f, 0x01, 0xf0],             // lmsw ax
            &[0x66, 0x0f, 0x38, 0x82, 0x00], // invpcid rax, [rax]
            &[0x0f, 0x33],                   // rdpmc
        ];
        for code in codes {
            let mut system = System::long(code);
            system.enter_ring3();
            system.cpu.regs[RAX] = DATA;
            assert_eq!(system.guest.step(), Err(Exception::GP0), "{code:x?}");
        }
    }

    #[test]
    fn invlpg_makes_a_changed_mapping_seen() {
        let mut system = System::long(&[0x8a, 0x08, 0x0f, 0x01, 0x38, 0x8a, 0x08]);
        let pte = system.cpu.cr3 + 0x3000 + (DATA >> 12) * 8;
        system.poke(DATA, &[1]);
        system.poke(DATA + 0x1000, &[2]);
        system.cpu.regs[RAX] = DATA;
        system.guest.step().unwrap();
        system.put64(pte, &[(DATA + 0x1000) | 7]);
        system.guest.steps(2).unwrap();
        assert_eq!(system.cpu.regs[reg::RCX as usize], 2);
    }

    #[test]
    fn invpcid_checks_its_descriptor() {
        let attempt = |kind: u64, descriptor: [u64; 2]| {
            let mut system = System::long(&[0x66, 0x0f, 0x38, 0x82, 0x08]); // invpcid rcx, [rax]
            system.put64(DATA, &descriptor);
            system.cpu.regs[RAX] = DATA;
            system.cpu.regs[reg::RCX as usize] = kind;
            system.guest.step()
        };
        assert_eq!(attempt(0, [0, DATA]), Ok(()));
        assert_eq!(attempt(0, [0, 1 << 50]), Err(Exception::GP0));
        assert_eq!(attempt(1, [5, 0]), Err(Exception::GP0), "PCIDs are off");
        assert_eq!(attempt(2, [5, 0]), Ok(()));
        assert_eq!(attempt(3, [0x1000, 0]), Err(Exception::GP0));
        assert_eq!(attempt(4, [0, 0]), Err(Exception::GP0));
    }

    #[test]
    fn msrs_travel_in_edx_and_eax() {
        let mut system = System::long(&[0x0f, 0x30, 0x0f, 0x32]); // wrmsr; rdmsr
        system.cpu.regs[reg::RCX as usize] = 0xdead_0000_0000 | u64::from(msr::LSTAR);
        system.cpu.regs[RAX] = 0xdead_0000_8000_0000;
        system.cpu.regs[reg::RDX as usize] = 0xdead_ffff_ffff_ffff;
        system.guest.step().unwrap();
        assert_eq!(system.cpu.msrs.lstar, 0xffff_ffff_8000_0000);
        system.guest.step().unwrap();
        assert_eq!((system.cpu.regs[RAX], system.cpu.regs[reg::RDX as usize]), (0x8000_0000, 0xffff_ffff));
    }

    #[test]
    fn the_counter_rises_and_can_be_kept_from_users() {
        let mut system = System::long(&[0x0f, 0x31, 0x0f, 0x31]);
        let mut read = || {
            system.guest.step().unwrap();
            pair(&system.guest.cpu)
        };
        assert!(read() < read());
        system.cpu.cr4 |= cr4::TSD;
        system.enter_ring3();
        system.cpu.regs[RIP as usize] = CODE;
        assert_eq!(system.guest.step(), Err(Exception::GP0));
    }

    #[test]
    fn task_priority_is_cr8() {
        let mut system = System::long(&[0x44, 0x0f, 0x22, 0xc0, 0x44, 0x0f, 0x20, 0xc1]);
        system.cpu.regs[RAX] = 5;
        system.guest.steps(2).unwrap();
        assert_eq!(system.cpu.regs[reg::RCX as usize], 5);
        system.cpu.regs[RAX] = 16;
        system.cpu.regs[RIP as usize] = CODE;
        assert_eq!(system.guest.step(), Err(Exception::GP0));
    }

    #[test]
    fn an_unknown_hypercall_says_so() {
        let mut system = System::long(&[0x0f, 0x01, 0xc1]);
        system.guest.step().unwrap();
        assert_eq!(system.cpu.regs[RAX] as i64, -1000);
    }
}
