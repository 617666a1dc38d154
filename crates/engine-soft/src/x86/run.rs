//! The dispatcher: find the block at RIP, run it, look up for interrupts, again.

#![allow(unsafe_code)] // copies code bytes out of the guest's RAM

use engine::Exit;
use engine::x86::Activity;
use engine::x86::bits::rflags;
use mem::{HostInt, PAGE_SIZE};

use super::block::{Blocks, Key, MAX_OPS};
use super::cpu::Cpu;
use super::debug::DR6_BS;
use super::decode::{MAX_LEN, decode};
use super::event::{Event, Shutdown};
use super::exception::{Exception, Exec};
use super::op::{Op, RIP, flag, seg};
use super::tlb::View;
use super::walk::Intent;
use crate::vm::attention;

/// The timer is looked at every so many blocks; some microseconds.
const TIMER_BLOCKS: u32 = 128;

/// Interprets guest code until there is a reason to stop.
pub fn run(cpu: &mut Cpu, blocks: &mut Blocks) -> Exit {
    run_by(cpu, |cpu| step_block(cpu, blocks))
}

/// Runs guest code by `step`, which goes some way on with it, until there is a reason to stop.
pub fn run_by(cpu: &mut Cpu, mut step: impl FnMut(&mut Cpu) -> Exec) -> Exit {
    let vm = cpu.vm.clone();
    vm.rest.vcpu_wakes();
    renew_translations(cpu);
    let exit = match cpu.deliver_pending() {
        Ok(()) => go(cpu, &mut step),
        Err(Shutdown) => Exit::Shutdown,
    };
    vm.reach_epoch(cpu.id, u64::MAX);
    vm.rest.vcpu_sleeps();
    super::native::pin::unpin(cpu);
    exit
}

fn go(cpu: &mut Cpu, step: &mut impl FnMut(&mut Cpu) -> Exec) -> Exit {
    let vm = cpu.vm.clone();
    let mailbox = &vm.vcpus[cpu.id as usize];
    let mut until_timer = 0;
    loop {
        if until_timer == 0 {
            until_timer = TIMER_BLOCKS;
            cpu.check_timer();
        }
        until_timer -= 1;
        // With IF clear, what waits for it is no reason to look up at every block.
        let closed = if cpu.flag(rflags::IF) { 0 } else { attention::INTERRUPT | attention::EXTINT };
        if mailbox.attention() & !closed != 0 || cpu.activity != Activity::Running {
            match attend(cpu) {
                Attend::GoOn => {}
                Attend::Sleep => {
                    sleep(cpu);
                    until_timer = 0;
                    continue;
                }
                Attend::Leave(exit) => return exit,
            }
        }
        if let Err(exception) = step(cpu)
            && cpu.deliver(Event::Exception(exception)).is_err()
        {
            return Exit::Shutdown;
        }
    }
}

/// Runs one block, or a single instruction where something must be looked at behind it.
pub(super) fn step_block(cpu: &mut Cpu, blocks: &mut Blocks) -> Exec {
    let shadow = std::mem::take(&mut cpu.interrupt_shadow);
    cpu.leave_block = shadow;
    if cpu.watched() {
        let held = shadow && std::mem::take(&mut cpu.debug_shadow);
        return step_watched(cpu, blocks, held);
    }
    cpu.debug_shadow = false;
    step(cpu, blocks)?;
    if cpu.debug_trap != 0 { cpu.pending_trap() } else { Ok(()) }
}

/// Runs one instruction with breakpoints and traps around it. `held`: behind a load of SS, where
/// traps wait. Instruction breakpoints do not on AMD's CPUs; on Intel's they are lost.
#[cold]
fn step_watched(cpu: &mut Cpu, blocks: &mut Blocks, held: bool) -> Exec {
    if !held {
        cpu.pending_trap()?;
    }
    // RF spares exactly one instruction from its breakpoint; of a repeated one, all iterations.
    let (resumed, from) = (cpu.flag(rflags::RF), cpu.rip());
    if !(resumed || held && cpu.vm.cpuid.is_intel()) {
        let at = fetch_address(cpu)?;
        cpu.code_breakpoint(at)?;
    }
    cpu.rflags &= !rflags::RF;
    cpu.leave_block = true;
    if cpu.flag(rflags::TF) {
        cpu.debug_trap |= DR6_BS;
    }
    if let Err(exception) = step(cpu, blocks) {
        cpu.debug_trap = 0;
        return Err(exception);
    }
    if resumed && cpu.rip() == from {
        cpu.rflags |= rflags::RF;
    }
    if cpu.debug_shadow { Ok(()) } else { cpu.pending_trap() }
}

/// Runs the block at RIP, or as much of it as `leave_block` allows.
#[inline(always)]
fn step(cpu: &mut Cpu, blocks: &mut Blocks) -> Exec {
    let at = fetch_address(cpu)?;
    let gpa = code_page(cpu, at)? | at & (PAGE_SIZE - 1);
    let key = Key::new(gpa, &cpu.mode);
    let version = cpu.vm.ram.page(gpa).map_or(0, |page| page.state.version());
    if let Some(block) = blocks.find(key, version)
        && within_limit(cpu, block.len)
    {
        return run_ops(cpu, &block.ops);
    }
    run_new(cpu, blocks, at, key)
}

/// The instructions of a block, one after another.
#[inline(always)]
fn run_ops(cpu: &mut Cpu, ops: &[Op]) -> Exec {
    // RIP is only written on the way, never read back: what changes it ends the block or leaves it.
    let mut rip = cpu.regs[RIP as usize];
    for op in ops {
        cpu.regs[RIP as usize] = rip;
        rip = rip.wrapping_add(op.len.into());
        cpu.next_rip = rip;
        (op.run)(cpu, op)?;
        if cpu.leave_block {
            break;
        }
        debug_assert!(cpu.next_rip == rip || op.has(flag::ENDS_BLOCK), "a jump from within a block");
    }
    cpu.regs[RIP as usize] = cpu.next_rip;
    if cpu.mode.code_bits != 64 {
        cpu.regs[RIP as usize] &= 0xffff_ffff;
    }
    Ok(())
}

/// Linear address of the next instruction.
#[inline(always)]
fn fetch_address(cpu: &Cpu) -> Exec<u64> {
    let rip = cpu.regs[RIP as usize];
    if cpu.mode.long64 {
        return if super::access::canonical(rip) { Ok(rip) } else { Err(Exception::GP0) };
    }
    let cs = &cpu.segs[seg::CS as usize];
    if rip > cs.limit.into() {
        return Err(Exception::GP0);
    }
    Ok(cs.base.wrapping_add(rip) & 0xffff_ffff)
}

#[inline(always)]
fn within_limit(cpu: &Cpu, len: u32) -> bool {
    cpu.mode.long64 || cpu.regs[RIP as usize] + u64::from(len) - 1 <= cpu.segs[seg::CS as usize].limit.into()
}

fn fetch_view(cpu: &Cpu) -> View {
    if cpu.cpl == 3 { View::User } else { View::Kernel }
}

/// Guest-physical page of the code at a linear address.
#[inline(always)]
pub(super) fn code_page(cpu: &mut Cpu, linear: u64) -> Exec<u64> {
    if let Some(page) = cpu.tlb.code(cpu.cpl == 3, linear) {
        return Ok(page);
    }
    let walked = cpu.translate(fetch_view(cpu), linear, Intent::Fetch)?;
    cpu.tlb.fill_code(cpu.cpl == 3, linear, walked.gpa, walked.global, walked.large);
    Ok(walked.gpa & !(PAGE_SIZE - 1))
}

/// Decodes the block at `linear`, keeps it if that is safe, and runs it.
#[cold]
#[inline(never)]
fn run_new(cpu: &mut Cpu, blocks: &mut Blocks, linear: u64, key: Key) -> Exec {
    let gpa = code_page(cpu, linear)? | linear & (PAGE_SIZE - 1);
    let vm = cpu.vm.clone();
    let Some(page) = vm.ram.page(gpa) else {
        // Code in MMIO space (a ROM, or a jump gone astray): byte by byte, never kept.
        return run_one(cpu, linear);
    };
    let (version, fresh) = page.state.mark_code();
    let keep = vm.settle_code(cpu.id, fresh);
    if fresh {
        cpu.tlb.protect_writes();
    }
    let from = (gpa & (PAGE_SIZE - 1)) as usize;
    let bytes = copy_page(&page);
    let (ops, len) = decode_run(cpu, &bytes[from..]);
    if ops.is_empty() || !within_limit(cpu, len) {
        return run_one(cpu, linear);
    }
    if keep {
        let block = blocks.insert(key, version, len, ops.into());
        run_ops(cpu, &block.ops)
    } else {
        run_ops(cpu, &ops)
    }
}

/// The bytes of a page.
pub(super) fn copy_page(page: &mem::Page<'_>) -> [u8; PAGE_SIZE as usize] {
    let mut bytes = [0u8; PAGE_SIZE as usize];
    for (i, bytes) in bytes.chunks_exact_mut(8).enumerate() {
        // SAFETY: within the page.
        let word: u64 = unsafe { HostInt::load(page.host.add(8 * i)) };
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Decodes up to the end of the block or of the bytes. Stops before an instruction that does not
/// decode or is cut by the page's end: it is looked at when it is reached.
fn decode_run(cpu: &Cpu, bytes: &[u8]) -> (Vec<Op>, u32) {
    let (mut ops, mut at) = (Vec::with_capacity(16), 0);
    while ops.len() < MAX_OPS && at < bytes.len() {
        let Ok(Some(op)) = decode(&bytes[at..bytes.len().min(at + MAX_LEN)], &cpu.mode) else { break };
        at += usize::from(op.len);
        ops.push(op);
        if op.has(flag::ENDS_BLOCK) {
            break;
        }
    }
    (ops, at as u32)
}

/// Fetches, decodes and runs a single instruction that lies across pages, at a segment's limit, or
/// does not decode; with the faults that fetching its bytes raises, in their order.
#[cold]
fn run_one(cpu: &mut Cpu, linear: u64) -> Exec {
    let mut bytes = [0; MAX_LEN];
    for len in 1..=MAX_LEN {
        if !within_limit(cpu, len as u32) {
            return Err(Exception::GP0);
        }
        let at = linear.wrapping_add(len as u64 - 1);
        let gpa = code_page(cpu, at)? | at & (PAGE_SIZE - 1);
        cpu.read_physical(gpa, &mut bytes[len - 1..len]);
        if let Some(op) = decode(&bytes[..len], &cpu.mode)? {
            return run_ops(cpu, &[op]);
        }
    }
    Err(Exception::GP0)
}

enum Attend {
    GoOn,
    Sleep,
    Leave(Exit),
}

/// Looks at what others want of this vCPU, between two instructions.
#[cold]
#[inline(never)]
fn attend(cpu: &mut Cpu) -> Attend {
    let vm = cpu.vm.clone();
    let mailbox = &vm.vcpus[cpu.id as usize];
    if mailbox.take(attention::STOP) != 0 {
        return Attend::Leave(Exit::Stopped);
    }
    if mailbox.take(attention::CODE) != 0 {
        renew_translations(cpu);
    }
    if mailbox.take(attention::TIMER) != 0 {
        cpu.check_timer();
    }
    if mailbox.take(attention::SAMPLE) != 0 {
        cpu.native.sampled = cpu.cpl == 3;
        super::native::pin::make_room(cpu);
    }
    if mailbox.take(attention::INIT) != 0 {
        cpu.init(false);
    }
    if mailbox.take(attention::SIPI) != 0 && cpu.activity == Activity::WaitForSipi {
        cpu.start_up(mailbox.sipi_vector.load(std::sync::atomic::Ordering::Acquire) as u8);
    }
    if matches!(cpu.activity, Activity::WaitForSipi | Activity::WaitForInit) {
        return Attend::Sleep;
    }
    match take_interrupt(cpu) {
        Err(Shutdown) => Attend::Leave(Exit::Shutdown),
        Ok(()) if cpu.activity == Activity::Running => Attend::GoOn,
        Ok(()) => Attend::Sleep,
    }
}

/// Delivers the NMI or interrupt that is due, if the CPU takes it now.
fn take_interrupt(cpu: &mut Cpu) -> Result<(), Shutdown> {
    // Traps of the last instruction come before interrupts (SDM 3A, table 6-2).
    if cpu.interrupt_shadow || cpu.debug_trap != 0 {
        return Ok(());
    }
    let vm = cpu.vm.clone();
    let mailbox = &vm.vcpus[cpu.id as usize];
    if cpu.nmi_blocked {
        mailbox.merge_nmis();
    } else if mailbox.take_nmi() {
        cpu.activity = Activity::Running;
        return cpu.deliver(Event::Nmi);
    }
    if !cpu.flag(rflags::IF) {
        return Ok(());
    }
    mailbox.take(attention::INTERRUPT);
    if let Some(vector) = cpu.lapic.pending(&vm) {
        cpu.lapic.accept(vector, &vm);
        mailbox.notify(attention::INTERRUPT); // there may be more
        cpu.activity = Activity::Running;
        return cpu.deliver(Event::External(vector));
    }
    if mailbox.take(attention::EXTINT) != 0
        && (vm.extint() && mailbox.lapic.accepts_extint())
        && let Some(vector) = cpu.io().acknowledge_extint()
    {
        if vm.extint() {
            mailbox.notify(attention::EXTINT);
        }
        cpu.activity = Activity::Running;
        return cpu.deliver(Event::External(vector));
    }
    Ok(())
}

/// Drops the writable translations that are older than the latest code page.
fn renew_translations(cpu: &mut Cpu) {
    let vm = cpu.vm.clone();
    let epoch = vm.code_epoch();
    cpu.tlb.protect_writes();
    vm.reach_epoch(cpu.id, epoch);
}

/// Waits, halted or not yet started, for something to do or for the timer.
fn sleep(cpu: &mut Cpu) {
    let vm = cpu.vm.clone();
    let wakes = match cpu.activity {
        Activity::Halted => {
            let mut wakes = attention::STOP | attention::INIT;
            if !cpu.nmi_blocked {
                wakes |= attention::NMI;
            }
            if cpu.flag(rflags::IF) {
                wakes |= attention::INTERRUPT | attention::EXTINT;
            }
            wakes
        }
        _ => attention::STOP | attention::INIT | attention::SIPI,
    };
    vm.reach_epoch(cpu.id, u64::MAX);
    let limit = cpu.lapic.deadline().map(|deadline| {
        let ticks = deadline.saturating_sub(crate::clock::Clock::ticks());
        std::time::Duration::from_nanos(vm.clock.nanos_in(ticks))
    });
    let start = crate::clock::Clock::ticks();
    let mailbox = &vm.vcpus[cpu.id as usize];
    mailbox.deadline.store(u64::MAX, std::sync::atomic::Ordering::Relaxed);
    vm.rest.vcpu_sleeps();
    super::native::pin::unpin(cpu);
    mailbox.sleep(wakes, limit);
    vm.rest.vcpu_wakes();
    cpu.idle_ticks += crate::clock::Clock::ticks().wrapping_sub(start);
    cpu.check_timer();
    renew_translations(cpu);
}

impl Cpu {
    /// Start-up IPI: real mode at `vector` × 4 KiB.
    fn start_up(&mut self, vector: u8) {
        let cs = &mut self.segs[seg::CS as usize];
        cs.selector = u16::from(vector) << 8;
        cs.base = u64::from(vector) << 12;
        self.regs[RIP as usize] = 0;
        self.activity = Activity::Running;
        self.update_mode();
    }
}

#[cfg(test)]
mod tests {
    use super::super::debug::DR6_BS;
    use super::super::systest::*;
    use super::super::testing::CODE;
    use super::*;

    #[test]
    fn a_trap_that_waits_comes_before_an_nmi_and_an_interrupt() {
        let mut system = System::long(&[0x90]);
        system.handler(2, 0x8e, 0);
        system.cpu.debug_trap = DR6_BS; // as SYSRET leaves it
        system.cpu.rflags |= rflags::IF;
        system.cpu.vm.vcpus[0].send_nmi();
        assert!(matches!(attend(&mut system.guest.cpu), Attend::GoOn));
        assert_eq!(system.rip(), CODE, "the NMI waits");
        assert!(system.guest.step().is_err(), "#DB in front of the NOP");
        assert_eq!((system.rip(), system.cpu.dr[6] & DR6_BS), (CODE, DR6_BS));
        assert!(matches!(attend(&mut system.guest.cpu), Attend::GoOn));
        assert_eq!(system.rip(), HANDLERS + 16 * 2);
    }
}
