//! The same guests on both engines: same registers, same memory, same accesses to the outside. And a
//! guest that moves between them in mid-run comes to the same result.

#![allow(unsafe_code)] // guest code is assembled into this program

mod common;
#[path = "agree/programs.rs"]
mod programs;

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use common::{Access, CODE, DATA, GDT, Guest, hardware, kvm, skipped};
use engine::x86::bits::{cr4, msr, rflags};
use engine::x86::{CpuModel, CpuState, Segment};
use engine::{Engine, Exit, Msi};
use engine_kvm::KvmEngine;
use engine_soft::SoftEngine;
use programs::*;

/// What no two runs, or no two engines, have alike.
fn comparable(mut state: CpuState) -> CpuState {
    (state.tsc, state.tsc_khz, state.kvm_clock_ns) = (0, 0, 0);
    // The version register counts LVT entries, which differ.
    state.lapic.regs[3] &= 0xff;
    // The rest of an engine's registers are its own business.
    let kept = [msr::EFER, msr::STAR, msr::LSTAR, msr::FMASK, msr::KERNEL_GS_BASE, msr::IA32_PAT];
    state.msrs.retain(|(index, _)| kept.contains(index));
    // A segment without a descriptor has no other contents; a busy TSS and accessed bits count.
    for segment in state.segments.iter_mut().chain([&mut state.ldtr]) {
        if segment.unusable || segment.access & 0x80 == 0 {
            *segment = Segment {
                selector: segment.selector,
                base: segment.base,
                unusable: true,
                ..Segment::default()
            };
        }
    }
    state.xsave = legacy(&state);
    state
}

/// x87, SSE and AVX registers by value: which components are marked "initial" is the CPU's choice, and so
/// are the x87's last instruction and operand.
fn legacy(state: &CpuState) -> Vec<u8> {
    let mut area = state.xsave.clone();
    area[4..24].fill(0);
    area[28..32].fill(0); // MXCSR_MASK
    area[416..576].fill(0);
    area.truncate(832);
    area
}

/// Whether QEMU's translator is the hardware here.
fn translated() -> bool {
    std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default().contains("TCG")
}

fn memory(guest: &Guest) -> Vec<u8> {
    let mut memory = guest.memory();
    // Accessed and dirty bits may be set ahead of time (SDM 3A, 4.8).
    for entry in memory[0x1_0000..0x1_6000].chunks_exact_mut(8) {
        entry[0] &= !0x60;
    }
    if translated() {
        // The translator does not push RF for faults (SDM 3B, 18.3.1.1).
        memory[0x8000..0x9000].fill(0);
    }
    memory
}

/// Runs both to their ends and compares everything.
fn compare(name: &str, mut hard: Guest) {
    let mut soft = hard.move_to(&SoftEngine::new().unwrap());
    assert_eq!(comparable(soft.state()), comparable(hard.state()), "{name}: before");
    hard.run_to_end();
    soft.run_to_end();
    assert_eq!(soft.io.log(), hard.io.log(), "{name}: accesses, soft on the left");
    let (soft_state, hard_state) = (comparable(soft.state()), comparable(hard.state()));
    assert_eq!(soft_state, hard_state, "{name}: state, soft on the left");
    let (soft_memory, hard_memory) = (memory(&soft), memory(&hard));
    let differs = soft_memory.iter().zip(&hard_memory).position(|(s, h)| s != h);
    if let Some(at) = differs {
        let line = |memory: &[u8]| format!("{:02x?}", &memory[at & !15..(at & !15) + 16]);
        panic!("{name}: memory at {at:#x}: soft {}, kvm {}", line(&soft_memory), line(&hard_memory));
    }
}

#[test]
fn integer_instructions() {
    let Some(kvm) = kvm() else { return };
    compare("integers", Guest::long_mode(&kvm, integers()));
}

#[test]
fn real_mode_segments_and_interrupts() {
    let Some(kvm) = kvm() else { return };
    compare("real mode", Guest::real_mode(&kvm, real_mode()));
}

#[test]
fn decimal_instructions() {
    // The emulated CPU knows none of them.
    let Some(kvm) = kvm().filter(|_| hardware()) else { return };
    compare("decimals", Guest::real_mode(&kvm, decimals()));
}

#[test]
fn faults_and_traps() {
    // The emulated CPU knows no software interrupts in long mode.
    let Some(kvm) = kvm().filter(|_| hardware()) else { return };
    let guest = Guest::long_mode(&kvm, faults());
    for vector in [0, 6] {
        guest.handle(vector, CODE + 0x100);
    }
    for vector in [11, 13, 14] {
        guest.handle(vector, CODE + 0x140);
    }
    guest.handle(3, CODE + 0x180);
    compare("faults", guest);
}

#[test]
fn rings_and_the_ways_between_them() {
    // The emulated CPU keeps ring 3's segments in its own way.
    let Some(kvm) = kvm().filter(|_| hardware()) else { return };
    let mut guest = Guest::long_mode(&kvm, rings());
    let tss = guest.read(GDT + 24);
    // Null, code, data, then for SYSRET: (32-bit code), data, 64-bit code; TSS.
    let (code, data) = (0x00af_fb00_0000_ffff, 0x00cf_f300_0000_ffff);
    guest.write(GDT + 24, &[0, data, code, tss, 0]);
    guest.handle(13, CODE + 0x240);
    guest.handle(0x30, CODE + 0x200);
    guest.write(common::IDT + 0x300, &[guest.read(common::IDT + 0x300) | 3 << 45]);
    guest.write(0x1_8004, &[0x8c00]); // RSP0
    let mut state = guest.state();
    state.gdtr.limit = 8 * 8 - 1;
    state.tr.selector = 48;
    guest.set(state);
    compare("rings", guest);
}

#[test]
fn ports_and_mmio() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::long_mode(&kvm, devices());
    guest.io.input.lock().unwrap().extend(1..=200);
    compare("devices", guest);
}

#[test]
fn the_local_apic() {
    // The emulated one does not show what is in service.
    let Some(kvm) = kvm().filter(|_| hardware()) else { return };
    let guest = Guest::long_mode(&kvm, apic());
    guest.handle(0x50, CODE + 0x100);
    guest.handle(0x70, CODE + 0x140);
    compare("local APIC", guest);
}

#[test]
fn vector_instructions() {
    // The emulated CPU knows none of them in ring 0.
    let Some(kvm) = kvm().filter(|_| hardware()) else { return };
    let mut guest = Guest::long_mode(&kvm, vectors());
    let mut state = guest.state();
    (state.cr4, state.xcr0) = (state.cr4 | cr4::OSXSAVE, 7);
    guest.set(state);
    compare("vectors", guest);
}

#[test]
fn a_guest_that_moves_between_engines_comes_to_the_same_result() {
    let Some(kvm) = kvm() else { return };
    moves_and_computes(&kvm, CpuModel::Host);
}

#[test]
fn a_guest_of_a_cpu_model_moves_between_engines_too() {
    let Some(kvm) = kvm() else { return };
    for model in models(&kvm) {
        moves_and_computes(&kvm, model);
    }
}

fn moves_and_computes(kvm: &KvmEngine, model: CpuModel) {
    let soft = SoftEngine::new().unwrap();
    let mut straight = Guest::long_mode_of(kvm, model, long_computation());
    straight.run_to_end();
    let mut guest = Guest::long_mode_of(kvm, model, long_computation());
    let mut told = Vec::new();
    let moves = AtomicU32::new(0);
    loop {
        // After each eighth round; and the longer it takes, the later, so that it ends anywhere at all.
        let rounds = AtomicU32::new(0);
        let at_round = guest.cpus[0].stop_handle();
        *guest.io.hook.lock().unwrap() = Some(Box::new(move |access| {
            if matches!(access, Access::Out(0x80, _)) && rounds.fetch_add(1, Ordering::Relaxed) == 7 {
                at_round.stop();
            }
        }));
        let patience = Duration::from_millis(20) * (1 + moves.load(Ordering::Relaxed));
        guest.stop_after(patience);
        told.extend(guest.io.written(0x80));
        if guest.io.ended.load(Ordering::SeqCst) {
            break;
        }
        let there: &dyn Engine =
            if moves.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) { &soft } else { kvm };
        guest = guest.move_to(there);
    }
    assert!(moves.into_inner() >= 2, "it ended before it was moved to and fro");
    assert_eq!(told, straight.io.written(0x80));
    assert!(memory(&guest) == memory(&straight), "memory differs");
    assert_eq!(guest.state().gpr, straight.state().gpr);
}

#[test]
fn a_halted_guest_moves_with_an_interrupt_that_it_has_not_taken() {
    let Some(kvm) = kvm() else { return };
    let soft = SoftEngine::new().unwrap();
    let mut guest = Guest::long_mode(&kvm, waits());
    guest.handle(0x41, CODE + 0x80);
    for there in [&soft as &dyn Engine, &kvm, &soft] {
        guest.stop_after(Duration::from_millis(50));
        // Into the local APIC of a vCPU that stands still.
        guest.vm.send_msi(Msi { address: 0xfee0_0000, data: 0x41 });
        guest = guest.move_to(there);
    }
    guest.run_to_end();
    assert_eq!(guest.read(DATA), 3);
}

#[test]
fn a_running_timer_moves() {
    let Some(kvm) = kvm() else { return };
    let soft = SoftEngine::new().unwrap();
    let mut guest = Guest::long_mode(&kvm, waits());
    guest.handle(0x41, CODE + 0x80);
    let mut state = guest.state();
    state.rflags |= rflags::IF;
    guest.set(state);
    // Set up as the guest would: enabled, periodic, each 100 ms.
    let stop = guest.cpus[0].stop_handle();
    stop.stop();
    assert_eq!(guest.cpus[0].run(&*guest.io).unwrap(), Exit::Stopped);
    let mut state = guest.state();
    (state.lapic.regs[0x0f], state.lapic.regs[0x32]) = (0x1ff, 0x2_0041);
    (state.lapic.regs[0x3e], state.lapic.regs[0x38]) = (0xb, 100_000_000);
    state.lapic.timer_left_ns = Some(30_000_000);
    guest.set(state);
    let mut there = guest.move_to(&soft);
    let started = std::time::Instant::now();
    there.run_to_end();
    let took = started.elapsed().as_millis();
    assert!((200..2000).contains(&took), "30 ms and twice 100 ms took {took} ms");
    assert_eq!(there.read(DATA), 3);
}

/// The models that both engines offer here; those that QEMU's translator can be without are said so.
fn models(kvm: &KvmEngine) -> Vec<CpuModel> {
    let offered = |model: &CpuModel| match kvm.supports(*model) {
        Ok(()) => true,
        Err(error) => {
            skipped(&error.to_string());
            false
        }
    };
    let models: Vec<_> = [CpuModel::V2, CpuModel::V3].into_iter().filter(offered).collect();
    assert!(!models.is_empty() || !hardware(), "even the least model is missing");
    models
}

/// What a guest of the model reads in each of `leaves`.
fn identity(engine: &dyn Engine, model: CpuModel, leaves: &[(u32, u32)]) -> Vec<u64> {
    let mut guest = Guest::long_mode_of(engine, model, identifies());
    let words: Vec<u64> =
        leaves.iter().map(|(leaf, index)| u64::from(*leaf) | u64::from(*index) << 32).collect();
    guest.write(DATA, &words);
    let mut state = guest.state();
    state.gpr[5] = leaves.len() as u64;
    guest.set(state);
    guest.run_to_end();
    (0..leaves.len() as u64 * 2).map(|n| guest.read(0xb000 + n * 8)).collect()
}

#[test]
fn both_engines_say_the_same_of_a_model() {
    let Some(kvm) = kvm() else { return };
    let soft = SoftEngine::new().unwrap();
    let basic = (0..0x10).flat_map(|leaf| (0..4).map(move |index| (leaf, index)));
    let hypervisor = [(0x4000_0000, 0), (0x4000_0001, 0)];
    let extended = (0x8000_0000..=0x8000_0008).map(|leaf| (leaf, 0));
    let leaves: Vec<_> = basic.chain(hypervisor).chain(extended).collect();
    for model in models(&kvm) {
        let (hard, soft) = (identity(&kvm, model, &leaves), identity(&soft, model, &leaves));
        for ((leaf, hard), soft) in leaves.iter().zip(hard.chunks(2)).zip(soft.chunks(2)) {
            assert_eq!(hard, soft, "{model}, leaf {leaf:x?}: {hard:x?} on KVM, {soft:x?} in software");
        }
    }
}

#[test]
fn a_models_state_has_the_same_registers_on_both_engines() {
    let Some(kvm) = kvm() else { return };
    for model in models(&kvm) {
        let of = |engine: &dyn Engine| {
            let state = Guest::of_model(engine, 1, model, &[]).state();
            let indices: Vec<u32> = state.msrs.iter().map(|(index, _)| *index).collect();
            (indices, state.xcr0, state.gpr[2])
        };
        assert_eq!(of(&kvm), of(&SoftEngine::new().unwrap()), "{model}");
    }
}
