//! Programs whose page tables change, in real jails.

use engine::x86::bits::cr4;

use super::super::testing::{Program, READ, USER, WRITE};
use super::*;
use crate::x86::exception::{Exception, vector};
use crate::x86::op::{RIP, reg};
use crate::x86::systest::GDT;
use crate::x86::testing::{CODE, DATA};

const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const READ_ONLY: u64 = 0x5;
const NX: u64 = 1 << 63;
/// Page tables of another address space.
const OTHER: u64 = 0x28_0000;

fn page_fault(program: &mut Program) -> (u32, u64) {
    let Some(Err(fault)) = program.run() else { panic!("no exception") };
    assert_eq!(fault.vector(), vector::PF);
    (fault.code().unwrap(), program.cpu.cr2)
}

#[test]
fn a_page_comes_when_the_program_touches_it_and_is_accessed_then() {
    let mut program = Program::new(READ);
    program.poke(DATA, &[42]);
    assert_eq!(program.entry(DATA) & (ACCESSED | DIRTY), 0);
    assert_eq!(program.rax(), 42);
    assert_eq!(program.entry(DATA) & (ACCESSED | DIRTY), ACCESSED);
    let faults = program.native.stats.faults;
    program.poke(DATA, &[43]);
    assert_eq!((program.rax(), program.native.stats.faults), (43, faults), "the same memory");
}

#[test]
fn the_first_write_makes_a_page_dirty() {
    let mut program = Program::new(WRITE);
    program.cpu.regs[reg::RAX as usize] = 7;
    program.rax();
    assert_eq!(program.peek(DATA), [7]);
    assert_eq!(program.entry(DATA) & (ACCESSED | DIRTY), ACCESSED | DIRTY);
    assert!(program.cpu.vm.ram.page(DATA).unwrap().state.is_dirty(), "in the log of a migration too");
    assert_eq!(program.entry(CODE) & DIRTY, 0, "only that one");
}

#[test]
fn writes_are_logged_again_once_the_log_was_taken() {
    let mut program = Program::new(WRITE);
    program.rax();
    assert!(program.cpu.vm.ram.take_dirty().contains(&DATA));
    program.cpu.tlb.protect_writes();
    program.rax();
    assert!(program.cpu.vm.ram.take_dirty().contains(&DATA));
}

#[test]
fn a_page_that_the_program_may_not_write_stays_as_it_is() {
    let mut program = Program::new(WRITE);
    program.set_entry(DATA, DATA | READ_ONLY);
    program.cpu.regs[reg::RAX as usize] = 7;
    assert_eq!(page_fault(&mut program), (7, DATA));
    assert_eq!((program.peek(DATA), program.entry(DATA) & DIRTY), ([0], 0));
    program.set_entry(DATA, DATA | USER);
    program.rax();
    assert_eq!(program.peek(DATA), [7], "rights that grow need no flush");
}

#[test]
fn a_translation_stays_until_it_is_flushed() {
    let mut program = Program::new(READ);
    let next = DATA + PAGE_SIZE;
    program.poke(DATA, &[1]);
    program.poke(next, &[2]);
    assert_eq!(program.rax(), 1);
    program.set_entry(DATA, next | USER);
    assert_eq!(program.rax(), 1, "as a TLB does it");
    program.flush(DATA);
    assert_eq!(program.rax(), 2);
    program.set_entry(DATA, 0);
    program.flush(DATA);
    assert_eq!(page_fault(&mut program), (4, DATA));
    program.set_entry(DATA, DATA | USER);
    assert_eq!(program.rax(), 1);
    program.set_entry(DATA, 0);
    let cr3 = program.cpu.cr3;
    program.cpu.write_cr3(cr3).unwrap();
    assert_eq!(page_fault(&mut program), (4, DATA), "after a load of CR3");
}

#[test]
fn more_flushes_than_are_remembered_flush_all() {
    let mut program = Program::new(READ);
    program.rax();
    program.set_entry(DATA, 0);
    program.flush(DATA);
    for page in 0..=LATEST as u64 {
        program.flush(0x3f_0000_0000 + page * PAGE_SIZE);
    }
    assert_eq!(page_fault(&mut program), (4, DATA));
}

#[test]
fn the_kernels_pages_are_not_there() {
    let mut program = Program::new(READ);
    program.cpu.regs[reg::RDI as usize] = GDT;
    program.set_entry(GDT - PAGE_SIZE, (GDT - PAGE_SIZE) | USER | ACCESSED);
    assert_eq!(page_fault(&mut program), (5, GDT));
    program.cpu.regs[reg::RDI as usize] = GDT - PAGE_SIZE;
    program.rax();
    program.cpu.regs[reg::RDI as usize] = GDT;
    assert_eq!(page_fault(&mut program), (5, GDT), "nor come with their neighbours");
}

#[test]
fn a_page_without_execution_is_data() {
    let mut program = Program::new(&[0xff, 0xe7]); // jmp rdi
    program.poke(DATA, &[0x0f, 0x05]);
    program.set_entry(DATA, DATA | USER | NX);
    assert!(program.run().is_none());
    assert_eq!((program.rip(), program.native.stats.foreign), (DATA, 1));
    assert_eq!(program.guest.step(), Err(Exception::with_code(vector::PF, 0x15)));
    program.set_entry(DATA, DATA | USER);
    program.flush(DATA);
    program.native.stats.foreign = 0;
    program.rax();
    assert_eq!(program.rip(), DATA, "at the system call there");
}

#[test]
fn an_instruction_that_goes_on_where_nothing_may_be_executed_makes_nothing_dirty() {
    let mut program = Program::new(&[0xff, 0xe7]); // jmp rdi
    let next = DATA + PAGE_SIZE;
    program.poke(next - 2, &[0x48, 0x8b, 0x07]); // mov rax, [rdi]
    program.set_entry(next, next | USER | NX);
    program.cpu.regs[reg::RDI as usize] = next - 2;
    assert_eq!(page_fault(&mut program), (0x15, next));
    assert_eq!(program.entry(next) & DIRTY, 0);
}

#[test]
fn writes_to_what_became_code_are_seen_by_the_translator() {
    let mut program = Program::new(WRITE);
    program.rax();
    let version = |program: &Program| program.cpu.vm.ram.page(DATA).unwrap().state.version();
    program.cpu.vm.ram.page(DATA).unwrap().state.mark_code();
    program.cpu.tlb.protect_writes();
    let before = version(&program);
    assert_eq!(program.run(), Some(Ok(())), "interpreted");
    assert_ne!(version(&program), before);
}

#[test]
fn a_program_changes_its_own_code() {
    // mov byte [rdi], 7; mov al, 1; syscall
    let mut program = Program::new(&[0xc6, 0x07, 7, 0xb0, 1, 0x0f, 0x05]);
    program.cpu.regs[reg::RDI as usize] = CODE + 4;
    assert_eq!(program.rax(), 7);
    assert_eq!(program.entry(CODE) & DIRTY, DIRTY);
}

/// Another address space, with the code of the first, and other data in its place.
fn with_two_address_spaces() -> (Program, u64) {
    let mut program = Program::new(READ);
    program.poke(DATA, &[1]);
    program.poke(DATA + PAGE_SIZE, &[2]);
    for level in 0..3 {
        program.put64(OTHER + level * PAGE_SIZE, &[(OTHER + (level + 1) * PAGE_SIZE) | USER]);
    }
    let table = OTHER + 3 * PAGE_SIZE;
    program.put64(table + CODE / PAGE_SIZE * 8, &[CODE | USER]);
    program.put64(table + DATA / PAGE_SIZE * 8, &[(DATA + PAGE_SIZE) | USER]);
    let first = program.cpu.cr3;
    program.cpu.cr4 |= cr4::PCIDE;
    (program, first)
}

#[test]
fn address_spaces_have_jails_of_their_own() {
    const KEEP: u64 = 1 << 63;
    let (mut program, first) = with_two_address_spaces();
    assert_eq!(program.rax(), 1);
    program.cpu.regs[reg::RDI as usize] = DATA + 2 * PAGE_SIZE;
    program.rax();
    program.cpu.write_cr3(OTHER | 1).unwrap();
    assert_eq!(page_fault(&mut program), (4, DATA + 2 * PAGE_SIZE), "it is the first one's");
    program.cpu.regs[reg::RDI as usize] = DATA;
    assert_eq!(program.rax(), 2);
    let faults = program.native.stats.faults;
    program.cpu.write_cr3(first | KEEP).unwrap();
    assert_eq!(program.rax(), 1);
    program.cpu.write_cr3(OTHER | 1 | KEEP).unwrap();
    assert_eq!((program.rax(), program.native.stats.faults), (2, faults), "both were kept");
}

#[test]
fn a_jail_that_changes_hands_keeps_no_pages() {
    let (mut program, first) = with_two_address_spaces();
    program.native.cells.truncate(1);
    assert_eq!(program.rax(), 1);
    program.cpu.write_cr3(OTHER | 1).unwrap();
    assert_eq!(program.rax(), 2);
    program.cpu.write_cr3(first).unwrap();
    assert_eq!(program.rax(), 1);
    assert_eq!(program.native.stats.flushes, 3);
}

#[test]
fn a_jail_whose_program_is_all_over_the_place_takes_little_of_the_hosts_memory() {
    let mut program = Program::new(READ);
    // The same page in every GiB of the lower half: two page tables each for the host.
    let tables = program.cpu.cr3;
    program.put64(tables, &[(tables + PAGE_SIZE) | USER; 256]);
    program.put64(tables + PAGE_SIZE, &[(tables + 2 * PAGE_SIZE) | USER; 512]);
    program.rax();
    let Program { native, .. } = &mut program;
    let mut cell = native.cells.remove(0);
    for gigabyte in 1..20_000 {
        let fault = cell.mirror.fault(&mut program.cpu, &cell.jail, gigabyte << 30 | DATA);
        assert_eq!(fault, Fault::Mapped);
        assert!(cell.mirror.settle(&mut cell.jail, &program.cpu.tlb.flushes_log).unwrap());
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", cell.jail.pid())).unwrap();
    let tables = status.lines().find_map(|line| line.strip_prefix("VmPTE:")).unwrap();
    let kib: u64 = tables.split_whitespace().next().unwrap().parse().unwrap();
    assert!((1000..80_000).contains(&kib), "{tables}");
    assert_eq!(program.cpu.regs[RIP as usize], CODE + 3);
}
