//! What a program sees that computes on the x87 unit.

use super::pair::Pair;
use crate::x86::exception::vector;
use crate::x86::fpu::FCW_INIT;
use crate::x86::op::{RIP, reg};
use crate::x86::testing::{CODE, DATA};
use engine::x86::bits::cr0;

fn program(bits: u8, parts: &[&[u8]]) -> Pair {
    let mut code = parts.concat();
    code.extend([0x0f, 0x0b]);
    let mut pair = Pair::of(bits, &code);
    for cpu in [&mut *pair.oracle.cpu, &mut *pair.cpu] {
        cpu.fpu.x87.reset();
        cpu.cr0 |= cr0::NE;
    }
    pair.set(reg::RBX, DATA);
    pair
}

#[test]
fn a_loop_of_floats_runs_without_handlers_even_where_it_rounds_to_integers() {
    // fldz; l: fadd qword [ebx]; fld st0; fnstcw [ebx+8]; mov word [ebx+10], 0xf7f; fldcw [ebx+10];
    // fistp dword [ebx+12]; fldcw [ebx+8]; dec ecx; jnz l; fstp qword [ebx+16]; fldz; fcomip; fnstsw ax
    let body: &[&[u8]] = &[
        &[
            0xd9, 0xee, 0xdc, 0x03, 0xd9, 0xc0, 0xd9, 0x7b, 8, 0x66, 0xc7, 0x43, 10, 0x7f, 0x0f, 0xd9, 0x6b,
            10,
        ],
        &[0xdb, 0x5b, 12, 0xd9, 0x6b, 8, 0xff, 0xc9, 0x75, 0xe6, 0xdd, 0x5b, 16],
        &[0xd9, 0xee, 0xdf, 0xf0, 0xdf, 0xe0, 0x9b],
    ];
    for bits in [32, 64] {
        let mut pair = program(bits, body);
        pair.poke(DATA, &0.25f64.to_le_bytes());
        pair.set(reg::RCX, 1000);
        assert_eq!(pair.run().vector(), vector::UD);
        assert_eq!(pair.oracle.peek::<4>(DATA + 12), 250u32.to_le_bytes());
        assert_eq!((pair.translator.stats.handlers, pair.cpu.fpu.x87.fcw), (0, FCW_INIT));
    }
}

#[test]
fn an_exception_that_is_unmasked_half_way_is_raised_by_the_next_instruction_that_waits() {
    // fld1; fldz; fldcw [ebx]; mov eax, 1; fdivp; mov eax, 2; fld1; mov eax, 3
    let body: &[&[u8]] = &[
        &[0xd9, 0xe8, 0xd9, 0xee, 0xd9, 0x2b, 0xb8, 1, 0, 0, 0, 0xde, 0xf9, 0xb8, 2, 0, 0, 0],
        &[0xd9, 0xe8, 0xb8, 3, 0, 0, 0],
    ];
    // From data that is in the TLB, and not; and where it has to be fetched from two pages.
    for at in [DATA, DATA, DATA + 0xfff] {
        let mut pair = program(32, body);
        pair.poke(at, &0x37bu16.to_le_bytes());
        for _ in 0..2 {
            for cpu in [&mut *pair.oracle.cpu, &mut *pair.cpu] {
                cpu.fpu.x87.reset();
            }
            pair.set(RIP, CODE);
            pair.set(reg::RBX, at);
            assert_eq!(pair.run().vector(), vector::MF);
            assert_eq!(pair.cpu.regs[0], 2);
        }
    }
}

#[test]
fn the_environment_names_the_last_instruction_of_the_guest() {
    // fldpi; nop; jmp over a page: fnstenv [ebx]; mov eax, [ebx + 12]
    let mut pair = program(32, &[&[0xd9, 0xeb, 0x90, 0xe9, 0xf8, 0x0f, 0, 0]]);
    pair.poke(CODE + 0x1000, &[0xd9, 0x33, 0x8b, 0x43, 12, 0x0f, 0x0b]);
    assert_eq!(pair.run().vector(), vector::UD);
    assert_eq!(pair.cpu.regs[0], CODE);
    assert_eq!(pair.oracle.peek::<4>(DATA + 16), [0, 0, 0xeb, 1]);
}

#[test]
fn without_the_unit_every_instruction_of_it_faults() {
    // fldz; fld1
    for bit in [cr0::TS, cr0::EM] {
        let mut pair = program(64, &[&[0xd9, 0xee, 0xd9, 0xe8]]);
        assert_eq!(pair.run().vector(), vector::UD);
        for cpu in [&mut *pair.oracle.cpu, &mut *pair.cpu] {
            cpu.cr0 |= bit;
            cpu.update_mode();
        }
        pair.set(RIP, CODE);
        assert_eq!(pair.run().vector(), vector::NM);
        assert_eq!(pair.cpu.rip(), CODE);
    }
}

#[test]
fn mmx_runs_on_the_same_registers() {
    // fldpi; movd mm1, ecx; punpcklbw mm1, [ebx]; paddw mm1, mm0; pmovmskb eax, mm1; movq [ebx+8], mm1; emms
    let mut pair = program(
        32,
        &[
            &[0xd9, 0xeb, 0x0f, 0x6e, 0xc9, 0x0f, 0x60, 0x0b, 0x0f, 0xfd, 0xc8, 0x0f, 0xd7, 0xc1],
            &[0x0f, 0x7f, 0x4b, 8, 0x0f, 0x77],
        ],
    );
    pair.poke(DATA, &[0x81, 0x72, 0x93, 0x14]);
    pair.set(reg::RCX, 0x1122_3344);
    assert_eq!(pair.run().vector(), vector::UD);
    assert_eq!((pair.translator.stats.handlers, pair.cpu.fpu.x87.ftw), (0, 0));
}

#[test]
fn lockstep_compares_the_unit() {
    // fldpi; fld1; faddp
    let mut pair = program(64, &[&[0xd9, 0xeb, 0xd9, 0xe8, 0xde, 0xc1]]);
    pair.lockstep();
    pair.run();
    assert_eq!((pair.translator.stats.compared, pair.translator.stats.mismatches), (1, 0));
    pair.translator.tamper(&[0xde, 0xc1], &[0xde, 0xc9]);
    pair.restart();
    pair.run();
    assert_eq!((pair.translator.stats.compared, pair.translator.stats.mismatches), (2, 1));
}
