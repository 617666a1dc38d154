//! Runs cases on the interpreter: a vCPU at CPL 3 in 64-bit mode, its few pages mapped one to one.

use engine::x86::Segment;
use engine::x86::bits::{cr0, cr4, efer, rflags};
use engine_soft::x86::exception::vector;
use engine_soft::x86::op::{RIP, seg};
use engine_soft::x86::testing::Guest;

use crate::state::*;

const PML4: u64 = 0x20_0000;
const PDPT: u64 = 0x20_1000;
const PD: u64 = 0x20_2000;
const PT: u64 = 0x20_3000;
const P_RW_US: u64 = 7;
const P_US: u64 = 5;
const NX: u64 = 1 << 63;

pub struct Interpreter {
    guest: Guest,
    memory: Vec<u8>,
}

impl Interpreter {
    pub fn new(memory: Vec<u8>) -> Interpreter {
        let mut guest = Guest::new(64, &[]);
        guest.poke(CODE, &[0xcc; 4096]);
        guest.poke(AREA, &memory);
        let entry = |table: u64, index: u64, value: u64| guest.poke(table + 8 * index, &value.to_le_bytes());
        entry(PML4, 0, PDPT | P_RW_US);
        entry(PDPT, 0, PD | P_RW_US);
        entry(PD, 0, PT | P_RW_US);
        entry(PT, CODE >> 12, CODE | P_US);
        for offset in (0..READABLE as u64).step_by(4096) {
            let rights = if offset < WRITABLE as u64 { P_RW_US } else { P_US };
            entry(PT, (AREA + offset) >> 12, (AREA + offset) | rights | NX);
        }
        let cpu = &mut guest.cpu;
        cpu.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
        cpu.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE;
        cpu.cr3 = PML4;
        cpu.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        cpu.segs = [segment(0x2b, 0xc0f3); 6];
        cpu.segs[usize::from(seg::CS)] = segment(0x33, 0xa0fb);
        cpu.cpl = 3;
        cpu.update_mode();
        cpu.tlb.flush_all(0);
        Interpreter { guest, memory }
    }

    pub fn run(&mut self, start: &Start) -> Box<End> {
        let guest = &mut self.guest;
        guest.poke(AREA, &self.memory[..WRITABLE]);
        let mut code = [0xcc; 16];
        code[..start.len as usize].copy_from_slice(&start.code[..start.len as usize]);
        guest.poke_code(START, &code);
        guest.cpu.regs[..16].copy_from_slice(&start.gpr);
        guest.cpu.regs[usize::from(RIP)] = START;
        guest.cpu.rflags = start.rflags | rflags::FIXED | rflags::IF;
        guest.cpu.cr2 = 0;
        let mut xsave = vec![0; engine::x86::XSAVE_AREA_SIZE];
        xsave[..XSAVE].copy_from_slice(&start.xsave);
        xsave[at::HEADER] = 7;
        guest.cpu.fpu.restore(&xsave).expect("the start state is valid");

        // A repeated string instruction may stop in between to look for interrupts.
        let mut outcome = guest.step();
        for _ in 0..1000 {
            if outcome.is_err() || guest.cpu.rip() != START {
                break;
            }
            outcome = guest.step();
        }
        let mut end = End::new();
        match outcome {
            Ok(()) => end.vector = COMPLETED,
            Err(exception) => {
                end.vector = exception.vector().into();
                end.code = exception.code().unwrap_or(0).into();
                if exception.vector() == vector::PF {
                    end.cr2 = guest.cpu.cr2;
                }
            }
        }
        end.rip = guest.cpu.rip();
        end.gpr.copy_from_slice(&guest.cpu.regs[..16]);
        end.rflags = guest.cpu.rflags;
        end.xsave.copy_from_slice(&guest.cpu.fpu.save()[..XSAVE]);
        end.memory = guest.peek(AREA);
        end
    }
}

fn segment(selector: u16, access: u16) -> Segment {
    Segment { selector, base: 0, limit: 0xffff_ffff, access, unusable: false }
}
