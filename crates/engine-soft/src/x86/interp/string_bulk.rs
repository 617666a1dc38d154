//! Stretches of string instructions as one operation on host memory.
//!
//! A stretch ends at a page's end on either side, at an address that wraps, and where the segment
//! does: what it does not cover, faults included, goes element by element.

#![allow(unsafe_code)] // works on host addresses from the TLB

use std::arch::asm;

use crate::x86::access::canonical;
use crate::x86::cpu::Cpu;
use crate::x86::int::Int;
use crate::x86::op::{reg, seg};

const OFFSET: u64 = mem::PAGE_SIZE - 1;

/// Elements of a stretch at `segment:offset` that are in one page and in the segment, and its linear
/// address.
#[inline(always)]
fn extent<T: Int, A: Int>(
    cpu: &Cpu,
    segment: u8,
    offset: u64,
    count: u64,
    write: bool,
) -> Option<(u64, u64)> {
    if cpu.mode.align_check || count == 0 {
        return None;
    }
    // The first byte tells the page; then all of the stretch is checked against the segment.
    let linear = cpu.linear(segment, offset, 1, write).ok()?;
    let in_page = (OFFSET + 1 - (linear & OFFSET)) / T::BYTES;
    let to_wrap = (A::MASK - offset) / T::BYTES;
    let count = count.min(in_page).min(to_wrap);
    if count == 0 || !canonical(linear) && cpu.mode.long64 {
        return None;
    }
    cpu.linear(segment, offset, count * T::BYTES, write).ok()?;
    Some((linear, count))
}

/// `MOVS` upwards: copies a stretch from `segment:rSI` to `ES:rDI`. Returns the number of elements.
pub fn copy<T: Int, A: Int>(cpu: &mut Cpu, segment: u8, count: u64) -> u64 {
    stretch_of_copy::<T, A>(cpu, segment, count).unwrap_or(0)
}

fn stretch_of_copy<T: Int, A: Int>(cpu: &mut Cpu, segment: u8, count: u64) -> Option<u64> {
    let (from, to) = (A::get(cpu, reg::RSI).zx(), A::get(cpu, reg::RDI).zx());
    let (source, count) = extent::<T, A>(cpu, segment, from, count, false)?;
    let (target, count) = extent::<T, A>(cpu, seg::ES, to, count, true)?;
    let view = cpu.view();
    let (source, target) = (cpu.tlb.read(view, source)?, cpu.tlb.write(view, target)?);
    let bytes = count * T::BYTES;
    // SAFETY: both stretches are in one page each, which the TLB says may be read and written.
    unsafe {
        let distance = (target.addr() as u64).wrapping_sub(source.addr() as u64);
        if distance < bytes && distance != 0 {
            // The target runs into the source: what was written is read again.
            for i in 0..count {
                let at = (i * T::BYTES) as usize;
                T::store(target.add(at), T::load(source.add(at)));
            }
        } else {
            copy_up(source, target, bytes);
        }
    }
    A::set(cpu, reg::RSI, A::cut(from.wrapping_add(bytes)));
    A::set(cpu, reg::RDI, A::cut(to.wrapping_add(bytes)));
    Some(count)
}

/// `STOS` upwards: fills a stretch at `ES:rDI`. Returns the number of elements.
pub fn fill<T: Int, A: Int>(cpu: &mut Cpu, count: u64) -> u64 {
    stretch_of_fill::<T, A>(cpu, count).unwrap_or(0)
}

fn stretch_of_fill<T: Int, A: Int>(cpu: &mut Cpu, count: u64) -> Option<u64> {
    let to = A::get(cpu, reg::RDI).zx();
    let (target, count) = extent::<T, A>(cpu, seg::ES, to, count, true)?;
    let target = cpu.tlb.write(cpu.view(), target)?;
    // SAFETY: the stretch is in one page, which the TLB says may be written.
    unsafe { fill_up::<T>(target, T::get(cpu, reg::RAX), count) };
    A::set(cpu, reg::RDI, A::cut(to.wrapping_add(count * T::BYTES)));
    Some(count)
}

/// Copies upwards, by an instruction because other vCPUs may use the same memory.
///
/// # Safety
/// Valid for reads and writes of `bytes` bytes.
#[inline(always)]
unsafe fn copy_up(source: *const u8, target: *mut u8, bytes: u64) {
    // SAFETY: the caller's promise; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") bytes => _, inout("rsi") source => _, inout("rdi") target => _,
             options(nostack, preserves_flags));
    }
}

/// Fills upwards.
///
/// # Safety
/// Valid for writes of `count` elements.
#[inline(always)]
unsafe fn fill_up<T: Int>(target: *mut u8, value: T, count: u64) {
    let value = value.zx();
    // SAFETY: the caller's promise; the direction flag is clear by the ABI.
    unsafe {
        match T::BYTES {
            1 => asm!("rep stosb", inout("rcx") count => _, inout("rdi") target => _, in("rax") value,
                      options(nostack, preserves_flags)),
            2 => asm!("rep stosw", inout("rcx") count => _, inout("rdi") target => _, in("rax") value,
                      options(nostack, preserves_flags)),
            4 => asm!("rep stosd", inout("rcx") count => _, inout("rdi") target => _, in("rax") value,
                      options(nostack, preserves_flags)),
            _ => asm!("rep stosq", inout("rcx") count => _, inout("rdi") target => _, in("rax") value,
                      options(nostack, preserves_flags)),
        }
    }
}
