//! Instructions that touch only some elements in memory, and those on all registers.
//!
//! Only elements whose mask is set are accessed, and only they fault (SDM 2C, `VMASKMOV`, `VGATHERDPS`;
//! 2B, `MASKMOVDQU`).

use iced_x86::{Mnemonic, OpKind};

use super::is_ymm;
use crate::x86::cpu::Cpu;
use crate::x86::decode::{Lower, number};
use crate::x86::exception::{Exception, Exec};
use crate::x86::fpu::Ymm;
use crate::x86::op::{Handler, Op, ZERO, reg};

/// Chooses the handler.
pub fn lower(l: &Lower<'_>, op: &mut Op) -> Option<Handler> {
    use Mnemonic as M;
    let wide = is_ymm(l.ins, 0) || is_ymm(l.ins, 1);
    Some(match l.ins.mnemonic() {
        M::Vmaskmovps | M::Vpmaskmovd => conditional(l, op, 4, wide),
        M::Vmaskmovpd | M::Vpmaskmovq => conditional(l, op, 8, wide),
        M::Vpgatherdd | M::Vgatherdps => gathered(l, op, 4, 4),
        M::Vpgatherdq | M::Vgatherdpd => gathered(l, op, 4, 8),
        M::Vpgatherqd | M::Vgatherqps => gathered(l, op, 8, 4),
        M::Vpgatherqq | M::Vgatherqpd => gathered(l, op, 8, 8),
        M::Maskmovdqu => bytes(l, op, mask_move_xmm::<false>),
        M::Vmaskmovdqu => bytes(l, op, mask_move_xmm::<true>),
        M::Maskmovq => bytes(l, op, mask_move_mm),
        M::Vzeroupper => vzero::<false>,
        M::Vzeroall => vzero::<true>,
        M::Emms => emms,
        _ => return None,
    })
}

/// Element `n` of `bytes` bytes (4 or 8).
#[inline(always)]
fn element(register: &Ymm, n: usize, bytes: usize) -> u64 {
    match bytes {
        4 => register[(n / 2) & 3] >> (32 * (n & 1)) & 0xffff_ffff,
        _ => register[n & 3],
    }
}

#[inline(always)]
fn set_element(register: &mut Ymm, n: usize, bytes: usize, value: u64) {
    let (word, shift) = if bytes == 4 { ((n / 2) & 3, 32 * (n & 1)) } else { (n & 3, 0) };
    let field = if bytes == 4 { 0xffff_ffff << shift } else { u64::MAX };
    register[word] = register[word] & !field | value << shift & field;
}

fn is_set(mask: &Ymm, n: usize, bytes: usize) -> bool {
    element(mask, n, bytes) >> (8 * bytes - 1) & 1 != 0
}

impl Cpu {
    /// Linear address of an element of `bytes` bytes at `offset` from the operand's start. The operand is
    /// one piece: with 32-bit addresses only its start wraps around, which is what AMD's CPUs do.
    fn element_linear(&self, op: &Op, offset: u64, bytes: usize, write: bool) -> Exec<u64> {
        self.linear(op.mem.seg, self.ea(op).wrapping_add(offset), bytes as u64, write)
    }

    fn load_element(&mut self, linear: u64, bytes: usize) -> Exec<u64> {
        match bytes {
            4 => self.load_linear::<u32>(self.view(), linear).map(u64::from),
            _ => self.load_linear::<u64>(self.view(), linear),
        }
    }
}

/// `Op::ext` of `VMASKMOV`: element size, and how many.
fn conditional(l: &Lower<'_>, op: &mut Op, bytes: u32, wide: bool) -> Handler {
    let vector = if wide { 32 } else { 16 };
    op.ext = bytes | (vector / bytes) << 8;
    if l.is_mem(0) { store_some } else { load_some }
}

/// Element size and count.
fn elements(op: &Op) -> (usize, usize) {
    ((op.ext & 0xff) as usize, (op.ext >> 8 & 0xff) as usize)
}

fn load_some(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_avx()?;
    let (bytes, count) = elements(op);
    let mask = cpu.fpu.ymm[usize::from(op.src & 15)];
    let mut value = [0; 4];
    for n in (0..count).filter(|&n| is_set(&mask, n, bytes)) {
        let linear = cpu.element_linear(op, (n * bytes) as u64, bytes, false)?;
        set_element(&mut value, n, bytes, cpu.load_element(linear, bytes)?);
    }
    cpu.fpu.ymm[usize::from(op.dst & 15)] = value;
    Ok(())
}

fn store_some(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_avx()?;
    let (bytes, count) = elements(op);
    let mask = cpu.fpu.ymm[usize::from(op.src & 15)];
    let value = cpu.fpu.ymm[usize::from(op.aux & 15)];
    // All faults come before the first store.
    for store in [false, true] {
        for n in (0..count).filter(|&n| is_set(&mask, n, bytes)) {
            let linear = cpu.element_linear(op, (n * bytes) as u64, bytes, true)?;
            let (view, element) = (cpu.view(), element(&value, n, bytes));
            match (store, bytes) {
                (false, _) => cpu.probe_write(view, linear, bytes as u64)?,
                (true, 4) => cpu.store_linear(view, linear, element as u32)?,
                (true, _) => cpu.store_linear(view, linear, element)?,
            }
        }
    }
    Ok(())
}

/// `Op::ext` of a gather: data size, count, index size, index register.
fn gathered(l: &Lower<'_>, op: &mut Op, index_bytes: u32, data_bytes: u32) -> Handler {
    let size = |register: iced_x86::Register| register.size() as u32;
    let index = l.ins.memory_index();
    // As many elements as both the index register and the destination hold.
    let count = (size(index) / index_bytes).min(size(l.ins.op0_register()) / data_bytes);
    let index = u32::from(number(index));
    op.ext = data_bytes | count << 8 | index_bytes << 16 | index << 24;
    if op.mem.base == ZERO && l.bits == 64 && l.ins.memory_displ_size() == 4 {
        op.mem.mask = 0xffff_ffff;
    }
    let (dst, mask) = (u32::from(op.dst), u32::from(op.aux));
    if dst == mask || dst == index || mask == index { |_, _| Err(Exception::UD) } else { gather }
}

/// Elements that were loaded before a fault stay loaded, with their mask cleared: the instruction goes
/// on where it stopped.
fn gather(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_avx()?;
    let (data_bytes, count) = elements(op);
    let (index_bytes, index) = ((op.ext >> 16 & 0xff) as usize, (op.ext >> 24 & 15) as usize);
    let (dst, mask) = (usize::from(op.dst & 15), usize::from(op.aux & 15));
    let indices = cpu.fpu.ymm[index];
    for n in 0..count {
        if is_set(&cpu.fpu.ymm[mask], n, data_bytes) {
            let index = element(&indices, n, index_bytes);
            let index = if index_bytes == 4 { index as u32 as i32 as u64 } else { index };
            let offset = cpu.ea(op).wrapping_add(index << (op.mem.scale & 3)) & op.mem.mask;
            let linear = cpu.linear(op.mem.seg, offset, data_bytes as u64, false)?;
            let value = cpu.load_element(linear, data_bytes)?;
            set_element(&mut cpu.fpu.ymm[dst], n, data_bytes, value);
        }
        set_element(&mut cpu.fpu.ymm[mask], n, data_bytes, 0);
    }
    cpu.fpu.ymm[mask] = [0; 4];
    for n in count..32 / data_bytes {
        set_element(&mut cpu.fpu.ymm[dst], n, data_bytes, 0);
    }
    Ok(())
}

/// The operand of byte-wise masked moves is at (E/R)DI.
fn bytes(l: &Lower<'_>, op: &mut Op, handler: Handler) -> Handler {
    op.mem.base = reg::RDI;
    op.mem.index = ZERO;
    op.mem.disp = 0;
    op.mem.seg = number(l.ins.memory_segment());
    op.mem.mask = match l.ins.op0_kind() {
        OpKind::MemorySegRDI => u64::MAX,
        OpKind::MemorySegEDI => 0xffff_ffff,
        _ => 0xffff,
    };
    handler
}

fn mask_move_xmm<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    super::check::<VEX>(cpu)?;
    mask_move(cpu, op, cpu.fpu.xmm(op.src), cpu.fpu.xmm(op.aux), 16)
}

fn mask_move_mm(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.check_mmx()?;
    cpu.fpu.x87.enter_mmx(); // even if the store faults
    let (value, mask) = (cpu.fpu.x87.mm(op.src), cpu.fpu.x87.mm(op.aux));
    mask_move(cpu, op, [value, 0], [mask, 0], 8)
}

fn mask_move(cpu: &mut Cpu, op: &Op, value: [u64; 2], mask: [u64; 2], count: usize) -> Exec {
    let byte = |register: [u64; 2], n: usize| (register[(n / 8) & 1] >> (8 * (n & 7))) as u8;
    for store in [false, true] {
        for n in (0..count).filter(|&n| byte(mask, n) & 0x80 != 0) {
            let linear = cpu.element_linear(op, n as u64, 1, true)?;
            let view = cpu.view();
            if store {
                cpu.store_linear(view, linear, byte(value, n))?;
            } else {
                cpu.probe_write(view, linear, 1)?;
            }
        }
    }
    Ok(())
}

/// `VZEROUPPER` and `VZEROALL`, on the registers that the mode has.
fn vzero<const ALL: bool>(cpu: &mut Cpu, _op: &Op) -> Exec {
    cpu.check_avx()?;
    let count = if cpu.mode.long64 { 16 } else { 8 };
    cpu.fpu.init_avx(count);
    if ALL {
        cpu.fpu.init_xmm(count);
    }
    Ok(())
}

fn emms(cpu: &mut Cpu, _op: &Op) -> Exec {
    cpu.check_mmx()?;
    cpu.fpu.x87.set_top(0);
    cpu.fpu.x87.ftw = 0;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::testing::{DATA, Guest};

    fn guest(code: &[u8]) -> Guest {
        let mut guest = Guest::new(64, code);
        guest.cpu.regs[usize::from(reg::RDI)] = DATA;
        guest
    }

    #[test]
    fn only_enabled_elements_move() {
        // vpmaskmovd ymm0, ymm1, [rdi]; vpmaskmovd [rdi + 64], ymm1, ymm0
        let mut guest = guest(&[0xc4, 0xe2, 0x75, 0x8c, 0x07, 0xc4, 0xe2, 0x75, 0x8e, 0x47, 0x40]);
        guest.poke(DATA, &[0x11; 32]);
        guest.poke(DATA + 64, &[0x22; 32]);
        guest.cpu.fpu.ymm[1] = [0x8000_0000_0000_0000, 0, 0x8000_0000, 0];
        guest.steps(2).unwrap();
        assert_eq!(guest.cpu.fpu.ymm[0], [0x1111_1111_0000_0000, 0, 0x1111_1111, 0]);
        let stored: [u8; 32] = guest.peek(DATA + 64);
        let expected: Vec<u8> =
            (0..32).map(|i| if (4..8).contains(&i) || (16..20).contains(&i) { 0x11 } else { 0x22 }).collect();
        assert_eq!(stored[..], expected);
    }

    #[test]
    fn an_operand_across_4_gib_does_not_wrap_around_in_the_middle() {
        // vpmaskmovq xmm0, xmm1, [edi]
        let mut guest = guest(&[0x67, 0xc4, 0xe2, 0xf1, 0x8c, 0x07]);
        guest.poke(0, &[0x11; 16]);
        guest.cpu.regs[usize::from(reg::RDI)] = 0xffff_fff9;
        guest.cpu.fpu.ymm[1] = [0, 1 << 63, 0, 0];
        guest.step().unwrap();
        assert_eq!(guest.cpu.fpu.ymm[0], [0, u64::MAX, 0, 0], "nothing is at 0x1_0000_0001");
    }

    #[test]
    fn a_gather_keeps_what_it_has_when_an_element_faults() {
        // vpgatherdq ymm0, [rdi + xmm1*8], ymm2
        let mut guest = guest(&[0xc4, 0xe2, 0xed, 0x90, 0x04, 0xcf]);
        for i in 0..4 {
            guest.poke(DATA + 16 * i, &(i + 1).to_le_bytes());
        }
        guest.cpu.fpu.ymm[1] = [2 << 32 | 6, 0xffff_fffe_0000_0000, 0, 0]; // 6, 2, 0, -2
        guest.cpu.fpu.ymm[2] = [u64::MAX, 0, u64::MAX, 0];
        guest.cpu.fpu.ymm[0] = [9; 4];
        guest.step().unwrap();
        assert_eq!(guest.cpu.fpu.ymm[0], [4, 9, 1, 9]);
        assert_eq!(guest.cpu.fpu.ymm[2], [0; 4]);

        guest.cpu.regs[usize::from(crate::x86::op::RIP)] = crate::x86::testing::CODE;
        guest.cpu.regs[usize::from(reg::RDI)] = 0x7fff_ffff_ffc0; // the second element is not canonical
        guest.cpu.fpu.ymm[1] = [8 << 32, 0, 0, 0];
        guest.cpu.fpu.ymm[2] = [u64::MAX; 4];
        assert_eq!(guest.step(), Err(Exception::GP0));
        assert_eq!(guest.cpu.fpu.ymm[2], [0, u64::MAX, u64::MAX, u64::MAX]);
    }

    #[test]
    fn bytes_are_stored_one_by_one() {
        // maskmovdqu xmm0, xmm1
        let mut guest = guest(&[0x66, 0x0f, 0xf7, 0xc1]);
        guest.cpu.fpu.ymm[0] = [0x0102_0304_0506_0708, 0x1112_1314_1516_1718, 0, 0];
        guest.cpu.fpu.ymm[1] = [0x80, 0x8000_0000_0000_0000, 0, 0];
        guest.step().unwrap();
        let mut expected = [0; 16];
        (expected[0], expected[15]) = (8, 0x11);
        assert_eq!(guest.peek::<16>(DATA), expected);
    }

    #[test]
    fn vzeroupper_keeps_the_lower_halves() {
        let mut guest = guest(&[0xc5, 0xf8, 0x77, 0xc5, 0xfc, 0x77]);
        guest.cpu.fpu.ymm = [[1, 2, 3, 4]; 16];
        guest.step().unwrap();
        assert_eq!(guest.cpu.fpu.ymm[15], [1, 2, 0, 0]);
        guest.step().unwrap();
        assert_eq!(guest.cpu.fpu.ymm, [[0; 4]; 16]);
    }
}
