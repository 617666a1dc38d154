//! One vCPU: enter the guest, do what its exit asks for, again.

#![allow(unsafe_code)] // the page that the kernel shares with us

use std::io::Error as IoError;
use std::sync::Arc;

use engine::{CpuIo, CpuState, Error, Exit, StopHandle};
use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_run, kvm_vcpu_events};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::deferred::Deferred;
use crate::kick::{Entered, Kick};
use crate::vm::Shared;
use crate::x86::{lapic, state};
use crate::{NAME, failed};

/// A vCPU of the hardware engine.
pub struct KvmVcpu {
    id: u32,
    /// Before `shared`, which keeps the guest's memory: closed first.
    fd: VcpuFd,
    shared: Arc<Shared>,
    kick: Arc<Kick>,
    /// What [`engine::Vcpu::reset`] goes back to.
    power_on: CpuState,
    /// Whether the local APIC's timer ran when [`engine::Vcpu::run`] last came back.
    timer_ran: bool,
}

impl KvmVcpu {
    pub(crate) fn new(id: u32, shared: Arc<Shared>) -> Result<KvmVcpu, Error> {
        let fd = shared.fd.create_vcpu(id.into()).map_err(failed("creating a vCPU"))?;
        shared.deferred.get_or_init(|| Deferred::new(&shared.fd, &fd));
        let cpuid = shared.cpuid.of_vcpu(id, fd.get_tsc_khz().ok())?;
        fd.set_cpuid2(&cpuid).map_err(failed("telling the vCPU what it is"))?;
        let power_on = state::power_on(id, &fd, &shared)?;
        let kick = shared.kicks[id as usize].clone();
        Ok(KvmVcpu { id, fd, shared, kick, power_on, timer_ran: false })
    }
}

impl engine::Vcpu for KvmVcpu {
    fn id(&self) -> u32 {
        self.id
    }

    fn run(&mut self, io: &dyn CpuIo) -> Result<Exit, Error> {
        let kick = self.kick.clone();
        let page: *mut kvm_run = self.fd.get_kvm_run();
        // What KVM last said about the PIC's interrupt may be out of date; an entry that returns at once
        // renews it.
        let ask = self.takes_extint() && self.shared.extint();
        // SAFETY: `page` is mapped as long as `self.fd`, and `entered` is dropped before this returns.
        let entered = unsafe { kick.enter(page, ask) };
        self.fd.get_kvm_run().ready_for_interrupt_injection = 0;
        loop {
            if let Some(exit) = self.enter_guest(page, &entered, io)? {
                self.timer_ran = lapic::timer_runs(&self.fd)?;
                return Ok(exit);
            }
            if self.takes_extint() {
                self.offer_extint(io)?;
            }
        }
    }

    fn stop_handle(&self) -> Arc<dyn StopHandle> {
        self.kick.clone()
    }

    fn save(&self) -> Result<CpuState, Error> {
        state::save(self.id, &self.fd, &self.shared, self.timer_ran)
    }

    fn restore(&mut self, state: &CpuState) -> Result<(), Error> {
        self.timer_ran = false;
        state::restore(self.id, &self.fd, &self.shared, state)
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.timer_ran = false;
        state::reset(self.id, &self.fd, &self.shared, &self.power_on)
    }
}

impl KvmVcpu {
    /// One `KVM_RUN`, and what its exit asks for.
    fn enter_guest(
        &mut self,
        page: *const kvm_run,
        entered: &Entered<'_>,
        io: &dyn CpuIo,
    ) -> Result<Option<Exit>, Error> {
        let exit = self.fd.run();
        if let Some(Some(deferred)) = self.shared.deferred.get() {
            deferred.carry_out(io);
        }
        match exit {
            Ok(VcpuExit::IoOut(port, data)) => {
                data.chunks(port_width(page)).for_each(|element| io.port_write(port, element));
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                data.chunks_mut(port_width(page)).for_each(|element| io.port_read(port, element));
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => io.mmio_write(gpa, data),
            Ok(VcpuExit::MmioRead(gpa, data)) => io.mmio_read(gpa, data),
            Ok(VcpuExit::IoapicEoi(vector)) => {
                self.shared.ended(vector);
                io.end_of_interrupt(vector);
            }
            Ok(VcpuExit::IrqWindowOpen | VcpuExit::Intr) => {}
            Ok(VcpuExit::Shutdown) => return Ok(Some(Exit::Shutdown)),
            Ok(VcpuExit::InternalError) => return Err(self.internal_error(page)),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return Err(refused(format!("the CPU did not take the guest's state, reason {reason:#x}")));
            }
            Ok(VcpuExit::MemoryFault { gpa, .. }) => {
                return Err(refused(format!("guest memory at {gpa:#x} cannot be had")));
            }
            Ok(other) => return Err(refused(format!("an exit that nobody asked for: {other:?}"))),
            Err(errno) => match errno.errno() {
                libc::EINTR => return Ok(entered.take_stop().then_some(Exit::Stopped)),
                // A vCPU that was just started by another one.
                libc::EAGAIN => {}
                errno => {
                    let source = IoError::from_raw_os_error(errno);
                    return Err(Error::Host { what: "running guest code", source });
                }
            },
        }
        Ok(None)
    }

    /// The PIC is wired to the bootstrap processor.
    fn takes_extint(&self) -> bool {
        self.id == 0
    }

    /// Has the guest take the PIC's interrupt, now or when it is ready to.
    ///
    /// The vector goes in as an interrupt in delivery, not by `KVM_INTERRUPT`: so it is part of the state
    /// that [`engine::Vcpu::save`] sees.
    fn offer_extint(&mut self, io: &dyn CpuIo) -> Result<(), Error> {
        let waits = self.shared.extint();
        let run = self.fd.get_kvm_run();
        let ready = std::mem::take(&mut run.ready_for_interrupt_injection) != 0;
        run.request_interrupt_window = u8::from(waits);
        if !waits || !ready {
            return Ok(());
        }
        let events = self.fd.get_vcpu_events().map_err(failed("reading pending events"))?;
        if events.interrupt.injected != 0 || events.exception.injected != 0 || events.nmi.injected != 0 {
            return Ok(());
        }
        if let Some(vector) = io.acknowledge_extint() {
            self.inject(vector, events)?;
        }
        self.fd.get_kvm_run().request_interrupt_window = u8::from(self.shared.extint());
        Ok(())
    }

    fn inject(&self, vector: u8, mut events: kvm_vcpu_events) -> Result<(), Error> {
        (events.interrupt.injected, events.interrupt.nr, events.interrupt.soft) = (1, vector, 0);
        events.flags = 0;
        self.fd.set_vcpu_events(&events).map_err(failed("injecting the PIC's interrupt"))?;
        let activity = self.fd.get_mp_state().map_err(failed("reading a vCPU's activity"))?;
        if activity.mp_state == KVM_MP_STATE_HALTED {
            // An interrupt in delivery does not by itself wake a halted vCPU.
            let running = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
            self.fd.set_mp_state(running).map_err(failed("waking a vCPU"))?;
        }
        Ok(())
    }

    fn internal_error(&self, page: *const kvm_run) -> Error {
        // SAFETY: mapped as long as `self.fd`; the exit's reason says that this is the union's member.
        let (suberror, data) = unsafe {
            let internal = &(*page).__bindgen_anon_1.internal;
            (internal.suberror, internal.data[..(internal.ndata as usize).min(16)].to_vec())
        };
        let what = match suberror {
            1 => "an instruction that KVM cannot emulate",
            2 => "an exception in the delivery of another",
            3 => "an exit in the delivery of an event",
            _ => "an exit that KVM does not know",
        };
        let at = match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(regs), Ok(sregs)) => format!(
                "at rip {:#x} (cs base {:#x}, cr0 {:#x}, cr3 {:#x}, efer {:#x})",
                regs.rip, sregs.cs.base, sregs.cr0, sregs.cr3, sregs.efer
            ),
            _ => "at an unknown place".into(),
        };
        refused(format!("{what} {at}; details {data:x?}; `--engine soft` may run this guest"))
    }
}

/// Bytes of one element of a port access; a string instruction moves several in one exit.
fn port_width(page: *const kvm_run) -> usize {
    // SAFETY: mapped while the vCPU runs; called for port exits, whose member of the union this is.
    usize::from(unsafe { (&raw const (*page).__bindgen_anon_1.io.size).read() }).max(1)
}

/// KVM gave up on the guest.
fn refused(what: String) -> Error {
    Error::Unsupported { engine: NAME, what }
}
