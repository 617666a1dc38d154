//! Two guests that start alike: one interpreted, one translated.

#![allow(unsafe_code)] // enters the translator

use std::sync::Arc;

use engine::VmConfig;
use engine::x86::bits::rflags;
use mem::{Bytes, GuestAddress, GuestRam};

use crate::vm::Shared;
use crate::x86::block::Blocks;
use crate::x86::cpu::Cpu;
use crate::x86::exception::{Exception, vector};
use crate::x86::fpu::{Pointers, X87};
use crate::x86::op::{RIP, reg};
use crate::x86::run::step_block;
use crate::x86::testing::{CODE, Guest, NoIo, STACK};
use crate::x86::translate::frame::CpuBox;
use crate::x86::translate::translator::Translator;

/// The flags that are compared: AF is left undefined too often.
pub const FLAGS: u64 = rflags::CF | rflags::PF | rflags::ZF | rflags::SF | rflags::OF | rflags::DF;

/// The two guests.
pub struct Pair {
    /// Interpreted.
    pub oracle: Guest,
    blocks: Blocks,
    /// Translated.
    pub cpu: CpuBox,
    /// Its translator.
    pub translator: Translator,
    other_blocks: Blocks,
    bits: u8,
}

impl Pair {
    /// Both in 64-bit mode with `code` at [`CODE`].
    pub fn new(code: &[u8]) -> Pair {
        Pair::of(64, code)
    }

    /// Both in 32-bit protected mode or in 64-bit mode.
    pub fn of(bits: u8, code: &[u8]) -> Pair {
        let oracle = Guest::new(bits, code);
        let ram = GuestRam::new(&[0..0x40_0000]).unwrap();
        ram.write_slice(code, GuestAddress(CODE)).unwrap();
        let shared = Arc::new(Shared::new(&VmConfig { cpus: 1, ..VmConfig::default() }, ram).unwrap());
        let mut cpu = CpuBox::new(Cpu::new(0, shared)).unwrap();
        cpu.segs = oracle.cpu.segs;
        (cpu.cr0, cpu.cr4, cpu.efer) = (oracle.cpu.cr0, oracle.cpu.cr4, oracle.cpu.efer);
        cpu.regs = oracle.cpu.regs;
        cpu.fpu.xcr0 = oracle.cpu.fpu.xcr0;
        cpu.update_mode();
        Pair {
            oracle,
            blocks: Blocks::default(),
            cpu,
            translator: Translator::new(false, None).unwrap(),
            other_blocks: Blocks::default(),
            bits,
        }
    }

    /// Has the translator run in lockstep with an interpreter of its own.
    pub fn lockstep(&mut self) {
        self.translator = Translator::new(true, None).unwrap();
    }

    /// Sets a register of both.
    pub fn set(&mut self, number: u8, value: u64) {
        self.oracle.cpu.regs[number as usize] = value;
        self.cpu.regs[number as usize] = value;
    }

    /// Sets a segment's base in both.
    pub fn set_base(&mut self, segment: u8, base: u64) {
        self.oracle.cpu.segs[segment as usize].base = base;
        self.cpu.segs[segment as usize].base = base;
    }

    /// Writes to both memories.
    pub fn poke(&mut self, gpa: u64, bytes: &[u8]) {
        self.oracle.poke(gpa, bytes);
        self.cpu.vm.ram.write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    /// Starts both anew at [`CODE`].
    pub fn restart(&mut self) {
        self.set(RIP, CODE);
        (self.oracle.cpu.rflags, self.cpu.rflags) = (rflags::FIXED, rflags::FIXED);
        self.set(reg::RSP, STACK);
    }

    /// Runs both up to their first exception, which is returned, and compares them.
    pub fn run(&mut self) -> Exception {
        let expected = self.run_oracle();
        let found = self.run_translated();
        assert_eq!(found, expected, "exceptions");
        // Flags that nothing reads any more may be stale at a fault in mid-block.
        let at = self.oracle.cpu.rip();
        let end = found.vector() == vector::UD && at < 0x3f_0000 && self.oracle.peek::<2>(at) == [0x0f, 0x0b];
        let flags = if end { FLAGS } else { 0 };
        self.compare(flags);
        found
    }

    fn run_oracle(&mut self) -> Exception {
        let blocks = &mut self.blocks;
        let cpu = &mut self.oracle.cpu;
        for _ in 0..1_000_000 {
            if let Err(exception) = cpu.with_io(&NoIo, |cpu| step_block(cpu, blocks)) {
                return exception;
            }
        }
        panic!("the interpreter does not come to an end, at {:#x}", self.oracle.cpu.rip());
    }

    /// Runs the translated one alone up to its first exception.
    pub fn run_translated(&mut self) -> Exception {
        let (translator, blocks) = (&mut self.translator, &mut self.other_blocks);
        for _ in 0..1_000_000 {
            // SAFETY: the vCPU is in its box.
            let result = self.cpu.with_io(&NoIo, |cpu| unsafe { translator.step(cpu, blocks) });
            if let Err(exception) = result {
                return exception;
            }
        }
        panic!("the translator does not come to an end, at {:#x}", self.cpu.rip());
    }

    /// Has the translator go some way on, the oracle not.
    pub fn translate_on(&mut self) {
        let (translator, blocks) = (&mut self.translator, &mut self.other_blocks);
        // SAFETY: the vCPU is in its box.
        self.cpu.with_io(&NoIo, |cpu| unsafe { translator.step(cpu, blocks) }).expect("no exception");
    }

    fn compare(&mut self, flags: u64) {
        let (a, b) = (&self.oracle.cpu, &self.cpu);
        for number in 0..16 {
            // 32-bit code does not see the upper halves of its registers, and does not have the others.
            let seen = if self.bits == 32 && number < 8 { u32::MAX.into() } else { u64::MAX };
            assert_eq!(b.regs[number] & seen, a.regs[number] & seen, "register {number}");
        }
        assert_eq!(b.regs[RIP as usize], a.regs[RIP as usize], "RIP");
        assert_eq!(b.rflags & flags, a.rflags & flags, "flags {:#x} {:#x}", b.rflags, a.rflags);
        for number in 0..16 {
            assert_eq!(b.fpu.ymm[number], a.fpu.ymm[number], "ymm{number}");
        }
        assert_eq!(b.fpu.mxcsr, a.fpu.mxcsr, "MXCSR");
        let unit = |cpu: &Cpu| {
            let X87 { fcw, fsw, ftw, st, .. } = cpu.fpu.x87;
            // The operand's address is the last handler's.
            let Pointers { fip, fop, .. } = cpu.fpu.pointers;
            (fcw, fsw, ftw, fip, fop, st.map(|[low, high]| (low, high & 0xffff)))
        };
        assert_eq!(unit(b), unit(a), "x87");
        let (mut x, mut y) = (vec![0; 0x40_0000], vec![0; 0x40_0000]);
        a.vm.ram.read_slice(&mut x, GuestAddress(0)).unwrap();
        b.vm.ram.read_slice(&mut y, GuestAddress(0)).unwrap();
        if let Some(at) = (0..x.len()).find(|&i| x[i] != y[i]) {
            panic!("memory at {at:#x}: {:x?} is {:x?}", &x[at..at + 16], &y[at..at + 16]);
        }
    }
}
