//! Hostile programs in jails: what they reach, and what they learn. Each of them really runs in one.

use engine::x86::bits::{cr4, rflags};
use mem::{Bytes, GuestAddress, PAGE_SIZE};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};

use super::super::cpu::Cpu;
use super::super::exception::{Exception, Exec, vector};
use super::super::op::{RIP, reg, seg};
use super::super::systest::TABLES;
use super::super::testing::{CODE, DATA};
use super::jail::Jail;
use super::testing::{BARE_CODE, BARE_DATA, Program, READ, USER, bare, ring3};
use super::tracee::Stop;

/// What the host says of a jail's process.
fn host_file(jail: &Jail, name: &str) -> String {
    std::fs::read_to_string(format!("/proc/{}/{name}", jail.pid())).unwrap()
}

fn process(pid: u32) -> Pid {
    Pid::from_raw(pid.cast_signed()).unwrap()
}

/// The code, and 32-bit code behind a far return to it.
fn in_32_bits(at: u64, code: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x6a, 0x23, 0x68]; // push 0x23; push behind
    bytes.extend(((at + 9) as u32).to_le_bytes());
    bytes.extend([0x48, 0xcb]); // retfq
    bytes.extend(code);
    bytes
}

#[test]
fn nothing_is_mapped_but_the_stub_and_the_programs_pages() {
    let (jail, _ram) = bare(&[0x90]);
    let maps = host_file(&jail, "maps");
    let starts: Vec<&str> = maps.lines().map(|line| line.split('-').next().unwrap()).collect();
    let expected = [BARE_CODE, BARE_DATA, jail.stub(), jail.stub() + PAGE_SIZE].map(|at| format!("{at:08x}"));
    let rest: Vec<&&str> = starts.iter().filter(|start| !expected.contains(&start.to_string())).collect();
    assert!(rest.iter().all(|start| **start == "ffffffffff600000"), "{maps}");
    assert!(expected.iter().all(|start| starts.contains(&&start[..])), "{maps}");
}

#[test]
fn no_system_call_is_made_whichever_way_it_is_asked_for() {
    let exit: [(&[u8], i64); 2] = [(&[0x0f, 0x05], libc::SYS_exit_group), (&[0xcd, 0x80], 1)];
    for (code, number) in exit {
        for code in [code.to_vec(), in_32_bits(BARE_CODE, code)] {
            let (mut jail, _ram) = bare(&code);
            let mut regs = jail.tracee().registers().unwrap();
            regs.rax = number as u64;
            jail.tracee().set_registers(&regs).unwrap();
            let stop = jail.run();
            assert!(
                matches!(stop, Stop::SystemCall | Stop::Signal(libc::SIGSEGV, ..)),
                "{code:x?}: {stop:?}"
            );
            assert!(jail.tracee().registers().is_ok(), "it is still there");
        }
    }
}

#[test]
fn calls_into_the_hosts_vsyscall_page_are_not_made() {
    for call in [0, 0x400, 0x800] {
        // mov rax, imm32; call rax
        let address = 0xff60_0000_u32 + call;
        let mut code = vec![0x48, 0xc7, 0xc0];
        code.extend(address.to_le_bytes());
        code.extend([0xff, 0xd0]);
        let mut program = Program::new(&code);
        let error = program.run().unwrap().unwrap_err();
        let address = address as i32 as u64;
        assert_eq!((error.vector(), program.cpu.cr2, program.rip()), (vector::PF, address, address));
    }
}

#[test]
fn the_hosts_addresses_do_not_show() {
    // The kernel continues behind these in its vDSO, at the address where that was in our process.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let vdso = maps.lines().find(|line| line.ends_with("[vdso]")).unwrap();
    let vdso = u64::from_str_radix(vdso.split('-').next().unwrap(), 16).unwrap();
    let near = |address: u64| (address as u32).wrapping_sub(vdso as u32) < 0x4000;
    for code in [&[0x0f, 0x05], &[0x0f, 0x34]] {
        for code in [code.to_vec(), in_32_bits(BARE_CODE, code)] {
            for stack in [BARE_DATA + 64, 0x30_0000] {
                let (mut jail, _ram) = bare(&code);
                let mut regs = jail.tracee().registers().unwrap();
                regs.rbp = stack;
                jail.tracee().set_registers(&regs).unwrap();
                let stop = jail.run();
                let regs = jail.tracee().registers().unwrap();
                assert!(!near(regs.rip), "{code:x?}: {stop:x?} at {:#x}", regs.rip);
                assert!(!matches!(stop, Stop::Signal(_, _, at) if near(at)), "{code:x?}: {stop:x?}");
            }
        }
    }
}

#[test]
fn the_stubs_list_does_not_tell_where_pages_are_in_the_guests_memory() {
    let (mut jail, ram) = bare(READ);
    for at in [0, 48, PAGE_SIZE - 8] {
        let mut regs = jail.tracee().registers().unwrap();
        (regs.rip, regs.rdi) = (BARE_CODE, jail.stub() + PAGE_SIZE + at);
        jail.tracee().set_registers(&regs).unwrap();
        assert_eq!(jail.run(), Stop::SystemCall);
        assert_eq!(jail.tracee().registers().unwrap().orig_rax, 0);
    }
    assert_eq!(ram.read_obj::<u64>(GuestAddress(0x2000)).unwrap(), 0);
}

#[test]
fn clocks_are_refused() {
    for code in [&[0x0f, 0x31, 0x90], &[0x0f, 0x01, 0xf9]] {
        let (mut jail, _ram) = bare(code);
        assert!(matches!(jail.run(), Stop::Signal(libc::SIGSEGV, libc::SI_KERNEL, _)), "{code:x?}");
    }
}

/// How a program ends: with an exception, or in its kernel.
fn ending(cpu: &Cpu, result: Exec) -> Option<Option<Exception>> {
    match result {
        Err(exception) => Some(Some(exception)),
        Ok(()) => (cpu.cpl != 3).then_some(None),
    }
}

#[test]
fn what_a_program_raises_is_what_it_raises_on_a_cpu_of_its_own() {
    let traps: [&[u8]; 17] = [
        &[0xcc],                                                 // int3
        &[0xcd, 0x03],                                           // int 3
        &[0xcd, 0x81],                                           // int 0x81
        &[0xf1],                                                 // int1
        &[0x0f, 0x0b],                                           // ud2
        &[0x31, 0xc9, 0xf7, 0xf1],                               // xor ecx, ecx; div ecx
        &[0x68, 0x02, 0x03, 0, 0, 0x9d, 0x90, 0x90],             // push 0x302; popf; nop; nop
        &[0x68, 0x02, 0x02, 4, 0, 0x9d, 0x48, 0x8b, 0x47, 0x01], // push 0x40202; popf; mov rax, [rdi + 1]
        &[0xf4],                                                 // hlt
        &[0xec],                                                 // in al, dx
        &[0xfa],                                                 // cli
        &[0x0f, 0x22, 0xd8],                                     // mov cr3, rax
        &[0x0f, 0x23, 0xf8],                                     // mov dr7, rax
        &[0xb8, 0x73, 0, 0, 0, 0x8e, 0xd8],                      // mov eax, 0x73; mov ds, eax
        &[0xb8, 0x07, 0, 0, 0, 0x8e, 0xe0],                      // mov eax, 7; mov fs, eax
        &[0x0f, 0x00, 0xd0],                                     // lldt ax
        &[0x48, 0xb8, 0, 0, 0, 0, 0, 0x80, 0, 0, 0x48, 0x8b, 0], // mov rax, 1 << 47; mov rax, [rax]
    ];
    for code in traps {
        let code = [code, &[0x0f, 0x0b]].concat();
        let mut alone = ring3(&code);
        alone.cpu.regs[reg::RDI as usize] = DATA;
        let expected = loop {
            let result = alone.guest.step();
            if let Some(end) = ending(&alone.cpu, result) {
                break end;
            }
        };
        let mut program = Program::new(&code);
        let mut left = program.run();
        let end = loop {
            let result = left.unwrap_or_else(|| program.guest.step());
            if let Some(end) = ending(&program.cpu, result) {
                break end;
            }
            left = program.go_on();
        };
        assert_eq!(end, expected, "{code:x?}");
        let state = |cpu: &Cpu| (cpu.regs, cpu.rflags, cpu.dr[6], cpu.cr2);
        assert_eq!(state(&program.cpu), state(&alone.cpu), "{code:x?}");
        assert_ne!(program.native.stats.entries, 0);
    }
}

#[test]
fn signals_from_outside_change_nothing() {
    for signal in [Signal::SYS, Signal::TRAP, Signal::SEGV, Signal::TERM, Signal::STOP] {
        let mut program = Program::new(&[0x48, 0xff, 0xc0, 0xeb, 0xfb]); // inc rax; jmp back
        let pids = program.native.processes();
        let sender = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(30));
            for pid in pids {
                kill_process(process(pid), signal).unwrap();
            }
        });
        assert_eq!(program.run(), Some(Ok(())), "{signal:?}");
        sender.join().unwrap();
        assert!((CODE..CODE + 5).contains(&program.rip()), "{signal:?}: {:#x}", program.rip());
        assert_eq!(program.rsp(), super::super::systest::System::STACK);
    }
}

#[test]
fn segment_bases_are_only_changed_where_the_guest_lets_programs_do_that() {
    // An old kernel takes a GS base in the upper half for its own.
    let base = 0xffff_8000_1234_5678;
    for (enabled, seen) in [(0, 0), (cr4::FSGSBASE, base)] {
        let mut program = Program::new(&[0xf3, 0x48, 0x0f, 0xae, 0xdf, 0x0f, 0x05]); // wrgsbase rdi; syscall
        program.cpu.cr4 |= enabled;
        program.cpu.regs[reg::RDI as usize] = base;
        program.run();
        assert_eq!(program.cpu.segs[seg::GS as usize].base, seen);
    }
}

#[test]
fn a_program_that_goes_over_to_32_bit_code_is_there_afterwards() {
    let mut program = Program::new(&in_32_bits(CODE, &[0xcd, 0x80]));
    assert!(program.run().is_none());
    assert_eq!((program.cs(), program.cpu.mode.code_bits, program.rip()), (0x23, 32, CODE + 9));
    assert!(!program.cpu.mode.long64);
}

#[test]
fn pages_come_to_32_bit_code_too() {
    let mut code = vec![0xa1]; // mov eax, [DATA]
    code.extend((DATA as u32).to_le_bytes());
    let mut program = Program::new(&in_32_bits(CODE, &code));
    program.poke(DATA, &[42]);
    assert_eq!(program.run(), Some(Ok(())));
    assert_eq!((program.cs(), program.rip()), (0x23, CODE + 9));
    program.guest.step().unwrap();
    assert_eq!((program.cpu.regs[reg::RAX as usize], program.rip()), (42, CODE + 14));
    assert!(!program.native.unavailable);
}

#[test]
fn selectors_of_code_are_loaded_as_what_they_are() {
    // mov eax, 0x33; mov ds, eax; syscall
    let mut program = Program::new(&[0xb8, 0x33, 0, 0, 0, 0x8e, 0xd8, 0x0f, 0x05]);
    program.rax();
    let ds = program.cpu.segs[seg::DS as usize];
    assert_eq!((ds.selector, ds.access), (0x33, 0xa0fb));
}

#[test]
fn a_jail_has_nothing_of_the_program_that_had_it_before() {
    if !std::arch::is_x86_feature_detected!("avx512bw") {
        return;
    }
    let mut program = Program::new(&[0xc4, 0xe1, 0xfb, 0x92, 0xcf, 0x0f, 0x05]); // kmovq k1, rdi; syscall
    program.native.cells.truncate(1);
    program.rax();
    program.poke(CODE, &[0xc4, 0xe1, 0xfb, 0x93, 0xc1, 0x0f, 0x05]); // kmovq rax, k1; syscall
    assert_eq!(program.rax(), DATA, "it is still there, in its own jail");
    let cr3 = program.cpu.cr3;
    program.cpu.write_cr3(cr3).unwrap();
    assert_eq!(program.rax(), 0);
}

#[test]
fn what_shows_the_hosts_cpu_is_left_to_the_translator() {
    for code in [&[0x0f, 0xa2, 0x90, 0x90], &[0xf3, 0x0f, 0xc7, 0xf8], &[0x0f, 0x01, 0xd0, 0x90]] {
        let mut program = Program::new(code);
        let left = program.run();
        if code[1] == 0xa2 && program.native.cells[0].jail.refuses_cpuid() {
            assert_eq!(left, Some(Ok(())), "interpreted");
            continue;
        }
        assert!(left.is_none());
        assert_eq!((program.rip(), program.native.stats.foreign), (CODE, 1), "{code:x?}");
    }
}

#[test]
fn a_host_that_maps_no_more_has_the_program_translated() {
    let mut program = Program::new(READ);
    program.poke(DATA, &[7]);
    let limit = |program: &Program, current: Option<u64>| {
        for pid in program.native.processes() {
            prlimit(Some(process(pid)), Resource::As, Rlimit { current, maximum: None }).unwrap();
        }
    };
    limit(&program, Some(2 * PAGE_SIZE));
    assert!(program.run().is_none());
    assert_eq!((program.rip(), program.native.stats.foreign), (CODE, 1));
    limit(&program, None);
    program.native.stats.foreign = 0;
    assert_eq!(program.rax(), 7);
    assert_eq!(program.cpu.rflags & rflags::IF, rflags::IF);
    assert_eq!(program.cpu.regs[RIP as usize], CODE + 3);
}

#[test]
fn a_program_with_a_page_where_the_stub_is_gets_another_jail() {
    const FREE: u64 = 0x28_0000;
    let mut program = Program::new(READ);
    let stub = program.native.cells[0].jail.stub();
    let index = |shift: u32| (stub >> shift & 511) * 8;
    program.poke(DATA, &[9]);
    program.put64(TABLES + index(39), &[FREE | USER]);
    for (table, shift) in [(0, 30), (1, 21)] {
        let next = FREE + (table + 1) * PAGE_SIZE;
        program.put64(FREE + table * PAGE_SIZE + index(shift), &[next | USER]);
    }
    program.put64(FREE + 2 * PAGE_SIZE + index(12), &[DATA | USER]);
    program.cpu.regs[reg::RDI as usize] = stub;
    let jails = program.native.cells.len();
    assert!(program.run().is_none());
    assert_eq!((program.rip(), program.native.cells.len()), (CODE, jails - 1));
    program.native.stats.foreign = 0;
    assert_eq!(program.rax(), 9);
}
