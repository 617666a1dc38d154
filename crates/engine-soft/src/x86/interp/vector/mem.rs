//! Memory operands of 16 and 32 bytes.

#![allow(unsafe_code)] // dereferences the host addresses that the TLB hands out

use std::arch::asm;
use std::arch::x86_64::__m128i;

use mem::PAGE_SIZE;

use crate::x86::cpu::Cpu;
use crate::x86::exception::{Exception, Exec};
use crate::x86::fpu::MXCSR_MM;
use crate::x86::op::Op;
use crate::x86::walk::Intent;

/// Loads 16 bytes by one host instruction: a vector load that is aligned is atomic where the host's
/// CPU has AVX, as guests may know.
///
/// # Safety
/// `host` is valid for reads of 16 bytes.
#[inline(always)]
unsafe fn load16(host: *const u8) -> [u64; 2] {
    let value: __m128i;
    // SAFETY: the caller's promise; any alignment will do.
    unsafe {
        asm!("movdqu {v}, [{p}]", v = out(xmm_reg) value, p = in(reg) host,
             options(nostack, preserves_flags, readonly));
    }
    // SAFETY: both are 16 bytes without invalid values.
    unsafe { std::mem::transmute(value) }
}

/// # Safety
/// `host` is valid for writes of 16 bytes.
#[inline(always)]
unsafe fn store16(host: *mut u8, value: [u64; 2]) {
    // SAFETY: both are 16 bytes without invalid values.
    let value: __m128i = unsafe { std::mem::transmute(value) };
    // SAFETY: the caller's promise; any alignment will do.
    unsafe {
        asm!("movdqu [{p}], {v}", v = in(xmm_reg) value, p = in(reg) host, options(nostack, preserves_flags));
    }
}

/// Bytes that do not cross into the next page.
#[inline(always)]
fn in_page(linear: u64, bytes: u64) -> bool {
    linear & (PAGE_SIZE - 1) <= PAGE_SIZE - bytes
}

impl Cpu {
    /// Linear address of a memory operand of `bytes` bytes; `#GP` if it must be `aligned` and is not.
    #[inline(always)]
    pub fn vector_linear(&mut self, op: &Op, bytes: u64, aligned: bool, write: bool) -> Exec<u64> {
        let offset = self.ea(op);
        if aligned && self.mode.long64 {
            // A misaligned operand is found before a non-canonical one.
            self.check_aligned(
                offset.wrapping_add(self.segs[usize::from(op.mem.seg & 7).min(5)].base),
                bytes,
            )?;
        }
        let linear = self.linear(op.mem.seg, offset, bytes, write)?;
        if aligned {
            self.check_aligned(linear, bytes)?;
        }
        Ok(linear)
    }

    #[inline(always)]
    fn check_aligned(&self, linear: u64, bytes: u64) -> Exec {
        if linear & (bytes - 1) != 0 && self.fpu.mxcsr & MXCSR_MM == 0 { Err(Exception::GP0) } else { Ok(()) }
    }

    /// Loads 16 bytes.
    #[inline(always)]
    pub fn load16(&mut self, linear: u64) -> Exec<[u64; 2]> {
        if in_page(linear, 16)
            && let Some(host) = self.tlb.read(self.view(), linear)
        {
            // SAFETY: a hit, and the access stays in the page.
            return Ok(unsafe { load16(host) });
        }
        self.load_words(linear)
    }

    /// Loads 32 bytes.
    #[inline(always)]
    pub fn load32(&mut self, linear: u64) -> Exec<[u64; 4]> {
        if in_page(linear, 32)
            && let Some(host) = self.tlb.read(self.view(), linear)
        {
            // SAFETY: a hit, and the access stays in the page.
            let ([a, b], [c, d]) = unsafe { (load16(host), load16(host.add(16))) };
            return Ok([a, b, c, d]);
        }
        self.load_words(linear)
    }

    /// Stores 16 bytes.
    #[inline(always)]
    pub fn store16(&mut self, linear: u64, value: [u64; 2]) -> Exec {
        if in_page(linear, 16)
            && let Some(host) = self.tlb.write(self.view(), linear)
        {
            // SAFETY: a hit, and the access stays in the page.
            unsafe { store16(host, value) };
            return Ok(());
        }
        self.store_words(linear, value)
    }

    /// Stores 32 bytes.
    #[inline(always)]
    pub fn store32(&mut self, linear: u64, value: [u64; 4]) -> Exec {
        if in_page(linear, 32)
            && let Some(host) = self.tlb.write(self.view(), linear)
        {
            let [a, b, c, d] = value;
            // SAFETY: a hit, and the access stays in the page.
            unsafe {
                store16(host, [a, b]);
                store16(host.add(16), [c, d]);
            }
            return Ok(());
        }
        self.store_words(linear, value)
    }

    /// A TLB miss, a page crossing, or MMIO.
    #[cold]
    #[inline(never)]
    fn load_words<const N: usize>(&mut self, linear: u64) -> Exec<[u64; N]> {
        let bytes = 8 * N as u64;
        let mut words = [0; N];
        if in_page(linear, bytes) {
            if let Some(host) = self.host_for_read(linear)? {
                for (i, pair) in words.chunks_exact_mut(2).enumerate() {
                    // SAFETY: the walk ended in RAM, and the access stays in the page.
                    pair.copy_from_slice(&unsafe { load16(host.add(16 * i)) });
                }
                return Ok(words);
            }
        } else {
            // Both pages are there before the first is read, for the sake of MMIO.
            for address in self.ends(linear, bytes) {
                self.translate(self.view(), address, Intent::Read)?;
            }
        }
        for (i, word) in (0u64..).zip(&mut words) {
            let mut part = [0; 8];
            self.read_linear(self.view(), self.along(linear, 8 * i), &mut part)?;
            *word = u64::from_le_bytes(part);
        }
        Ok(words)
    }

    #[cold]
    #[inline(never)]
    fn store_words<const N: usize>(&mut self, linear: u64, words: [u64; N]) -> Exec {
        let bytes = 8 * N as u64;
        let store = |host: *mut u8| {
            for (i, pair) in words.chunks_exact(2).enumerate() {
                // SAFETY: the walk ended in writable RAM, and the access stays in the page.
                unsafe { store16(host.add(16 * i), [pair[0], pair[1]]) };
            }
        };
        if in_page(linear, bytes) && self.store_through(linear, store)?.is_some() {
            return Ok(());
        }
        for address in self.ends(linear, bytes) {
            self.translate(self.view(), address, Intent::Write)?;
        }
        for (i, word) in (0u64..).zip(words) {
            self.write_linear(self.view(), self.along(linear, 8 * i), &word.to_le_bytes())?;
        }
        Ok(())
    }

    /// The linear address `by` bytes further on.
    pub fn along(&self, linear: u64, by: u64) -> u64 {
        linear.wrapping_add(by) & if self.mode.long64 { u64::MAX } else { 0xffff_ffff }
    }
}
