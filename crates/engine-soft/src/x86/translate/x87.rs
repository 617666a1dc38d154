//! x87 and MMX instructions: copied, on the guest's registers in the host's.
//!
//! The guest's unit comes into the host's when a unit of code first needs it ([`Frame::x87`]), stays there
//! while translated code looks for targets and refills the TLB, and goes back before any handler runs and
//! when translated code is left: whatever else reads [`Fpu::x87`](super::super::fpu::Fpu::x87) finds it there.
//! Only the x87 part is moved (`XSAVE`, `XRSTOR`), for the vector registers have their own way.
//!
//! All of this is for code whose x87 exceptions are masked, which the mode says ([`mode`](super::mode));
//! other code, and instructions that could unmask one, its handlers execute. So the host's unit never has
//! a pending exception, and `FWAIT` nothing to wait for.
//!
//! Each instruction notes its address and opcode for `FNSTENV` and its kin, as the unit's own are of host
//! addresses. The address of the operand is not noted: it is that of the last instruction that a handler
//! executed. CPUs of today update it only with exceptions that are not masked (SDM 1, 8.1.8), and there
//! is none.

#![allow(unsafe_code)] // moves the host's x87 registers

use std::arch::asm;
use std::arch::x86_64::{_xrstor64, _xsave64};

use engine::x86::bits::cr0;
use iced_x86::{
    EncodingKind, Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic, OpCodeOperandKind,
    OpKind,
};

use super::super::cpu::{Cpu, Mode};
use super::super::fpu::stub::{is_x87, is_x87_control};
use super::super::fpu::{X87, X87_EXCEPTIONS};
use super::asm::{Alu, Mem, cc};
use super::build::{Builder, Cold, slot};
use super::frame::{Frame, at};
use super::insn::{Access, Class, Insn, access, slot_accesses, slot_count, with_raw};
use super::regs::{A, B};
use super::vector::wide_only;

/// The x87 component in the masks of `XSAVE`.
const COMPONENT: u64 = 1;
/// In [`Frame::x87_at`]: there is something.
const NOTED: u32 = 1 << 31;
/// Where the opcode is in it.
const OPCODE: u32 = 12;

/// How an instruction uses the unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Not at all.
    None,
    /// Its address is not kept: control instructions, MMX.
    Quiet,
    /// Its address and this opcode are kept.
    Noted(u16),
}

/// Whether the host can, and the guest's unit may be the host's.
pub fn is_native(cpu: &Cpu) -> bool {
    std::arch::is_x86_feature_detected!("xsave")
        && cpu.cr0 & (cr0::EM | cr0::TS) == 0
        && cpu.fpu.x87.fcw & X87_EXCEPTIONS == X87_EXCEPTIONS
}

/// How an instruction of the unit is translated; `None` if it is not one of those, or a handler is to do it.
pub fn classify(insn: &mut Insn, mode: &Mode, factory: &mut InstructionInfoFactory) -> Option<Class> {
    use Mnemonic::*;
    let ins = &insn.ins;
    let memory = (0..ins.op_count()).find(|&n| ins.op_kind(n) == OpKind::Memory);
    match ins.mnemonic() {
        Wait => return Some(Class::Nothing),
        Fnop | Fnclex | Emms => {}
        Fldcw => {
            insn.memory = Some(Access { size: 2, write: false });
            insn.x87 = Use::Quiet;
            return Some(Class::Fldcw);
        }
        Fnstsw | Fnstcw => {}
        mnemonic if is_x87_control(mnemonic) => return None,
        _ if is_x87(ins) => {}
        _ if is_mmx(ins) => return mmx(insn, mode, memory, factory),
        _ => return None,
    }
    let noted = !is_x87_control(ins.mnemonic()) && ins.mnemonic() != Emms;
    let Some(n) = memory else {
        insn.x87 = if noted { Use::Noted(insn.op.imm as u16 & 0x7ff) } else { Use::Quiet };
        return Some(Class::Copy);
    };
    let info = factory.info_options(ins, InstructionInfoOptions::NO_REGISTER_USAGE);
    insn.memory = Some(access(ins, info.op_access(n))?);
    insn.x87 = if noted { Use::Noted(insn.op.imm as u16 & 0x7ff) } else { Use::Quiet };
    Some(with_raw(insn, mode, Class::Generic))
}

/// Whether an instruction works on MMX registers, and general ones at most.
fn is_mmx(ins: &Instruction) -> bool {
    use OpCodeOperandKind::*;
    let code = ins.op_code();
    let mut mmx = false;
    for n in 0..ins.op_count() {
        match code.op_kind(n) {
            mm_reg | mm_rm | mm_or_mem => mmx = true,
            r32_or_mem | r64_or_mem | r32_reg | r64_reg | r32_rm | r64_rm | r32_reg_mem | r64_reg_mem
            | mem | imm8 => {}
            _ => return false,
        }
    }
    mmx && ins.encoding() == EncodingKind::Legacy && ins.mnemonic() != Mnemonic::Maskmovq
}

fn mmx(
    insn: &mut Insn,
    mode: &Mode,
    memory: Option<u32>,
    factory: &mut InstructionInfoFactory,
) -> Option<Class> {
    if slot_count(&insn.ins, memory.is_some())? > 0 {
        insn.slots = slot_accesses(&insn.ins, factory);
    }
    if let Some(n) = memory {
        let info = factory.info_options(&insn.ins, InstructionInfoOptions::NO_REGISTER_USAGE);
        insn.memory = Some(access(&insn.ins, info.op_access(n))?);
    }
    insn.x87 = Use::Quiet;
    let class = with_raw(insn, mode, Class::Generic);
    Some(if insn.narrow() && wide_only(insn) { Class::Handler } else { class })
}

impl Builder<'_> {
    /// Brings the guest's unit into the host's, where it stays for the rest of the unit of code. Uses A.
    pub fn want_x87(&mut self, insn: &Insn) {
        if insn.x87 == Use::None || self.x87 {
            return;
        }
        self.disturb(insn.live_before());
        self.asm.load(A, slot(at::PAGE));
        self.asm.store(slot(at::X87_PAGE), A);
        self.asm.cmp_mem32(slot(at::X87), 0);
        let jump = self.asm.jcc_forward(cc::Z);
        let resume = self.asm.position();
        self.cold.push(Cold::Load { jump, resume, stub: self.place.stubs.x87_load });
        self.x87 = true;
    }

    /// Keeps the address of an instruction that is about to execute.
    pub fn note_x87(&mut self, insn: &Insn) {
        if let Use::Noted(opcode) = insn.x87 {
            self.asm.store_imm32(slot(at::X87_AT), NOTED | u32::from(opcode) << OPCODE | insn.at);
        }
    }

    /// `FLDCW` natively if it leaves all exceptions masked; else its handler.
    pub fn load_control(&mut self, insn: &Insn) {
        let Some(access) = insn.memory else { return };
        self.want_x87(insn);
        self.disturb(insn.live_before()); // not behind the address, which is in A
        let operand = self.memory(insn, access, true);
        self.asm.op_mem(false, &[0x0f, 0xb7], B, &operand.mem); // movzx
        self.asm.store(slot(at::TEMP), B);
        self.asm.alu_imm(false, Alu::And, B, X87_EXCEPTIONS.into());
        self.asm.alu_imm(false, Alu::Cmp, B, X87_EXCEPTIONS.into());
        let unmasks = self.asm.jcc_forward(cc::NZ);
        self.asm.op_mem(false, &[0xd9], 5, &slot(at::TEMP));
        self.holds = None;
        let (resume, site) = (self.asm.position(), self.op_site(insn, 0, 0, false));
        self.cold.push(Cold::Miss { jump: unmasks, site, resume, restore: self.host, run: true });
        self.complete(insn, operand);
    }
}

/// Code that brings the guest's unit into the host's; it is called, so RSP is 8 lower. Leaves flags alone
/// no more than the comparison in front of it.
pub fn load(asm: &mut super::asm::Asm) {
    use super::asm::host;
    let slot = |disp: i32| Mem::at(host::RSP, disp + 8);
    asm.store(slot(at::RAX), host::RAX);
    asm.store(slot(at::TEMP), host::RDX);
    asm.store_imm32(slot(at::X87_COMPONENTS), COMPONENT as u32);
    asm.mov_imm(host::RAX, COMPONENT);
    asm.mov_imm(host::RDX, 0);
    asm.op_mem(true, &[0x0f, 0xae], 5, &slot(at::X87_AREA)); // xrstor64
    asm.store_imm32(slot(at::X87_AT), 0);
    asm.store_imm32(slot(at::X87), 1);
    asm.load(host::RAX, slot(at::RAX));
    asm.load(host::RDX, slot(at::TEMP));
    asm.ret();
}

impl Cpu {
    /// Takes the guest's unit out of the host's if it is there, and answers whether it was. The host's is
    /// then as Rust code expects it.
    #[inline(always)]
    pub(super) fn take_x87(&mut self) -> bool {
        let there = self.frame.x87 != 0;
        if there {
            self.take_loaded_x87();
        }
        there
    }

    fn take_loaded_x87(&mut self) {
        // SAFETY: the flag is only set where the host has `XSAVE`.
        unsafe { save(&mut self.fpu.x87) };
        self.fpu.x87.summarize();
        self.frame.x87 = 0;
        let Frame { x87_at: noted, x87_page: page, .. } = self.frame;
        if noted & NOTED != 0 {
            self.fpu.pointers.fip = page | u64::from(noted & 0xfff);
            self.fpu.pointers.fop = (noted >> OPCODE) as u16 & 0x7ff;
        }
    }

    /// Puts it there.
    pub(super) fn put_x87(&mut self) {
        self.fpu.x87.components = COMPONENT;
        // SAFETY: it was there before, so the host has `XRSTOR`.
        unsafe { restore(&self.fpu.x87) };
        (self.frame.x87, self.frame.x87_at) = (1, 0);
    }
}

/// # Safety
/// The host has `XSAVE`.
#[target_feature(enable = "xsave")]
unsafe fn save(area: &mut X87) {
    // SAFETY: the area is of the size and alignment that the x87 component needs, with a header.
    unsafe {
        _xsave64(std::ptr::from_mut(area).cast(), COMPONENT);
        asm!("fninit", options(nomem, nostack));
    }
}

/// # Safety
/// The host has `XRSTOR`.
#[target_feature(enable = "xsave")]
unsafe fn restore(area: &X87) {
    // SAFETY: as above; the header names this component only. The function's caller has the registers.
    unsafe { _xrstor64(std::ptr::from_ref(area).cast(), COMPONENT) };
}
