//! Saving and restoring the extended state: `FXSAVE`, `XSAVE` and their kin, `XGETBV`, `XSETBV`, MXCSR.
//!
//! SDM 1, 10.5 and chapter 13. XSAVE areas are in the standard format; compaction is not offered.

use engine::x86::bits::{cr0, cr4};
use iced_x86::Mnemonic;

use crate::x86::cpu::Cpu;
use crate::x86::decode::Lower;
use crate::x86::exception::{Exception, Exec};
use crate::x86::fpu::{AREA_SIZE, AVX_OFFSET, Fpu, LEGACY_SIZE, Width, component, header_of, mxcsr_of};
use crate::x86::op::reg::{RAX, RCX, RDX};
use crate::x86::op::{Handler, Op};
use crate::x86::walk::Intent;

/// Where the parts of an area are.
mod at {
    use std::ops::Range;

    /// x87 control, status and pointers.
    pub const CONTROL: Range<usize> = 0..24;
    pub const MXCSR: Range<usize> = 24..32;
    pub const ST: Range<usize> = 32..160;
    pub const XMM: usize = 160;
    pub const HEADER: usize = 512;
}

/// Chooses the handler of an instruction that saves or restores extended state.
pub fn lower(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    use Mnemonic as M;
    op.ext = u32::from(matches!(
        l.ins.mnemonic(),
        M::Fxsave64 | M::Fxrstor64 | M::Xsave64 | M::Xsaveopt64 | M::Xrstor64
    ));
    Some(match l.ins.mnemonic() {
        M::Fxsave | M::Fxsave64 => fxsave,
        M::Fxrstor | M::Fxrstor64 => fxrstor,
        M::Xsave | M::Xsave64 => xsave::<false>,
        M::Xsaveopt | M::Xsaveopt64 => xsave::<true>,
        M::Xrstor | M::Xrstor64 => xrstor,
        M::Xgetbv => xgetbv,
        M::Xsetbv => xsetbv,
        M::Ldmxcsr => ldmxcsr::<false>,
        M::Stmxcsr => stmxcsr::<false>,
        M::Vldmxcsr => ldmxcsr::<true>,
        M::Vstmxcsr => stmxcsr::<true>,
        _ => return None,
    })
}

/// How the instruction's area holds pointers.
fn width(op: &Op) -> Width {
    if op.ext != 0 { Width::Wide } else { Width::Narrow }
}

/// Vector registers that the current mode has.
fn registers(cpu: &Cpu) -> usize {
    if cpu.mode.long64 { 16 } else { 8 }
}

/// Linear address of an area; `#GP` if it is not aligned.
fn area(cpu: &Cpu, op: &Op, bytes: u64, align: u64, write: bool) -> Exec<u64> {
    let linear = cpu.linear(op.mem.seg, cpu.ea(op), bytes, write)?;
    if linear & (align - 1) == 0 { Ok(linear) } else { Err(Exception::GP0) }
}

impl Cpu {
    /// Makes sure that an area can be accessed to its end.
    fn probe_area(&mut self, linear: u64, bytes: u64, intent: Intent) -> Exec {
        for address in self.ends(linear, bytes) {
            self.translate(self.view(), address, intent)?;
        }
        Ok(())
    }

    /// Copies a part of an area, which starts and ends at a multiple of 8, to memory.
    fn store_part(&mut self, linear: u64, area: &[u8], part: std::ops::Range<usize>) -> Exec {
        for (i, bytes) in area[part.clone()].chunks_exact(8).enumerate() {
            let mut word = [0; 8];
            word.copy_from_slice(bytes);
            let to = linear.wrapping_add((part.start + 8 * i) as u64);
            self.store_linear(self.view(), to, u64::from_le_bytes(word))?;
        }
        Ok(())
    }

    /// Copies a part of an area from memory.
    fn load_part(&mut self, linear: u64, area: &mut [u8], part: std::ops::Range<usize>) -> Exec {
        for (i, bytes) in area[part.clone()].chunks_exact_mut(8).enumerate() {
            let from = linear.wrapping_add((part.start + 8 * i) as u64);
            let word: u64 = self.load_linear(self.view(), from)?;
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        Ok(())
    }

    /// `#UD` or `#NM` if XSAVE-enabled instructions may not execute.
    fn check_xsave(&self) -> Exec {
        if self.cr4 & cr4::OSXSAVE == 0 {
            return Err(Exception::UD);
        }
        if self.cr0 & cr0::TS != 0 { Err(Exception::NM) } else { Ok(()) }
    }

    /// The requested-feature bitmap: EDX:EAX of what is enabled.
    fn requested(&self) -> u64 {
        let [low, high] = [RAX, RDX].map(|n| self.regs[usize::from(n)] & 0xffff_ffff);
        (low | high << 32) & self.fpu.xcr0
    }
}

fn fxsave(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_x87()?;
    let linear = area(cpu, op, LEGACY_SIZE as u64, 16, true)?;
    cpu.probe_area(linear, LEGACY_SIZE as u64, Intent::Write)?;
    let mut image = [0; LEGACY_SIZE];
    let count = registers(cpu);
    cpu.fpu.write_x87(&mut image, width(op));
    cpu.fpu.write_mxcsr(&mut image);
    cpu.fpu.write_xmm(&mut image, count);
    cpu.store_part(linear, &image, 0..at::XMM + 16 * count)
}

fn fxrstor(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_x87()?;
    let linear = area(cpu, op, LEGACY_SIZE as u64, 16, false)?;
    cpu.probe_area(linear, LEGACY_SIZE as u64, Intent::Read)?;
    let mut image = [0; LEGACY_SIZE];
    let count = registers(cpu);
    cpu.load_part(linear, &mut image, 0..at::XMM + 16 * count)?;
    set_mxcsr(cpu, mxcsr_of(&image))?;
    cpu.fpu.read_x87(&image, width(op));
    cpu.fpu.read_xmm(&image, count);
    Ok(())
}

/// Bytes of an area with the components of `bits`.
fn size(bits: u64) -> u64 {
    if bits & component::AVX != 0 { AREA_SIZE as u64 } else { AVX_OFFSET as u64 }
}

/// `XSAVE`, and `XSAVEOPT`: that one leaves out components in their initial configuration. Whether the
/// others were modified since they were restored is not tracked.
fn xsave<const OPTIMIZED: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_xsave()?;
    let requested = cpu.requested();
    let bytes = size(requested);
    let linear = area(cpu, op, bytes, 64, true)?;
    cpu.probe_area(linear, bytes, Intent::Write)?;
    let in_use = cpu.fpu.in_use();
    let count = registers(cpu);
    let saved = if OPTIMIZED { requested & in_use } else { requested };
    let mut image = [0; AREA_SIZE];
    if saved & component::X87 != 0 {
        cpu.fpu.write_x87(&mut image, width(op));
        cpu.store_part(linear, &image, at::CONTROL)?;
        cpu.store_part(linear, &image, at::ST)?;
    }
    if requested & (component::SSE | component::AVX) != 0 {
        cpu.fpu.write_mxcsr(&mut image);
        cpu.store_part(linear, &image, at::MXCSR)?;
    }
    if saved & component::SSE != 0 {
        cpu.fpu.write_xmm(&mut image, count);
        cpu.store_part(linear, &image, at::XMM..at::XMM + 16 * count)?;
    }
    if saved & component::AVX != 0 {
        cpu.fpu.write_avx(&mut image, count);
        cpu.store_part(linear, &image, AVX_OFFSET..AVX_OFFSET + 16 * count)?;
    }
    let header = linear + at::HEADER as u64;
    let before: u64 = cpu.load_linear(cpu.view(), header)?;
    cpu.store_linear(cpu.view(), header, before & !requested | in_use & requested)
}

/// `XRSTOR` of the standard format (SDM 1, 13.8.1).
fn xrstor(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_xsave()?;
    let requested = cpu.requested();
    let linear = area(cpu, op, size(requested), 64, false)?;
    let mut image = [0; AREA_SIZE];
    cpu.load_part(linear, &mut image, at::HEADER..at::HEADER + 24)?;
    let (present, compaction, clear) = header_of(&image);
    if present & !cpu.fpu.xcr0 != 0 || compaction != 0 || !clear {
        return Err(Exception::GP0);
    }
    let count = registers(cpu);
    let loaded = requested & present;
    if loaded & component::X87 != 0 {
        cpu.load_part(linear, &mut image, at::CONTROL)?;
        cpu.load_part(linear, &mut image, at::ST)?;
    }
    if loaded & component::SSE != 0 {
        cpu.load_part(linear, &mut image, at::XMM..at::XMM + 16 * count)?;
    }
    if loaded & component::AVX != 0 {
        cpu.load_part(linear, &mut image, AVX_OFFSET..AVX_OFFSET + 16 * count)?;
    }
    if requested & (component::SSE | component::AVX) != 0 {
        cpu.load_part(linear, &mut image, at::MXCSR)?;
        set_mxcsr(cpu, mxcsr_of(&image))?;
    }
    restore(&mut cpu.fpu, &image, requested, loaded, count, width(op));
    Ok(())
}

/// Components that are requested but not present go to their initial configuration.
fn restore(fpu: &mut Fpu, image: &[u8], requested: u64, loaded: u64, count: usize, width: Width) {
    let choice = |bit: u64| (requested & bit != 0, loaded & bit != 0);
    match choice(component::X87) {
        (_, true) => fpu.read_x87(image, width),
        (true, false) => fpu.init_x87(),
        _ => {}
    }
    match choice(component::SSE) {
        (_, true) => fpu.read_xmm(image, count),
        (true, false) => fpu.init_xmm(count),
        _ => {}
    }
    match choice(component::AVX) {
        (_, true) => fpu.read_avx(image, count),
        (true, false) => fpu.init_avx(count),
        _ => {}
    }
}

fn set_mxcsr(cpu: &mut Cpu, value: u32) -> Exec {
    if value & !Fpu::mxcsr_mask() != 0 {
        return Err(Exception::GP0);
    }
    cpu.fpu.mxcsr = value;
    Ok(())
}

fn ldmxcsr<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    if VEX { cpu.check_avx() } else { cpu.check_sse() }?;
    let value = cpu.load_mem(op)?;
    set_mxcsr(cpu, value)
}

fn stmxcsr<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    if VEX { cpu.check_avx() } else { cpu.check_sse() }?;
    cpu.store_mem(op, cpu.fpu.mxcsr)
}

fn xgetbv(cpu: &mut Cpu, _op: &Op) -> Exec {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    let value = match cpu.regs[usize::from(RCX)] as u32 {
        0 => cpu.fpu.xcr0,
        1 => cpu.fpu.xcr0 & cpu.fpu.in_use(),
        _ => return Err(Exception::GP0),
    };
    cpu.regs[usize::from(RAX)] = value & 0xffff_ffff;
    cpu.regs[usize::from(RDX)] = value >> 32;
    Ok(())
}

fn xsetbv(cpu: &mut Cpu, _op: &Op) -> Exec {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    let [low, high] = [RAX, RDX].map(|n| cpu.regs[usize::from(n)] & 0xffff_ffff);
    let value = low | high << 32;
    let lone_avx = value & component::AVX != 0 && value & component::SSE == 0;
    let valid = value & component::X87 != 0 && !lone_avx && value & !cpu.vm.cpuid.xcr0_mask() == 0;
    if cpu.cpl != 0 || cpu.regs[usize::from(RCX)] as u32 != 0 || !valid {
        return Err(Exception::GP0);
    }
    cpu.fpu.xcr0 = value;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::op::reg;
    use crate::x86::testing::{DATA, Guest};

    /// `rdi` points to the area, all components are requested.
    fn guest(code: &[u8]) -> Guest {
        let mut guest = Guest::new(64, code);
        guest.cpu.regs[reg::RDI as usize] = DATA;
        guest.cpu.regs[reg::RAX as usize] = 7;
        guest.cpu.regs[reg::RDX as usize] = 0;
        guest
    }

    #[test]
    fn fxsave_and_fxrstor_bring_everything_but_the_upper_halves_back() {
        // fxsave64 [rdi]; fxrstor64 [rdi]
        let mut guest = guest(&[0x48, 0x0f, 0xae, 0x07, 0x48, 0x0f, 0xae, 0x0f]);
        guest.cpu.fpu.ymm[15] = [1, 2, 3, 4];
        guest.cpu.fpu.mxcsr = 0x3f80;
        guest.cpu.fpu.x87.st[2] = [0x8000_0000_0000_0000, 0x3fff];
        guest.step().unwrap();
        assert_eq!(guest.peek::<8>(DATA + 160 + 15 * 16 + 8), 2u64.to_le_bytes());
        guest.cpu.fpu.ymm[15] = [9; 4];
        guest.cpu.fpu.mxcsr = 0x1f80;
        guest.cpu.fpu.x87.st[2] = [0; 2];
        guest.step().unwrap();
        assert_eq!(guest.cpu.fpu.ymm[15], [1, 2, 9, 9]);
        assert_eq!(guest.cpu.fpu.mxcsr, 0x3f80);
        assert_eq!(guest.cpu.fpu.x87.st[2], [0x8000_0000_0000_0000, 0x3fff]);
    }

    #[test]
    fn areas_must_be_aligned_and_mxcsr_valid() {
        let mut misaligned = guest(&[0x48, 0x0f, 0xae, 0x0f]);
        misaligned.cpu.regs[reg::RDI as usize] = DATA + 8;
        assert_eq!(misaligned.step(), Err(Exception::GP0));
        let mut reserved = guest(&[0x48, 0x0f, 0xae, 0x0f]);
        reserved.poke(DATA + 24, &0x8000_0000u32.to_le_bytes());
        assert_eq!(reserved.step(), Err(Exception::GP0));
        let mut loaded = guest(&[0x0f, 0xae, 0x17]); // ldmxcsr [rdi]
        loaded.poke(DATA, &0x8000_0000u32.to_le_bytes());
        assert_eq!(loaded.step(), Err(Exception::GP0));
    }

    #[test]
    fn xrstor_initializes_what_the_area_does_not_hold() {
        // xsave [rdi]; xrstor [rdi]
        let mut guest = guest(&[0x0f, 0xae, 0x27, 0x0f, 0xae, 0x2f]);
        guest.cpu.fpu.init_x87();
        guest.cpu.fpu.ymm[1] = [5, 6, 0, 0];
        guest.step().unwrap();
        assert_eq!(guest.peek::<8>(DATA + 512), 2u64.to_le_bytes(), "only SSE is in use");
        guest.cpu.fpu.ymm[1] = [9; 4];
        guest.cpu.fpu.x87.st[0] = [7; 2];
        guest.step().unwrap();
        assert_eq!(guest.cpu.fpu.ymm[1], [5, 6, 0, 0]);
        assert_eq!(guest.cpu.fpu.x87.st[0], [0; 2]);
    }

    #[test]
    fn xrstor_refuses_bad_headers() {
        for (offset, value) in [(512, 8u64), (520, 1), (520, 1 << 63), (528, 1)] {
            let mut guest = guest(&[0x0f, 0xae, 0x2f]);
            guest.poke(DATA + offset, &value.to_le_bytes());
            assert_eq!(guest.step(), Err(Exception::GP0), "{value:#x} at {offset}");
        }
    }

    #[test]
    fn xcr0_takes_only_valid_combinations() {
        for (value, valid) in
            [(1, true), (3, true), (7, true), (0, false), (5, false), (2, false), (0xf, false)]
        {
            let mut guest = guest(&[0x0f, 0x01, 0xd1]);
            guest.cpu.regs[reg::RAX as usize] = value;
            assert_eq!(guest.step().is_ok(), valid, "{value:#x}");
        }
        let mut user = guest(&[0x0f, 0x01, 0xd1]);
        user.cpu.cpl = 3;
        assert_eq!(user.step(), Err(Exception::GP0));
        let mut off = guest(&[0x0f, 0x01, 0xd0]);
        off.cpu.cr4 = 0;
        assert_eq!(off.step(), Err(Exception::UD));
    }
}
