//! Saving and restoring a vCPU. The order matters: KVM checks each part against those that are there.

use engine::x86::bits::{access, msr};
use engine::x86::{Activity, CpuState as X86State, DescriptorTable, LapicState, Segment};
use engine::{CpuState, Error};
use kvm_bindings::kvm_clock_data;
use kvm_ioctls::VcpuFd;

use super::{events, lapic, msrs, registers, sregs2, tsc, xsave};
use crate::failed;
use crate::routes::level_message;
use crate::vm::Shared;

/// Everything that the guest can observe of the vCPU; `timer_ran` is what [`lapic::timer_runs`] said when it was
/// parked.
pub(crate) fn save(id: u32, fd: &VcpuFd, shared: &Shared, timer_ran: bool) -> Result<CpuState, Error> {
    let mut state = empty();
    // Activity comes first: asking for it can change registers.
    events::save(fd, &mut state)?;
    state.msrs = msrs::save(fd, &shared.msrs)?;
    registers::save_general(fd, &mut state)?;
    registers::save_system(fd, &mut state)?;
    state.pdptes = if shared.sregs2 { sregs2::pdptes(fd)? } else { None };
    registers::save_debug(fd, &mut state)?;
    (state.xsave, state.xcr0) = xsave::save(fd, shared.cpuid.xsave())?;
    lapic::save(fd, timer_ran, &mut state)?;
    state.lapic.tsc_deadline = msrs::read(fd, msr::IA32_TSC_DEADLINE).unwrap_or(0);
    state.tsc = msrs::read(fd, msr::IA32_TSC)
        .ok_or_else(|| Error::BadState(format!("KVM does not tell vCPU {id}'s time-stamp counter")))?;
    state.tsc_khz = tsc::save(fd);
    state.kvm_clock_ns = shared.fd.get_clock().map_err(failed("reading the VM's clock"))?.clock;
    Ok(CpuState::X86(Box::new(state)))
}

/// Far from every counter, in ticks.
const FAR: u64 = 1 << 62;

/// Takes a state on, vCPU 0's first.
pub(crate) fn restore(id: u32, fd: &VcpuFd, shared: &Shared, state: &CpuState) -> Result<(), Error> {
    let state = x86(state)?;
    tsc::restore(id, fd, shared, state.tsc_khz)?;
    if id == 0 {
        let clock = kvm_clock_data { clock: state.kvm_clock_ns, ..Default::default() };
        shared.fd.set_clock(&clock).map_err(failed("setting the VM's clock"))?;
        // KVM takes a counter less than a second from the one that was set last, by whichever vCPU, for the same
        // one, and leaves it: that of a VM that was just made must not pass for the saved one's.
        msrs::write(fd, msr::IA32_TSC, state.tsc.wrapping_add(FAR));
    }
    // The other vCPUs' counters are close to the first one's, and so become the same.
    if !msrs::write(fd, msr::IA32_TSC, state.tsc) {
        return Err(Error::BadState(format!("KVM refuses the time-stamp counter {:#x}", state.tsc)));
    }
    take_on(id, fd, shared, state)
}

/// Back to power-on. Time goes on: on all vCPUs alike.
pub(crate) fn reset(id: u32, fd: &VcpuFd, shared: &Shared, power_on: &CpuState) -> Result<(), Error> {
    take_on(id, fd, shared, x86(power_on)?)
}

fn x86(state: &CpuState) -> Result<&X86State, Error> {
    match state {
        CpuState::X86(state) => Ok(state),
        _ => Err(Error::BadState("it is of another guest architecture".into())),
    }
}

/// Everything but time.
fn take_on(id: u32, fd: &VcpuFd, shared: &Shared, state: &X86State) -> Result<(), Error> {
    registers::restore_general(fd, state)?;
    // XCR0 is checked by nothing, and CR4.OSXSAVE changes what CPUID says of it.
    xsave::restore(fd, shared.cpuid.xsave(), &state.xsave, state.xcr0)?;
    registers::restore_system(fd, state, shared.sregs2)?;
    registers::restore_debug(fd, state)?;
    lapic::restore(fd, &state.lapic)?;
    msrs::restore(fd, &shared.msrs, &state.msrs)?;
    // Only in the timer's deadline mode, which the local APIC's registers have set.
    let deadline = state.lapic.tsc_deadline;
    if deadline != 0 && !msrs::write(fd, msr::IA32_TSC_DEADLINE, deadline) {
        return Err(Error::BadState(format!("KVM refuses the TSC deadline {deadline:#x}")));
    }
    for vector in lapic::level_vectors(&state.lapic) {
        shared.await_end(level_message(id, vector));
    }
    events::restore(fd, state)
}

/// The state after power-on, as all engines have it.
pub(crate) fn power_on(id: u32, fd: &VcpuFd, shared: &Shared) -> Result<CpuState, Error> {
    if id == 0 {
        lapic::wire_nmi(fd)?;
    }
    if shared.cpuid.intel() {
        msrs::lock_features(fd);
    }
    let CpuState::X86(mut state) = save(id, fd, shared, false)? else {
        return Err(Error::BadState("KVM made a vCPU of another architecture".into()));
    };
    // SDM 3A, table 9-1: EDX identifies the CPU; the other general registers are zero.
    state.gpr = [0; 16];
    state.gpr[2] = u64::from(shared.cpuid.signature());
    let state = CpuState::X86(state);
    take_on(id, fd, shared, x86(&state)?)?;
    Ok(state)
}

/// To be filled in.
fn empty() -> X86State {
    let data = Segment { limit: 0xffff, access: access::P, ..Segment::default() };
    let table = DescriptorTable::default();
    X86State {
        gpr: [0; 16],
        rip: 0,
        rflags: 0,
        segments: [data; 6],
        ldtr: data,
        tr: data,
        gdtr: table,
        idtr: table,
        cr0: 0,
        cr2: 0,
        cr3: 0,
        cr4: 0,
        pdptes: None,
        cr8: 0,
        dr: [0; 8],
        xcr0: 0,
        xsave: Vec::new(),
        msrs: Vec::new(),
        tsc: 0,
        tsc_khz: 0,
        lapic: LapicState { regs: Vec::new(), base: 0, tsc_deadline: 0, timer_left_ns: None },
        activity: Activity::Running,
        pending: None,
        nmi_pending: false,
        nmi_blocked: false,
        interrupt_shadow: false,
        kvm_clock_ns: 0,
    }
}
