//! A vCPU's registers to a jail and back.

use std::io::Error;

use engine::x86::Segment;
use engine::x86::bits::{cr4, rflags};

use super::super::cpu::Cpu;
use super::super::exception::vector;
use super::super::fpu::{Fpu, Ymm};
use super::super::op::{RIP, reg, seg};
use super::super::segment::flat_segment;
use super::tracee::Tracee;

/// The selectors of 64-bit programs, which Linux, Windows and the host have in common.
pub const USER_CODE: u16 = 0x33;
pub const USER_DATA: u16 = 0x2b;
/// Access rights of flat user data.
const DATA: u16 = 0xc0f3;
/// Access rights of flat 32-bit user code.
const CODE32: u16 = 0xc0fb;
/// The flags that a program can change.
const FLAGS: u64 = rflags::CF
    | rflags::PF
    | rflags::AF
    | rflags::ZF
    | rflags::SF
    | rflags::TF
    | rflags::DF
    | rflags::OF
    | rflags::NT
    | rflags::AC
    | rflags::ID;

/// What was in the jail's x87 and vector registers when they were last compared.
#[derive(Clone, PartialEq, Eq)]
struct Extended {
    control: (u16, u16, u8, u32),
    st: [[u64; 2]; 8],
    ymm: [Ymm; 16],
}

impl Extended {
    fn of(fpu: &Fpu) -> Extended {
        let x87 = &fpu.x87;
        Extended { control: (x87.fcw, x87.fsw, x87.ftw, fpu.mxcsr), st: x87.st, ymm: fpu.ymm }
    }
}

/// A jail's registers.
#[derive(Default)]
pub struct Registers {
    extended: Option<Box<Extended>>,
}

impl Registers {
    /// Gives the jail the vCPU's registers.
    pub fn load(&mut self, cpu: &Cpu, jail: &mut Tracee) -> Result<(), Error> {
        self.load_general(cpu, jail)?;
        if self.extended.as_ref().is_some_and(|extended| **extended == Extended::of(&cpu.fpu)) {
            return Ok(());
        }
        self.extended = None;
        cpu.fpu.write_components(jail.xstate());
        jail.put_xstate()
    }

    /// The general registers alone: nothing else has changed since [`Registers::store`].
    pub fn load_general(&mut self, cpu: &Cpu, jail: &mut Tracee) -> Result<(), Error> {
        let r = |number: u8| cpu.regs[number as usize];
        let selector = |number: u8| u64::from(cpu.segs[number as usize].selector);
        jail.set_registers(&libc::user_regs_struct {
            r15: r(15),
            r14: r(14),
            r13: r(13),
            r12: r(12),
            rbp: r(reg::RBP),
            rbx: r(reg::RBX),
            r11: r(11),
            r10: r(10),
            r9: r(9),
            r8: r(8),
            rax: r(reg::RAX),
            rcx: r(reg::RCX),
            rdx: r(reg::RDX),
            rsi: r(reg::RSI),
            rdi: r(reg::RDI),
            orig_rax: u64::MAX, // not in a system call
            rip: r(RIP),
            cs: USER_CODE.into(),
            eflags: cpu.rflags & FLAGS | rflags::IF | rflags::FIXED,
            rsp: r(reg::RSP),
            ss: USER_DATA.into(),
            fs_base: cpu.segs[seg::FS as usize].base,
            gs_base: cpu.segs[seg::GS as usize].base,
            ds: selector(seg::DS),
            es: selector(seg::ES),
            fs: selector(seg::FS),
            gs: selector(seg::GS),
        })
    }

    /// Takes the vCPU's registers from the jail. In a system call RIP is behind the instruction.
    pub fn store(&mut self, cpu: &mut Cpu, jail: &mut Tracee, system_call: bool) -> Result<(), Error> {
        let regs = jail.registers()?;
        let rax = if system_call { regs.orig_rax } else { regs.rax };
        cpu.regs[..16].copy_from_slice(&[
            rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9,
            regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ]);
        cpu.regs[RIP as usize] = regs.rip;
        let aligned = cpu.rflags & rflags::AC;
        cpu.rflags = cpu.rflags & !FLAGS | regs.eflags & FLAGS;
        if cpu.rflags & rflags::AC != aligned {
            cpu.update_mode();
        }
        store_segments(cpu, &regs);
        jail.fetch_xstate()?;
        cpu.fpu.read_components(jail.xstate());
        let extended = Extended::of(&cpu.fpu);
        match &mut self.extended {
            Some(known) => **known = extended,
            none => *none = Some(Box::new(extended)),
        }
        Ok(())
    }
}

/// The program may have loaded selectors that the host has for it too, CS among them: with a far jump to 32-bit
/// code.
fn store_segments(cpu: &mut Cpu, regs: &libc::user_regs_struct) {
    let selectors =
        [(seg::CS, regs.cs), (seg::DS, regs.ds), (seg::ES, regs.es), (seg::FS, regs.fs), (seg::GS, regs.gs)];
    for (number, selector) in selectors {
        let selector = selector as u16;
        if cpu.segs[number as usize].selector != selector {
            cpu.segs[number as usize] = loaded(cpu, number, selector);
            cpu.update_mode();
        }
    }
    for (number, base) in [(seg::FS, regs.fs_base), (seg::GS, regs.gs_base)] {
        // A kernel that does not let programs write bases may take one in its half for its own. The host
        // does let them, but a selector brings no other base than 0.
        if cpu.cr4 & cr4::FSGSBASE != 0 || base == 0 {
            cpu.segs[number as usize].base = base;
        }
    }
}

/// What the guest's table has for a selector, as far as it agrees with the host's.
fn loaded(cpu: &mut Cpu, number: u8, selector: u16) -> Segment {
    let cr2 = cpu.cr2;
    let segment = if number == seg::CS {
        let descriptor = cpu.descriptor(selector, vector::GP).ok();
        descriptor.filter(|found| found.code() && found.present()).map(|found| found.segment(selector))
    } else {
        cpu.data_segment(selector, vector::GP).ok()
    };
    cpu.cr2 = cr2; // nothing has been raised
    segment.unwrap_or_else(|| flat_segment(selector, if number == seg::CS { CODE32 } else { DATA }))
}
