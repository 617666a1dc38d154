//! The same guests on both engines: same registers, same memory, same accesses to the outside. And a
//! guest that moves between them in mid-run comes to the same result.

#![allow(unsafe_code)] // guest code is assembled into this program

mod common;

use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use common::{Access, CODE, DATA, GDT, Guest, hardware, kvm, skipped};
use engine::x86::bits::{cr4, msr, rflags};
use engine::x86::{CpuModel, CpuState, Segment};
use engine::{Engine, Exit, Msi};
use engine_kvm::KvmEngine;
use engine_soft::SoftEngine;

guest!(
    integers,
    ".code64",
    "mov rdi, 0xa000",
    "mov rax, 0x0123456789abcdef",
    "mov rbx, 0xfedcba9876543210",
    "mov rcx, rax",
    "add rcx, rbx",
    "pushfq",
    "adc ecx, -1",
    "pushfq",
    "sbb cx, 0x7fff",
    "pushfq",
    "cmp cl, bl",
    "setg dl",
    "setb dh",
    "rol rax, 13",
    "rcr ebx, 1",
    "bswap r8",
    "imul r9, rax, 0x1003",
    "mul rbx",
    "mov [rdi], rax",
    "mov [rdi + 8], rdx",
    "mov ecx, 0x10001",
    "xor edx, edx",
    "mov eax, 0x89abcdef",
    "div ecx",
    "mov [rdi + 16], rax",
    "mov [rdi + 24], rdx",
    "mov rax, -1000000007",
    "cqo",
    "mov ecx, 12345",
    "idiv rcx",
    "mov [rdi + 32], rax",
    "mov [rdi + 40], rdx",
    "mov r10, 0x00f0000000000000",
    "bsf r11, r10",
    "bsr r12, r10",
    "bts qword ptr [rdi + 48], 70",
    "lock xadd [rdi], r10",
    "mov rax, [rdi + 8]",
    "lock cmpxchg [rdi + 8], rdi",
    "pushfq",
    "movsx r13, byte ptr [rdi + 3]",
    "movzx r14d, word ptr [rdi + 5]",
    "shld r13, rax, 7",
    "shrd r14w, ax, 3",
    "sar r15, 5",
    "lea rsi, [rdi + r11 * 2 - 0x60]",
    "mov rcx, 10",
    "lea rdi, [rdi + 0x100]",
    "cld",
    "rep movsb",
    "std",
    "mov al, 0x77",
    "mov ecx, 5",
    "rep stosw",
    "cld",
    "mov rdi, 0xa100",
    "mov ecx, 100",
    "mov al, 0x77",
    "repne scasb",
    "xor eax, eax",
    "test eax, eax",
    "out 0xf4, al",
);

guest!(
    real_mode,
    ".code16",
    "mov ax, 0x900",
    "mov ss, ax",
    "mov sp, 0x800",
    "mov ax, 0xa00",
    "mov ds, ax",
    "mov es, ax",
    "mov word ptr [0], 0x1234",
    "push cs",
    "call 2f",
    "pushf",
    "pop word ptr [8]",
    "mov si, 0",
    "mov di, 0x20",
    "mov cx, 8",
    "rep movsw",
    "enter 16, 0",
    "mov [bp - 4], di",
    "leave",
    "mov eax, 0x12345678",
    "mov [0x40], eax",
    "xlatb",
    "xor ax, ax",
    "mov fs, ax",
    "mov word ptr fs:[0x84], 0x1100", // vector 0x21
    "mov word ptr fs:[0x86], 0",
    "int 0x21",
    "mov word ptr fs:[0], 0x1140", // divide error
    "mov word ptr fs:[2], 0",
    "xor bx, bx",
    "xor dx, dx",
    "div bx",
    "cmp ax, ax",
    "out 0xf4, al",
    "2: mov word ptr [10], 0x5678",
    "retf",
    ".balign 0x100",
    "mov word ptr [12], 0x2121",
    "iret",
    ".balign 0x40",
    "mov word ptr [14], 0xdede",
    "mov bx, 7",
    "iret",
);

guest!(
    decimals,
    ".code16",
    "mov di, 0xa000",
    "mov al, 0x38",
    "add al, 0x45",
    "daa",
    "mov [di + 2], al",
    "mov al, 0x79",
    "sub al, 0x88",
    "das",
    "mov [di + 3], al",
    "mov ax, 0x0a7",
    "aam",
    "mov [di + 4], ax",
    "aad",
    "mov [di + 6], ax",
    "mov ax, 0x0907",
    "aaa",
    "mov [di + 8], ax",
    "cmp ax, ax",
    "out 0xf4, al",
);

// Faults with and without error codes; each handler notes what it gets and goes on behind the fault.
guest!(
    faults,
    ".code64",
    "mov rdi, 0xa000",
    "lea r15, [rip + 1f]",
    "ud2",
    "1: lea r15, [rip + 2f]",
    "mov rax, 0x8000000000000000", // not canonical
    "mov rbx, [rax]",
    "2: lea r15, [rip + 3f]",
    "xor ecx, ecx",
    "xor edx, edx",
    "div rcx",
    "3: lea r15, [rip + 4f]",
    "mov rax, 0xc0000000",
    "invlpg [rax]",
    "mov qword ptr [0x11018], 0", // the fourth GiB is gone
    "mov rbx, cr3",
    "mov cr3, rbx",
    "mov [rax + 0x123], rcx",
    "4: lea r15, [rip + 5f]",
    "mov ax, 0x48", // beyond the GDT
    "mov fs, ax",
    "5: int3",
    "mov cr2, rcx",
    "xor eax, eax",
    "test eax, eax",
    "out 0xf4, al",
    ".balign 0x100",
    // 0x100: without an error code
    "mov rax, [rsp]",
    "mov [rdi], rax",
    "mov [rsp], r15",
    "mov rax, cr2",
    "mov [rdi + 8], rax",
    "add rdi, 16",
    "iretq",
    ".balign 0x40",
    // 0x140: with one
    "mov rax, [rsp + 8]",
    "mov [rdi], rax",
    "pop qword ptr [rdi + 8]",
    "mov rax, cr2",
    "mov [rdi + 16], rax",
    "mov [rsp], r15",
    "add rdi, 24",
    "iretq",
    ".balign 0x40",
    // 0x180: a trap
    "mov rax, [rsp]",
    "mov [rdi], rax",
    "iretq",
);

// Down to ring 3 and back by SYSCALL, INT and a fault; ring 3's pages are all user pages.
guest!(
    rings,
    ".code64",
    "mov ecx, 0xc0000081", // STAR
    "mov edx, 0x00180008",
    "xor eax, eax",
    "wrmsr",
    "inc ecx", // LSTAR
    "lea rax, [rip + 3f]",
    "xor edx, edx",
    "wrmsr",
    "mov ecx, 0xc0000084", // FMASK
    "mov eax, 0x400",
    "wrmsr",
    "mov rcx, 0x1100",
    "mov r11, 0x402",
    "sysretq",
    "3: mov [0xa010], rcx",
    "mov [0xa018], r11",
    "pushfq",
    "pop qword ptr [0xa020]",
    "mov rsp, 0x8f00",
    "swapgs",
    "sysretq",
    ".balign 0x100",
    "mov rsp, 0x8800",
    "mov [0xa000], cs",
    "mov [0xa002], ss",
    "syscall",
    "int 0x30",
    "hlt", // a fault
    "ud2",
    ".balign 0x100",
    // 0x200: INT 0x30
    "mov rax, [rsp + 24]",
    "mov [0xa028], rax",
    "mov [0xa030], rsp",
    "iretq",
    ".balign 0x40",
    // 0x240: #GP of the HLT
    "pop rax",
    "pop rbx",
    "mov [0xa038], rbx",
    "xor eax, eax",
    "test eax, eax",
    "out 0xf4, al",
);

guest!(
    devices,
    ".code64",
    "mov rbx, 0xd0000000",
    "mov dx, 0x1234",
    "in al, dx",
    "mov [0xa000], al",
    "in ax, dx",
    "mov [0xa002], ax",
    "in eax, dx",
    "mov [0xa004], rax",
    "mov rdi, 0xa010",
    "mov ecx, 3",
    "rep insd",
    "mov rsi, 0xa000",
    "mov ecx, 5",
    "rep outsb",
    "movzx eax, byte ptr [rbx + 1]",
    "movsx rcx, word ptr [rbx + 2]",
    "add [rbx + 8], ecx", // load and store
    "mov [rbx + 0x10], rcx",
    "or byte ptr [rbx + 0x20], 1",
    "xchg [rbx + 0x30], r10d",
    "mov rsi, rbx",
    "mov rdi, 0xa040",
    "mov ecx, 4",
    "rep movsd",
    "push qword ptr [rbx + 0x38]",
    "pop r12",
    "xor eax, eax",
    "test eax, eax",
    "out 0xf4, al",
);

// The local APIC: self-IPIs of two priorities, TPR, EOI.
guest!(
    apic,
    ".code64",
    "mov rbx, 0xfee00000",
    "mov rdi, 0xa000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov eax, 6",
    "mov cr8, rax",
    "sti",
    "mov dword ptr [rbx + 0x300], 0x40050", // self, vector 0x50: held back
    "mov dword ptr [rbx + 0x300], 0x40070", // 0x70: comes
    "mov eax, [rbx + 0x220]",               // IRR
    "mov [rdi], eax",
    "mov eax, [rbx + 0xa0]", // PPR
    "mov [rdi + 4], eax",
    "add rdi, 8",
    "xor eax, eax",
    "mov cr8, rax", // now 0x50
    "nop",
    "cli",
    "mov eax, [rbx + 0x20]",
    "mov ecx, [rbx + 0x30]",
    "and ecx, 0xff",
    "mov edx, [rbx + 0x350]",
    "mov r8d, [rbx + 0x360]",
    "xor r9d, r9d",
    "test r9, r9",
    "out 0xf4, al",
    ".balign 0x100",
    // 0x100: 0x50
    "mov dword ptr [rdi], 0x5050",
    "jmp 2f",
    ".balign 0x40",
    // 0x140: 0x70
    "mov dword ptr [rdi], 0x7070",
    "2: mov eax, [rbx + 0x120]", // ISR
    "mov [rdi + 4], eax",
    "mov eax, [rbx + 0x130]",
    "mov [rdi + 8], eax",
    "mov eax, [rbx + 0xa0]",
    "mov [rdi + 12], eax",
    "add rdi, 16",
    "mov dword ptr [rbx + 0xb0], 0",
    "iretq",
);

guest!(
    vectors,
    ".code64",
    "mov rax, 0x4009000000000000", // 3.125
    "movq xmm0, rax",
    "sqrtsd xmm1, xmm0",
    "mulpd xmm1, xmm0",
    "pshufd xmm2, xmm1, 0x1b",
    "paddq xmm2, xmm0",
    "movdqu [0xa000], xmm2",
    "fld qword ptr [0xa000]",
    "fld1",
    "fadd st(0), st(1)",
    "fstp tbyte ptr [0xa010]",
    "vbroadcastsd ymm5, xmm0",
    "vaddpd ymm6, ymm5, [0xa000]",
    "vmovupd [0xa040], ymm6",
    "vzeroupper",
    "xor eax, eax",
    "test eax, eax",
    "out 0xf4, al",
);

/// What no two runs, or no two engines, have alike.
fn comparable(mut state: CpuState) -> CpuState {
    (state.tsc, state.kvm_clock_ns) = (0, 0);
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

// Computes for a while; tells each round.
guest!(
    long_computation,
    ".code64",
    "mov r8d, 60",
    "mov rax, 0x243f6a8885a308d3",
    "2: mov ecx, 300",
    "3: mov rdx, rax",
    "shl rdx, 13",
    "xor rax, rdx",
    "mov rdx, rax",
    "shr rdx, 7",
    "xor rax, rdx",
    "mov rdx, rax",
    "shl rdx, 17",
    "xor rax, rdx",
    "mov rdx, rax",
    "and edx, 0xff8",
    "add [rdx + 0xa000], rax",
    "push rax",
    "add rax, [rsp]",
    "pop rdx",
    "dec ecx",
    "jnz 3b",
    "out 0x80, al",
    "dec r8d",
    "jnz 2b",
    "out 0xf4, al",
);

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
        let stop = guest.cpus[0].stop_handle();
        // After each eighth round; and the longer it takes, the later, so that it ends anywhere at all.
        let rounds = AtomicU32::new(0);
        let at_round = stop.clone();
        *guest.io.hook.lock().unwrap() = Some(Box::new(move |access| {
            if matches!(access, Access::Out(0x80, _)) && rounds.fetch_add(1, Ordering::Relaxed) == 7 {
                at_round.stop();
            }
        }));
        let patience = Duration::from_millis(20) * (1 + moves.load(Ordering::Relaxed));
        let stopper = thread::spawn(move || {
            thread::sleep(patience);
            stop.stop();
        });
        assert_eq!(guest.cpus[0].run(&*guest.io).unwrap(), Exit::Stopped);
        stopper.join().unwrap();
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

// Waits for interrupts; notes each, and ends with the third.
guest!(
    waits,
    ".code64",
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov al, 1",
    "out 0x80, al",
    "sti",
    "2: hlt",
    "jmp 2b",
    ".balign 0x80",
    "mov dword ptr [rbx + 0xb0], 0",
    "inc qword ptr [0xa000]",
    "cmp qword ptr [0xa000], 3",
    "jne 3f",
    "out 0xf4, al",
    "3: iretq",
);

#[test]
fn a_halted_guest_moves_with_an_interrupt_that_it_has_not_taken() {
    let Some(kvm) = kvm() else { return };
    let soft = SoftEngine::new().unwrap();
    let mut guest = Guest::long_mode(&kvm, waits());
    guest.handle(0x41, CODE + 0x80);
    for there in [&soft as &dyn Engine, &kvm, &soft] {
        let stop = guest.cpus[0].stop_handle();
        let stopper = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            stop.stop();
        });
        assert_eq!(guest.cpus[0].run(&*guest.io).unwrap(), Exit::Stopped);
        stopper.join().unwrap();
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

// Asks for the leaves and subleaves at 0xa000, as many as EBP says, and writes the answers to 0xb000.
guest!(
    identifies,
    ".code64",
    "mov rsi, 0xa000",
    "mov rdi, 0xb000",
    "2: mov eax, [rsi]",
    "mov ecx, [rsi + 4]",
    "cpuid",
    "mov [rdi], eax",
    "mov [rdi + 4], ebx",
    "mov [rdi + 8], ecx",
    "mov [rdi + 12], edx",
    "add rsi, 8",
    "add rdi, 16",
    "dec ebp",
    "jnz 2b",
    "out 0xf4, al",
);

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
