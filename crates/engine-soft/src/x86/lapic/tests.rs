//! What a guest sees of its own APIC.

use engine::x86::bits::msr::IA32_APIC_BASE;

use super::super::testing::Guest;
use super::*;
use crate::vm::Mailbox;

const VECTOR: u32 = 0xef;
const ONE_SHOT: u32 = 0;
const PERIODIC: u32 = 1 << 17;
const TSC_DEADLINE: u32 = 2 << 17;

/// A guest whose APIC is on, with its timer in this mode.
fn with_timer(mode: u32) -> Guest {
    let mut guest = Guest::new(64, &[]);
    set(&mut guest, SVR, 0x1ff);
    set(&mut guest, LVT_TIMER, mode | VECTOR);
    guest
}

fn set(guest: &mut Guest, number: usize, value: u32) {
    let gpa = DEFAULT_BASE + number as u64 * 16;
    guest.cpu.lapic_mmio_write(gpa, &value.to_le_bytes());
}

fn get(guest: &mut Guest, number: usize) -> u32 {
    let mut data = [0; 4];
    guest.cpu.lapic_mmio_read(DEFAULT_BASE + number as u64 * 16, &mut data);
    u32::from_le_bytes(data)
}

fn requested(guest: &mut Guest) -> bool {
    get(guest, IRR + VECTOR as usize / 32) & 1 << (VECTOR % 32) != 0
}

fn mailbox(guest: &Guest) -> &Mailbox {
    &guest.cpu.vm.vcpus[0]
}

#[test]
fn a_tsc_deadline_that_has_passed_fires_at_once() {
    let mut guest = with_timer(TSC_DEADLINE);
    let now = guest.cpu.tsc();
    guest.cpu.set_tsc_deadline(now);
    assert!(requested(&mut guest));
    assert_eq!(guest.cpu.tsc_deadline(), 0, "it is disarmed");
    guest.cpu.set_tsc_deadline(u64::MAX >> 1);
    assert_ne!(guest.cpu.tsc_deadline(), 0, "one to come stays");
}

#[test]
fn a_countdown_goes_on_across_one_shot_and_periodic_mode() {
    const COUNT: u32 = 0x8000_0000;
    let mut guest = with_timer(ONE_SHOT);
    set(&mut guest, INITIAL_COUNT, COUNT);
    let deadline = guest.cpu.lapic.deadline;
    assert!(deadline.is_some());
    set(&mut guest, LVT_TIMER, PERIODIC | VECTOR);
    assert_eq!(guest.cpu.lapic.deadline, deadline);
    assert!((1..COUNT).contains(&get(&mut guest, CURRENT_COUNT)));
    set(&mut guest, LVT_TIMER, ONE_SHOT | VECTOR);
    assert_eq!(guest.cpu.lapic.deadline, deadline);
    set(&mut guest, LVT_TIMER, TSC_DEADLINE | VECTOR);
    assert_eq!(guest.cpu.lapic.deadline, None, "TSC-deadline mode disarms");
}

#[test]
fn a_countdown_that_is_over_stays_so_in_periodic_mode() {
    let mut guest = with_timer(ONE_SHOT);
    set(&mut guest, INITIAL_COUNT, 1);
    while !requested(&mut guest) {
        guest.cpu.check_timer();
    }
    set(&mut guest, LVT_TIMER, PERIODIC | VECTOR);
    assert_eq!((get(&mut guest, CURRENT_COUNT), guest.cpu.lapic.deadline), (0, None));
}

#[test]
fn a_self_ipi_has_a_vector_and_nothing_else() {
    let mut guest = Guest::new(64, &[]);
    guest.cpu.set_apic_base(guest.cpu.apic_base() | BASE_X2APIC).unwrap();
    guest.cpu.write_msr(0x80f, 0x1ff).unwrap();
    assert_eq!(guest.cpu.write_msr(0x83f, 0x100), Err(Exception::GP0));
    guest.cpu.write_msr(0x83f, VECTOR.into()).unwrap();
    assert_eq!(guest.cpu.read_msr(0x820 + u32::from(VECTOR as u8) / 32), Ok(1 << (VECTOR % 32)));
}

#[test]
fn an_apic_that_is_off_is_not_in_cpuid() {
    let mut guest = Guest::new(64, &[]);
    let mut seen = |base: u64| {
        guest.cpu.write_msr(IA32_APIC_BASE, base).unwrap();
        let vm = guest.cpu.vm.clone();
        vm.cpuid.query(&guest.cpu, 1, 0)[3] & 1 << 9 != 0
    };
    assert!(!seen(DEFAULT_BASE));
    assert!(seen(DEFAULT_BASE | BASE_ENABLE));
}

#[test]
fn two_nmis_that_meet_are_both_taken() {
    let guest = Guest::new(64, &[]);
    let mailbox = mailbox(&guest);
    for _ in 0..3 {
        mailbox.send_nmi();
    }
    let taken: Vec<bool> = (0..3).map(|_| mailbox.take_nmi()).collect();
    assert_eq!(taken, [true, true, false], "the CPU holds two at most");
    for _ in 0..2 {
        mailbox.send_nmi();
    }
    mailbox.merge_nmis();
    assert!(mailbox.take_nmi() && !mailbox.take_nmi(), "and one while they are blocked");
}
