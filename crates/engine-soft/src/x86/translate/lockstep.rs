//! Each unit on the interpreter first, then on the translator from the same state, and the results
//! compared: registers, flags, vector registers, exceptions and memory.
//!
//! Memory is compared by pages: all pages start protected, and the first write to one keeps a copy. Units
//! are not chained, flags are complete at their ends, and they end in front of instructions that only
//! handlers execute, which are the interpreter's in both tiers. Units that reach outside of RAM are not
//! repeated. A unit that agreed [`COMPARISONS`] times is trusted from then on.
//!
//! Devices write to memory meanwhile, and nothing tells when. So only bytes that differ are put back, and
//! where the tiers seem to differ, both run again before it is said ([`ATTEMPTS`]): a mistake is made again,
//! while what a device wrote was [`Late`], and is there afterwards.

#![allow(unsafe_code)] // copies guest pages

use mem::{HostInt, PAGE_SIZE, Page};

use super::super::cpu::Cpu;
use super::super::exception::Exec;
use super::super::fpu::{Fpu, Pointers, X87, Ymm};
use super::super::op::{Op, RIP, reg, seg};
use super::super::run::copy_page;
use super::insn::{ARITHMETIC, Insn};
use engine::x86::bits::rflags;
use iced_x86::RflagsBits;

/// Mismatches that are printed.
const SHOWN: u64 = 20;
/// How often each unit is compared before it is trusted and runs as translated units usually do.
pub const COMPARISONS: u32 = 24;
/// How often both run before they are said to differ.
pub const ATTEMPTS: u32 = 3;

type Bytes = [u8; PAGE_SIZE as usize];

/// Pages as they were before they were written.
#[derive(Default)]
pub struct WriteLog {
    pages: Vec<(u64, Box<Bytes>)>,
    /// Something other than RAM was touched.
    pub outside: bool,
}

impl WriteLog {
    /// `page`, which is at `gpa`, is about to be written.
    pub fn before_write(&mut self, gpa: u64, page: &Page<'_>) {
        if !self.pages.iter().any(|&(known, _)| known == gpa) {
            self.pages.push((gpa, Box::new(copy_page(page))));
        }
    }
}

/// An instruction of a unit, as lockstep runs it.
pub struct Step {
    at: u32,
    op: Op,
    /// RFLAGS bits that it leaves undefined, and that it sets to something.
    undefined: u64,
    defined: u64,
    text: String,
}

/// iced's flag bits as RFLAGS bits.
fn rflags_of(bits: u32) -> u64 {
    [
        (RflagsBits::CF, rflags::CF),
        (RflagsBits::PF, rflags::PF),
        (RflagsBits::AF, rflags::AF),
        (RflagsBits::ZF, rflags::ZF),
        (RflagsBits::SF, rflags::SF),
        (RflagsBits::OF, rflags::OF),
    ]
    .into_iter()
    .filter(|&(bit, _)| bits & bit != 0)
    .map(|(_, flag)| flag)
    .sum()
}

impl Step {
    /// What lockstep needs of an instruction.
    pub fn new(insn: &Insn) -> Step {
        let undefined = insn.ins.rflags_undefined() & ARITHMETIC;
        Step {
            at: insn.at,
            op: insn.op,
            undefined: rflags_of(undefined),
            defined: rflags_of(insn.ins.rflags_modified() & ARITHMETIC & !undefined),
            text: format!("{:?} {:02x?}", insn.ins.code(), &insn.bytes[..insn.length() as usize]),
        }
    }
}

/// What is compared and put back.
#[derive(Clone)]
struct State {
    regs: [u64; 18],
    rflags: u64,
    cr2: u64,
    ymm: [Ymm; 16],
    mxcsr: u32,
    x87: X87,
    pointers: Pointers,
    /// GS base and the one that `SWAPGS` swaps in.
    gs: (u64, u64),
}

impl State {
    fn of(cpu: &Cpu) -> State {
        let mut regs = [0; 18];
        regs.copy_from_slice(&cpu.regs[..18]);
        let gs = (cpu.segs[seg::GS as usize].base, cpu.msrs.kernel_gs_base);
        let Fpu { ymm, mxcsr, x87, pointers, .. } = cpu.fpu;
        State { regs, rflags: cpu.rflags, cr2: cpu.cr2, ymm, mxcsr, x87, pointers, gs }
    }

    fn put(&self, cpu: &mut Cpu) {
        cpu.regs[..18].copy_from_slice(&self.regs);
        (cpu.rflags, cpu.cr2) = (self.rflags, self.cr2);
        (cpu.fpu.ymm, cpu.fpu.mxcsr) = (self.ymm, self.mxcsr);
        (cpu.fpu.x87, cpu.fpu.pointers) = (self.x87, self.pointers);
        (cpu.segs[seg::GS as usize].base, cpu.msrs.kernel_gs_base) = self.gs;
        cpu.update_view();
    }
}

/// The outcome of the interpreter's run, to compare the translator's with.
pub struct Expected {
    before: State,
    after: State,
    result: Exec,
    /// Pages written: address, before, after.
    pages: Vec<(u64, Box<Bytes>, Box<Bytes>)>,
    undefined: u64,
}

/// Runs the unit on the interpreter. `Ok` with what is expected of the translator, with the state put
/// back; `Err` with the result if the unit cannot be repeated.
pub fn interpret(cpu: &mut Cpu, steps: &[Step]) -> Result<Expected, Exec> {
    let before = State::of(cpu);
    let page = cpu.regs[RIP as usize] & !(PAGE_SIZE - 1);
    cpu.tlb.protect_writes();
    cpu.write_log = Some(Box::default());
    let mut undefined = 0;
    let mut result = Ok(());
    for (n, step) in steps.iter().enumerate() {
        let rip = page | u64::from(step.at);
        if cpu.regs[RIP as usize] != rip {
            break;
        }
        cpu.next_rip = rip.wrapping_add(step.op.len.into());
        result = (step.op.run)(cpu, &step.op);
        if result.is_err() {
            break;
        }
        cpu.regs[RIP as usize] = cpu.next_rip;
        cpu.wrap_rip();
        undefined = undefined & !step.defined | step.undefined;
        let expected = steps.get(n + 1).map(|next| page | u64::from(next.at));
        if cpu.leave_block || Some(cpu.next_rip) != expected {
            break;
        }
    }
    let log = *cpu.write_log.take().unwrap_or_default();
    if log.outside || cpu.leave_block {
        return Err(result);
    }
    let after = State::of(cpu);
    let vm = cpu.vm.clone();
    let pages: Vec<_> = log
        .pages
        .into_iter()
        .filter_map(|(gpa, old)| {
            let page = vm.ram.page(gpa)?;
            let new = Box::new(copy_page(&page));
            change(&page, &new, &old);
            Some((gpa, old, new))
        })
        .collect();
    before.put(cpu);
    // The pages written just now are the only ones that writes hit: they are in the next log already.
    let known = pages.iter().map(|(gpa, old, _): &(u64, Box<Bytes>, _)| (*gpa, old.clone())).collect();
    cpu.write_log = Some(Box::new(WriteLog { pages: known, outside: false }));
    Ok(Expected { before, after, result, pages, undefined })
}

/// Makes a page that is `from` be `to`, but where it is not `from` any more.
fn change(page: &Page<'_>, from: &Bytes, to: &Bytes) {
    for (i, (from, to)) in from.as_chunks::<8>().0.iter().zip(to.as_chunks::<8>().0).enumerate() {
        if from != to {
            // SAFETY: within the page, and aligned.
            unsafe { change_word(page.host.add(8 * i), from, to) };
        }
    }
}

/// # Safety
/// `host` is an aligned word of guest memory.
unsafe fn change_word(host: *mut u8, from: &[u8; 8], to: &[u8; 8]) {
    // SAFETY: the caller's promise.
    let mut known = unsafe { u64::load(host) };
    loop {
        let mut bytes = known.to_le_bytes();
        for ((byte, from), to) in bytes.iter_mut().zip(from).zip(to) {
            if byte == from {
                *byte = *to;
            }
        }
        // SAFETY: the caller's promise.
        match unsafe { u64::compare_exchange(host, known, u64::from_le_bytes(bytes)) } {
            Ok(_) => return,
            Err(now) => known = now,
        }
    }
}

/// What a device seems to have written to a page while it was compared: the page without it and with it.
pub struct Late {
    gpa: u64,
    without: Box<Bytes>,
    with: Box<Bytes>,
}

impl Late {
    /// Has it written now, where the vCPU did not.
    pub fn deliver(&self, cpu: &Cpu) {
        if let Some(page) = cpu.vm.ram.page(self.gpa) {
            change(&page, &self.without, &self.with);
        }
    }
}

/// A page that either wrote.
struct Written {
    gpa: u64,
    before: Box<Bytes>,
    found: Box<Bytes>,
    right: Box<Bytes>,
}

/// The translator's run, compared with the interpreter's.
pub struct Comparison {
    pages: Vec<Written>,
    differences: Vec<String>,
}

impl Expected {
    /// What the unit came to.
    pub fn result(&self) -> Exec {
        self.result
    }

    /// Compares the translator's run with it.
    pub fn compare(&self, cpu: &mut Cpu, result: Exec) -> Comparison {
        let pages = self.written(cpu);
        let mut found = State::of(cpu);
        // Flags that nothing reads any more may be stale at a fault.
        let mut ignored = self.undefined;
        if result.is_err() {
            ignored = rflags_of(ARITHMETIC);
        }
        found.rflags = found.rflags & !ignored | self.after.rflags & ignored;
        let mut differences = Vec::new();
        if result != self.result {
            differences.push(format!("result {result:?} instead of {:?}", self.result));
        }
        differences.extend(state_differences(&found, &self.after));
        differences.extend(pages.iter().filter_map(memory_difference));
        Comparison { pages, differences }
    }

    /// The pages that either wrote, as the translator left them.
    fn written(&self, cpu: &mut Cpu) -> Vec<Written> {
        let log = *cpu.write_log.take().unwrap_or_default();
        let found = |gpa| cpu.vm.ram.page(gpa).map(|page| Box::new(copy_page(&page)));
        // The translator's log has the interpreter's pages too.
        let written = log.pages.into_iter().filter_map(|(gpa, before)| {
            let known = self.pages.iter().find(|&&(known, ..)| known == gpa);
            let right = known.map_or_else(|| before.clone(), |(_, _, new)| new.clone());
            Some(Written { gpa, before, found: found(gpa)?, right })
        });
        written.collect()
    }

    /// Takes the interpreter's outcome.
    fn take(&self, cpu: &mut Cpu, pages: &[Written]) {
        for written in pages {
            if let Some(page) = cpu.vm.ram.page(written.gpa) {
                change(&page, &written.found, &written.right);
            }
        }
        self.after.put(cpu);
    }

    /// Takes the interpreter's outcome of a unit that the translator left half way, to be gone on elsewhere.
    pub fn adopt(&self, cpu: &mut Cpu) {
        let pages = self.written(cpu);
        self.take(cpu, &pages);
    }
}

impl Comparison {
    /// Whether the tiers agree.
    pub fn agrees(&self) -> bool {
        self.differences.is_empty()
    }

    /// The interpreter's outcome stays.
    pub fn end(self, cpu: &mut Cpu, expected: &Expected) {
        expected.take(cpu, &self.pages);
    }

    /// All as it was before the unit, for both to run again; answers what must not be lost by that if it
    /// was a device's.
    pub fn undo(self, cpu: &mut Cpu, expected: &Expected) -> Vec<Late> {
        let late = self.pages.into_iter().filter_map(|Written { gpa, before, found, right }| {
            change(&cpu.vm.ram.page(gpa)?, &found, &before);
            let mut with = before.clone();
            for (at, byte) in with.iter_mut().enumerate().filter(|&(at, _)| found[at] != right[at]) {
                // It came in either's run.
                *byte = if found[at] == before[at] { right[at] } else { found[at] };
            }
            (with != before).then_some(Late { gpa, without: before, with })
        });
        let late = late.collect();
        expected.before.put(cpu);
        late
    }

    /// Prints what differs.
    #[cold]
    pub fn report(&self, steps: &[Step], expected: &Expected, mismatches: u64) {
        if mismatches >= SHOWN {
            return;
        }
        let before = &expected.before;
        let mut text = format!("lockstep: the translator differs at {:#x}", before.regs[RIP as usize]);
        for step in steps {
            text += &format!("\n    {:03x} {}", step.at, step.text);
        }
        for number in 0..16 {
            text += &format!("\n    before: register {number} {:#x}", before.regs[number]);
        }
        text += &format!(
            "\n    before: RFLAGS {:#x}, stack {:#x}",
            before.rflags,
            before.regs[reg::RSP as usize]
        );
        for difference in &self.differences {
            text += &format!("\n  {difference}");
        }
        eprintln!("{text}");
    }
}

fn memory_difference(Written { gpa, found, right, .. }: &Written) -> Option<String> {
    let at = (0..found.len()).find(|&i| found[i] != right[i])?;
    let end = (at + 16).min(found.len());
    let (found, right) = (&found[at..end], &right[at..end]);
    Some(format!("memory at {:#x}: {found:02x?} instead of {right:02x?}", gpa + at as u64))
}

fn state_differences(found: &State, right: &State) -> Vec<String> {
    let mut differences = Vec::new();
    let mut check = |name: String, found: u64, right: u64| {
        if found != right {
            differences.push(format!("{name} {found:#x} instead of {right:#x}"));
        }
    };
    for number in 0..16 {
        check(format!("register {number}"), found.regs[number], right.regs[number]);
        for part in 0..4 {
            check(format!("ymm{number}[{part}]"), found.ymm[number][part], right.ymm[number][part]);
        }
    }
    check("RIP".into(), found.regs[RIP as usize], right.regs[RIP as usize]);
    check("RFLAGS".into(), found.rflags, right.rflags);
    check("CR2".into(), found.cr2, right.cr2);
    check("GS base".into(), found.gs.0, right.gs.0);
    check("kernel GS base".into(), found.gs.1, right.gs.1);
    check("MXCSR".into(), found.mxcsr.into(), right.mxcsr.into());
    check("FCW".into(), found.x87.fcw.into(), right.x87.fcw.into());
    check("FSW".into(), found.x87.fsw.into(), right.x87.fsw.into());
    check("FTW".into(), found.x87.ftw.into(), right.x87.ftw.into());
    for (number, (found, right)) in found.x87.st.iter().zip(&right.x87.st).enumerate() {
        check(format!("st{number}"), found[0], right[0]);
        check(format!("st{number}'s exponent"), found[1] & 0xffff, right[1] & 0xffff);
    }
    // Not the operand's address: see `x87`.
    check("FIP".into(), found.pointers.fip, right.pointers.fip);
    check("FOP".into(), found.pointers.fop.into(), right.pointers.fop.into());
    differences
}
