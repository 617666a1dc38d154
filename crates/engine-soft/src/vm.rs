//! What the vCPUs of one VM share: memory, mailboxes, interrupt routing.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use engine::{Error, Msi, VmConfig};
use mem::GuestRam;

use crate::Tier;
use crate::clock::Clock;
use crate::ticker::Rest;
use crate::x86::cpuid::Cpuid;
use crate::x86::lapic::{Message, SharedLapic};
use crate::x86::native::kick;

/// Bits of [`Mailbox::attention`]: why a vCPU must look up from its guest code.
pub mod attention {
    /// The local APIC may have an interrupt to deliver.
    pub const INTERRUPT: u32 = 1 << 0;
    /// The PIC's output rose.
    pub const EXTINT: u32 = 1 << 1;
    /// Non-maskable interrupt.
    pub const NMI: u32 = 1 << 2;
    /// INIT.
    pub const INIT: u32 = 1 << 3;
    /// Start-up IPI.
    pub const SIPI: u32 = 1 << 4;
    /// Leave [`engine::Vcpu::run`].
    pub const STOP: u32 = 1 << 5;
    /// A page became code: writable TLB entries are out of date.
    pub const CODE: u32 = 1 << 6;
    /// The APIC timer's deadline passed.
    pub const TIMER: u32 = 1 << 7;
    /// Look what is running: a program that computes goes to the host's CPU.
    pub const SAMPLE: u32 = 1 << 8;
}

/// NMIs that a CPU holds: the one that it takes next, and one behind it.
const MOST_NMIS: u32 = 2;

/// One vCPU as the others, and the devices' threads, see it.
pub struct Mailbox {
    /// What it must look at ([`attention`]).
    attention: AtomicU32,
    /// NMIs that wait, at most [`MOST_NMIS`]; [`attention::NMI`] is set if there are any.
    nmis: AtomicU32,
    /// Vector of the last start-up IPI.
    pub sipi_vector: AtomicU32,
    /// The latest code epoch whose protection this vCPU carried out; `u64::MAX` while it is parked and
    /// writes nothing.
    code_epoch: AtomicU64,
    /// When the APIC timer fires, while the vCPU runs translated code, which does not look at the clock.
    pub deadline: AtomicU64,
    /// The part of its local APIC that others reach.
    pub lapic: SharedLapic,
    /// The jail that it lets run, -1 if none.
    jail: AtomicI32,
    /// The CPU of the host that it is kept on, -1 if none.
    pinned: AtomicI32,
    sleep: Mutex<()>,
    wake: Condvar,
}

impl Mailbox {
    fn new(id: u32) -> Mailbox {
        Mailbox {
            attention: AtomicU32::new(0),
            nmis: AtomicU32::new(0),
            sipi_vector: AtomicU32::new(0),
            code_epoch: AtomicU64::new(u64::MAX),
            deadline: AtomicU64::new(u64::MAX),
            lapic: SharedLapic::new(id),
            jail: AtomicI32::new(-1),
            pinned: AtomicI32::new(-1),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        }
    }

    /// What is to be looked at.
    #[inline(always)]
    pub fn attention(&self) -> u32 {
        self.attention.load(Ordering::Relaxed)
    }

    /// Where [`Mailbox::attention`] is, for translated code.
    pub fn attention_address(&self) -> u64 {
        self.attention.as_ptr().expose_provenance() as u64
    }

    /// Takes `bits` away and returns which of them were set.
    pub fn take(&self, bits: u32) -> u32 {
        self.attention.fetch_and(!bits, Ordering::AcqRel) & bits
    }

    /// Makes the vCPU look at `bits`, waking it if it sleeps.
    pub fn notify(&self, bits: u32) {
        let before = self.attention.fetch_or(bits, Ordering::SeqCst);
        if before & bits != bits {
            let jail = self.jail.load(Ordering::SeqCst);
            if jail >= 0 {
                kick(jail);
            }
            let _guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            self.wake.notify_all();
        }
    }

    /// Before the vCPU lets a jail run, which [`Mailbox::notify`] stops from then on. Not if something wants
    /// attention already. For the vCPU itself.
    pub fn enter_jail(&self, jail: i32) -> bool {
        // Both sides write, then read: one of them sees the other.
        self.jail.store(jail, Ordering::SeqCst);
        self.attention.load(Ordering::SeqCst) & !attention::SAMPLE == 0
    }

    /// It has stopped.
    pub fn leave_jail(&self) {
        self.jail.store(-1, Ordering::SeqCst);
    }

    /// It is kept on a CPU of the host, or no longer.
    pub fn pin(&self, cpu: Option<usize>) {
        let number = cpu.and_then(|cpu| i32::try_from(cpu).ok());
        self.pinned.store(number.unwrap_or(-1), Ordering::Relaxed);
    }

    /// Whether the vCPU runs guest code that it translates or interprets.
    fn is_translating(&self) -> bool {
        self.jail.load(Ordering::Relaxed) < 0 && self.code_epoch.load(Ordering::Relaxed) != u64::MAX
    }

    /// Sends an NMI. Two that meet before the CPU takes the first are both taken, one after the other.
    pub fn send_nmi(&self) {
        let more = |nmis: u32| Some((nmis + 1).min(MOST_NMIS));
        let _ = self.nmis.fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        self.notify(attention::NMI);
    }

    /// Takes one NMI, if one waits. For the vCPU itself, as the others below.
    pub fn take_nmi(&self) -> bool {
        if self.take(attention::NMI) == 0 {
            return false;
        }
        let less = |nmis: u32| nmis.checked_sub(1);
        let before = self.nmis.fetch_update(Ordering::AcqRel, Ordering::Acquire, less);
        if before.is_ok_and(|nmis| nmis > 1) {
            self.notify(attention::NMI);
        }
        before.is_ok()
    }

    /// While NMIs are blocked a CPU remembers one, however many come.
    pub fn merge_nmis(&self) {
        self.nmis.fetch_min(1, Ordering::AcqRel);
    }

    /// Forgets the NMIs that wait.
    pub fn drop_nmis(&self) {
        self.nmis.store(0, Ordering::Release);
        self.take(attention::NMI);
    }

    /// Sleeps until a bit of `bits` is set, or for at most `limit`.
    pub fn sleep(&self, bits: u32, limit: Option<Duration>) {
        let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = limit.map(|limit| std::time::Instant::now() + limit);
        while self.attention.load(Ordering::Acquire) & bits == 0 {
            match deadline.map(|d| d.saturating_duration_since(std::time::Instant::now())) {
                Some(Duration::ZERO) => return,
                Some(left) => {
                    guard = self.wake.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
                }
                None => guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// The shared part of a VM.
pub struct Shared {
    /// Guest memory.
    pub ram: GuestRam,
    /// What the CPUs say they are.
    pub cpuid: Cpuid,
    /// Time.
    pub clock: Clock,
    /// What the VM's clock showed when ours began, in nanoseconds (wrapping): the VM may come from
    /// elsewhere.
    pub uptime_before: AtomicU64,
    /// One mailbox a vCPU.
    pub vcpus: Vec<Mailbox>,
    /// Level of the PIC's output.
    extint: AtomicBool,
    /// Counts pages that became code while other vCPUs could hold writable translations of them.
    code_epoch: AtomicU64,
    split_lock: Mutex<()>,
    /// The ticker's rest.
    pub rest: Arc<Rest>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.rest.end();
    }
}

impl Shared {
    /// The shared part of a VM with `config.cpus` vCPUs.
    pub fn new(config: &VmConfig, ram: GuestRam) -> Result<Shared, Error> {
        if config.cpus == 0 {
            return Err(Error::Unsupported { engine: "soft", what: "a VM without a CPU".into() });
        }
        Ok(Shared {
            ram,
            cpuid: Cpuid::new(config.cpus, config.cpu_model)?,
            clock: Clock::default(),
            uptime_before: AtomicU64::new(0),
            vcpus: (0..config.cpus).map(Mailbox::new).collect(),
            extint: AtomicBool::new(false),
            code_epoch: AtomicU64::new(0),
            split_lock: Mutex::new(()),
            rest: Arc::default(),
        })
    }

    /// Held around a locked access that no single host instruction can do.
    pub fn split_lock(&self) -> MutexGuard<'_, ()> {
        self.split_lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Level of the PIC's output.
    pub fn extint(&self) -> bool {
        self.extint.load(Ordering::Acquire)
    }

    /// Sets the level of the PIC's output.
    pub fn set_extint(&self, high: bool) {
        let before = self.extint.swap(high, Ordering::AcqRel);
        if high && !before {
            for vcpu in self.vcpus.iter().filter(|v| v.lapic.accepts_extint()) {
                vcpu.notify(attention::EXTINT);
            }
        }
    }

    /// Delivers a message-signalled interrupt.
    pub fn send_msi(&self, msi: Msi) {
        self.send(&Message::from_msi(msi), None);
    }

    /// Delivers a message to every vCPU that its destination names. `exclude` is left out (the
    /// "all but self" shorthand).
    pub fn send(&self, message: &Message, exclude: Option<u32>) {
        message.deliver(self, exclude);
    }

    /// Whether a vCPU is kept on that CPU of the host.
    pub fn is_pinned(&self, cpu: usize) -> bool {
        self.vcpus.iter().any(|vcpu| usize::try_from(vcpu.pinned.load(Ordering::Relaxed)) == Ok(cpu))
    }

    /// Has vCPUs look what they are running.
    pub fn sample(&self) {
        let running = self.vcpus.iter().filter(|vcpu| vcpu.is_translating());
        running.for_each(|vcpu| vcpu.notify(attention::SAMPLE));
    }

    /// A page is about to be read as code by vCPU `id`; `fresh` if it was data until now. Answers
    /// whether what is decoded may be kept: not while another vCPU may still write to the page
    /// through a translation that does not log the write. If it is fresh, the caller drops its own
    /// writable translations next.
    pub fn settle_code(&self, id: u32, fresh: bool) -> bool {
        if self.vcpus.len() == 1 {
            return true;
        }
        if fresh {
            let epoch = self.code_epoch.fetch_add(1, Ordering::SeqCst) + 1;
            // Its own translations it drops before it goes on; nobody tells it to.
            self.reach_epoch(id, epoch);
            for (_, vcpu) in self.vcpus.iter().enumerate().filter(|(i, _)| *i != id as usize) {
                vcpu.notify(attention::CODE);
            }
        }
        let epoch = self.code_epoch.load(Ordering::SeqCst);
        let others = self.vcpus.iter().enumerate().filter(|(i, _)| *i != id as usize);
        others.into_iter().all(|(_, vcpu)| vcpu.code_epoch.load(Ordering::SeqCst) >= epoch)
    }

    /// The current code epoch. Read it, drop all writable translations, then [`Shared::reach_epoch`].
    pub fn code_epoch(&self) -> u64 {
        self.code_epoch.load(Ordering::SeqCst)
    }

    /// vCPU `id` holds no writable translation from before `epoch`.
    pub fn reach_epoch(&self, id: u32, epoch: u64) {
        self.vcpus[id as usize].code_epoch.store(epoch, Ordering::SeqCst);
    }
}

/// A VM of the software engine.
pub struct SoftVm {
    shared: Arc<Shared>,
    tier: Tier,
    statistics: bool,
    created: Mutex<Vec<bool>>,
}

impl SoftVm {
    pub(crate) fn new(
        config: &VmConfig,
        ram: GuestRam,
        tier: Tier,
        statistics: bool,
    ) -> Result<SoftVm, Error> {
        let shared = Arc::new(Shared::new(config, ram)?);
        if tier != Tier::Interpreter {
            crate::ticker::start(&shared, tier == Tier::Native);
        }
        Ok(SoftVm { shared, tier, statistics, created: Mutex::new(vec![false; config.cpus as usize]) })
    }
}

impl engine::Vm for SoftVm {
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn engine::Vcpu>, Error> {
        let mut created = self.created.lock().unwrap_or_else(PoisonError::into_inner);
        match created.get_mut(id as usize) {
            Some(done) if !*done => *done = true,
            _ => {
                let what = format!("creating vCPU {id} (each of 0..{} once)", self.shared.vcpus.len());
                return Err(Error::Unsupported { engine: "soft", what });
            }
        }
        Ok(Box::new(crate::vcpu::SoftVcpu::new(id, self.shared.clone(), self.tier, self.statistics)?))
    }

    fn send_msi(&self, msi: Msi) {
        self.shared.send_msi(msi);
    }

    fn set_extint(&self, high: bool) {
        self.shared.set_extint(high);
    }

    fn send_nmi(&self, id: u32) {
        if let Some(vcpu) = self.shared.vcpus.get(id as usize) {
            vcpu.send_nmi();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_makes_a_page_code_does_not_keep_the_others_waiting() {
        let ram = GuestRam::new(&[0..0x1000]).unwrap();
        let vm = Shared::new(&VmConfig { cpus: 2, ..VmConfig::default() }, ram).unwrap();
        vm.reach_epoch(0, vm.code_epoch());
        vm.reach_epoch(1, vm.code_epoch());
        assert!(!vm.settle_code(1, true), "vCPU 0 may still write to it");
        assert_ne!(vm.vcpus[0].take(attention::CODE), 0);
        vm.reach_epoch(0, vm.code_epoch());
        assert!(vm.settle_code(1, false));
        assert!(vm.settle_code(0, false), "nothing is left to tell vCPU 1");
    }
}
