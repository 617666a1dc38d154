//! The paravirtual clock that KVM guests know (Linux' Documentation/virt/kvm/x86/msr.rst describes
//! the interface): the guest computes the time from its TSC and a page that says how.

use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use super::cpu::Cpu;
use crate::clock::Clock;

/// The TSC is the same on all vCPUs and never stops.
const TSC_STABLE: u8 = 1;

/// Scale that turns TSC ticks into nanoseconds: `(ticks << shift) * multiplier >> 32`.
fn scale(hz: u64) -> (u32, i8) {
    let (mut base, mut shift) = (hz, 0i8);
    while base > 2_000_000_000 {
        base >>= 1;
        shift -= 1;
    }
    while base <= 1_000_000_000 {
        base <<= 1;
        shift += 1;
    }
    // After the shift a second is `base` ticks.
    (((1_000_000_000u128 << 32) / u128::from(base)) as u32, shift)
}

/// Nanoseconds since the VM's clock began, wherever that was.
pub fn uptime(cpu: &Cpu) -> u64 {
    since_start(cpu).wrapping_add(cpu.vm.uptime_before.load(Ordering::Relaxed))
}

fn since_start(cpu: &Cpu) -> u64 {
    cpu.vm.clock.nanos_in(Clock::ticks().saturating_sub(cpu.vm.clock.start()))
}

/// Makes the VM's clock show `nanos` now. Pages that were written before do not follow.
pub fn set_uptime(cpu: &Cpu, nanos: u64) {
    cpu.vm.uptime_before.store(nanos.wrapping_sub(since_start(cpu)), Ordering::Relaxed);
}

fn write(cpu: &mut Cpu, gpa: u64, bytes: &[u8]) {
    if cpu.vm.ram.page(gpa).is_some() && !cpu.lapic.claims(gpa) && gpa & 0xfff <= 0x1000 - bytes.len() as u64
    {
        cpu.write_physical(gpa, bytes);
    }
}

/// MSR_KVM_WALL_CLOCK_NEW: version, seconds, nanoseconds of the moment when the clock began.
pub fn write_wall_clock(cpu: &mut Cpu, gpa: u64) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let boot = now.saturating_sub(std::time::Duration::from_nanos(uptime(cpu)));
    let mut page = [0; 12];
    page[..4].copy_from_slice(&2u32.to_le_bytes());
    page[4..8].copy_from_slice(&(boot.as_secs() as u32).to_le_bytes());
    page[8..].copy_from_slice(&boot.subsec_nanos().to_le_bytes());
    write(cpu, gpa, &page);
}

/// MSR_KVM_SYSTEM_TIME_NEW: bit 0 enables, the rest is where the page goes.
pub fn write_system_time(cpu: &mut Cpu, value: u64) {
    if value & 1 == 0 {
        return;
    }
    let (multiplier, shift) = scale(cpu.vm.clock.hz());
    let (system_time, tsc) = (uptime(cpu), cpu.tsc());
    let mut page = [0; 32];
    page[..4].copy_from_slice(&2u32.to_le_bytes());
    page[8..16].copy_from_slice(&tsc.to_le_bytes());
    page[16..24].copy_from_slice(&system_time.to_le_bytes());
    page[24..28].copy_from_slice(&multiplier.to_le_bytes());
    page[28] = shift as u8;
    page[29] = TSC_STABLE;
    write(cpu, value & !1, &page);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_turns_a_second_of_ticks_into_a_second() {
        for hz in [1_000_000_000u64, 2_595_123_456, 4_900_000_000, 800_000_000] {
            let (multiplier, shift) = scale(hz);
            let ticks = if shift < 0 { hz >> -shift } else { hz << shift };
            let nanos = ((u128::from(ticks) * u128::from(multiplier)) >> 32) as u64;
            assert!(nanos.abs_diff(1_000_000_000) < 10, "{hz} Hz gives {nanos} ns");
        }
    }
}
