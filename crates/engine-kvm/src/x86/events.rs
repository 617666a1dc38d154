//! What is between instructions: events in delivery, NMIs, the interrupt shadow, activity.

use engine::Error;
use engine::x86::bits::rflags;
use engine::x86::{Activity, CpuState, PendingEvent};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SMM, KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI, kvm_mp_state,
    kvm_vcpu_events,
};
use kvm_ioctls::VcpuFd;

use crate::failed;

/// Fills in events and activity.
pub(super) fn save(fd: &VcpuFd, state: &mut CpuState) -> Result<(), Error> {
    // First the activity: asking for it has KVM carry out an INIT or start-up IPI that has come in.
    state.activity = activity(fd.get_mp_state().map_err(failed("reading a vCPU's activity"))?.mp_state)?;
    let events = fd.get_vcpu_events().map_err(failed("reading a vCPU's pending events"))?;
    if events.smi.smm != 0 {
        return Err(Error::BadState(
            "the vCPU is in system management mode, which no saved state has a place for; try again".into(),
        ));
    }
    state.pending = pending(&events);
    state.nmi_pending = events.nmi.injected != 0 || events.nmi.pending != 0;
    // An NMI in delivery blocks others only once it is delivered.
    state.nmi_blocked = events.nmi.masked != 0 && events.nmi.injected == 0;
    state.interrupt_shadow = events.interrupt.shadow != 0;
    Ok(())
}

/// Sets events and activity. Comes last: setting registers can wake a vCPU.
pub(super) fn restore(fd: &VcpuFd, state: &CpuState) -> Result<(), Error> {
    fd.set_vcpu_events(&events(state)).map_err(failed("setting a vCPU's pending events"))?;
    let mp_state = match state.activity {
        Activity::Running => KVM_MP_STATE_RUNNABLE,
        Activity::Halted => KVM_MP_STATE_HALTED,
        Activity::WaitForInit => KVM_MP_STATE_UNINITIALIZED,
        Activity::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
    };
    fd.set_mp_state(kvm_mp_state { mp_state }).map_err(failed("setting a vCPU's activity"))
}

fn activity(mp_state: u32) -> Result<Activity, Error> {
    Ok(match mp_state {
        KVM_MP_STATE_RUNNABLE => Activity::Running,
        KVM_MP_STATE_HALTED => Activity::Halted,
        KVM_MP_STATE_UNINITIALIZED => Activity::WaitForInit,
        // No vector of a start-up IPI waits: being asked for the activity, KVM has carried it out.
        KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => Activity::WaitForSipi,
        other => return Err(Error::BadState(format!("KVM has a vCPU in activity {other}"))),
    })
}

fn pending(events: &kvm_vcpu_events) -> Option<PendingEvent> {
    let (exception, interrupt) = (&events.exception, &events.interrupt);
    if exception.injected != 0 {
        let error_code = (exception.has_error_code != 0).then_some(exception.error_code);
        return Some(PendingEvent { vector: exception.nr, error_code, software: false });
    }
    let software = interrupt.soft != 0;
    (interrupt.injected != 0).then_some(PendingEvent { vector: interrupt.nr, error_code: None, software })
}

/// Vectors below are exceptions (SDM 3A, table 6-1).
const FIRST_INTERRUPT: u8 = 32;

fn events(state: &CpuState) -> kvm_vcpu_events {
    let mut events = kvm_vcpu_events {
        // Zeros for system management: out of it, nothing of it pending, no INIT held off by it. The board has
        // none, but a guest can send itself its interrupt.
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM,
        ..Default::default()
    };
    if let Some(PendingEvent { vector, error_code, software }) = state.pending {
        if software || vector >= FIRST_INTERRUPT {
            events.interrupt.injected = 1;
            events.interrupt.nr = vector;
            events.interrupt.soft = software.into();
        } else {
            events.exception.injected = 1;
            events.exception.nr = vector;
            events.exception.has_error_code = error_code.is_some().into();
            events.exception.error_code = error_code.unwrap_or(0);
        }
    }
    events.nmi.pending = state.nmi_pending.into();
    events.nmi.masked = state.nmi_blocked.into();
    // The state does not say which of the two it was. Both hold interrupts off, and a VMCS takes that of
    // STI only with IF set and never both (SDM 3C, 27.3.1.5).
    let interrupts_on = state.rflags & rflags::IF != 0;
    let shadow = if interrupts_on { KVM_X86_SHADOW_INT_STI } else { KVM_X86_SHADOW_INT_MOV_SS };
    events.interrupt.shadow = if state.interrupt_shadow { shadow as u8 } else { 0 };
    events
}
