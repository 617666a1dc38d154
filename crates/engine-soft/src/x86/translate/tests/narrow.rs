//! What a program of 32-bit code sees.

use super::pair::Pair;
use crate::x86::exception::vector;
use crate::x86::op::{RIP, reg, seg};
use crate::x86::testing::{CODE, DATA};

fn program(parts: &[&[u8]]) -> Pair {
    let mut code = parts.concat();
    code.extend([0x0f, 0x0b]);
    Pair::of(32, &code)
}

#[test]
fn a_loop_is_counted_by_inc_and_dec_and_keeps_the_carry() {
    // mov ecx, 1000; l: add eax, ecx; inc edx; mov [ebx+ecx*4], eax; adc esi, 0; dec ecx; jnz l
    let mut pair = program(&[
        &[0xb9, 0xe8, 3, 0, 0],
        &[0x01, 0xc8, 0x42, 0x89, 0x04, 0x8b, 0x83, 0xd6, 0, 0x49, 0x75, 0xf4],
    ]);
    pair.set(reg::RBX, DATA);
    pair.set(reg::RDX, 0);
    assert_eq!(pair.run().vector(), vector::UD);
    assert_eq!((pair.cpu.regs[0], pair.cpu.regs[2]), (500_500, 1000));
    assert_eq!(pair.translator.stats.handlers, 0);
    assert!(pair.translator.stats.entries < 20, "{:?}", pair.translator.stats);
}

#[test]
fn functions_with_frames_call_and_return() {
    // mov ecx, 100; l: push ecx; call f; add esp, 4; dec ecx; jnz l; ud2
    // f: push ebp; mov ebp, esp; push 7; push -1; add eax, [ebp+8]; push dword [ebp+8]; leave; ret
    let mut pair = program(&[
        &[0xb9, 100, 0, 0, 0, 0x51, 0xe8, 8, 0, 0, 0, 0x83, 0xc4, 4, 0x49, 0x75, 0xf4, 0x0f, 0x0b],
        &[0x55, 0x89, 0xe5, 0x6a, 7, 0x68, 0xff, 0xff, 0xff, 0xff, 3, 0x45, 8, 0xff, 0x75, 8, 0xc9, 0xc3],
    ]);
    pair.run();
    assert_eq!(pair.cpu.regs[0], 5050);
    assert_eq!(pair.translator.stats.handlers, 0);
}

#[test]
fn addresses_wrap_at_4_gib_whatever_is_above_them() {
    // mov eax, [ebx-8]; add eax, [ebx+ecx*4-16]; mov [ebx+ecx*4], eax; mov edx, [DATA]; push [esi+8]
    let mut pair = program(&[
        &[0x8b, 0x43, 0xf8, 0x03, 0x44, 0x8b, 0xf0, 0x89, 0x04, 0x8b],
        &[0x8b, 0x15, 0, 0, 0x10, 0, 0xff, 0x76, 8, 0x8d, 0x7c, 0x8b, 4],
    ]);
    pair.poke(DATA, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
    for (rbx, rcx) in
        [(DATA + 8, 0), (DATA + 0x40, 0xffff_fff2), (1 << 40 | (DATA + 8), 7 << 32), (4, 0x3_fff0)]
    {
        pair.restart();
        pair.set(reg::RBX, rbx);
        pair.set(reg::RCX, rcx);
        pair.set(reg::RSI, 0xdead_0000_0000_0000 | (DATA - 4));
        pair.run();
    }
    assert_eq!(pair.translator.stats.handlers, 0);
}

#[test]
fn thread_data_lies_below_the_base_of_gs() {
    // mov eax, gs:[0]; mov gs:[-4], eax; add ecx, gs:[ebx-8]; call gs:[0x10]
    let mut pair = program(&[
        &[0x65, 0xa1, 0, 0, 0, 0, 0x65, 0xa3, 0xfc, 0xff, 0xff, 0xff],
        &[0x65, 0x03, 0x4b, 0xf8, 0x65, 0xff, 0x15, 0x10, 0, 0, 0],
    ]);
    pair.poke(DATA + 0x800, &[0x44, 0x33, 0x22, 0x11]);
    pair.poke(DATA + 0x810, &(CODE as u32 + 23).to_le_bytes());
    for base in [DATA + 0x800, 7 << 32 | (DATA + 0x800)] {
        pair.restart();
        pair.set_base(seg::GS, base);
        assert_eq!(pair.run().vector(), vector::UD);
        assert_eq!(pair.oracle.peek::<4>(DATA + 0x7fc), [0x44, 0x33, 0x22, 0x11]);
    }
    assert_eq!(pair.translator.stats.handlers, 0);
}

#[test]
fn a_segment_with_a_limit_faults_beyond_it() {
    // mov eax, gs:[ebx]; mov ecx, [ebx]
    let mut pair = program(&[&[0x65, 0x8b, 0x03, 0x8b, 0x0b]]);
    for (limit, unusable) in [(u32::MAX, false), (0xfff, false), (u32::MAX, true)] {
        for cpu in [&mut *pair.oracle.cpu, &mut *pair.cpu] {
            (cpu.segs[seg::GS as usize].limit, cpu.segs[seg::GS as usize].unusable) = (limit, unusable);
        }
        pair.restart();
        pair.set(reg::RBX, DATA);
        let expected = if limit == u32::MAX && !unusable { vector::UD } else { vector::GP };
        assert_eq!(pair.run().vector(), expected);
    }
    // Beyond that of DS, nothing is translated at all.
    for cpu in [&mut *pair.oracle.cpu, &mut *pair.cpu] {
        cpu.segs[seg::GS as usize].unusable = false;
        cpu.segs[seg::DS as usize].limit = 0xffff;
    }
    pair.restart();
    assert_eq!(pair.run().vector(), vector::GP);
}

#[test]
fn one_page_runs_as_32_bit_code_and_as_64_bit_code() {
    // 40: inc eax, or REX; then: inc ecx or add ecx...: 40 ff c1 0f 0b
    let mut pair = Pair::of(32, &[0x40, 0xff, 0xc1, 0x0f, 0x0b]);
    let narrow = [pair.oracle.cpu.segs[seg::CS as usize], pair.oracle.cpu.segs[seg::SS as usize]];
    for round in 0..4u64 {
        let wide = round % 2 == 1;
        for cpu in [&mut *pair.oracle.cpu, &mut *pair.cpu] {
            cpu.efer = engine::x86::bits::efer::LME | engine::x86::bits::efer::LMA;
            let access = if wide { 0xa09b } else { narrow[0].access };
            cpu.segs[seg::CS as usize].access = access;
            cpu.update_mode();
        }
        pair.set(RIP, CODE);
        pair.run();
        assert_eq!((pair.cpu.regs[0], pair.cpu.regs[1]), (round / 2 + 1, round + 1));
    }
}

#[test]
fn high_bytes_and_sixteen_bits_are_what_they_were() {
    // mov ah, [ebx]; mov [ebx+1], ch; inc cx; dec word [ebx+2]; push cx; pop dx; movzx esi, bh; xchg eax, edi
    let mut pair = program(&[
        &[0x8a, 0x23, 0x88, 0x6b, 1, 0x66, 0x41, 0x66, 0xff, 0x4b, 2, 0x66, 0x51, 0x66, 0x5a],
        &[0x0f, 0xb6, 0xf7, 0x97, 0x66, 0x4f, 0x66, 0xa1, 4, 0, 0x10, 0, 0xa2, 5, 0, 0x10, 0],
    ]);
    pair.poke(DATA, &[9, 8, 7, 6, 5, 4, 3, 2]);
    pair.set(reg::RBX, DATA);
    pair.set(reg::RCX, 0x1234_ffff);
    assert_eq!(pair.run().vector(), vector::UD);
}

#[test]
fn an_instruction_across_pages_and_one_that_is_patched_run_right() {
    let mut pair = program(&[]);
    let start = CODE + 0xffb;
    // l: add eax, 1; mov ecx, 0x12345678 (cut by the page's end); mov byte [l + 8], dl; dec edi; jnz l; ud2
    let code =
        [0x83, 0xc0, 1, 0x90, 0xb9, 0x78, 0x56, 0x34, 0x12, 0x88, 0x15, 3, 0x10, 1, 0, 0x4f, 0x75, 0xee];
    pair.poke(start, &code);
    pair.poke(start + code.len() as u64, &[0x0f, 0x0b]);
    for rdi in [1, 2, 300] {
        pair.set(RIP, start);
        pair.set(reg::RDX, rdi);
        pair.set(reg::RDI, rdi);
        pair.run();
    }
    assert_eq!(pair.cpu.regs[1], (300 & 0xff) << 24 | 0x34_5678);
}

#[test]
fn lockstep_agrees_on_32_bit_code() {
    // add eax, 1; mov [ebx], eax; push eax; pop ecx
    let mut pair = program(&[&[0x83, 0xc0, 1, 0x89, 0x03, 0x50, 0x59]]);
    pair.lockstep();
    pair.set(reg::RBX, DATA);
    pair.run();
    assert_eq!((pair.translator.stats.compared, pair.translator.stats.mismatches), (1, 0));
    pair.translator.tamper(&[0x83, 0xc0, 1], &[0x83, 0xc0, 2]);
    pair.restart();
    pair.run();
    assert_eq!((pair.translator.stats.compared, pair.translator.stats.mismatches), (2, 1));
}
