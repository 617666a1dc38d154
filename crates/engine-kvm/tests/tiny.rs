//! Guests of some instructions on this host's `/dev/kvm`, be it hardware or not.

#![allow(unsafe_code)] // guest code is assembled into this program

mod common;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::{Access, CODE, DATA, Guest, SIZE, hardware, kvm, skipped};
use engine::x86::bits::{cr0, cr4};
use engine::x86::{Activity, CpuState, Segment};
use engine::{Exit, Msi, Register, Vcpu};
use engine_kvm::KvmEngine;
use kvm_ioctls::{Cap, Kvm};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

guest!(
    ports_and_mmio,
    ".code16",
    "mov al, 0x41",
    "mov dx, 0x3f8",
    "out dx, al",
    "in eax, dx",
    "mov [0xa000], eax",
    "mov si, 0x1000", // three bytes of this very code
    "mov cx, 3",
    "rep outsb",
    "mov di, 0xa010",
    "mov cx, 2",
    "rep insw",
    "mov ax, 0xffff",
    "mov es, ax",
    "mov al, es:[0x10]", // 0x100000: RAM
    "out 0xf4, al",
    "hlt",
);

#[test]
fn a_real_mode_guest_talks_to_ports() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::real_mode(&kvm, ports_and_mmio());
    guest.io.input.lock().unwrap().extend([1, 2, 3, 4, 5, 6, 7, 8]);
    guest.ram.page(0x10_0000).unwrap();
    guest.run_to_end();
    let expected = [
        Access::Out(0x3f8, vec![0x41]),
        Access::In(0x3f8, 4),
        Access::Out(0x3f8, vec![0xb0]),
        Access::Out(0x3f8, vec![0x41]),
        Access::Out(0x3f8, vec![0xba]),
        Access::In(0x3f8, 2),
        Access::In(0x3f8, 2),
        Access::Out(0xf4, vec![0]),
    ];
    assert_eq!(guest.io.log(), expected);
    assert_eq!(guest.read(DATA) as u32, 0x0403_0201);
    assert_eq!(guest.read(DATA + 0x10) as u32, 0x0807_0605);
}

guest!(
    mmio,
    ".code64",
    "mov rbx, 0xd0000000",
    "mov rax, 0x1122334455667788",
    "mov [rbx], rax",
    "mov [rbx + 8], al",
    "mov ecx, [rbx + 0x10]",
    "mov [0xa000], rcx",
    "mov rdx, [rbx + 0x18]",
    "mov [0xa008], rdx",
    "out 0xf4, al",
);

#[test]
fn a_long_mode_guest_reaches_devices_beyond_its_memory() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::long_mode(&kvm, mmio());
    guest.io.input.lock().unwrap().extend(1..=12);
    guest.run_to_end();
    let expected = [
        Access::Store(0xd000_0000, 0x1122_3344_5566_7788u64.to_le_bytes().to_vec()),
        Access::Store(0xd000_0008, vec![0x88]),
        Access::Load(0xd000_0010, 4),
        Access::Load(0xd000_0018, 8),
        Access::Out(0xf4, vec![0x88]),
    ];
    assert_eq!(guest.io.log(), expected);
    assert_eq!(guest.read(DATA), 0x0403_0201);
    assert_eq!(guest.read(DATA + 8), 0x0c0b_0a09_0807_0605);
}

#[test]
fn a_doorbell_signals_its_event_and_is_no_exit() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::long_mode(&kvm, mmio());
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let doorbell = guest.vm.doorbell(0xd000_0008, event.try_clone().unwrap()).expect("a doorbell");
    guest.run_to_end();
    assert_eq!(event.read().unwrap(), 1);
    assert!(!guest.io.log().contains(&Access::Store(0xd000_0008, vec![0x88])));
    drop(doorbell);
    let mut again = guest.state();
    again.rip = CODE;
    guest.set(again);
    guest.run_to_end();
    assert!(event.read().is_err());
    assert!(guest.io.log().contains(&Access::Store(0xd000_0008, vec![0x88])));
}

guest!(
    registers,
    ".code64",
    "mov rbx, 0xd0000000",
    "mov dword ptr [rbx], 7",
    "mov eax, [rbx + 0x10]",
    "mov eax, 0x80000000",
    "mov dx, 0xcf8",
    "out dx, eax",
    "mov dword ptr [rbx], 8",
    "out 0xf4, al",
);

#[test]
fn deferred_writes_come_before_the_next_access_and_in_order() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::long_mode(&kvm, registers());
    guest.vm.defer_writes(Register::Memory(0xd000_0000), 4);
    guest.vm.defer_writes(Register::Port(0xcf8), 4);
    guest.run_to_end();
    let expected = [
        Access::Store(0xd000_0000, vec![7, 0, 0, 0]),
        Access::Load(0xd000_0010, 4),
        Access::Out(0xcf8, vec![0, 0, 0, 0x80]),
        Access::Store(0xd000_0000, vec![8, 0, 0, 0]),
        Access::Out(0xf4, vec![0]),
    ];
    assert_eq!(guest.io.log(), expected);
}

guest!(select, ".code64", "mov rbx, 0xd0000000", "mov dword ptr [rbx], 7", "2: pause", "jmp 2b");

#[test]
fn deferred_writes_come_before_a_stop() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::long_mode(&kvm, select());
    guest.vm.defer_writes(Register::Memory(0xd000_0000), 4);
    guest.stop_after(Duration::from_millis(100));
    assert_eq!(guest.io.log(), [Access::Store(0xd000_0000, vec![7, 0, 0, 0])]);
}

// Enables the local APIC and waits for an interrupt; the handler, 0x80 further on, ends it.
guest!(
    wait_for_interrupt,
    ".code64",
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov al, 1",
    "out 0x80, al", // ready
    "sti",
    "2: hlt",
    "jmp 2b",
    ".balign 0x80",
    "mov al, 0x55",
    "out 0x81, al",
    "mov dword ptr [rbx + 0xb0], 0",
    "mov al, 2",
    "out 0xf4, al",
    "iretq",
);
const HANDLER: u64 = CODE + 0x80;

/// A guest in long mode whose handler of this vector is at [`HANDLER`].
fn handling(vector: u8, code: &[u8]) -> Option<(KvmEngine, Guest)> {
    let kvm = kvm()?;
    let guest = Guest::long_mode(&kvm, code);
    guest.handle(vector, HANDLER);
    Some((kvm, guest))
}

/// Sends at each write of 1 to port 0x80.
fn send_when_asked(guest: &Guest, msi: Msi) {
    let vm = guest.vm.clone();
    *guest.io.hook.lock().unwrap() = Some(Box::new(move |access| {
        if *access == Access::Out(0x80, vec![1]) {
            vm.send_msi(msi);
        }
    }));
}

/// Runs to the write of 1 to port 0x80, and sends then.
fn interrupted(msi: Msi) -> Option<Guest> {
    let (_, mut guest) = handling((msi.data & 0xff) as u8, wait_for_interrupt())?;
    send_when_asked(&guest, msi);
    guest.run_to_end();
    // Completes the write that ended it, and what follows.
    Some(guest)
}

guest!(
    count_interrupts,
    ".code64",
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "sti",
    "2: mov al, 1",
    "out 0x80, al", // one more, please
    "jmp 2b",
    ".balign 0x80",
    "mov dword ptr [rbx + 0xb0], 0",
    "inc dword ptr [0xa000]",
    "cmp dword ptr [0xa000], 100",
    "jne 3f",
    "out 0xf4, al",
    "3: iretq",
);

#[test]
fn a_message_that_comes_often_arrives_each_time() {
    let Some((_, mut guest)) = handling(0x41, count_interrupts()) else { return };
    send_when_asked(&guest, Msi { address: 0xfee0_0000, data: 0x41 });
    guest.run_to_end();
    // One for each that was asked for, by ioctl at first and by an event later.
    assert_eq!(guest.read(DATA) as u32, 100);
    assert_eq!(guest.io.written(0x80).len(), 100);
}

#[test]
fn a_message_interrupts_a_guest() {
    let Some(guest) = interrupted(Msi { address: 0xfee0_0000, data: 0x41 }) else { return };
    assert_eq!(guest.io.written(0x81), [0x55]);
    assert!(!guest.io.log().iter().any(|a| matches!(a, Access::EndOfInterrupt(_))), "edges end silently");
}

#[test]
fn the_end_of_a_level_triggered_interrupt_is_told() {
    let Some(guest) = interrupted(Msi { address: 0xfee0_0000, data: 0xc042 }) else { return };
    let log = guest.io.log();
    let at = |wanted: &Access| log.iter().position(|a| a == wanted).expect("it must be in the log");
    assert!(at(&Access::Out(0x81, vec![0x55])) < at(&Access::EndOfInterrupt(0x42)), "{log:?}");
    assert!(at(&Access::EndOfInterrupt(0x42)) < at(&Access::Out(0xf4, vec![2])), "{log:?}");
}

#[test]
fn a_level_triggered_interrupt_in_service_survives_a_move() {
    // The emulated local APIC does not show what is in service.
    let Some(kvm) = kvm().filter(|_| hardware()) else { return };
    let mut guest = Guest::long_mode(&kvm, wait_for_interrupt());
    guest.handle(0x43, HANDLER);
    let (vm, stop) = (guest.vm.clone(), guest.cpus[0].stop_handle());
    *guest.io.hook.lock().unwrap() = Some(Box::new(move |access| match access {
        Access::Out(0x80, _) => vm.send_msi(Msi { address: 0xfee0_0000, data: 0xc043 }),
        Access::Out(0x81, _) => stop.stop(),
        _ => {}
    }));
    assert_eq!(guest.cpus[0].run(&*guest.io).unwrap(), Exit::Stopped);
    assert_eq!(guest.io.written(0x81), [0x55], "it stops in the handler");
    let mut there = guest.move_to(&kvm);
    there.run_to_end();
    assert!(there.io.log().contains(&Access::EndOfInterrupt(0x43)), "{:?}", there.io.log());
}

guest!(spin, ".code64", "mov al, 1", "out 0x80, al", "2: jmp 2b", ".balign 0x80", "out 0xf4, al");

#[test]
fn an_nmi_comes_through_though_interrupts_are_off() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::long_mode(&kvm, spin());
    guest.handle(2, HANDLER);
    let vm = guest.vm.clone();
    *guest.io.hook.lock().unwrap() = Some(Box::new(move |access| {
        if *access == Access::Out(0x80, vec![1]) {
            vm.send_nmi(0);
        }
    }));
    guest.run_to_end();
    assert!(guest.state().nmi_blocked);
}

// Real mode, with the PIC's vectors at 0x20. The first STI comes late.
guest!(
    pic,
    ".code16",
    "mov word ptr [0x80], 0x1080", // vector 0x20
    "mov word ptr [0x82], 0",
    "mov word ptr [0x84], 0x10c0", // vector 0x21
    "mov word ptr [0x86], 0",
    "mov al, 1",
    "out 0x80, al",
    "nop",
    "nop",
    "sti",
    "2: hlt",
    "jmp 2b",
    ".balign 0x80",
    "mov al, 0x20",
    "out 0x81, al",
    "iret",
    ".balign 0x40",
    "mov al, 0x21",
    "out 0x81, al",
    "out 0xf4, al",
    "iret",
);

#[test]
fn the_pics_interrupts_come_through_when_the_guest_is_ready() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::real_mode(&kvm, pic());
    let (vm, io) = (guest.vm.clone(), Arc::downgrade(&guest.io));
    *guest.io.hook.lock().unwrap() = Some(Box::new(move |access| {
        if *access == Access::Out(0x80, vec![1]) {
            io.upgrade().unwrap().pic.lock().unwrap().extend([0x20, 0x21]);
            vm.set_extint(true);
        }
    }));
    guest.run_to_end();
    assert_eq!(guest.io.written(0x81), [0x20, 0x21]);
}

#[test]
fn the_pic_wakes_a_halted_guest_from_another_thread() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::real_mode(&kvm, pic());
    let (vm, io) = (guest.vm.clone(), guest.io.clone());
    let device = thread::spawn(move || {
        for vector in [0x20, 0x21] {
            thread::sleep(Duration::from_millis(100));
            io.pic.lock().unwrap().push_back(vector);
            vm.set_extint(true);
        }
    });
    guest.run_to_end();
    device.join().unwrap();
    assert_eq!(guest.io.written(0x81), [0x20, 0x21]);
}

#[test]
fn a_halted_guest_is_stopped_moved_and_woken_there() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::real_mode(&kvm, pic());
    guest.stop_after(Duration::from_millis(200));
    assert_eq!(guest.state().activity, Activity::Halted);
    let mut there = guest.move_to(&kvm);
    assert_eq!(there.state().activity, Activity::Halted);
    there.io.pic.lock().unwrap().extend([0x20, 0x21]);
    there.vm.set_extint(true);
    there.run_to_end();
    assert_eq!(there.io.written(0x81), [0x20, 0x21]);
}

guest!(
    timer,
    ".code64",
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x320], 0x41", // one-shot
    "mov dword ptr [rbx + 0x3e0], 0xb",  // divide by 1
    "mov dword ptr [rbx + 0x380], 300000000",
    "sti",
    "2: hlt",
    "jmp 2b",
    ".balign 0x80",
    "out 0xf4, al",
);

#[test]
fn a_timer_that_runs_goes_on_after_a_move() {
    let Some((kvm, mut guest)) = handling(0x41, timer()) else { return };
    let started = Instant::now();
    guest.stop_after(Duration::from_millis(100));
    let left = guest.state().lapic.timer_left_ns.expect("the timer runs");
    assert!((50_000_000..250_000_000).contains(&left), "{left} ns are left of 300 ms");
    let mut there = guest.move_to(&kvm);
    there.run_to_end();
    assert!(started.elapsed() >= Duration::from_millis(280), "too early: {:?}", started.elapsed());
    assert!(started.elapsed() < Duration::from_secs(3), "too late: {:?}", started.elapsed());
}

#[test]
fn a_timer_that_expires_while_its_vcpu_is_parked_still_interrupts() {
    let Some((kvm, mut guest)) = handling(0x41, timer()) else { return };
    guest.stop_after(Duration::from_millis(100));
    thread::sleep(Duration::from_millis(400));
    assert_eq!(guest.state().lapic.timer_left_ns, Some(1), "300 ms are over");
    let mut there = guest.move_to(&kvm);
    there.run_to_end();
    guest.run_to_end();
    assert_eq!(guest.state().lapic.timer_left_ns, None, "it has interrupted");
}

/// A state with PAE paging whose page-directory pointers are `pdptes`, in memory too.
fn pae(guest: &Guest, pdptes: [u64; 4]) -> engine::x86::CpuState {
    guest.write(0x6000, &pdptes);
    let mut state = guest.state();
    let flat = |access| Segment { selector: 8, base: 0, limit: 0xffff_ffff, access, unusable: false };
    state.segments = [flat(0xc093); 6];
    state.segments[1] = flat(0xc09b);
    (state.cr0, state.cr3, state.cr4) = (cr0::PE | cr0::ET | cr0::NE | cr0::PG, 0x6000, cr4::PAE);
    (state.rip, state.pdptes) = (CODE, None);
    state
}

#[test]
fn page_directory_pointers_travel_as_they_were_loaded() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, 1, &[]);
    let loaded = [0x9001, 0, 0, 0xb001];
    let mut state = pae(&guest, loaded);
    guest.set(state.clone());
    let Some(found) = guest.state().pdptes else {
        return skipped("this KVM does not tell page-directory pointers (Linux 5.14 and newer do)");
    };
    assert_eq!(found, loaded);
    guest.write(0x6000, &[0xc001, 0, 0, 0]);
    state.pdptes = Some(loaded);
    guest.set(state.clone());
    assert_eq!(guest.state().pdptes, Some(loaded), "not those in memory");
    state.pdptes = None;
    guest.set(state);
    assert_eq!(guest.state().pdptes, Some([0xc001, 0, 0, 0]));
}

guest!(fault, ".code64", "lidt [0xa100]", "ud2");

#[test]
fn a_triple_fault_is_a_shutdown_and_a_reset_starts_afresh() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::long_mode(&kvm, fault());
    assert_eq!(guest.cpus[0].run(&*guest.io).unwrap(), Exit::Shutdown);
    guest.cpus[0].reset().unwrap();
    let state = guest.state();
    assert_eq!((state.rip, state.segments[1].base, state.cr0 & 1), (0xfff0, 0xffff_0000, 0));
    assert_eq!(state.gpr[4], 0);
}

guest!(busy, ".code64", "2: inc rax", "jmp 2b");

#[test]
fn a_busy_guest_stops_when_it_is_told_and_goes_on() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::long_mode(&kvm, busy());
    guest.cpus[0].stop_handle().stop();
    assert_eq!(guest.cpus[0].run(&*guest.io).unwrap(), Exit::Stopped, "a stop that comes first counts");
    assert_eq!(guest.state().gpr[0], 0);
    let mut before = 0;
    for _ in 0..3 {
        guest.stop_after(Duration::from_millis(50));
        let after = guest.state().gpr[0];
        assert!(after > before, "{after} after {before}");
        before = after;
    }
}

guest!(
    rich,
    ".code64",
    "mov ecx, 0xc0000082", // LSTAR
    "mov eax, 0x1234",
    "xor edx, edx",
    "wrmsr",
    "mov rax, 0xa000",
    "mov dr0, rax",
    "mov r15, 77",
    "out 0xf4, al",
);

#[test]
fn saved_and_restored_is_the_same_state() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::long_mode(&kvm, rich());
    let mut state = guest.state();
    state.xsave[160 + 48..][..8].copy_from_slice(&0x0123_4567_89ab_cdefu64.to_le_bytes()); // XMM3
    state.xsave[32..42].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]); // ST0 = 1.0
    state.xsave[512] = 3;
    guest.set(state);
    guest.run_to_end();
    let mut before = guest.state();
    assert_eq!(before.xsave[160 + 48..][..8], 0x0123_4567_89ab_cdefu64.to_le_bytes());
    assert_eq!((before.gpr[15], before.dr[0]), (77, 0xa000));
    assert!(before.msrs.contains(&(0xc000_0082, 0x1234)));
    let there = guest.move_to(&kvm);
    let mut after = there.state();
    assert!(after.tsc.wrapping_sub(before.tsc) < 60_000_000_000, "{} after {}", after.tsc, before.tsc);
    assert!(
        after.kvm_clock_ns >= before.kvm_clock_ns
            && after.kvm_clock_ns < before.kvm_clock_ns + 60_000_000_000
    );
    (before.tsc, after.tsc) = (0, 0);
    (before.kvm_clock_ns, after.kvm_clock_ns) = (0, 0);
    assert_eq!(before, after);
}

/// What a measurement may be off, and what a CPU that scales its counter takes on.
#[test]
fn the_counters_frequency_is_kept_where_the_host_can() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, 1, &[]);
    let state = guest.state();
    let here = state.tsc_khz;
    assert!(here > 100_000, "{here} kHz");
    let scales = Kvm::new().unwrap().check_extension(Cap::TscControl);
    let (near, far) = (here + here / 10_000, here / 2);
    for (khz, after) in [(near, near), (far, if scales { far } else { near })] {
        guest.set(CpuState { tsc_khz: khz, ..state.clone() });
        assert_eq!(
            guest.state().tsc_khz,
            after,
            "{khz} kHz on a host with {here} kHz, which scales: {scales}"
        );
    }
}

#[test]
fn broken_states_are_refused() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, 1, &[]);
    let good = guest.state();
    let mut try_on = |change: &dyn Fn(&mut engine::x86::CpuState)| {
        let mut state = good.clone();
        change(&mut state);
        guest.cpus[0].restore(&engine::CpuState::X86(Box::new(state))).unwrap_err().to_string()
    };
    assert!(try_on(&|s| s.xsave.truncate(10)).contains("2696 bytes"));
    assert!(try_on(&|s| s.lapic.regs.truncate(10)).contains("64 registers"));
    assert!(try_on(&|s| s.xcr0 = 0).contains("XCR0"));
    assert!(try_on(&|s| s.xsave[519] = 0x40).contains("XSTATE_BV"));
    assert!(try_on(&|s| s.msrs = vec![(0xdead_0000, 1)]).contains("0xdead0000"));
}

guest!(
    writer,
    ".code64",
    "mov byte ptr [0xa000], 1",
    "out 0x80, al",
    "mov byte ptr [0x1ff000], 2",
    "mov byte ptr [0xc000], 3",
    "out 0xf4, al",
);

#[test]
fn the_log_has_the_pages_that_the_guest_wrote() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::long_mode(&kvm, writer());
    guest.vm.collect_writes().unwrap();
    assert_eq!(
        guest.ram.take_dirty().len() as u64,
        SIZE / 4096,
        "without a log every page may have been written"
    );
    guest.vm.log_writes(true).unwrap();
    let (vm, ram) = (guest.vm.clone(), guest.ram.clone());
    *guest.io.hook.lock().unwrap() = Some(Box::new(move |access| {
        if matches!(access, Access::Out(0x80, _)) {
            vm.collect_writes().unwrap();
            assert!(ram.take_dirty().contains(&0xa000));
        }
    }));
    guest.run_to_end();
    guest.vm.collect_writes().unwrap();
    let dirty = guest.ram.take_dirty();
    assert!(dirty.contains(&0x1f_f000) && dirty.contains(&0xc000), "{dirty:x?}");
    assert!(!dirty.contains(&0xd000), "{dirty:x?}");
}

// INIT and start-up IPI to APIC 1; the other starts in real mode at 0x2000.
guest!(
    start_other,
    ".code64",
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x310], 0x01000000",
    "mov dword ptr [rbx + 0x300], 0x4500",
    "mov dword ptr [rbx + 0x310], 0x01000000",
    "mov dword ptr [rbx + 0x300], 0x4602",
    "2: pause",
    "cmp byte ptr [0xa000], 0x77",
    "jne 2b",
    "out 0xf4, al",
);
guest!(other, ".code16", "mov byte ptr ds:[0xa000], 0x77", "2: hlt", "jmp 2b");

#[test]
fn one_vcpu_starts_another() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, 2, start_other());
    guest.enter_long_mode();
    mem::Bytes::write_slice(&*guest.ram, other(), mem::GuestAddress(0x2000)).unwrap();
    let mut second: Box<dyn Vcpu> = guest.cpus.pop().unwrap();
    let (io, stop) = (guest.io.clone(), second.stop_handle());
    let thread = thread::spawn(move || (second.run(&*io).unwrap(), second));
    guest.run_to_end();
    stop.stop();
    let (exit, second) = thread.join().unwrap();
    assert_eq!(exit, Exit::Stopped);
    let engine::CpuState::X86(state) = second.save().unwrap() else { panic!() };
    assert_eq!(state.segments[1].base, 0x2000);
}

#[test]
fn a_vcpu_that_is_started_while_it_is_parked_is_saved_at_its_start() {
    let Some(kvm) = kvm() else { return };
    // The other one does not run, and the first does not wait for it.
    let mut guest = Guest::new(&kvm, 2, start_other());
    guest.enter_long_mode();
    guest.write(DATA, &[0x77]);
    guest.run_to_end();
    let engine::CpuState::X86(state) = guest.cpus[1].save().unwrap() else { panic!() };
    assert_eq!((state.activity, state.segments[1].base, state.rip), (Activity::Running, 0x2000, 0));
}
