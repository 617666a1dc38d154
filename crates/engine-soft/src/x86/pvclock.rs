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
    // Of one moment for all vCPUs: clocks that are set one after the other differ by as long as the host holds
    // a vCPU up on its way here.
    let tsc = cpu.tsc_at(cpu.vm.clock.start());
    let system_time = cpu.vm.uptime_before.load(Ordering::Relaxed);
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
    use engine::VmConfig;
    use mem::{Backing, Bytes, GuestAddress, GuestRam};
    use std::sync::Arc;
    use std::thread::sleep;
    use std::time::Duration;

    use crate::vm::Shared;
    use crate::x86::msr::KVM_SYSTEM_TIME;

    /// The time by the page at `gpa` when the guest's TSC shows `tsc`.
    fn time(cpu: &Cpu, gpa: u64, tsc: u64) -> u64 {
        let mut page = [0; 32];
        cpu.vm.ram.read_slice(&mut page, GuestAddress(gpa)).unwrap();
        let field = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
        let (ticks, shift) = (tsc.wrapping_sub(field(8)), page[28] as i8);
        let ticks = if shift < 0 { ticks >> -shift } else { ticks << shift };
        let nanos = (u128::from(ticks) * u128::from(field(24) as u32)) >> 32;
        field(16).wrapping_add(nanos as u64)
    }

    #[test]
    fn vcpus_that_ask_at_different_times_have_the_same_clock() {
        let ram = GuestRam::with_backing(&[0..0x40_0000], Backing::Shared).unwrap();
        let vm = Arc::new(Shared::new(&VmConfig { cpus: 2, ..VmConfig::default() }, ram).unwrap());
        let boxed = |id| Box::new(Cpu::new(id, vm.clone()));
        let mut cpus: Vec<_> = (0..2).map(boxed).collect();
        let pages = [0x1000, 0x2000];
        for (cpu, page) in cpus.iter_mut().zip(pages) {
            cpu.write_msr(KVM_SYSTEM_TIME, page | 1).unwrap();
            sleep(Duration::from_millis(2));
        }
        let (tsc, now) = (cpus[0].tsc(), uptime(&cpus[0]));
        let [one, other] = pages.map(|page| time(&cpus[0], page, tsc));
        assert_eq!(one, other);
        assert!(one.abs_diff(now) < 100_000_000 && one > 4_000_000, "{one} and {now} ns");
        cpus[1].set_tsc(5);
        cpus[1].write_msr(KVM_SYSTEM_TIME, pages[1] | 1).unwrap();
        let (tsc, now) = (cpus[1].tsc(), uptime(&cpus[1]));
        assert!(time(&cpus[1], pages[1], tsc).abs_diff(now) < 100_000_000, "with a counter of its own");
    }

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
