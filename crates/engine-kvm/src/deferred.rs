//! Writes to registers that only say what the next access is about (`KVM_REGISTER_COALESCED_MMIO`): the kernel
//! notes them in a ring, and they come out of it before the next access that leaves the kernel.

#![allow(unsafe_code)] // a page shared with the kernel

use std::os::fd::AsRawFd;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use engine::CpuIo;
use kvm_bindings::{KVM_CAP_COALESCED_MMIO, kvm_coalesced_mmio};
use kvm_ioctls::{VcpuFd, VmFd};
use mem::PAGE_SIZE;

const PAGE: usize = PAGE_SIZE as usize;
/// `first` and `last` come before the entries.
const ENTRIES: usize = 8;
/// How many entries the page has room for.
const ROOM: u32 = ((PAGE - ENTRIES) / size_of::<kvm_coalesced_mmio>()) as u32;

/// The ring of a VM.
pub(crate) struct Deferred {
    page: *mut u8,
    /// Held while writes are carried out: whoever finds the ring not empty waits until they are. Taken before
    /// every other lock.
    turn: Mutex<()>,
}

// SAFETY: `first` and `last` are only touched atomically; entries only under `turn`, between the two, where the
// kernel does not write.
unsafe impl Send for Deferred {}
// SAFETY: as above.
unsafe impl Sync for Deferred {}

impl Deferred {
    /// Maps the ring; any vCPU's file has it. `None` if this kernel has none.
    pub(crate) fn new(vm: &VmFd, vcpu: &VcpuFd) -> Option<Deferred> {
        let page = vm.check_extension_raw(KVM_CAP_COALESCED_MMIO.into());
        if page <= 0 {
            return None;
        }
        let (fd, prot) = (vcpu.as_raw_fd(), libc::PROT_READ | libc::PROT_WRITE);
        let offset = libc::off_t::from(page) * PAGE as libc::off_t;
        // SAFETY: a new mapping of one page.
        let start = unsafe { libc::mmap(null_mut(), PAGE, prot, libc::MAP_SHARED, fd, offset) };
        (start != libc::MAP_FAILED).then(|| Deferred { page: start.cast(), turn: Mutex::new(()) })
    }

    /// Where the oldest entry is; we move it.
    fn first(&self) -> &AtomicU32 {
        // SAFETY: the first word of the page, which is mapped as long as `self` lives.
        unsafe { AtomicU32::from_ptr(self.page.cast()) }
    }

    /// Where the next entry comes; the kernel moves it.
    fn last(&self) -> &AtomicU32 {
        // SAFETY: the second word of the page.
        unsafe { AtomicU32::from_ptr(self.page.cast::<u32>().add(1)) }
    }

    /// Carries out what is in the ring.
    pub(crate) fn carry_out(&self, io: &dyn CpuIo) {
        if self.first().load(Ordering::Acquire) == self.last().load(Ordering::Acquire) {
            return;
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let first = self.first().load(Ordering::Acquire) % ROOM;
            if first == self.last().load(Ordering::Acquire) % ROOM {
                return;
            }
            let entries = self.page.wrapping_add(ENTRIES).cast::<kvm_coalesced_mmio>();
            // SAFETY: `first` is less than `ROOM`, and the entry is not the kernel's until `first` has moved on.
            let entry = unsafe { entries.add(first as usize).read() };
            carry_out(&entry, io);
            self.first().store((first + 1) % ROOM, Ordering::Release);
        }
    }
}

fn carry_out(entry: &kvm_coalesced_mmio, io: &dyn CpuIo) {
    let data = &entry.data[..(entry.len as usize).min(entry.data.len())];
    // SAFETY: a word either way.
    match unsafe { entry.__bindgen_anon_1.pio } {
        0 => io.mmio_write(entry.phys_addr, data),
        _ => io.port_write(entry.phys_addr as u16, data),
    }
}

impl Drop for Deferred {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.page.cast(), PAGE) };
    }
}
