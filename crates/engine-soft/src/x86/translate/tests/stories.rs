//! What a program sees.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mem::{Bytes, GuestAddress, PAGE_SIZE};

use super::pair::Pair;
use crate::vm::attention;
use crate::x86::exception::vector;
use crate::x86::op::{RIP, reg};
use crate::x86::testing::{CODE, DATA};
use crate::x86::translate::lockstep::COMPARISONS;

const UD2: [u8; 2] = [0x0f, 0x0b];

fn program(parts: &[&[u8]]) -> Vec<u8> {
    let mut code = parts.concat();
    code.extend_from_slice(&UD2);
    code
}

#[test]
fn a_loop_counts_and_sums() {
    // mov ecx, 1000; xor eax, eax; l: add rax, rcx; mov [rbx+rcx*8], rax; dec rcx; jnz l
    let code = program(&[
        &[0xb9, 0xe8, 3, 0, 0, 0x31, 0xc0],
        &[0x48, 0x01, 0xc8, 0x48, 0x89, 0x04, 0xcb, 0x48, 0xff, 0xc9, 0x75, 0xf4],
    ]);
    let mut pair = Pair::new(&code);
    pair.set(reg::RBX, DATA);
    assert_eq!(pair.run().vector(), vector::UD);
    assert_eq!(pair.cpu.regs[0], 500_500);
    assert!(pair.translator.stats.links >= 1, "{:?}", pair.translator.stats);
    assert!(pair.translator.stats.entries < 20, "{:?}", pair.translator.stats);
}

#[test]
fn calls_return_and_the_stack_is_written() {
    // mov ecx, 100; l: call f; loop; ud2; f: push r15; push rcx; pop r14; pop r15; lea r10,[r14+r10]; ret
    let code = [
        &[0xb9, 100, 0, 0, 0][..],
        &[0xe8, 6, 0, 0, 0, 0xff, 0xc9, 0x75, 0xf7, 0x0f, 0x0b],
        &[0x41, 0x57, 0x51, 0x41, 0x5e, 0x41, 0x5f, 0x4f, 0x8d, 0x14, 0x16, 0xc3],
    ]
    .concat();
    let mut pair = Pair::new(&code);
    assert_eq!(pair.run().vector(), vector::UD);
    assert_eq!(pair.cpu.regs[10], 5050);
    assert_eq!(pair.translator.stats.handlers, 0);
}

#[test]
fn a_push_from_memory_that_misses_leaves_the_stack_to_be_found_by_the_next() {
    // push [rbx]; push rcx; pop rax; pop rsi; then pop [rbx + 8] and the like
    let code = program(&[
        &[0xff, 0x33, 0x51, 0x58, 0x5e],
        &[0x51, 0x51, 0x8f, 0x43, 8, 0x58],
        &[0xff, 0x73, 8, 0x8f, 0x43, 16, 0xff, 0x33, 0x58],
    ]);
    let mut pair = Pair::new(&code);
    pair.poke(DATA, &[1, 2, 3, 4, 5, 6, 7, 8]);
    pair.set(reg::RBX, DATA);
    pair.set(reg::RCX, 9);
    assert_eq!(pair.run().vector(), vector::UD);
    assert_eq!(pair.cpu.regs[0], 0x0807_0605_0403_0201);
}

#[test]
fn registers_that_live_in_slots_are_what_was_written_last_whatever_is_between() {
    let code = program(&[
        &[0x41, 0x89, 0xc2, 0x41, 0xc1, 0xca, 7], // mov r10d, eax; ror r10d, 7
        &[0x45, 0x89, 0xd7, 0x45, 0x01, 0xfa],    // mov r15d, r10d; add r10d, r15d
        &[0x4d, 0x87, 0xfa, 0x45, 0x29, 0xfa],    // xchg r10, r15; sub r10d, r15d
        &[0x4c, 0x89, 0x13, 0x4d, 0x01, 0xd7],    // mov [rbx], r10; add r15, r10
        &[0x66, 0x4d, 0x0f, 0x6e, 0xd7, 0x49, 0xff, 0xc7], // movq xmm10, r15; inc r15
        &[0x4d, 0x85, 0xff, 0x74, 3, 0x41, 0xb3, 5], // test r15, r15; jz +3; mov r11b, 5
        &[0x4d, 0x01, 0xdf, 0x41, 0x0f, 0x92, 0xc3], // add r15, r11; setb r11b
        &[0x4d, 0x0f, 0xaf, 0xdf, 0x4d, 0x8b, 0x13, 0x4d, 0x01, 0xfa], // imul r11, r15; mov r10, [r11]; ...
    ]);
    let mut pair = Pair::new(&code);
    pair.set(reg::RAX, 0x1234_5678);
    pair.set(reg::RBX, DATA);
    pair.set(11, 0xffff);
    pair.run();
}

#[test]
fn flags_live_across_a_load_that_misses_are_kept() {
    // cmp eax, 5; mov rdx, [rbx]; setb cl; adc rdx, [rbx]; pushfq; pop rsi
    let code = program(&[&[0x83, 0xf8, 5, 0x48, 0x8b, 0x13, 0x0f, 0x92, 0xc1, 0x48, 0x13, 0x13, 0x9c, 0x5e]]);
    let mut pair = Pair::new(&code);
    pair.poke(DATA + 0xffc, &[0xff; 8]);
    for (rax, rbx) in [(3, DATA), (7, DATA), (3, DATA + 0xffc), (5, DATA + 0xffc), (3, 0x7000_0000_0000)] {
        pair.restart();
        pair.set(reg::RAX, rax);
        pair.set(reg::RBX, rbx);
        pair.run();
    }
}

#[test]
fn a_non_canonical_access_faults_at_its_instruction_with_all_before_it_done() {
    // inc rax; add rcx, 2; mov [rbx], rax
    let code = program(&[&[0x48, 0xff, 0xc0, 0x48, 0x83, 0xc1, 2, 0x48, 0x89, 0x03]]);
    let mut pair = Pair::new(&code);
    pair.set(reg::RBX, 0x8000_0000_0000_0000);
    assert_eq!(pair.run().vector(), vector::GP);
    assert_eq!(pair.cpu.rip(), crate::x86::testing::CODE + 7);
    assert_eq!(pair.cpu.regs[0], 1);
}

#[test]
fn code_that_patches_the_instruction_ahead_of_it_runs_the_patched_one() {
    // mov byte [rip+1+1], 7  -> patches the immediate of the next instruction: mov al, 1
    let code = program(&[&[0xc6, 0x05, 1, 0, 0, 0, 7, 0xb0, 1], &[0xff, 0xc1]]);
    let mut pair = Pair::new(&code);
    for _ in 0..5 {
        pair.restart();
        pair.poke(crate::x86::testing::CODE + 8, &[1]);
        pair.run();
        assert_eq!(pair.cpu.regs[0] & 0xff, 7);
    }
    assert!(pair.translator.stats.voided >= 1);
}

#[test]
fn an_instruction_across_pages_is_interpreted_in_between() {
    let mut pair = Pair::new(&UD2);
    let start = crate::x86::testing::CODE + 0xffb;
    // add rax, 1; mov ecx, 0x12345678 (cut by the page's end); add rax, 2; ud2
    pair.poke(start, &[0x48, 0x83, 0xc0, 1, 0xb9, 0x78, 0x56, 0x34, 0x12, 0x48, 0x83, 0xc0, 2, 0x0f, 0x0b]);
    for round in 0..3 {
        pair.set(crate::x86::op::RIP, start);
        pair.run();
        assert_eq!((pair.cpu.regs[0], pair.cpu.regs[1]), (3 * (round + 1), 0x1234_5678));
    }
}

#[test]
fn an_instruction_across_pages_in_a_loop_is_translated_until_one_of_them_is_written() {
    let mut pair = Pair::new(&UD2);
    let start = crate::x86::testing::CODE + 0xffb;
    // l: add rax, 1; mov ecx, 0x12345678 (cut by the page's end); dec edx; jnz l; ud2
    let code = [0x48, 0x83, 0xc0, 1, 0xb9, 0x78, 0x56, 0x34, 0x12, 0xff, 0xca, 0x75, 0xf3, 0x0f, 0x0b];
    pair.poke(start, &code);
    for (n, change) in [0x12, 0x13, 0x14].into_iter().enumerate() {
        pair.poke(start + 8, &[change]);
        pair.set(crate::x86::op::RIP, start);
        pair.set(reg::RDX, 1000);
        pair.run();
        assert_eq!(pair.cpu.regs[1], u64::from(change) << 24 | 0x34_5678);
        if n == 0 {
            assert!(pair.translator.stats.straddles < 10, "{:?}", pair.translator.stats);
        }
    }
}

#[test]
fn a_conditional_move_from_memory_to_a_register_in_a_slot_keeps_it_if_false() {
    // mov r11b, sil; cmp eax, ecx; cmova r11d, [rbx]; setg [rbx+8]
    let code = program(&[&[0x41, 0x88, 0xf3, 0x39, 0xc8, 0x44, 0x0f, 0x47, 0x1b, 0x0f, 0x9f, 0x43, 8]]);
    let mut pair = Pair::new(&code);
    pair.poke(DATA, &[7; 8]);
    for (rax, rcx) in [(3, 2), (3, 3), (1, 2), (u64::MAX, 1)] {
        pair.restart();
        pair.set(reg::RAX, rax);
        pair.set(reg::RCX, rcx);
        pair.set(reg::RSI, 0x20);
        pair.set(11, 0x1234_5678_9abc_def0);
        pair.set(reg::RBX, DATA);
        pair.run();
    }
}

#[test]
fn lockstep_agrees_with_right_code_and_finds_wrong_code() {
    // add eax, 0x11223344; mov [rbx], eax; ud2
    let code = program(&[&[0x05, 0x44, 0x33, 0x22, 0x11, 0x89, 0x03]]);
    let mut pair = Pair::new(&code);
    pair.lockstep();
    pair.set(reg::RBX, DATA);
    pair.run();
    assert_eq!((pair.translator.stats.compared, pair.translator.stats.mismatches), (1, 0));
    pair.translator.tamper(&[0x05, 0x44, 0x33, 0x22, 0x11], &[0x05, 0x45, 0x33, 0x22, 0x11]);
    pair.restart();
    pair.run(); // the interpreter's result stands
    assert_eq!((pair.translator.stats.compared, pair.translator.stats.mismatches), (2, 1));
}

#[test]
fn lockstep_keeps_what_a_device_writes_meanwhile() {
    const UNITS: u32 = 200;
    const ROUNDS: u64 = COMPARISONS as u64;
    // The guest writes the first half of each word, the device a byte of the second.
    // mov [rbx + 8 * n], eax; jmp on
    let unit = |n: u32| [&[0x89, 0x83][..], &(8 * n).to_le_bytes(), &[0xeb, 0x00]].concat();
    let units: Vec<_> = (0..UNITS).map(unit).collect();
    let code = program(&[&units.concat()]);
    let mut pair = Pair::new(&code);
    pair.lockstep();
    pair.set(reg::RBX, DATA);
    let ram = pair.cpu.vm.ram.clone();
    let at = |n: u32| GuestAddress(DATA + u64::from(8 * n) + 6);
    let done = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let device = scope.spawn(|| {
            let mut written = [0u8; UNITS as usize];
            for n in (0..UNITS).cycle().take_while(|_| !done.load(Ordering::Relaxed)) {
                let byte = &mut written[n as usize];
                *byte = byte.wrapping_add(1);
                ram.write_obj(*byte, at(n)).unwrap();
                std::thread::sleep(Duration::from_micros(100));
            }
            written
        });
        for round in 0..ROUNDS {
            pair.restart();
            pair.set(reg::RAX, round + 1);
            pair.run_translated();
        }
        done.store(true, Ordering::Relaxed);
        device.join().unwrap()
    });
    let stats = &pair.translator.stats;
    assert_eq!((stats.compared, stats.mismatches), (u64::from(UNITS) * ROUNDS, 0));
    for (n, byte) in (0..UNITS).zip(written) {
        let word: u64 = ram.read_obj(GuestAddress(DATA + u64::from(8 * n))).unwrap();
        assert_eq!(word, ROUNDS | u64::from(byte) << 48, "word {n}");
    }
}

#[test]
fn a_return_of_16_bits_is_none_of_64_however_much_it_releases() {
    // push word 0x800; ret 6 (of 16 bits)
    let code = program(&[&[0x66, 0x68, 0, 8, 0x66, 0xc2, 6, 0]]);
    let mut pair = Pair::new(&code);
    pair.poke(0x800, &UD2);
    assert_eq!(pair.run().vector(), vector::UD);
}

#[test]
fn a_timer_that_an_instruction_across_pages_sets_is_due_in_a_loop_behind_it() {
    // at the end of a page: wrmsr (across); l: test ecx, ecx; jnz l
    let mut pair = Pair::new(&[]);
    let at = CODE + PAGE_SIZE - 1;
    pair.poke(at, &[0x0f, 0x30, 0x85, 0xc9, 0x75, 0xfc]);
    let cpu = &mut pair.cpu;
    cpu.write_msr(0x1b, 0xfee0_0d00).unwrap(); // x2APIC mode
    cpu.write_msr(0x80f, 0x1ff).unwrap();
    cpu.write_msr(0x832, 0x4_00ec).unwrap(); // TSC deadline
    let mailbox = |pair: &Pair| pair.cpu.vm.vcpus[0].deadline.load(Ordering::Relaxed);
    // Once to translate, then with everything there.
    for round in 0..3 {
        pair.set(RIP, at);
        pair.set(reg::RCX, 0x6e0);
        pair.set(reg::RAX, u32::MAX.into());
        pair.set(reg::RDX, 0x7fff_ffff);
        pair.cpu.tlb.jumps.clear(); // the unit across the pages is not sure of its second page any more
        pair.cpu.write_msr(0x6e0, 0).unwrap();
        let vm = pair.cpu.vm.clone();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(std::time::Duration::from_millis(50));
                vm.vcpus[0].notify(attention::STOP);
            });
            while vm.vcpus[0].attention() & attention::STOP == 0 {
                pair.translate_on();
            }
        });
        vm.vcpus[0].take(attention::STOP);
        assert!(pair.translator.stats.straddles > 0);
        assert_ne!(mailbox(&pair), u64::MAX, "round {round}");
    }
}

#[test]
fn bits_are_tested_and_set_in_words_far_from_the_operand() {
    // bt [rbx], rcx; setc al; lock bts [rbx+8], edx; adc eax, eax; btr [rbx], r9; adc eax, eax; btc [r10], r14d
    let code = program(&[
        &[0x48, 0x0f, 0xa3, 0x0b, 0x0f, 0x92, 0xc0, 0xf0, 0x0f, 0xab, 0x53, 8, 0x11, 0xc0],
        &[0x4c, 0x0f, 0xb3, 0x0b, 0x11, 0xc0, 0x45, 0x0f, 0xbb, 0x32],
    ]);
    let mut pair = Pair::new(&code);
    let data: Vec<u8> = (0..0x4000u32).map(|i| ((i * 37) >> 2) as u8).collect();
    pair.poke(DATA, &data);
    let mut handlers = 0;
    for (bit, base) in [(5, 0x1000), (77, 0x1ff0), (-1i64, 0x2000), (-20_001, 0x2004), (0x7fff, 0x2ff8)] {
        pair.restart();
        for number in [reg::RCX, reg::RDX, 9, 14] {
            pair.set(number, bit as u64);
        }
        pair.set(reg::RBX, DATA + base);
        pair.set(10, DATA + base + 12);
        pair.run();
        handlers = pair.translator.stats.handlers;
    }
    assert_eq!(handlers, 0);
}

#[test]
fn flags_are_pushed_as_they_are() {
    // add eax, ecx; pushfq; pop rdx; cld; lodsb; lodsd; lodsq; cmp ah, [rbx]; pushfq; add [rbx], ch; mov bh, [rbx]
    let code = program(&[&[
        0x01, 0xc8, 0x9c, 0x5a, 0xfc, 0xac, 0xad, 0x48, 0xad, 0x3a, 0x23, 0x9c, 0x00, 0x2b, 0x8a, 0x3b,
    ]]);
    let mut pair = Pair::new(&code);
    for (rax, rcx) in [(0, 0), (0x8000_0000, 0x8000_0000), (0x7fff_ffff, 1), (0xffff_ffff, 1), (0xf, 0xf1)] {
        pair.restart();
        (pair.oracle.cpu.rflags, pair.cpu.rflags) = (0x40202, 0x40202);
        pair.set(reg::RAX, rax);
        pair.set(reg::RCX, rcx);
        pair.set(reg::RBX, DATA + 0x1000);
        pair.set(reg::RSI, DATA + 0x10);
        assert_eq!(pair.run().vector(), vector::UD);
        assert_eq!(pair.cpu.regs[2] & 0x40302, 0x40202);
    }
    assert_eq!(pair.translator.stats.handlers, 0);
}
