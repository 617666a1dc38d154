//! What translated code calls.

#![allow(unsafe_code)] // gets the vCPU and the translator as pointers

use mem::PAGE_SIZE;

use super::super::cpu::Cpu;
use super::super::op::{RIP, flag};
use super::frame::Frame;
use super::mode::mode_bits;
use super::site::{OpSite, Site};
use super::stubs::Helpers;
use super::translator::{Translator, missed_address};
use engine::x86::bits::rflags;

/// All of them.
pub const PLAIN: Helpers = Helpers { go, miss, run };
/// Those that measure.
pub const TIMED: Helpers = Helpers { go, miss: timed_miss, run: timed_run };
/// Leave translated code.
const LEAVE: u64 = 0;
/// The arithmetic flags but OF.
const LOW: u64 = rflags::CF | rflags::PF | rflags::AF | rflags::ZF | rflags::SF;

impl Frame {
    /// Takes the arithmetic flags of RFLAGS into the slot.
    pub fn set_flags(&mut self, rflags: u64) {
        self.flags = (rflags & LOW) << 8 | u64::from(rflags & rflags::OF != 0) | 2 << 8;
    }

    /// RFLAGS with the arithmetic flags in the slot.
    pub fn merge_flags(&self, rflags: u64) -> u64 {
        let of = if self.flags & 1 != 0 { rflags::OF } else { 0 };
        rflags & !(LOW | rflags::OF) | self.flags >> 8 & LOW | of
    }
}

/// # Safety
/// `cpu` is the vCPU that translated code runs on, entered by [`Translator::step`], whose address is in
/// the frame.
unsafe fn both<'a>(cpu: *mut Cpu) -> (&'a mut Cpu, &'a mut Translator) {
    // SAFETY: the caller's promise; `step` uses neither while translated code runs.
    unsafe {
        let cpu = &mut *cpu;
        let translator = std::ptr::with_exposed_provenance_mut::<Translator>(cpu.frame.translator as usize);
        (cpu, &mut *translator)
    }
}

/// A jump whose target is not linked or not in the jump cache: goes there if it is translated.
///
/// # Safety
/// Called by translated code only.
pub unsafe extern "sysv64" fn go(cpu: *mut Cpu, site: u64) -> u64 {
    // SAFETY: as for this function.
    let (cpu, translator) = unsafe { both(cpu) };
    translator.resolve(cpu, site).unwrap_or(LEAVE)
}

/// A load or store missed the fast TLB: refills it and tries again, or lets the handler do it.
///
/// # Safety
/// Called by translated code only.
pub unsafe extern "sysv64" fn miss(cpu: *mut Cpu, site: u64) -> u64 {
    // SAFETY: as for this function.
    let (cpu, translator) = unsafe { both(cpu) };
    let Some(Site::Op(op)) = translator.site(site) else { return LEAVE };
    let view = cpu.view();
    let linear = missed_address(cpu, &op);
    let inside = (linear % PAGE_SIZE) + u64::from(op.size) <= PAGE_SIZE;
    if inside && cpu.tlb.refill(view, linear, op.write) {
        translator.stats.refills += 1;
        return op.retry;
    }
    if op.group {
        return plain(cpu, translator, &op);
    }
    translator.stats.misses += 1;
    let mode = mode_bits(cpu);
    let next = run_op(cpu, translator, &op);
    if inside {
        cpu.tlb.refill(view, linear, op.write);
    }
    if next != LEAVE && mode_bits(cpu) != mode {
        return translator.known(cpu).unwrap_or(LEAVE); // FLDCW
    }
    next
}

/// An instruction that is not translated.
///
/// # Safety
/// Called by translated code only.
pub unsafe extern "sysv64" fn run(cpu: *mut Cpu, site: u64) -> u64 {
    // SAFETY: as for this function.
    let (cpu, translator) = unsafe { both(cpu) };
    let op = match translator.site(site) {
        Some(Site::Op(op)) => op,
        Some(Site::Straddle { at }) => return straddle(cpu, translator, at),
        _ => return LEAVE,
    };
    translator.stats.handlers += 1;
    let mode = mode_bits(cpu);
    let next = run_op(cpu, translator, &op);
    Translator::publish_deadline(cpu);
    if next != LEAVE && mode_bits(cpu) == mode {
        // Handlers execute what serializes (CPUID): code that another vCPU has rewritten is void behind it.
        if translator.code_changed() {
            return LEAVE;
        }
        Translator::set_mask(cpu);
        return next;
    }
    if translator.exception.is_some() { LEAVE } else { translator.known(cpu).unwrap_or(LEAVE) }
}

/// [`miss`], for statistics.
///
/// # Safety
/// As for [`miss`].
pub unsafe extern "sysv64" fn timed_miss(cpu: *mut Cpu, site: u64) -> u64 {
    // SAFETY: as for this function; nothing of both is used while the other one runs.
    let profile = unsafe { both(cpu) }.1.profile.clone();
    // SAFETY: as for this function.
    profile.map_or(LEAVE, |profile| profile.measure(&profile.misses, || unsafe { miss(cpu, site) }))
}

/// [`run`], for statistics.
///
/// # Safety
/// As for [`run`].
pub unsafe extern "sysv64" fn timed_run(cpu: *mut Cpu, site: u64) -> u64 {
    // SAFETY: as for `timed_miss`.
    let (state, translator) = unsafe { both(cpu) };
    let Some(profile) = translator.profile.clone() else { return LEAVE };
    if let Some(Site::Op(op)) = translator.site(site) {
        translator.count_handler(state, &op);
    }
    // SAFETY: as for this function.
    profile.measure(&profile.handlers, || unsafe { run(cpu, site) })
}

/// Runs an instruction across pages, and goes on in the next page if that is translated.
fn straddle(cpu: &mut Cpu, translator: &mut Translator, at: u16) -> u64 {
    translator.stats.straddles += 1;
    let Some(op) = translator.straddling(cpu, at) else {
        translator.interpret = true;
        cpu.rflags = cpu.frame.merge_flags(cpu.rflags);
        cpu.regs[RIP as usize] = cpu.frame.page.wrapping_add(at.into());
        return LEAVE;
    };
    translator.link_straddle(cpu, at);
    run_op(cpu, translator, &OpSite { resume: 1, ..OpSite::new(op, at) });
    Translator::publish_deadline(cpu);
    if translator.exception.is_some() { LEAVE } else { translator.known(cpu).unwrap_or(LEAVE) }
}

/// Goes on in the plain variant of the unit.
fn plain(cpu: &mut Cpu, translator: &mut Translator, site: &OpSite) -> u64 {
    cpu.regs[RIP as usize] = cpu.frame.page.wrapping_add(site.at.into());
    match translator.plain_entry(cpu) {
        Some(code) => {
            translator.refused(cpu, site, code);
            code
        }
        None => {
            cpu.rflags = cpu.frame.merge_flags(cpu.rflags);
            translator.plain = true;
            LEAVE
        }
    }
}

/// Runs the handler as the interpreter's loop does.
fn run_op(cpu: &mut Cpu, translator: &mut Translator, site: &OpSite) -> u64 {
    let rip = cpu.frame.page.wrapping_add(site.at.into());
    cpu.regs[RIP as usize] = rip;
    cpu.next_rip = rip.wrapping_add(site.op.len.into());
    cpu.rflags = cpu.frame.merge_flags(cpu.rflags);
    let x87 = cpu.take_x87();
    let result = (site.op.run)(cpu, &site.op);
    cpu.frame.set_flags(cpu.rflags);
    match result {
        Err(exception) => {
            translator.exception = Some(exception);
            LEAVE
        }
        Ok(()) => {
            cpu.regs[RIP as usize] = cpu.next_rip;
            cpu.wrap_rip();
            if cpu.leave_block || site.op.has(flag::ENDS_BLOCK) {
                return LEAVE;
            }
            // What follows in the unit counts on it; if the mode has changed, it is not gone on with.
            if x87 && super::x87::is_native(cpu) {
                cpu.put_x87();
            }
            site.resume
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_go_through_the_slot_unchanged() {
        let mut frame = Frame::default();
        for bits in 0..64u64 {
            let flag = |n: u64, bit| if bits >> n & 1 != 0 { bit } else { 0 };
            let value = rflags::IF
                | rflags::FIXED
                | flag(0, rflags::CF)
                | flag(1, rflags::PF)
                | flag(2, rflags::AF)
                | flag(3, rflags::ZF)
                | flag(4, rflags::SF)
                | flag(5, rflags::OF);
            frame.set_flags(value);
            assert_eq!(frame.merge_flags(rflags::IF | rflags::FIXED | 0x8d5), value);
        }
    }
}
