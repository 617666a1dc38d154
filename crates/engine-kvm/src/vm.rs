//! What the vCPUs of one VM share: memory slots, interrupts, the dirty log.

#![allow(unsafe_code)] // hands guest memory to the kernel

use std::io::Error as IoError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use engine::{Error, Msi, Register, VmConfig};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap, kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, VmFd};
use mem::{GuestRam, PAGE_SIZE, RamRange};
use vmm_sys_util::eventfd::EventFd;

use crate::deferred::Deferred;
use crate::doorbell::Doorbell;
use crate::irqfd::{Irqfd, Way};
use crate::kick::{Kick, install_handler};
use crate::routes::{PINS, Routes, wants_eoi};
use crate::vcpu::KvmVcpu;
use crate::x86::cpuid::Cpuid;
use crate::x86::msrs::MsrTable;
use crate::x86::sregs2;
use crate::{NAME, failed};

/// Three pages and one that KVM takes for itself on Intel CPUs, to run real mode. Below the firmware's
/// place at the end of the first 4 GiB, where this board has nothing.
const TSS: usize = 0xfffb_d000;
const IDENTITY_MAP: u64 = 0xfffb_c000;

/// Message data: non-maskable interrupt (SDM 3A, 11.11.2).
const DELIVER_NMI: u32 = 4 << 8;

/// The shared part of a VM.
pub(crate) struct Shared {
    pub(crate) fd: VmFd,
    /// Keeps the memory mapped that the slots name.
    ram: GuestRam,
    pub(crate) cpuid: Cpuid,
    pub(crate) msrs: MsrTable,
    pub(crate) kicks: Vec<Arc<Kick>>,
    /// Whether the kernel knows the page-directory pointers of PAE paging.
    pub(crate) sregs2: bool,
    /// Writes that wait; from the first vCPU on, if the kernel has a place for them.
    pub(crate) deferred: OnceLock<Option<Deferred>>,
    /// Level of the PIC's output.
    extint: AtomicBool,
    /// Lock order: the IOAPIC's own lock is held by whoever sends, this one is the innermost.
    routes: Mutex<Routes>,
}

impl Shared {
    pub(crate) fn extint(&self) -> bool {
        self.extint.load(Ordering::SeqCst)
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes sure that the end of a level-triggered interrupt comes back to us.
    pub(crate) fn await_end(&self, msi: Msi) {
        let mut routes = self.routes();
        if !routes.sending(msi) {
            return;
        }
        if let Err(errno) = routes.table().and_then(|table| self.fd.set_gsi_routing(&table)) {
            log::error!("KVM refuses the route of {msi:x?}: {errno}; the interrupt may never end");
        }
    }

    /// A local APIC has ended `vector`.
    pub(crate) fn ended(&self, vector: u8) {
        self.routes().ended(vector);
    }

    fn send(&self, msi: Msi) {
        if wants_eoi(msi) {
            self.await_end(msi);
        } else if let Some(irqfd) = self.irqfd(msi) {
            // The kernel takes the signal back at once, so that the counter cannot be full.
            let _ = irqfd.event.write(1);
            return;
        }
        let message = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        // 0 is a message that its vCPU does not take, or that names none.
        match self.fd.signal_msi(message) {
            Ok(taken) if taken > 0 => {}
            Ok(_) => log::trace!("no vCPU takes {msi:x?}"),
            Err(errno) => log::trace!("no vCPU takes {msi:x?}: {errno}"),
        }
    }

    /// The event that sends this message, if it has one.
    fn irqfd(&self, msi: Msi) -> Option<Arc<Irqfd>> {
        let mut routes = self.routes();
        match routes.irqfds.sending(msi) {
            Way::Signal(irqfd) => Some(irqfd),
            Way::Plain => None,
            Way::Promote => self.promote(&mut routes, msi).unwrap_or_else(|error| {
                log::debug!("messages go without events: {error}");
                routes.irqfds.turn_off();
                None
            }),
        }
    }

    /// Gives the message an event: in the place of another one, if need be.
    fn promote(&self, routes: &mut Routes, msi: Msi) -> Result<Option<Arc<Irqfd>>, IoError> {
        let failed = |errno: kvm_ioctls::Error| IoError::from_raw_os_error(errno.errno());
        let (place, old) = routes.irqfds.place();
        let gsi = (PINS + place) as u32;
        if let Some(old) = old {
            self.fd.unregister_irqfd(&old.event, gsi).map_err(failed)?;
        }
        let irqfd = routes.irqfds.promote(msi)?;
        let table = routes.table().map_err(failed)?;
        self.fd.set_gsi_routing(&table).map_err(failed)?;
        self.fd.register_irqfd(&irqfd.event, gsi).map_err(failed)?;
        Ok(Some(irqfd))
    }

    fn map(&self, slot: usize, range: RamRange, flags: u32) -> Result<(), Error> {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags,
            guest_phys_addr: range.gpa,
            memory_size: range.len,
            userspace_addr: range.host as u64,
        };
        // SAFETY: the range is mapped as long as `ram`, which lives at least as long as the VM's file.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(failed("giving memory to the guest"))
    }
}

/// A VM of the hardware engine.
pub struct KvmVm {
    shared: Arc<Shared>,
    created: Mutex<Vec<bool>>,
    /// Whether KVM logs the guest's writes.
    logging: Mutex<bool>,
}

impl KvmVm {
    pub(crate) fn new(kvm: &Kvm, config: &VmConfig, ram: GuestRam) -> Result<KvmVm, Error> {
        let most = kvm.get_max_vcpus();
        if config.cpus == 0 || config.cpus as usize > most {
            let what = format!("a VM with {} vCPUs (1 to {most})", config.cpus);
            return Err(Error::Unsupported { engine: NAME, what });
        }
        install_handler();
        let fd = kvm.create_vm().map_err(failed("creating a VM"))?;
        fd.set_identity_map_address(IDENTITY_MAP).map_err(failed("placing the identity map"))?;
        fd.set_tss_address(TSS).map_err(failed("placing the task state segment"))?;
        split_irqchip(&fd)?;
        let shared = Shared {
            cpuid: Cpuid::new(kvm, config.cpus, config.cpu_model)?,
            msrs: MsrTable::new(config.cpu_model),
            kicks: (0..config.cpus).map(|_| Arc::default()).collect(),
            sregs2: sregs2::available(&fd),
            deferred: OnceLock::new(),
            extint: AtomicBool::new(false),
            routes: Mutex::default(),
            ram,
            fd,
        };
        for (slot, range) in shared.ram.ranges().enumerate() {
            shared.map(slot, range, 0)?;
        }
        Ok(KvmVm {
            shared: Arc::new(shared),
            created: Mutex::new(vec![false; config.cpus as usize]),
            logging: Mutex::new(false),
        })
    }
}

/// Local APICs in the kernel, PIC and IOAPIC outside.
fn split_irqchip(fd: &VmFd) -> Result<(), Error> {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    cap.args[0] = PINS as u64;
    fd.enable_cap(&cap).map_err(failed("asking KVM for local APICs"))
}

impl engine::Vm for KvmVm {
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn engine::Vcpu>, Error> {
        let mut created = self.created.lock().unwrap_or_else(PoisonError::into_inner);
        match created.get_mut(id as usize) {
            Some(done) if !*done => *done = true,
            _ => {
                let what = format!("creating vCPU {id} (each of 0..{} once)", self.shared.kicks.len());
                return Err(Error::Unsupported { engine: NAME, what });
            }
        }
        Ok(Box::new(KvmVcpu::new(id, self.shared.clone())?))
    }

    fn send_msi(&self, msi: Msi) {
        self.shared.send(msi);
    }

    fn set_extint(&self, high: bool) {
        let before = self.shared.extint.swap(high, Ordering::SeqCst);
        if high && !before {
            // LINT0 of the bootstrap processor is where the PIC is wired to.
            self.shared.kicks[0].kick();
        }
    }

    fn send_nmi(&self, id: u32) {
        let address = 0xfee0_0000 | u64::from(id & 0xff) << 12;
        self.shared.send(Msi { address, data: DELIVER_NMI });
    }

    fn doorbell(&self, address: u64, event: EventFd) -> Option<Box<dyn Send + Sync>> {
        Some(Box::new(Doorbell::new(self.shared.clone(), address, event)?))
    }

    fn defer_writes(&self, register: Register, len: u32) {
        let address = match register {
            Register::Port(port) => IoEventAddress::Pio(port.into()),
            Register::Memory(gpa) => IoEventAddress::Mmio(gpa),
        };
        // Without a vCPU nobody would look for them.
        if let Some(Some(_)) = self.shared.deferred.get()
            && let Err(errno) = self.shared.fd.register_coalesced_mmio(address, len)
        {
            log::debug!("writes to {register:x?} come at once: {errno}");
        }
    }

    fn log_writes(&self, on: bool) -> Result<(), Error> {
        let mut logging = self.logging.lock().unwrap_or_else(PoisonError::into_inner);
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        for (slot, range) in self.shared.ram.ranges().enumerate() {
            self.shared.map(slot, range, flags)?;
        }
        *logging = on;
        Ok(())
    }

    fn collect_writes(&self) -> Result<(), Error> {
        let logging = self.logging.lock().unwrap_or_else(PoisonError::into_inner);
        for (slot, range) in self.shared.ram.ranges().enumerate() {
            if *logging {
                let log = self.shared.fd.get_dirty_log(slot as u32, range.len as usize);
                let log = log.map_err(failed("reading the log of the guest's writes"))?;
                note_writes(&self.shared.ram, range, &log);
            } else {
                note_writes(&self.shared.ram, range, &all(range));
            }
        }
        Ok(())
    }
}

/// What is not known to be clean is dirty.
fn all(range: RamRange) -> Vec<u64> {
    vec![u64::MAX; (range.len / PAGE_SIZE).div_ceil(64) as usize]
}

/// `log` has a bit a page, from the range's first page on.
fn note_writes(ram: &GuestRam, range: RamRange, log: &[u64]) {
    for (index, mut word) in log.iter().copied().enumerate() {
        while word != 0 {
            let page = index as u64 * 64 + u64::from(word.trailing_zeros());
            word &= word - 1;
            if page * PAGE_SIZE < range.len
                && let Some(page) = ram.page(range.gpa + page * PAGE_SIZE)
            {
                page.state.note_write();
            }
        }
    }
}
