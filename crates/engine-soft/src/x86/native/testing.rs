//! A program of a guest in a real jail, for the tests.

use std::ops::{Deref, DerefMut};

use engine::x86::bits::rflags;
use mem::{Backing, Bytes, GuestAddress, GuestRam, PAGE_SIZE};

use super::super::block::Blocks;
use super::super::exception::Exec;
use super::super::op::{RIP, reg, seg};
use super::super::systest::{GDT, System, TABLES, descriptor, segment};
use super::super::testing::{CODE, DATA, NoIo};
use super::Native;
use super::jail::{Jail, MEMORY_FD};
use super::policy::SAMPLES;
use super::state::{USER_CODE, USER_DATA};

/// `mov rax, [rdi]; syscall`
pub const READ: &[u8] = &[0x48, 0x8b, 0x07, 0x0f, 0x05];
/// `mov [rdi], rax; syscall`
pub const WRITE: &[u8] = &[0x48, 0x89, 0x07, 0x0f, 0x05];

/// Rights in a page-table entry: present, writable, for the program.
pub const USER: u64 = 0x7;

/// A vCPU at ring 3 with `code` at [`CODE`], [`DATA`] in RDI, and identity-mapped memory of which the first 16
/// pages are the kernel's.
pub struct Program {
    system: System,
    blocks: Blocks,
    /// Its jails.
    pub native: Native,
}

impl Deref for Program {
    type Target = System;
    fn deref(&self) -> &System {
        &self.system
    }
}

impl DerefMut for Program {
    fn deref_mut(&mut self) -> &mut System {
        &mut self.system
    }
}

impl Program {
    pub fn new(code: &[u8]) -> Program {
        let mut system = ring3(code);
        let mut native = Native::start(&system.cpu.vm.clone());
        native.prepare();
        assert!(!native.unavailable);
        system.cpu.regs[reg::RDI as usize] = DATA;
        Program { system, blocks: Blocks::default(), native }
    }

    /// Runs it in its jail from [`CODE`] on, as the policy does with what computes, until it leaves.
    pub fn run(&mut self) -> Option<Exec> {
        self.cpu.regs[RIP as usize] = CODE;
        self.go_on()
    }

    /// Runs it in its jail from where it is.
    pub fn go_on(&mut self) -> Option<Exec> {
        let Program { system, blocks, native } = self;
        system.guest.cpu.with_io(&NoIo, |cpu| {
            let before = (native.stats.entries, native.stats.foreign);
            for _ in 0..2 * SAMPLES {
                cpu.native.sampled = true;
                let left = native.step(cpu, blocks, None);
                if (native.stats.entries, native.stats.foreign) != before {
                    return left;
                }
            }
            panic!("it did not go to its jail");
        })
    }

    /// Runs it up to its system call and says what RAX is there.
    pub fn rax(&mut self) -> u64 {
        let result = self.run();
        assert!(result.is_none() && self.native.stats.foreign == 0, "{result:?}");
        self.cpu.regs[reg::RAX as usize]
    }

    /// The page-table entry of `linear`.
    pub fn entry(&self, linear: u64) -> u64 {
        let [entry] = self.get64(slot(linear));
        entry
    }

    /// Changes it, and tells no TLB.
    pub fn set_entry(&self, linear: u64, entry: u64) {
        self.put64(slot(linear), &[entry]);
    }

    /// `INVLPG`
    pub fn flush(&mut self, linear: u64) {
        let pcid = self.cpu.pcid();
        self.cpu.tlb.flush_page(linear, pcid);
    }
}

fn slot(linear: u64) -> u64 {
    TABLES + 0x3000 + linear / PAGE_SIZE * 8
}

/// The same program on a vCPU without jails.
pub fn ring3(code: &[u8]) -> System {
    let mut system = System::long(code);
    let flat = |access, flags| descriptor(0, 0xf_ffff, access, flags);
    // Where Linux and Windows have them: 32-bit code, data, 64-bit code.
    system.put64(GDT + 0x20, &[flat(0xfb, 0xc), flat(0xf3, 0xc), flat(0xfb, 0xa)]);
    for vector in [1, 3] {
        system.handler(vector, 0xee, 0);
    }
    let cpu = &mut system.cpu;
    cpu.segs = [segment(USER_DATA, 0xc0f3); 6];
    cpu.segs[seg::CS as usize] = segment(USER_CODE, 0xa0fb);
    cpu.rflags |= rflags::IF;
    cpu.cpl = 3;
    cpu.update_mode();
    system
}

/// Where [`bare`] jails have their data.
pub const BARE_DATA: u64 = 0x50_0000;
/// And their code.
pub const BARE_CODE: u64 = 0x40_0000;

/// A jail with a page of code and one of data, from the first pages of memory, and no vCPU. RDI is the data,
/// RSP its end, RAX the number of a system call.
pub fn bare(code: &[u8]) -> (Jail, GuestRam) {
    let ram = GuestRam::with_backing(&[0..0x4000], Backing::Shared).unwrap();
    ram.write_slice(code, GuestAddress(0x1000)).unwrap();
    let mut jail = Jail::start(ram.file(0).unwrap().0).unwrap();
    jail.adopt().unwrap();
    let map = |at: u64, prot: i32, offset: u64| {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        [libc::SYS_mmap as u64, at, PAGE_SIZE, prot as u64, flags as u64, MEMORY_FD as u64, offset]
    };
    let (execute, write) = (libc::PROT_READ | libc::PROT_EXEC, libc::PROT_READ | libc::PROT_WRITE);
    jail.call(&[map(BARE_CODE, execute, 0x1000), map(BARE_DATA, write, 0x2000)]).unwrap();
    let mut regs = jail.tracee().registers().unwrap();
    (regs.rip, regs.rsp, regs.rdi) = (BARE_CODE, BARE_DATA + PAGE_SIZE, BARE_DATA);
    (regs.rax, regs.orig_rax) = (libc::SYS_getpid as u64, u64::MAX);
    jail.tracee().set_registers(&regs).unwrap();
    (jail, ram)
}
