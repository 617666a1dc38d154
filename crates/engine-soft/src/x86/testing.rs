//! A bare vCPU for the tests of instruction families.

use std::sync::Arc;

use engine::x86::Segment;
use engine::x86::bits::{cr0, cr4, efer};
use engine::{CpuIo, VmConfig};
use mem::{Backing, Bytes, GuestAddress, GuestRam};

use super::block::Blocks;
use super::cpu::Cpu;
use super::exception::Exec;
use super::op::{RIP, reg, seg};
use super::run::step_block;
use crate::vm::Shared;

/// Where the code of a test is.
pub const CODE: u64 = 0x1_0000;
/// Where its stack ends.
pub const STACK: u64 = 0x8_0000;
/// Free for its data.
pub const DATA: u64 = 0x10_0000;

/// I/O space with nothing in it.
pub struct NoIo;

impl CpuIo for NoIo {
    fn port_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&self, _port: u16, _data: &[u8]) {}
    fn mmio_read(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
    fn acknowledge_extint(&self) -> Option<u8> {
        None
    }
    fn end_of_interrupt(&self, _vector: u8) {}
}

/// A vCPU with 4 MiB of memory, flat segments, paging off (addresses are physical in every mode).
pub struct Guest {
    /// The vCPU.
    pub cpu: Box<Cpu>,
    blocks: Blocks,
}

/// What a VM with one vCPU and 4 MiB of memory shares.
pub fn shared() -> Arc<Shared> {
    let ram = GuestRam::with_backing(&[0..0x40_0000], Backing::Shared).unwrap();
    Arc::new(Shared::new(&VmConfig { cpus: 1, ..VmConfig::default() }, ram).unwrap())
}

impl Guest {
    /// In 16-bit real, 32-bit protected or 64-bit mode at CPL 0, with `code` at [`CODE`].
    pub fn new(bits: u8, code: &[u8]) -> Guest {
        let shared = shared();
        shared.ram.write_slice(code, GuestAddress(CODE)).unwrap();
        let mut cpu = Box::new(Cpu::new(0, shared));
        cpu.regs[reg::RSP as usize] = STACK;
        cpu.regs[RIP as usize] = CODE;
        cpu.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        cpu.fpu.xcr0 = cpu.vm.cpuid.xcr0_mask();
        let flat = |access| Segment { selector: 0x10, base: 0, limit: 0xffff_ffff, access, unusable: false };
        match bits {
            16 => {
                let base = Segment { limit: 0xffff, access: 0x93, ..Segment::default() };
                cpu.segs = [base; 6];
                cpu.segs[seg::CS as usize] =
                    Segment { selector: (CODE >> 4) as u16, base: CODE, access: 0x9b, ..base };
                cpu.regs[RIP as usize] = 0;
                cpu.regs[reg::RSP as usize] = 0x8000;
            }
            32 => {
                cpu.cr0 |= cr0::PE;
                cpu.segs = [flat(0xc093); 6];
                cpu.segs[seg::CS as usize] = flat(0xc09b);
            }
            _ => {
                cpu.cr0 |= cr0::PE;
                cpu.efer = efer::LME | efer::LMA;
                cpu.segs = [flat(0xc093); 6];
                cpu.segs[seg::CS as usize] = flat(0xa09b);
            }
        }
        cpu.update_mode();
        Guest { cpu, blocks: Blocks::default() }
    }

    /// Runs exactly one instruction.
    pub fn step(&mut self) -> Exec {
        let blocks = &mut self.blocks;
        self.cpu.interrupt_shadow = true; // makes the dispatcher stop behind one instruction
        self.cpu.with_io(&NoIo, |cpu| step_block(cpu, blocks))
    }

    /// Runs `count` instructions, up to the first exception.
    pub fn steps(&mut self, count: usize) -> Exec {
        (0..count).try_for_each(|_| self.step())
    }

    /// Drops decoded code: what was poked over it is run next.
    pub fn forget_code(&mut self) {
        self.blocks.clear();
    }

    /// Runs whole blocks until RIP is `end`.
    ///
    /// # Panics
    /// On an exception.
    pub fn run_to(&mut self, end: u64) {
        let blocks = &mut self.blocks;
        self.cpu.with_io(&NoIo, |cpu| {
            while cpu.rip() != end {
                step_block(cpu, blocks).expect("no exception");
            }
        });
    }

    /// Writes to guest memory.
    pub fn poke(&self, gpa: u64, bytes: &[u8]) {
        self.cpu.vm.ram.write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    /// Writes code that may have been executed before.
    pub fn poke_code(&self, gpa: u64, bytes: &[u8]) {
        self.poke(gpa, bytes);
        if let Some(page) = self.cpu.vm.ram.page(gpa) {
            page.state.note_write();
        }
    }

    /// Reads from guest memory.
    pub fn peek<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.cpu.vm.ram.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }
}
