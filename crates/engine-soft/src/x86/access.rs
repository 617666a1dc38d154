//! Loads and stores of the guest.
//!
//! The way of a guest load: effective address ([`Cpu::ea`]) → segmentation ([`Cpu::linear`]) → TLB hit
//! ([`Tlb::read`](super::tlb::Tlb::read)) → one host load. On a miss: page walk ([`super::walk`]) → RAM and a TLB fill, or the
//! local APIC, or MMIO through [`engine::CpuIo`], or a page fault.

#![allow(unsafe_code)] // dereferences the host addresses that the TLB and GuestRam hand out

use engine::x86::Segment;
use engine::x86::bits::access;
use mem::PAGE_SIZE;

use super::cpu::{Cpu, Mode};
use super::exception::{Exception, Exec};
use super::int::Int;
use super::op::{Op, flag, seg};
use super::tlb::{Fill, View};
use super::walk::Intent;

/// Pages and bytes of an access that may cross from one page into the next.
const OFFSET: u64 = PAGE_SIZE - 1;

/// A linear address is canonical if bits 47-63 are equal (4-level paging).
#[inline(always)]
pub fn canonical(linear: u64) -> bool {
    ((linear << 16) as i64 >> 16) as u64 == linear
}

impl Cpu {
    /// Linear address of `size` bytes at `offset` in a segment, with the checks of the current mode.
    #[inline(always)]
    pub fn linear(&self, segment: u8, offset: u64, size: u64, write: bool) -> Exec<u64> {
        if self.mode.long64 {
            let linear = self.flat(segment, offset);
            if canonical(linear) && canonical(linear.wrapping_add(size - 1)) {
                return Ok(linear);
            }
            return Err(segment_fault(segment));
        }
        self.linear_legacy(segment, offset, size, write)
    }

    /// Linear address in 64-bit code, canonical or not.
    #[inline(always)]
    fn flat(&self, segment: u8, offset: u64) -> u64 {
        if segment >= seg::FS {
            offset.wrapping_add(self.segs[(segment & 7).min(5) as usize].base)
        } else {
            offset
        }
    }

    /// Segmentation outside of 64-bit code.
    fn linear_legacy(&self, segment: u8, offset: u64, size: u64, write: bool) -> Exec<u64> {
        let s = &self.segs[(segment & 7).min(5) as usize];
        segment_linear(&self.mode, s, offset, size, write).ok_or_else(|| segment_fault(segment))
    }

    /// Loads from `segment:offset`.
    #[inline(always)]
    pub fn load<T: Int>(&mut self, segment: u8, offset: u64) -> Exec<T> {
        if self.mode.long64 {
            let linear = self.flat(segment, offset);
            // What hits the TLB is canonical.
            if linear & (T::BYTES - 1) == 0
                && let Some(host) = self.tlb.read(self.view(), linear)
            {
                // SAFETY: as in `load_linear`.
                return Ok(unsafe { T::load(host) });
            }
        }
        self.load_checked(segment, offset)
    }

    #[inline(never)]
    fn load_checked<T: Int>(&mut self, segment: u8, offset: u64) -> Exec<T> {
        let linear = self.linear(segment, offset, T::BYTES, false)?;
        self.load_linear(self.view(), linear)
    }

    /// Stores to `segment:offset`.
    #[inline(always)]
    pub fn store<T: Int>(&mut self, segment: u8, offset: u64, value: T) -> Exec {
        if self.mode.long64 {
            let linear = self.flat(segment, offset);
            // What hits the TLB is canonical.
            if linear & (T::BYTES - 1) == 0
                && let Some(host) = self.tlb.write(self.view(), linear)
            {
                // SAFETY: as in `store_linear`.
                unsafe { T::store(host, value) };
                return Ok(());
            }
        }
        self.store_checked(segment, offset, value)
    }

    #[inline(never)]
    fn store_checked<T: Int>(&mut self, segment: u8, offset: u64, value: T) -> Exec {
        let linear = self.linear(segment, offset, T::BYTES, true)?;
        self.store_linear(self.view(), linear, value)
    }

    /// Loads an instruction's memory operand.
    #[inline(always)]
    pub fn load_mem<T: Int>(&mut self, op: &Op) -> Exec<T> {
        self.load(op.mem.seg, self.ea(op))
    }

    /// Stores to an instruction's memory operand.
    #[inline(always)]
    pub fn store_mem<T: Int>(&mut self, op: &Op, value: T) -> Exec {
        self.store(op.mem.seg, self.ea(op), value)
    }

    /// Loads from a linear address as `view`. Supervisor structures (descriptor tables, task state
    /// segments) are read as [`View::Kernel`] whatever the CPL.
    #[inline(always)]
    pub fn load_linear<T: Int>(&mut self, view: View, linear: u64) -> Exec<T> {
        if linear & (T::BYTES - 1) == 0
            && let Some(host) = self.tlb.read(view, linear)
        {
            // SAFETY: a TLB hit is a host address in the guest's RAM, and an aligned access of up to
            // 8 bytes stays in its page.
            return Ok(unsafe { T::load(host) });
        }
        self.load_slow(view, linear)
    }

    /// Stores to a linear address as `view`.
    #[inline(always)]
    pub fn store_linear<T: Int>(&mut self, view: View, linear: u64, value: T) -> Exec {
        if linear & (T::BYTES - 1) == 0
            && let Some(host) = self.tlb.write(view, linear)
        {
            // SAFETY: as in `load_linear`, and the page is writable.
            unsafe { T::store(host, value) };
            return Ok(());
        }
        self.store_slow(view, linear, value)
    }

    fn check_alignment<T: Int>(&self, view: View, linear: u64) -> Exec {
        if self.mode.align_check && view == View::User && linear & (T::BYTES - 1) != 0 {
            return Err(Exception::AC0);
        }
        Ok(())
    }

    /// Data breakpoints: while any is enabled the TLB holds no data pages, so that all accesses come by.
    fn watch<T: Int>(&mut self, linear: u64, write: bool) {
        if self.watches_data() {
            self.watch_data(linear, T::BYTES, write);
        }
    }

    #[cold]
    #[inline(never)]
    fn load_slow<T: Int>(&mut self, view: View, linear: u64) -> Exec<T> {
        self.check_alignment::<T>(view, linear)?;
        self.watch::<T>(linear, false);
        if (linear & OFFSET) + T::BYTES > PAGE_SIZE {
            let mut bytes = [0; 8];
            self.read_linear(view, linear, &mut bytes[..T::BYTES as usize])?;
            return Ok(T::cut(u64::from_le_bytes(bytes)));
        }
        if let Some(host) = self.tlb.read(view, linear) {
            // SAFETY: a hit, and the access stays in the page.
            return Ok(unsafe { T::load(host) });
        }
        let walked = self.translate(view, linear, Intent::Read)?;
        if let Some(host) = self.fill_data(view, linear, &walked, false) {
            // SAFETY: the walk ended in RAM, and the access stays in the page.
            return Ok(unsafe { T::load(host) });
        }
        let mut bytes = [0; 8];
        self.mmio_read(walked.gpa, &mut bytes[..T::BYTES as usize]);
        Ok(T::cut(u64::from_le_bytes(bytes)))
    }

    #[cold]
    #[inline(never)]
    fn store_slow<T: Int>(&mut self, view: View, linear: u64, value: T) -> Exec {
        self.check_alignment::<T>(view, linear)?;
        self.watch::<T>(linear, true);
        let bytes = value.zx().to_le_bytes();
        if (linear & OFFSET) + T::BYTES > PAGE_SIZE {
            return self.write_linear(view, linear, &bytes[..T::BYTES as usize]);
        }
        if let Some(host) = self.tlb.write(view, linear) {
            // SAFETY: a hit, and the access stays in the page.
            unsafe { T::store(host, value) };
            return Ok(());
        }
        let walked = self.translate(view, linear, Intent::Write)?;
        if let Some(host) = self.fill_data(view, linear, &walked, true) {
            // SAFETY: the walk ended in RAM, and the access stays in the page.
            unsafe { T::store(host, value) };
            self.note_store(walked.gpa);
            return Ok(());
        }
        self.mmio_write(walked.gpa, &bytes[..T::BYTES as usize]);
        Ok(())
    }

    /// Enters a walk's result into the TLB and returns the host address of the byte; `None` if it is
    /// not RAM.
    fn fill_data(
        &mut self,
        view: View,
        linear: u64,
        walked: &super::walk::Walked,
        write: bool,
    ) -> Option<*mut u8> {
        let vm = self.vm.clone();
        let page = vm.ram.page(walked.gpa)?;
        if self.lapic.claims(walked.gpa) {
            return None;
        }
        if write && let Some(log) = &mut self.write_log {
            log.before_write(walked.gpa & !OFFSET, &page);
        }
        // A page with code must be written the slow way, so that the code is voided. It becomes data
        // by that, and the next write may enter it as writable.
        // What is written for the first time is logged, also where only the dirty log has forgotten it.
        let logged = write || page.state.is_dirty() && self.write_log.is_none();
        let writable = logged && walked.writable && !page.state.has_code();
        if write && writable {
            page.state.mark_dirty();
        }
        let host = page.host.expose_provenance() as u64;
        if !self.watches_data() {
            let (global, large) = (walked.global, walked.large);
            self.tlb.fill(view, Fill { linear, host, global, large, writable });
        }
        // SAFETY: an offset within the page.
        Some(unsafe { page.host.add((walked.gpa & OFFSET) as usize) })
    }

    /// Logs a store that did not go through the TLB, after it was made.
    pub(super) fn note_store(&mut self, gpa: u64) {
        if let Some(page) = self.vm.ram.page(gpa) {
            if page.state.has_code() {
                self.leave_block = true;
            }
            page.state.note_write();
        }
    }

    /// The first byte of a range (at most a page), and the first of those in the page where it ends: a
    /// fault names the latter if only that page is not there.
    pub fn ends(&self, linear: u64, len: u64) -> [u64; 2] {
        let cut = if self.mode.long64 { u64::MAX } else { 0xffff_ffff };
        let last = linear.wrapping_add(len - 1) & cut;
        let crosses = (linear ^ last) & !OFFSET != 0;
        [linear, if crosses { last & !OFFSET } else { linear }]
    }

    /// Checks that all of a range could be written as `view`, so that a store of several parts does
    /// not fault half way.
    pub fn probe_write(&mut self, view: View, linear: u64, len: u64) -> Exec {
        for address in self.ends(linear, len) {
            if self.tlb.write(view, address).is_none() {
                self.translate(view, address, Intent::Write)?;
            }
        }
        Ok(())
    }

    /// Reads bytes (at most a page) at a linear address; they may cross into the next page. Nothing is
    /// read from MMIO before both pages are known to be readable.
    pub fn read_linear(&mut self, view: View, linear: u64, data: &mut [u8]) -> Exec {
        if self.watches_data() {
            self.watch_data(linear, data.len() as u64, false);
        }
        for (address, range) in self.split(linear, data.len()) {
            let part = &mut data[range];
            let gpa = self.translate(view, address, Intent::Read)?.gpa;
            self.read_physical(gpa, part);
        }
        Ok(())
    }

    /// Writes bytes (at most a page) at a linear address, all or nothing.
    pub fn write_linear(&mut self, view: View, linear: u64, data: &[u8]) -> Exec {
        if self.watches_data() {
            self.watch_data(linear, data.len() as u64, true);
        }
        let mut targets = [0; 2];
        let parts = self.split(linear, data.len());
        for (target, (address, _)) in targets.iter_mut().zip(parts.clone()) {
            *target = self.translate(view, address, Intent::Write)?.gpa;
        }
        for (gpa, (_, range)) in targets.into_iter().zip(parts) {
            self.write_physical(gpa, &data[range]);
        }
        Ok(())
    }

    /// Where a range of linear addresses falls into pages: address and byte range of each part.
    fn split(
        &self,
        linear: u64,
        len: usize,
    ) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> + Clone + use<> {
        let first = len.min((PAGE_SIZE - (linear & OFFSET)) as usize);
        let mut second = linear.wrapping_add(first as u64);
        if !self.mode.long64 && linear >> 32 == 0 {
            second &= 0xffff_ffff;
        }
        [(linear, 0..first), (second, first..len)].into_iter().filter(|(_, r)| !r.is_empty())
    }

    /// Reads within one page of guest-physical space: RAM, local APIC or MMIO.
    pub fn read_physical(&mut self, gpa: u64, data: &mut [u8]) {
        let vm = self.vm.clone();
        match vm.ram.page(gpa) {
            Some(page) if !self.lapic.claims(gpa) => {
                for (i, byte) in data.iter_mut().enumerate() {
                    // SAFETY: the callers stay within the page.
                    *byte =
                        unsafe { mem::HostInt::load(page.host.add(((gpa + i as u64) & OFFSET) as usize)) };
                }
            }
            _ => self.mmio_read(gpa, data),
        }
    }

    /// Writes within one page of guest-physical space.
    pub fn write_physical(&mut self, gpa: u64, data: &[u8]) {
        let vm = self.vm.clone();
        match vm.ram.page(gpa) {
            Some(page) if !self.lapic.claims(gpa) => {
                if let Some(log) = &mut self.write_log {
                    log.before_write(gpa & !OFFSET, &page);
                }
                for (i, &byte) in data.iter().enumerate() {
                    // SAFETY: the callers stay within the page.
                    unsafe { mem::HostInt::store(page.host.add(((gpa + i as u64) & OFFSET) as usize), byte) };
                }
                self.note_store(gpa);
            }
            _ => self.mmio_write(gpa, data),
        }
    }

    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) {
        if let Some(log) = &mut self.write_log {
            log.outside = true;
        }
        if self.lapic.claims(gpa) {
            self.lapic_mmio_read(gpa, data);
        } else {
            self.io().mmio_read(gpa, data);
        }
    }

    fn mmio_write(&mut self, gpa: u64, data: &[u8]) {
        if let Some(log) = &mut self.write_log {
            log.outside = true;
        }
        if self.lapic.claims(gpa) {
            self.lapic_mmio_write(gpa, data);
        } else {
            self.io().mmio_write(gpa, data);
        }
        // A device access may have raised an interrupt: look before the next block.
        self.leave_block = true;
    }

    /// Read-modify-write of an instruction's memory operand; atomic towards other vCPUs if the
    /// instruction is locked. Returns the old value.
    #[inline(always)]
    pub fn rmw<T: Int>(&mut self, op: &Op, change: impl FnMut(&mut Cpu, T) -> T) -> Exec<T> {
        let linear = self.linear(op.mem.seg, self.ea(op), T::BYTES, true)?;
        self.rmw_linear(linear, op.has(flag::LOCK), change)
    }

    /// Read-modify-write at a linear address. `change` may be called more than once if `locked`; what
    /// it does to the CPU (flags) must only depend on its argument.
    #[inline(always)]
    pub fn rmw_linear<T: Int>(
        &mut self,
        linear: u64,
        locked: bool,
        mut change: impl FnMut(&mut Cpu, T) -> T,
    ) -> Exec<T> {
        if linear & (T::BYTES - 1) == 0
            && let Some(host) = self.tlb.write(self.view(), linear)
        {
            // SAFETY: a hit for writing, aligned.
            return Ok(unsafe { self.exchange(host, locked, change) });
        }
        let view = self.view();
        self.check_alignment::<T>(view, linear)?;
        self.watch::<T>(linear, true);
        if (linear & OFFSET) + T::BYTES <= PAGE_SIZE {
            if let Some(host) = self.tlb.write(view, linear) {
                // SAFETY: a hit for writing, and the access stays in the page.
                return Ok(unsafe { self.exchange(host, locked, change) });
            }
            let walked = self.translate(view, linear, Intent::Write)?;
            if let Some(host) = self.fill_data(view, linear, &walked, true) {
                // SAFETY: the walk ended in RAM, writable, within the page.
                let old = unsafe { self.exchange(host, locked, change) };
                self.note_store(walked.gpa);
                return Ok(old);
            }
        }
        // Split over pages, or MMIO. A split lock stops the world on a real CPU; here, one after another.
        let shared = self.vm.clone();
        let _guard = locked.then(|| shared.split_lock());
        self.probe_write(view, linear, T::BYTES)?;
        let mut bytes = [0; 8];
        let bytes = &mut bytes[..T::BYTES as usize];
        self.read_linear(view, linear, bytes)?;
        let mut wide = [0; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        let old = T::cut(u64::from_le_bytes(wide));
        let new = change(self, old).zx().to_le_bytes();
        self.write_linear(view, linear, &new[..T::BYTES as usize])?;
        Ok(old)
    }

    /// # Safety
    /// `host` is valid for reads and writes of `T`.
    #[inline(always)]
    unsafe fn exchange<T: Int>(
        &mut self,
        host: *mut u8,
        locked: bool,
        mut change: impl FnMut(&mut Cpu, T) -> T,
    ) -> T {
        // SAFETY: the caller's promise.
        unsafe {
            let mut old = T::load(host);
            if !locked {
                let new = change(self, old);
                T::store(host, new);
                return old;
            }
            loop {
                let new = change(self, old);
                match T::compare_exchange(host, old, new) {
                    Ok(_) => return old,
                    Err(found) => old = found,
                }
            }
        }
    }

    /// Host address for a read at a linear address that stays in its page, after all checks; `None` if it
    /// is not RAM.
    pub fn host_for_read(&mut self, linear: u64) -> Exec<Option<*const u8>> {
        let view = self.view();
        if let Some(host) = self.tlb.read(view, linear) {
            return Ok(Some(host));
        }
        let walked = self.translate(view, linear, Intent::Read)?;
        Ok(self.fill_data(view, linear, &walked, false).map(|host| host.cast_const()))
    }

    /// Stores that are no [`Int`] (16 bytes and more, within a page): calls `store` with the host address
    /// after all checks for writing, and logs the write behind it; `None` if it is not RAM.
    ///
    /// Behind it, for whoever decodes the page in between has read the old bytes, and must find its
    /// code void.
    pub fn store_through<R>(&mut self, linear: u64, store: impl FnOnce(*mut u8) -> R) -> Exec<Option<R>> {
        let view = self.view();
        if let Some(host) = self.tlb.write(view, linear) {
            return Ok(Some(store(host)));
        }
        let walked = self.translate(view, linear, Intent::Write)?;
        let Some(host) = self.fill_data(view, linear, &walked, true) else { return Ok(None) };
        let result = store(host);
        self.note_store(walked.gpa);
        Ok(Some(result))
    }
}

/// Linear address of `size` bytes at `offset` in `s` outside of 64-bit code, if the segment allows the
/// access (SDM 3A, 5.3 and 5.4: limits, type, expand-down).
pub(super) fn segment_linear(mode: &Mode, s: &Segment, offset: u64, size: u64, write: bool) -> Option<u64> {
    let last = offset.wrapping_add(size - 1);
    if mode.protected && !mode.v86 {
        if s.unusable {
            return None;
        }
        let code = s.access & access::CODE != 0;
        let read_write = s.access & access::READ_WRITE != 0;
        let forbidden = if write { code || !read_write } else { code && !read_write };
        if forbidden {
            return None;
        }
        if !code && s.access & access::CONFORM_DOWN != 0 {
            let top = if s.access & access::DB != 0 { 0xffff_ffff } else { 0xffff };
            let outside = offset <= s.limit.into() || last > top || last < offset;
            return (!outside).then_some(s.base.wrapping_add(offset) & 0xffff_ffff);
        }
    }
    let outside = last > s.limit.into() || last < offset;
    (!outside).then_some(s.base.wrapping_add(offset) & 0xffff_ffff)
}

fn segment_fault(segment: u8) -> Exception {
    if segment == seg::SS { Exception::SS0 } else { Exception::GP0 }
}

#[cfg(test)]
mod tests {
    use crate::x86::testing::{DATA, Guest};

    #[test]
    fn code_is_void_behind_a_wide_store_and_not_before_it() {
        let mut guest = Guest::new(64, &[]);
        let ram = guest.cpu.vm.ram.clone();
        let page = ram.page(DATA).unwrap();
        let (version, _) = page.state.mark_code();
        let during = guest.cpu.store_through(DATA, |_| page.state.version()).unwrap();
        assert_eq!(during, Some(version), "whoever decodes now reads the old bytes");
        assert_ne!(page.state.version(), version);
    }
}
