//! A 64-bit guest that sleeps until devices wake it, through the engine's public face.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use engine::x86::bits::{cr0, cr4, efer, msr};
use engine::x86::{CpuState as X86State, DescriptorTable, Segment};
use engine::{CpuIo, CpuState, Engine, Exit, Msi, StopHandle, Vcpu, Vm, VmConfig};
use engine_soft::SoftEngine;
use mem::{Bytes, GuestAddress, GuestRam};

const CODE: u64 = 0x1000;
const HANDLER: u64 = CODE + 0x80;
const GDT: u64 = 0x2000;
const IDT: u64 = 0x3000;
const TABLES: u64 = 0x4000;
const STACK: u64 = 0x8000;
/// Interrupts taken, then the last one's return address.
const COUNT: u64 = 0x9000;
const VECTOR: u64 = 0x40;

/// Turns the local APIC on, then: sti; hlt; cli, until three interrupts have come; then port 0xf4.
const PROGRAM: &[u8] = &[
    0xbf, 0xf0, 0x00, 0xe0, 0xfe, 0xc7, 0x07, 0xff, 0x01, 0x00, 0x00, // [0xfee000f0] = 0x1ff
    0x48, 0x8d, 0x1d, 0x02, 0x00, 0x00, 0x00, // lea rbx, [the instruction behind hlt]
    0xfb, 0xf4, 0xfa, // sti; hlt; cli
    0x83, 0x3c, 0x25, 0x00, 0x90, 0x00, 0x00, 0x03, 0x72, 0xf3, // jump back while [0x9000] < 3
    0xb0, 0x2a, 0xe6, 0xf4, 0x0f, 0x0b, // out 0xf4, 42; ud2
];

/// push rax; ++[0x9000]; [0x9008] = return address; [0xfee000b0] = 0 (EOI); pop rax; iretq
const SERVICE: &[u8] = &[
    0x50, 0xff, 0x04, 0x25, 0x00, 0x90, 0x00, 0x00, 0x48, 0x8b, 0x44, 0x24, 0x08, 0x48, 0x89, 0x04, 0x25,
    0x08, 0x90, 0x00, 0x00, 0xb8, 0xb0, 0x00, 0xe0, 0xfe, 0xc7, 0x00, 0x00, 0x00, 0x00, 0x00, 0x58, 0x48,
    0xcf,
];

/// Stops the vCPU when the guest writes to port 0xf4.
#[derive(Default)]
struct Ports {
    written: AtomicU32,
    stop: OnceLock<Arc<dyn StopHandle>>,
}

impl CpuIo for Ports {
    fn port_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&self, port: u16, data: &[u8]) {
        if port == 0xf4 {
            self.written.store(data[0].into(), Ordering::SeqCst);
            self.stop.get().unwrap().stop();
        }
    }
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn acknowledge_extint(&self) -> Option<u8> {
        None
    }
    fn end_of_interrupt(&self, _: u8) {}
}

fn put(ram: &GuestRam, at: u64, words: &[u64]) {
    for (at, word) in (at..).step_by(8).zip(words) {
        ram.write_slice(&word.to_le_bytes(), GuestAddress(at)).unwrap();
    }
}

/// Code, tables, and large pages over the first 2 MiB and the local APIC.
fn memory() -> GuestRam {
    const TABLE: u64 = 3;
    const LARGE: u64 = 0x83;
    let ram = GuestRam::new(&[0..0x20_0000]).unwrap();
    ram.write_slice(PROGRAM, GuestAddress(CODE)).unwrap();
    ram.write_slice(SERVICE, GuestAddress(HANDLER)).unwrap();
    put(&ram, GDT, &[0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]);
    for vector in [VECTOR, VECTOR + 1] {
        put(&ram, IDT + 16 * vector, &[HANDLER | 8 << 16 | 0x8e00 << 32, 0]);
    }
    put(&ram, TABLES, &[(TABLES + 0x1000) | TABLE]);
    put(&ram, TABLES + 0x1000, &[(TABLES + 0x2000) | TABLE, 0, 0, (TABLES + 0x3000) | TABLE]);
    put(&ram, TABLES + 0x2000, &[LARGE]);
    put(&ram, TABLES + 0x3000 + 0x1f7 * 8, &[0xfee0_0000 | LARGE]);
    ram
}

fn in_64_bit_mode(mut cpu: X86State) -> X86State {
    let flat = |selector, access| Segment { selector, base: 0, limit: u32::MAX, access, unusable: false };
    cpu.segments = [flat(0x10, 0xc093); 6];
    cpu.segments[1] = flat(8, 0xa09b);
    cpu.gdtr = DescriptorTable { base: GDT, limit: 23 };
    cpu.idtr = DescriptorTable { base: IDT, limit: 0xfff };
    (cpu.cr0, cpu.cr3, cpu.cr4) = (cr0::PE | cr0::PG | cr0::ET, TABLES, cr4::PAE);
    let at = cpu.msrs.iter_mut().find(|(index, _)| *index == msr::EFER).unwrap();
    at.1 = efer::LME | efer::LMA;
    (cpu.rip, cpu.gpr[4]) = (CODE, STACK);
    cpu
}

fn guest() -> (GuestRam, Arc<dyn Vm>, Box<dyn Vcpu>) {
    let ram = memory();
    let vm = SoftEngine::new()
        .unwrap()
        .create_vm(&VmConfig { cpus: 1, ..VmConfig::default() }, ram.clone())
        .unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let CpuState::X86(power_on) = vcpu.save().unwrap() else { unreachable!() };
    vcpu.restore(&CpuState::X86(Box::new(in_64_bit_mode(*power_on)))).unwrap();
    (ram, vm, vcpu)
}

fn word(ram: &GuestRam, at: u64) -> u64 {
    let mut bytes = [0; 8];
    ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
fn a_sleeping_guest_wakes_for_each_message_and_goes_on_behind_its_hlt() {
    let (ram, vm, mut vcpu) = guest();
    let ports = Ports::default();
    ports.stop.set(vcpu.stop_handle()).ok().unwrap();
    let done = AtomicBool::new(false);
    let exit = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                vm.send_msi(Msi { address: 0xfee0_0000, data: VECTOR as u32 });
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let exit = vcpu.run(&ports).unwrap();
        done.store(true, Ordering::SeqCst);
        exit
    });
    assert_eq!((exit, ports.written.load(Ordering::SeqCst)), (Exit::Stopped, 42));
    assert_eq!(word(&ram, COUNT) & 0xffff_ffff, 3);
    let CpuState::X86(state) = vcpu.save().unwrap() else { unreachable!() };
    assert_eq!(word(&ram, COUNT + 8), state.gpr[3], "STI lets the HLT begin before an interrupt comes");
}

/// Runs `program` with the service routine until it writes to port 0xf4.
fn runs(program: &[u8]) -> (GuestRam, Box<dyn Vcpu>) {
    let (ram, _vm, mut vcpu) = guest();
    ram.write_slice(program, GuestAddress(CODE)).unwrap();
    let ports = Ports::default();
    ports.stop.set(vcpu.stop_handle()).ok().unwrap();
    assert_eq!(vcpu.run(&ports).unwrap(), Exit::Stopped);
    assert_eq!(ports.written.load(Ordering::SeqCst), 42);
    (ram, vcpu)
}

#[test]
fn sti_opens_a_window_behind_its_shadow_even_if_cli_comes_next() {
    // `sti; nop; cli`, and `sti; jmp; cli`
    for window in [&[0xfb, 0x90, 0xfa, 0x90, 0x90][..], &[0xfb, 0xeb, 0x00, 0xfa, 0x90]] {
        let mut program = PROGRAM[..11].to_vec(); // turns the local APIC on
        program.extend([0xbf, 0x00, 0x03, 0xe0, 0xfe]); // mov edi, the low half of the ICR
        for vector in [0x41, 0x40] {
            program.extend([0xc7, 0x07, vector, 0x00, 0x04, 0x00]); // to self
        }
        program.extend(window);
        program.extend([0xb0, 0x2a, 0xe6, 0xf4, 0x0f, 0x0b]); // out 0xf4, 42; ud2
        let (ram, _) = runs(&program);
        assert_eq!(word(&ram, COUNT) & 0xffff_ffff, 2, "both interrupts come through {window:02x?}");
    }
}

#[test]
fn of_the_nmis_that_come_while_one_is_served_one_is_left() {
    let mut program = PROGRAM[..11].to_vec();
    // mov edi, the low half of the ICR; an NMI to this CPU; nops
    program.extend([0xbf, 0x00, 0x03, 0xe0, 0xfe, 0xc7, 0x07, 0x00, 0x04, 0x00, 0x00]);
    program.extend([0x90; 8]);
    program.extend([0xb0, 0x2a, 0xe6, 0xf4, 0x0f, 0x0b]); // out 0xf4, 42; ud2
    // inc dword [0x9000]; cmp dword [0x9000], 1; jne +0x12; three more; iretq
    let mut handler = vec![0xff, 0x04, 0x25, 0x00, 0x90, 0x00, 0x00];
    handler.extend([0x83, 0x3c, 0x25, 0x00, 0x90, 0x00, 0x00, 0x01, 0x75, 0x12]);
    (0..3).for_each(|_| handler.extend([0xc7, 0x07, 0x00, 0x04, 0x00, 0x00]));
    handler.extend([0x48, 0xcf]);
    const NMI: u64 = CODE + 0x100;
    let (ram, _vm, mut vcpu) = guest();
    ram.write_slice(&program, GuestAddress(CODE)).unwrap();
    ram.write_slice(&handler, GuestAddress(NMI)).unwrap();
    put(&ram, IDT + 16 * 2, &[NMI | 8 << 16 | 0x8e00 << 32, 0]);
    let ports = Ports::default();
    ports.stop.set(vcpu.stop_handle()).ok().unwrap();
    assert_eq!(vcpu.run(&ports).unwrap(), Exit::Stopped);
    assert_eq!(word(&ram, COUNT) & 0xffff_ffff, 2);
}

#[test]
fn a_guest_without_handlers_ends_in_a_shutdown() {
    let (ram, _vm, mut vcpu) = guest();
    ram.write_slice(&[0x0f, 0x0b], GuestAddress(CODE)).unwrap(); // ud2
    assert_eq!(vcpu.run(&Ports::default()).unwrap(), Exit::Shutdown);
}
