//! Segment registers, descriptor-table registers, and looking at descriptors (SDM 2 under each
//! mnemonic).

use engine::x86::DescriptorTable;
use engine::x86::bits::{cr0, cr4, rflags};
use iced_x86::Code;

use super::super::access::canonical;
use super::super::cpu::Cpu;
use super::super::decode::Lower;
use super::super::descriptor::{Descriptor, null, rpl, system};
use super::super::exception::{Exception, Exec, vector};
use super::super::int::Int;
use super::super::op::{Handler, Op, flag, seg};
use super::super::stack::Stack;

/// Handlers for segment registers and descriptor tables.
pub fn lower(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    segment_registers(l, op)
        .or_else(|| table_registers(l, op))
        .or_else(|| inspections(l))
        .or_else(|| bases(l, op))
}

fn segment_registers(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    use Code::*;
    let code = l.ins.code();
    if let Some((handler, segment)) = far_pointer(code) {
        op.src = segment;
        return Some(ends_at_ss(op, segment, handler));
    }
    Some(match code {
        Mov_rm16_Sreg | Mov_r32m16_Sreg | Mov_r64m16_Sreg if l.is_mem(0) => store_sreg,
        Mov_rm16_Sreg => read_sreg::<u16>,
        Mov_r32m16_Sreg => read_sreg::<u32>,
        Mov_r64m16_Sreg => read_sreg::<u64>,
        Mov_Sreg_rm16 | Mov_Sreg_r32m16 | Mov_Sreg_r64m16 => {
            let handler: Handler = if l.is_mem(1) { load_sreg::<true> } else { load_sreg::<false> };
            ends_at_ss(op, op.dst, handler)
        }
        Pushw_ES | Pushw_CS | Pushw_SS | Pushw_DS | Pushw_FS | Pushw_GS => push_sreg::<2>,
        Pushd_ES | Pushd_CS | Pushd_SS | Pushd_DS | Pushd_FS | Pushd_GS => push_sreg::<4>,
        Pushq_FS | Pushq_GS => push_sreg::<8>,
        Popw_ES | Popw_SS | Popw_DS | Popw_FS | Popw_GS => ends_at_ss(op, op.dst, pop_sreg::<2>),
        Popd_ES | Popd_SS | Popd_DS | Popd_FS | Popd_GS => ends_at_ss(op, op.dst, pop_sreg::<4>),
        Popq_FS | Popq_GS => pop_sreg::<8>,
        _ => return None,
    })
}

/// `LDS` and its kin: the handler and the segment register.
fn far_pointer(code: Code) -> Option<(Handler, u8)> {
    use Code::*;
    let segment = match code {
        Les_r16_m1616 | Les_r32_m1632 => seg::ES,
        Lds_r16_m1616 | Lds_r32_m1632 => seg::DS,
        Lss_r16_m1616 | Lss_r32_m1632 | Lss_r64_m1664 => seg::SS,
        Lfs_r16_m1616 | Lfs_r32_m1632 | Lfs_r64_m1664 => seg::FS,
        Lgs_r16_m1616 | Lgs_r32_m1632 | Lgs_r64_m1664 => seg::GS,
        _ => return None,
    };
    let handler: Handler = match code {
        Les_r16_m1616 | Lds_r16_m1616 | Lss_r16_m1616 | Lfs_r16_m1616 | Lgs_r16_m1616 => {
            load_far_pointer::<u16>
        }
        Lss_r64_m1664 | Lfs_r64_m1664 | Lgs_r64_m1664 => load_far_pointer::<u64>,
        _ => load_far_pointer::<u32>,
    };
    Some((handler, segment))
}

/// A load of SS may change the width of the stack, and holds off interrupts: the block ends.
fn ends_at_ss(op: &mut Op, segment: u8, handler: Handler) -> Handler {
    if segment == seg::SS {
        op.flags |= flag::ENDS_BLOCK;
    }
    handler
}

fn table_registers(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    use Code::*;
    let mem = l.is_mem(0);
    let pick = |in_memory: Handler, in_register: Handler| if mem { in_memory } else { in_register };
    let handler = match l.ins.code() {
        Sgdt_m1632_16 | Sgdt_m1632 => sgdt::<u32>,
        Sgdt_m1664 => sgdt::<u64>,
        Sidt_m1632_16 | Sidt_m1632 => sidt::<u32>,
        Sidt_m1664 => sidt::<u64>,
        Lgdt_m1632_16 => lgdt::<2>,
        Lgdt_m1632 => lgdt::<4>,
        Lgdt_m1664 => lgdt::<8>,
        Lidt_m1632_16 => lidt::<2>,
        Lidt_m1632 => lidt::<4>,
        Lidt_m1664 => lidt::<8>,
        Sldt_rm16 => pick(sldt::<u16, true>, sldt::<u16, false>),
        Sldt_r32m16 => pick(sldt::<u32, true>, sldt::<u32, false>),
        Sldt_r64m16 => pick(sldt::<u64, true>, sldt::<u64, false>),
        Str_rm16 => pick(str::<u16, true>, str::<u16, false>),
        Str_r32m16 => pick(str::<u32, true>, str::<u32, false>),
        Str_r64m16 => pick(str::<u64, true>, str::<u64, false>),
        Smsw_rm16 => pick(smsw::<u16, true>, smsw::<u16, false>),
        Smsw_r32m16 => pick(smsw::<u32, true>, smsw::<u32, false>),
        Smsw_r64m16 => pick(smsw::<u64, true>, smsw::<u64, false>),
        Lldt_rm16 | Lldt_r32m16 | Lldt_r64m16 => pick(lldt::<true>, lldt::<false>),
        Ltr_rm16 | Ltr_r32m16 | Ltr_r64m16 => pick(ltr::<true>, ltr::<false>),
        Lmsw_rm16 | Lmsw_r32m16 | Lmsw_r64m16 => {
            op.flags |= flag::ENDS_BLOCK;
            pick(lmsw::<true>, lmsw::<false>)
        }
        _ => return None,
    };
    Some(handler)
}

fn inspections(l: &Lower<'_>) -> Option<Handler> {
    use Code::*;
    // The selector is operand 1 of LAR and LSL, operand 0 of the others.
    let pick = |n: u32, in_memory: Handler, in_register: Handler| {
        if l.is_mem(n) { in_memory } else { in_register }
    };
    Some(match l.ins.code() {
        Lar_r16_rm16 => pick(1, lar::<u16, true>, lar::<u16, false>),
        Lar_r32_r32m16 | Lar_r64_r64m16 => pick(1, lar::<u32, true>, lar::<u32, false>),
        Lsl_r16_rm16 => pick(1, lsl::<u16, true>, lsl::<u16, false>),
        Lsl_r32_r32m16 | Lsl_r64_r64m16 => pick(1, lsl::<u32, true>, lsl::<u32, false>),
        Verr_rm16 | Verr_r32m16 | Verr_r64m16 => pick(0, verify::<true, false>, verify::<false, false>),
        Verw_rm16 | Verw_r32m16 | Verw_r64m16 => pick(0, verify::<true, true>, verify::<false, true>),
        Arpl_rm16_r16 | Arpl_r32m16_r32 => pick(0, arpl::<true>, arpl::<false>),
        _ => return None,
    })
}

fn read_sreg<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let selector = cpu.segs[op.src as usize].selector;
    T::set(cpu, op.dst, T::cut(selector.into()));
    Ok(())
}

fn store_sreg(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.store_mem::<u16>(op, cpu.segs[op.src as usize].selector)
}

/// The 16-bit selector operand of an instruction.
fn selector<const MEM: bool>(cpu: &mut Cpu, op: &Op, register: u8) -> Exec<u16> {
    if MEM { cpu.load_mem::<u16>(op) } else { Ok(u16::get(cpu, register)) }
}

/// Behind a `MOV` or `POP` of SS, interrupts and debug traps wait for one instruction more.
fn hold_off(cpu: &mut Cpu, segment: u8) {
    if segment == seg::SS {
        cpu.interrupt_shadow = true;
        cpu.debug_shadow = true;
    }
}

fn load_sreg<const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let selector = selector::<MEM>(cpu, op, op.src)?;
    cpu.load_segment(op.dst, selector)?;
    hold_off(cpu, op.dst);
    Ok(())
}

fn push_sreg<const SIZE: u64>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.push_value(SIZE, cpu.segs[op.dst as usize].selector.into())
}

fn pop_sreg<const SIZE: u64>(cpu: &mut Cpu, op: &Op) -> Exec {
    let mut stack = Stack::current(cpu);
    let selector = stack.pop(cpu, SIZE)? as u16;
    cpu.load_segment(op.dst, selector)?;
    stack.commit(cpu);
    hold_off(cpu, op.dst);
    Ok(())
}

fn load_far_pointer<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let at = cpu.ea(op);
    let offset = cpu.load::<T>(op.mem.seg, at)?;
    let selector = cpu.load::<u16>(op.mem.seg, at.wrapping_add(T::BYTES) & op.mem.mask)?;
    cpu.load_segment(op.src, selector)?;
    T::set(cpu, op.dst, offset);
    Ok(())
}

/// `#GP(0)` for user code if the OS hides the system tables from it.
fn not_for_users(cpu: &Cpu) -> Exec {
    if cpu.cpl != 0 && cpu.cr4 & cr4::UMIP != 0 { Err(Exception::GP0) } else { Ok(()) }
}

/// `#UD` in real and virtual-8086 mode.
fn protected_only(cpu: &Cpu) -> Exec {
    if cpu.mode.protected && !cpu.mode.v86 { Ok(()) } else { Err(Exception::UD) }
}

/// Stores limit and base. With a 16-bit operand size, too, 32 bits of base are stored, as CPUs since the
/// 80386 do.
fn store_table<T: Int>(cpu: &mut Cpu, op: &Op, table: DescriptorTable) -> Exec {
    not_for_users(cpu)?;
    let at = cpu.ea(op);
    let linear = cpu.linear(op.mem.seg, at, T::BYTES + 2, true)?;
    let mut image = [0; 10];
    image[..2].copy_from_slice(&table.limit.to_le_bytes());
    image[2..].copy_from_slice(&table.base.to_le_bytes());
    cpu.write_linear(cpu.view(), linear, &image[..T::BYTES as usize + 2])
}

fn sgdt<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    store_table::<T>(cpu, op, cpu.gdtr)
}

fn sidt<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    store_table::<T>(cpu, op, cpu.idtr)
}

/// Reads limit and base; a 16-bit operand size takes 24 bits of base.
fn load_table<const SIZE: u64>(cpu: &mut Cpu, op: &Op) -> Exec<DescriptorTable> {
    cpu.supervisor()?;
    let at = cpu.ea(op);
    let next = at.wrapping_add(2) & op.mem.mask;
    let limit = cpu.load::<u16>(op.mem.seg, at)?;
    let base = match SIZE {
        8 => cpu.load::<u64>(op.mem.seg, next)?,
        4 => cpu.load::<u32>(op.mem.seg, next)?.into(),
        _ => u64::from(cpu.load::<u32>(op.mem.seg, next)?) & 0xff_ffff,
    };
    if canonical(base) { Ok(DescriptorTable { base, limit }) } else { Err(Exception::GP0) }
}

fn lgdt<const SIZE: u64>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.gdtr = load_table::<SIZE>(cpu, op)?;
    Ok(())
}

fn lidt<const SIZE: u64>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.idtr = load_table::<SIZE>(cpu, op)?;
    Ok(())
}

/// Memory gets 16 bits whatever the operand size.
fn put<T: Int, const MEM: bool>(cpu: &mut Cpu, op: &Op, value: u64) -> Exec {
    if MEM {
        return cpu.store_mem::<u16>(op, value as u16);
    }
    T::set(cpu, op.dst, T::cut(value));
    Ok(())
}

fn sldt<T: Int, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    protected_only(cpu)?;
    not_for_users(cpu)?;
    put::<T, MEM>(cpu, op, cpu.ldtr.selector.into())
}

fn str<T: Int, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    protected_only(cpu)?;
    not_for_users(cpu)?;
    put::<T, MEM>(cpu, op, cpu.tr.selector.into())
}

fn smsw<T: Int, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    not_for_users(cpu)?;
    put::<T, MEM>(cpu, op, cpu.cr0)
}

fn lldt<const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    protected_only(cpu)?;
    cpu.supervisor()?;
    let selector = selector::<MEM>(cpu, op, op.dst)?;
    cpu.ldtr = cpu.ldt_segment(selector, vector::GP)?;
    Ok(())
}

fn ltr<const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    protected_only(cpu)?;
    cpu.supervisor()?;
    let selector = selector::<MEM>(cpu, op, op.dst)?;
    cpu.load_task_register(selector)
}

/// Writes PE (which it cannot clear), MP, EM and TS.
fn lmsw<const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.supervisor()?;
    let word = u64::from(selector::<MEM>(cpu, op, op.dst)?);
    let mask = cr0::MP | cr0::EM | cr0::TS;
    cpu.write_cr0(cpu.cr0 & !mask | word & (mask | cr0::PE))
}

/// The descriptor that `LAR` and its kin look at, if it is in its table.
fn inspected(cpu: &mut Cpu, selector: u16) -> Exec<Option<Descriptor>> {
    if null(selector) { Ok(None) } else { cpu.find_descriptor(selector) }
}

/// Whether code at this CPL may see the descriptor through this selector.
fn visible(cpu: &Cpu, descriptor: &Descriptor) -> bool {
    descriptor.conforming() || descriptor.dpl() >= cpu.cpl.max(rpl(descriptor.selector))
}

fn set_zf(cpu: &mut Cpu, on: bool) {
    cpu.rflags = cpu.rflags & !rflags::ZF | if on { rflags::ZF } else { 0 };
}

fn lar<T: Int, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    protected_only(cpu)?;
    let selector = selector::<MEM>(cpu, op, op.src)?;
    let found = inspected(cpu, selector)?.filter(|d| {
        let kind = match d.system() {
            None => true,
            Some(system::LDT | system::TSS | system::TSS_BUSY | system::CALL_GATE) => true,
            Some(system::TSS16 | system::TSS16_BUSY | system::CALL_GATE16 | system::TASK_GATE) => {
                !cpu.mode.long
            }
            Some(_) => false,
        };
        kind && visible(cpu, d)
    });
    if let Some(descriptor) = found {
        T::set(cpu, op.dst, T::cut(descriptor.low >> 32 & 0xf0_ff00));
    }
    set_zf(cpu, found.is_some());
    Ok(())
}

fn lsl<T: Int, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    protected_only(cpu)?;
    let selector = selector::<MEM>(cpu, op, op.src)?;
    let found = inspected(cpu, selector)?.filter(|d| {
        let kind = match d.system() {
            None => true,
            Some(system::LDT | system::TSS | system::TSS_BUSY) => true,
            Some(system::TSS16 | system::TSS16_BUSY) => !cpu.mode.long,
            Some(_) => false,
        };
        kind && visible(cpu, d)
    });
    if let Some(descriptor) = found {
        T::set(cpu, op.dst, T::cut(descriptor.limit().into()));
    }
    set_zf(cpu, found.is_some());
    Ok(())
}

/// `VERR` and `VERW`.
fn verify<const MEM: bool, const WRITE: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    protected_only(cpu)?;
    let selector = selector::<MEM>(cpu, op, op.dst)?;
    let fits = inspected(cpu, selector)?
        .is_some_and(|d| (if WRITE { d.writable() } else { d.readable() }) && visible(cpu, &d));
    set_zf(cpu, fits);
    Ok(())
}

fn arpl<const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    protected_only(cpu)?;
    let wanted = u16::get(cpu, op.src) & 3;
    let current = selector::<MEM>(cpu, op, op.dst)?;
    let raise = current & 3 < wanted;
    if raise {
        let raised = current & !3 | wanted;
        if MEM {
            cpu.store_mem(op, raised)?;
        } else {
            u16::set(cpu, op.dst, raised);
        }
    }
    set_zf(cpu, raise);
    Ok(())
}

impl Cpu {
    /// `#GP(0)` outside of privilege level 0.
    #[inline(always)]
    pub(in super::super) fn supervisor(&self) -> Exec {
        if self.cpl == 0 { Ok(()) } else { Err(Exception::GP0) }
    }
}

/// `RDFSBASE`, `RDGSBASE`, `WRFSBASE`, `WRGSBASE`.
fn bases(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    use Code::*;
    let (segment, handler): (u8, Handler) = match l.ins.code() {
        Rdfsbase_r32 => (seg::FS, read_base::<u32>),
        Rdfsbase_r64 => (seg::FS, read_base::<u64>),
        Rdgsbase_r32 => (seg::GS, read_base::<u32>),
        Rdgsbase_r64 => (seg::GS, read_base::<u64>),
        Wrfsbase_r32 => (seg::FS, write_base::<u32>),
        Wrfsbase_r64 => (seg::FS, write_base::<u64>),
        Wrgsbase_r32 => (seg::GS, write_base::<u32>),
        Wrgsbase_r64 => (seg::GS, write_base::<u64>),
        _ => return None,
    };
    op.ext = segment.into();
    Some(handler)
}

fn bases_enabled(cpu: &Cpu) -> Exec {
    if cpu.cr4 & cr4::FSGSBASE != 0 { Ok(()) } else { Err(Exception::UD) }
}

fn read_base<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    bases_enabled(cpu)?;
    let base = cpu.segs[op.ext as usize].base;
    T::set(cpu, op.dst, T::cut(base));
    Ok(())
}

fn write_base<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    bases_enabled(cpu)?;
    let base = T::get(cpu, op.dst).zx();
    if !canonical(base) {
        return Err(Exception::GP0);
    }
    cpu.segs[op.ext as usize].base = base;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::super::descriptor::{gp, np};
    use super::super::super::op::reg;
    use super::super::super::systest::*;
    use super::super::super::testing::{CODE, DATA};
    use super::*;

    const RAX: usize = reg::RAX as usize;

    /// mov ds, eax with a descriptor in the free slot.
    fn load_ds(selector: u16, access: u64, ring3: bool) -> (Exec, System) {
        let mut system = System::protected(&[0x8e, 0xd8]);
        system.put64(GDT + u64::from(FREE), &[descriptor(0x1234_5000, 0x1f, access, 0xc)]);
        if ring3 {
            system.enter_ring3();
        }
        system.cpu.regs[RAX] = selector.into();
        (system.guest.step(), system)
    }

    #[test]
    fn a_loaded_segment_carries_its_descriptor_and_marks_it_accessed() {
        let (result, system) = load_ds(FREE, 0x92, false);
        assert_eq!(result, Ok(()));
        let ds = system.cpu.segs[seg::DS as usize];
        assert_eq!((ds.base, ds.limit, ds.access), (0x1234_5000, 0x1_ffff, 0xc093));
        assert_eq!(system.get64::<1>(GDT + u64::from(FREE))[0] >> 40 & 0xff, 0x93);
    }

    #[test]
    fn segments_are_refused_for_their_type_level_or_absence() {
        let refused = |selector, access, ring3| load_ds(selector, access, ring3).0.err();
        assert_eq!(refused(FREE | 3, 0x92, true), Some(gp(FREE)), "ring 0 data for ring 3");
        assert_eq!(refused(FREE | 3, 0xf2, true), None);
        assert_eq!(refused(FREE | 3, 0x92, false), Some(gp(FREE)), "RPL 3");
        assert_eq!(refused(FREE, 0x98, false), Some(gp(FREE)), "execute-only code");
        assert_eq!(refused(FREE | 3, 0x9e, true), None, "conforming code");
        assert_eq!(refused(FREE, 0x12, false), Some(np(FREE)));
        assert_eq!(refused(0x100, 0x92, false), Some(gp(0x100)), "beyond the GDT");
        assert_eq!(refused(FREE | 4, 0x92, false), Some(gp(FREE | 4)), "no LDT");
        assert_eq!(refused(3, 0x92, true), None, "null");
    }

    #[test]
    fn a_null_segment_faults_when_it_is_used_but_not_in_64_bit_mode() {
        let code = &[0x8e, 0xd8, 0x8a, 0x00]; // mov ds, eax; mov al, [eax]
        let mut system = System::protected(code);
        system.guest.step().unwrap();
        assert_eq!(system.guest.step(), Err(Exception::GP0));
        let mut system = System::long(code);
        system.guest.step().unwrap();
        assert_eq!(system.guest.step(), Ok(()));
    }

    #[test]
    fn the_stack_segment_has_rules_of_its_own() {
        let load = |selector: u16, ring3: bool, long: bool| {
            let code = &[0x8e, 0xd0]; // mov ss, eax
            let mut system = if long { System::long(code) } else { System::protected(code) };
            if ring3 {
                system.enter_ring3();
            }
            system.cpu.regs[RAX] = selector.into();
            system.guest.step()
        };
        assert_eq!(load(KERNEL_DATA, false, false), Ok(()));
        assert_eq!(load(USER_DATA, false, false), Err(gp(USER_DATA)));
        assert_eq!(load(0, false, false), Err(Exception::GP0));
        assert_eq!(load(0, false, true), Ok(()), "null in ring 0 of 64-bit mode");
        assert_eq!(load(3, true, true), Err(Exception::GP0));
        assert_eq!(load(KERNEL_CODE32, false, false), Err(gp(KERNEL_CODE32)), "not writable");
    }

    #[test]
    fn loading_ss_holds_interrupts_off_for_one_instruction() {
        let mut system = System::long(&[0x8e, 0xd0, 0x90]);
        system.cpu.regs[RAX] = KERNEL_DATA.into();
        system.guest.step().unwrap();
        assert!(system.cpu.interrupt_shadow);
    }

    #[test]
    fn lar_and_lsl_look_without_faulting() {
        let look = |code: &[u8], selector: u16, ring3: bool| {
            let mut system = System::long(code);
            if ring3 {
                system.enter_ring3();
            }
            system.cpu.regs[RAX] = selector.into();
            system.cpu.regs[reg::RCX as usize] = 0x55;
            system.guest.step().unwrap();
            system.cpu.flag(rflags::ZF).then_some(system.cpu.regs[reg::RCX as usize])
        };
        let (lar, lsl): (&[u8], &[u8]) = (&[0x0f, 0x02, 0xc8], &[0x0f, 0x03, 0xc8]);
        assert_eq!(look(lar, KERNEL_CODE, false), Some(0xa0_9b00));
        assert_eq!(look(lsl, KERNEL_CODE, false), Some(0xffff_ffff));
        assert_eq!(look(lsl, TASK, false), Some(0x67));
        assert_eq!(look(lar, KERNEL_CODE, true), None);
        assert_eq!(look(lar, 0, false), None);
        assert_eq!(look(lsl, USER_DATA, true), Some(0xffff_ffff));
    }

    #[test]
    fn verify_tells_what_ring_3_may_touch() {
        let verify = |modrm: u8, selector: u16| {
            let mut system = System::protected(&[0x0f, 0x00, modrm]);
            system.enter_ring3();
            system.cpu.regs[RAX] = selector.into();
            system.guest.step().unwrap();
            system.cpu.flag(rflags::ZF)
        };
        let (verr, verw) = (0xe0, 0xe8);
        assert!(verify(verr, USER_DATA) && verify(verw, USER_DATA));
        assert!(verify(verr, USER_CODE32) && !verify(verw, USER_CODE32));
        assert!(!verify(verr, KERNEL_DATA));
    }

    #[test]
    fn umip_hides_the_tables_from_users() {
        let mut system = System::long(&[0x0f, 0x01, 0x00]); // sgdt [rax]
        system.enter_ring3();
        system.cpu.regs[RAX] = DATA;
        system.cpu.cr4 |= cr4::UMIP;
        assert_eq!(system.guest.step(), Err(Exception::GP0));
        system.cpu.cr4 &= !cr4::UMIP;
        assert_eq!(system.guest.step(), Ok(()));
        assert_eq!(system.peek::<10>(DATA), [0xff, 0, 0, 0x20, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn gs_bases_are_read_written_and_swapped() {
        // wrgsbase rax; swapgs; rdgsbase rcx
        let code = &[0xf3, 0x48, 0x0f, 0xae, 0xd8, 0x0f, 0x01, 0xf8, 0xf3, 0x48, 0x0f, 0xae, 0xc9];
        let mut system = System::long(code);
        assert_eq!(system.guest.step(), Err(Exception::UD), "not enabled");
        system.cpu.cr4 |= cr4::FSGSBASE;
        system.cpu.regs[RAX] = 1 << 50;
        assert_eq!(system.guest.step(), Err(Exception::GP0), "not canonical");
        system.cpu.regs[RAX] = 0x7fff_0000_1000;
        system.cpu.msrs.kernel_gs_base = 0xffff_8880_0000_0000;
        system.guest.steps(3).unwrap();
        assert_eq!(system.cpu.regs[reg::RCX as usize], 0xffff_8880_0000_0000);
        assert_eq!(system.cpu.msrs.kernel_gs_base, 0x7fff_0000_1000);
    }

    #[test]
    fn a_far_pointer_fills_register_and_segment_or_neither() {
        let mut system = System::protected(&[0x0f, 0xb4, 0x08]); // lfs ecx, [eax]
        system.cpu.regs[RAX] = DATA;
        system.poke(DATA, &[0x78, 0x56, 0x34, 0x12, 0x00, 0x01]);
        assert_eq!(system.guest.step(), Err(gp(0x100)));
        assert_eq!(system.cpu.regs[reg::RCX as usize], 0);
        system.poke(DATA + 4, &[0x10, 0]);
        system.guest.step().unwrap();
        assert_eq!(system.cpu.regs[reg::RCX as usize], 0x1234_5678);
        assert_eq!(system.cpu.segs[seg::FS as usize].selector, KERNEL_DATA);
        assert_eq!(system.rip(), CODE + 3);
    }

    #[test]
    fn real_mode_segments_follow_their_selector_and_keep_their_limit() {
        let mut system = System::real(&[0x8e, 0xd8]);
        system.cpu.segs[seg::DS as usize].limit = 0xffff_ffff; // "unreal" mode
        system.cpu.regs[RAX] = 0x1234;
        system.guest.step().unwrap();
        let ds = system.cpu.segs[seg::DS as usize];
        assert_eq!((ds.base, ds.limit), (0x1_2340, 0xffff_ffff));
    }
}
