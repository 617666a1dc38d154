//! The local APIC.

use engine::Error;
use engine::x86::{CpuState, LapicState};
use kvm_bindings::kvm_lapic_state;
use kvm_ioctls::VcpuFd;

use crate::failed;

/// Registers of 32 bits, one each 16 bytes.
const REGISTERS: usize = 64;

/// Register numbers: offset / 16 (SDM 3A, table 11-1).
mod reg {
    pub(super) const ID: usize = 0x02;
    pub(super) const ISR: usize = 0x10;
    pub(super) const TMR: usize = 0x18;
    pub(super) const IRR: usize = 0x20;
    /// Reserved; the software engine keeps errors there that are not in the ESR yet.
    pub(super) const HIDDEN_ERRORS: usize = 0x29;
    pub(super) const LVT_TIMER: usize = 0x32;
    pub(super) const LVT_LINT1: usize = 0x36;
    pub(super) const INITIAL_COUNT: usize = 0x38;
    pub(super) const CURRENT_COUNT: usize = 0x39;
    pub(super) const DIVIDE: usize = 0x3e;
}

/// IA32_APIC_BASE: x2APIC mode.
const X2APIC: u64 = 1 << 10;
/// LVT timer modes (SDM 3A, 11.5.4).
const ONE_SHOT: u32 = 0;
const PERIODIC: u32 = 1;
const TSC_DEADLINE: u32 = 2;
/// LVT entry: unmasked NMI.
const LVT_NMI: u32 = 4 << 8;

/// What the timer divides by (SDM 3A, figure 11-10).
fn divisor(divide: u32) -> u64 {
    let code = divide & 3 | divide >> 1 & 4;
    1 << ((code + 1) & 7)
}

fn timer_mode(regs: &[u32]) -> u32 {
    regs[reg::LVT_TIMER] >> 17 & 3
}

fn registers(fd: &VcpuFd) -> Result<[u32; REGISTERS], Error> {
    let page = fd.get_lapic().map_err(failed("reading a vCPU's local APIC"))?;
    let mut regs = [0; REGISTERS];
    for (number, value) in regs.iter_mut().enumerate() {
        let byte = |i: usize| page.regs[number * 16 + i] as u8;
        *value = u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)]);
    }
    Ok(regs)
}

fn set_registers(fd: &VcpuFd, regs: &[u32; REGISTERS]) -> Result<(), Error> {
    let mut page = kvm_lapic_state::default();
    for (number, value) in regs.iter().enumerate() {
        for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
            page.regs[number * 16 + i] = byte as _;
        }
    }
    fd.set_lapic(&page).map_err(failed("setting a vCPU's local APIC"))
}

/// Whether the timer runs. A vCPU that is about to be parked is asked: of a one-shot timer that expires later,
/// KVM keeps the interrupt where nobody can read it, until the vCPU runs again.
pub(crate) fn timer_runs(fd: &VcpuFd) -> Result<bool, Error> {
    Ok(timer_left(&registers(fd)?).is_some())
}

/// Fills in the registers and the timer; the base is there already. `ran` says whether the timer ran when the
/// vCPU was parked.
pub(super) fn save(fd: &VcpuFd, ran: bool, state: &mut CpuState) -> Result<(), Error> {
    let mut regs = registers(fd)?;
    let LapicState { regs: saved, base, timer_left_ns, tsc_deadline: _ } = &mut state.lapic;
    if *base & X2APIC != 0 {
        // KVM shows the ID where xAPIC mode has it; software sees all 32 bits.
        regs[reg::ID] >>= 24;
    }
    *timer_left_ns = timer_left(&regs).or(expired_since(&regs, ran));
    *saved = regs.to_vec();
    Ok(())
}

/// KVM's timer counts nanoseconds before division. A period that is over, and whose end the host's timer has
/// not come round to yet, has none left: the timer runs all the same.
fn timer_left(regs: &[u32; REGISTERS]) -> Option<u64> {
    let left = u64::from(regs[reg::CURRENT_COUNT]) * divisor(regs[reg::DIVIDE]);
    let overdue = timer_mode(regs) == PERIODIC && regs[reg::INITIAL_COUNT] != 0;
    match timer_mode(regs) {
        TSC_DEADLINE => None,
        _ if left != 0 => Some(left),
        _ => overdue.then_some(1),
    }
}

/// A one-shot timer that ran when the vCPU was parked, and runs no more, has nothing left.
fn expired_since(regs: &[u32; REGISTERS], ran: bool) -> Option<u64> {
    (ran && timer_mode(regs) == ONE_SHOT && regs[reg::INITIAL_COUNT] != 0).then_some(1)
}

/// Sets the registers and starts the timer. Comes after the base.
pub(super) fn restore(fd: &VcpuFd, state: &LapicState) -> Result<(), Error> {
    let LapicState { regs, base, tsc_deadline: _, timer_left_ns } = state;
    let mut regs: [u32; REGISTERS] = regs.as_slice().try_into().map_err(|_| {
        Error::BadState(format!("the local APIC has {REGISTERS} registers, not {}", regs.len()))
    })?;
    if base & X2APIC != 0 {
        regs[reg::ID] <<= 24;
    }
    regs[reg::HIDDEN_ERRORS] = 0;
    let ticks = timer_left_ns.map_or(0, |left| (left / divisor(regs[reg::DIVIDE])).max(1));
    regs[reg::CURRENT_COUNT] = u32::try_from(ticks).unwrap_or(u32::MAX);
    set_registers(fd, &regs)
}

/// LINT1 of the bootstrap processor as firmware leaves it: NMI. (KVM itself sets up LINT0 for the PIC.)
pub(super) fn wire_nmi(fd: &VcpuFd) -> Result<(), Error> {
    let mut regs = registers(fd)?;
    regs[reg::LVT_LINT1] = LVT_NMI;
    set_registers(fd, &regs)
}

/// Level-triggered vectors that are requested or in service: their ends are awaited outside.
pub(super) fn level_vectors(state: &LapicState) -> impl Iterator<Item = u8> + '_ {
    let word = |register: usize, vector: u32| {
        state.regs.get(register + vector as usize / 32).copied().unwrap_or(0) >> (vector % 32) & 1
    };
    let awaited =
        move |&vector: &u32| word(reg::TMR, vector) & (word(reg::ISR, vector) | word(reg::IRR, vector)) != 0;
    (16..256).filter(awaited).map(|vector| vector as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_divider_is_the_figure_in_the_manual() {
        let table = [(0b0000, 2), (0b0001, 4), (0b0010, 8), (0b0011, 16), (0b1000, 32), (0b1011, 1)];
        for (code, by) in table {
            assert_eq!(divisor(code), by, "{code:04b}");
        }
    }

    #[test]
    fn a_period_that_is_over_is_one_that_ends_at_once() {
        let mut regs = [0; REGISTERS];
        (regs[reg::LVT_TIMER], regs[reg::INITIAL_COUNT]) = (PERIODIC << 17, 1000);
        assert_eq!(timer_left(&regs), Some(1));
        (regs[reg::CURRENT_COUNT], regs[reg::DIVIDE]) = (30, 0);
        assert_eq!(timer_left(&regs), Some(60));
        (regs[reg::LVT_TIMER], regs[reg::CURRENT_COUNT]) = (0, 0);
        assert_eq!(timer_left(&regs), None, "one that ran once has expired");
        assert_eq!(expired_since(&regs, true), Some(1), "while the vCPU was parked");
        assert_eq!(expired_since(&regs, false), None, "before that");
    }

    #[test]
    fn ends_are_awaited_of_level_triggered_vectors_only() {
        let mut regs = vec![0; REGISTERS];
        regs[reg::TMR + 1] = 1 << 4 | 1 << 5; // 0x24, 0x25
        regs[reg::ISR + 1] = 1 << 4 | 1 << 6; // 0x24, 0x26
        regs[reg::IRR + 2] = 1; // 0x40
        let state = LapicState { regs, base: 0, tsc_deadline: 0, timer_left_ns: None };
        assert_eq!(level_vectors(&state).collect::<Vec<_>>(), [0x24]);
    }
}
