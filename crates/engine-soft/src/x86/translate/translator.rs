//! Finds, makes and enters units.

#![allow(unsafe_code)] // enters translated code, reads code bytes out of guest memory

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use engine::Error;
use engine::x86::bits::rflags;
use iced_x86::{Decoder, DecoderOptions, FlowControl, InstructionInfoFactory};
use mem::PAGE_SIZE;

use super::super::block::Blocks;
use super::super::cpu::Cpu;
use super::super::decode::{self, MAX_LEN};
use super::super::exception::{Exception, Exec};
use super::super::fast::{FAST_ENTRIES, NO_CONTEXT};
use super::super::op::{Op, RIP, flag};
use super::super::run::{code_page, copy_page, step_block};
use super::build::{End, Place, Unit, build, build_across, build_straddle, liveness};
use super::cache::CodeCache;
use super::groups::{REFUSALS, plan};
use super::helpers;
use super::insn::{ARITHMETIC, Class, Insn, decode};
use super::links::{Joint, Link, MAX_ALIASES};
use super::lockstep::{self, Step};
use super::mode::{BITS, ModeBits, PLAIN, context_of, features_of, mode_bits, translatable};
use super::site::{OpSite, Site};
use super::stats::Stats;
use super::stubs::{SITE_FAR, SITE_INDIRECT, Stubs};
use crate::clock::Clock;
use crate::profile::Profile;
use crate::vm::attention;

/// Attention that waits for RFLAGS.IF.
pub(super) const INTERRUPTS: u32 = attention::INTERRUPT | attention::EXTINT;
/// Most instructions of a unit.
const MAX_INSNS: usize = 48;
/// Most instructions that a look ahead for dead flags decodes.
const LOOK_AHEAD: usize = 4;
/// Code and sites of the longest unit need less.
const ROOM: usize = 64 << 10;
const SITES_OF_A_UNIT: usize = 1 << 10;
/// Sites, units and instructions across pages kept before everything is dropped.
const MAX_SITES: usize = 1 << 20;
const MAX_UNITS: usize = 1 << 18;
const MAX_STRADDLES: usize = 1 << 17;
/// Bytes that a vCPU's translated code and all that is remembered of it take at most; the tables grow by
/// doubling. The code is mapped twice, and counts twice where a process's resident pages are counted.
pub const MEMORY_LIMIT: usize = 2 * super::cache::CACHE_SIZE
    + 2 * MAX_SITES * size_of::<Site>()
    + 2 * MAX_UNITS * (size_of::<(Key, Unit)>() + size_of::<(u64, Page)>() + 2 * size_of::<Key>())
    + 2 * MAX_STRADDLES * size_of::<(Key, Straddle)>()
    + 2 * MAX_ALIASES * size_of::<(u64, u64)>();
/// Jumps that are linked anew, at most, from one tick to the next: this costs as much as a few hundred
/// instructions, and is in vain if the next address space to run has other ideas.
const RELINKS: u64 = 64;
pub(super) const OFFSET: u64 = PAGE_SIZE - 1;

/// What a unit is found by: page and offset, and the parts of the mode that translation depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key(u64);

impl Key {
    pub(super) fn new(gpa: u64, mode: ModeBits) -> Key {
        Key(gpa << BITS | u64::from(mode))
    }
}

#[derive(Default)]
pub(in super::super) struct Hasher(u64);

impl std::hash::Hasher for Hasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(byte.into()));
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
}

pub(in super::super) type Map<K, V> = HashMap<K, V, std::hash::BuildHasherDefault<Hasher>>;

/// Units of one page.
struct Page {
    version: u32,
    units: Vec<Key>,
}

/// A decoded instruction across two pages.
struct Straddle {
    versions: [u32; 2],
    /// Guest-physical address of the second page.
    second: u64,
    op: Op,
    /// Guard of the unit that it is translated to.
    guard: Option<u64>,
}

/// The translator of one vCPU.
pub struct Translator {
    pub(super) cache: CodeCache,
    stubs: Stubs,
    sites: Vec<Site>,
    pub(super) units: Map<Key, Unit>,
    pages: Map<u64, Page>,
    straddles: Map<Key, Straddle>,
    /// How often the check of a group, by its address, found a page that cannot be written.
    refusals: Map<u64, u32>,
    /// The instructions of each unit, and how often it was compared, in lockstep.
    steps: Map<Key, (Vec<Step>, u32)>,
    /// Contexts by number: when the jump cache was last cleared, and the number of links made since.
    pub(super) link_ids: Map<u64, (u64, u64)>,
    pub(super) next_link_id: u64,
    /// The context that the jump cache's link number is of.
    pub(super) link_context: u64,
    /// Linear address at which a page is executed, by page and link number.
    pub(super) aliases: Map<u64, u64>,
    /// Changes to code pages that have been looked at ([`mem::code_changes`]).
    seen: u64,
    pub(super) link: Option<Link>,
    /// The next instruction is for the interpreter.
    pub(super) interpret: bool,
    /// The next unit is to be the plain variant ([`groups`](super::groups)).
    pub(super) plain: bool,
    /// Raised by a handler that translated code called.
    pub(super) exception: Option<Exception>,
    factory: InstructionInfoFactory,
    /// Keeps the time, for statistics.
    pub profile: Option<Arc<Profile>>,
    /// What happened.
    pub stats: Stats,
    /// Units end in front of what has effects outside of registers and memory, and flags are complete at
    /// their ends.
    pub(super) lockstep: bool,
}

impl Translator {
    /// A translator with an empty code cache.
    pub fn new(lockstep: bool, profile: Option<Arc<Profile>>) -> Result<Translator, Error> {
        let mut cache = CodeCache::new()?;
        let avx = std::arch::is_x86_feature_detected!("avx");
        let helpers = if profile.is_some() { helpers::TIMED } else { helpers::PLAIN };
        let stubs = Stubs::install(&mut cache, helpers, avx)?;
        Ok(Translator {
            cache,
            stubs,
            sites: vec![Site::Indirect, Site::FarMiss],
            link_ids: Map::default(),
            next_link_id: 1,
            link_context: NO_CONTEXT,
            aliases: Map::default(),
            units: Map::default(),
            pages: Map::default(),
            straddles: Map::default(),
            refusals: Map::default(),
            steps: Map::default(),
            seen: 0,
            link: None,
            interpret: false,
            plain: false,
            exception: None,
            factory: InstructionInfoFactory::new(),
            profile,
            stats: Stats::default(),
            lockstep,
        })
    }

    pub(super) fn site(&self, number: u64) -> Option<Site> {
        self.sites.get(number as usize).copied()
    }

    #[cold]
    pub(super) fn count_handler(&mut self, cpu: &mut Cpu, site: &OpSite) {
        let linear = cpu.frame.page.wrapping_add(site.at.into());
        let mut bytes = [0; MAX_LEN];
        let len = usize::from(site.op.len);
        if cpu.read_linear(cpu.view(), linear, &mut bytes[..len]).is_ok() {
            let ins = Decoder::new(cpu.mode.code_bits.into(), &bytes[..len], DecoderOptions::NONE).decode();
            if let Some(profile) = &self.profile {
                profile.fallback(ins.code());
            }
        }
    }

    fn is_full(&self) -> bool {
        self.cache.room() < ROOM
            || self.sites.len() + SITES_OF_A_UNIT > MAX_SITES
            || self.units.len() >= MAX_UNITS
            || self.straddles.len() >= MAX_STRADDLES
    }

    /// Drops all translated code.
    pub fn clear(&mut self, cpu: &mut Cpu) {
        self.cache.reset();
        self.sites.truncate(2);
        self.units.clear();
        self.pages.clear();
        self.straddles.clear();
        self.steps.clear();
        self.refusals.clear();
        self.link = None;
        self.link_ids.clear();
        self.aliases.clear();
        cpu.tlb.jumps.clear();
        self.stats.flushes += 1;
    }

    /// Runs guest code for a while: translated if it can be, else one block in the interpreter.
    ///
    /// # Safety
    /// `cpu` is in a [`CpuBox`](super::frame::CpuBox).
    pub unsafe fn step(&mut self, cpu: &mut Cpu, blocks: &mut Blocks) -> Exec {
        let plain = if std::mem::take(&mut self.plain) { PLAIN } else { 0 };
        cpu.end_idle_resume();
        if std::mem::take(&mut self.interpret) || !translatable(cpu) {
            return self.interpret(cpu, blocks);
        }
        if self.link.is_none()
            && plain == 0
            && let Some(code) = self.known(cpu)
        {
            cpu.frame.set_flags(cpu.rflags);
            Translator::publish_deadline(cpu);
            self.stats.entries += 1;
            // SAFETY: the caller's promise.
            return unsafe { self.enter(cpu, code) };
        }
        let rip = cpu.regs[RIP as usize];
        if !super::super::access::canonical(rip) {
            return Err(Exception::GP0); // in 64-bit code, others have fewer bits
        }
        let gpa = code_page(cpu, rip)? | rip & OFFSET;
        self.void_changed(cpu);
        let mode = mode_bits(cpu) | plain;
        let Some(unit) = self.find(cpu, gpa, mode) else {
            return self.interpret(cpu, blocks);
        };
        let key = Key::new(gpa, mode);
        let context = self.prepare(cpu, rip, mode, unit, self.trusted(key));
        if self.next_link_id >= u32::MAX.into() {
            self.link_ids.clear();
            self.next_link_id = 1;
            self.clear(cpu);
            return Ok(()); // all code was dropped: look again
        }
        let linkable = self.number_links(cpu, rip, gpa, context);
        if self.trusted(key) {
            self.follow_link(cpu, rip, gpa, mode, unit, linkable);
        }
        self.stats.entries += 1;
        if !self.trusted(key) {
            // SAFETY: the caller's promise.
            return unsafe { self.step_both(cpu, key, unit) };
        }
        // SAFETY: the caller's promise.
        unsafe { self.enter(cpu, unit.indirect) }
    }

    fn interpret(&mut self, cpu: &mut Cpu, blocks: &mut Blocks) -> Exec {
        self.stats.interpreted += 1;
        match &self.profile {
            None => step_block(cpu, blocks),
            Some(profile) => profile.measure(&profile.blocks, || step_block(cpu, blocks)),
        }
    }

    /// Whether a unit runs on the translator alone.
    fn trusted(&self, key: Key) -> bool {
        !self.lockstep || self.steps.get(&key).is_some_and(|(_, count)| *count >= lockstep::COMPARISONS)
    }

    /// The unit on both tiers.
    ///
    /// # Safety
    /// As for [`Translator::step`].
    unsafe fn step_both(&mut self, cpu: &mut Cpu, key: Key, unit: Unit) -> Exec {
        let Some((steps, count)) = self.steps.remove(&key) else { return Ok(()) };
        cpu.frame.attention_mask = 0;
        let mut late = Vec::new();
        let mut attempt = 1;
        let result = loop {
            let expected = match lockstep::interpret(cpu, &steps) {
                Ok(expected) => expected,
                Err(result) => break result,
            };
            // SAFETY: the caller's promise; the unit is still there.
            let found = unsafe { self.enter_alone(cpu, unit) };
            self.stats.compared += u64::from(attempt == 1);
            if std::mem::take(&mut self.plain) {
                expected.adopt(cpu);
                break expected.result();
            }
            let comparison = expected.compare(cpu, found);
            if comparison.agrees() {
                comparison.end(cpu, &expected);
                break expected.result();
            }
            if attempt == lockstep::ATTEMPTS || !self.units.contains_key(&key) {
                comparison.report(&steps, &expected, self.stats.mismatches);
                self.stats.mismatches += 1;
                comparison.end(cpu, &expected);
                late.clear(); // nobody knows whose it was
                break expected.result();
            }
            late.extend(comparison.undo(cpu, &expected));
            attempt += 1;
        };
        late.iter().for_each(|late| late.deliver(cpu));
        if self.units.contains_key(&key) {
            self.steps.insert(key, (steps, count + 1));
        }
        result
    }

    /// Runs a unit and nothing behind it: no links, and no jumps through the cache.
    ///
    /// # Safety
    /// As for [`Translator::step`], and the unit is there.
    unsafe fn enter_alone(&mut self, cpu: &mut Cpu, unit: Unit) -> Exec {
        cpu.frame.context = NO_CONTEXT - 1;
        cpu.frame.page = cpu.regs[RIP as usize] & !OFFSET;
        cpu.frame.set_flags(cpu.rflags);
        cpu.tlb.jumps.link_id = 0;
        cpu.tlb.jumps.forget_latest();
        cpu.leave_block = false;
        // SAFETY: the caller's promise.
        let result = unsafe { self.enter(cpu, unit.indirect) };
        self.link = None;
        self.interpret = false;
        result
    }

    /// Runs translated code from an entry of a unit on.
    ///
    /// # Safety
    /// As for [`Translator::step`].
    unsafe fn enter(&mut self, cpu: &mut Cpu, code: u64) -> Exec {
        let translator = std::ptr::from_mut(self);
        cpu.frame.translator = translator.expose_provenance() as u64;
        let cpu = std::ptr::from_mut(cpu);
        // SAFETY: the caller's promise; the unit was found just now. Neither `self` nor the vCPU is used
        // but through these pointers until it returns.
        unsafe {
            match (*translator).profile.clone() {
                None => (*translator).stubs.enter(cpu, code),
                Some(profile) => {
                    profile.measure(&profile.translated, || (*translator).stubs.enter(cpu, code));
                }
            }
            (*cpu).take_x87();
            (*translator).left(&mut *cpu)
        }
    }

    /// Translated code was left: brings RIP and RFLAGS up to date.
    fn left(&mut self, cpu: &mut Cpu) -> Exec {
        if let Some(exception) = self.exception.take() {
            return Err(exception);
        }
        let page = cpu.frame.page;
        match self.site(cpu.frame.site) {
            Some(Site::Indirect) | None => {
                self.stats.jump_misses += 1;
                cpu.regs[RIP as usize] = cpu.frame.scratch[0];
                if let Some(profile) = &self.profile {
                    profile.jump_miss(cpu.frame.scratch[0]);
                }
            }
            // The handler did it.
            Some(Site::Op(_) | Site::Straddle { .. }) => return Ok(()),
            Some(Site::Link { patch, target, entry, plain }) => {
                let rip = page | u64::from(target);
                cpu.regs[RIP as usize] = rip;
                self.plain = plain;
                self.want_link(cpu, Joint::Near(patch, entry));
            }
            Some(Site::Far(site)) => {
                cpu.regs[RIP as usize] = page.wrapping_add(site.offset as u64);
                cpu.wrap_rip();
                self.want_link(cpu, Joint::Far(site));
            }
            Some(Site::FarMiss) => {
                self.stats.jump_misses += 1;
                cpu.regs[RIP as usize] = cpu.frame.scratch[0];
                if let Some(Site::Far(site)) = self.site(cpu.frame.far_site) {
                    self.want_link(cpu, Joint::Far(site));
                }
            }
            Some(Site::Leave { at }) => {
                self.stats.attentions += 1;
                cpu.frame.relinks = RELINKS;
                cpu.regs[RIP as usize] = page.wrapping_add(at.into());
            }
        }
        debug_assert_eq!((SITE_INDIRECT, SITE_FAR), (0, 1));
        cpu.wrap_rip();
        cpu.rflags = cpu.frame.merge_flags(cpu.rflags);
        Ok(())
    }

    /// Fills the frame for the unit at `rip`.
    fn prepare(&mut self, cpu: &mut Cpu, rip: u64, mode: ModeBits, unit: Unit, trusted: bool) -> u64 {
        let context = context_of(cpu, mode & !PLAIN);
        let private = cpu.cpl != 3 && !cpu.tlb.code_is_global(false, rip);
        if trusted && mode & PLAIN == 0 {
            cpu.tlb.jumps.fill(rip, context, unit.indirect, private);
        }
        cpu.tlb.jumps.enter(context);
        cpu.frame.context = context;
        cpu.frame.page = rip & !OFFSET;
        cpu.frame.set_flags(cpu.rflags);
        cpu.frame.attention = cpu.vm.vcpus[cpu.id as usize].attention_address();
        cpu.leave_block = false;
        cpu.debug_shadow = false;
        Translator::set_mask(cpu);
        Translator::publish_deadline(cpu);
        context
    }

    /// Which attention bits would be acted upon.
    pub(super) fn set_mask(cpu: &mut Cpu) {
        let mut mask = u32::MAX;
        if cpu.rflags & rflags::IF == 0 {
            mask &= !INTERRUPTS;
        }
        if cpu.nmi_blocked {
            mask &= !attention::NMI;
        }
        cpu.frame.attention_mask = mask.into();
    }

    /// Whether code pages were written since units were last compared with theirs.
    pub(super) fn code_changed(&self) -> bool {
        mem::code_changes() != self.seen
    }

    /// Lets the ticker know when the APIC timer is due.
    pub(in super::super) fn publish_deadline(cpu: &Cpu) {
        let deadline = cpu.lapic.deadline().unwrap_or(u64::MAX);
        cpu.vm.vcpus[cpu.id as usize].deadline.store(deadline, Ordering::Relaxed);
        cpu.vm.rest.expect(deadline);
    }

    /// Drops the code of pages that have been written.
    fn void_changed(&mut self, cpu: &mut Cpu) {
        let changes = mem::code_changes();
        if changes == self.seen {
            return;
        }
        self.seen = changes;
        let ram = cpu.vm.ram.clone();
        let stale = |gpa: u64, page: &Page| ram.page(gpa).is_none_or(|p| p.state.version() != page.version);
        let units = &mut self.units;
        let mut dropped = 0;
        self.pages.retain(|&gpa, page| {
            let drop = stale(gpa, page);
            if drop {
                page.units.iter().for_each(|key| {
                    units.remove(key);
                });
                dropped += 1;
            }
            !drop
        });
        if dropped > 0 {
            cpu.tlb.jumps.clear();
            self.link = None;
            self.stats.voided += dropped;
        }
    }

    /// The code of the plain variant that goes on at RIP, if there is one.
    pub(super) fn plain_entry(&self, cpu: &Cpu) -> Option<u64> {
        let rip = cpu.regs[RIP as usize];
        let gpa = cpu.tlb.code(cpu.cpl == 3, rip)? | rip & OFFSET;
        let unit = self.units.get(&Key::new(gpa, mode_bits(cpu) | PLAIN))?;
        (!self.lockstep).then_some(unit.indirect)
    }

    /// The check of a group failed, and `code` goes on without: if that is because the page cannot be
    /// written for now, and not the first time, it is not tried again.
    pub(super) fn refused(&mut self, cpu: &Cpu, site: &OpSite, code: u64) {
        let linear = missed_address(cpu, site);
        let readable = cpu.tlb.read(cpu.view(), linear).is_some();
        if site.write && readable && cpu.tlb.write(cpu.view(), linear).is_none() {
            let count = self.refusals.entry(site.retry).or_insert(0);
            *count += 1;
            if *count == REFUSALS {
                self.cache.patch_to_jump(site.retry, code);
            }
        }
    }

    /// The unit at `gpa`, translated if need be. `None` if it must be interpreted.
    fn find(&mut self, cpu: &mut Cpu, gpa: u64, mode: ModeBits) -> Option<Unit> {
        match self.units.get(&Key::new(gpa, mode)) {
            Some(unit) => Some(*unit),
            None => self.translate(cpu, gpa, mode),
        }
    }

    #[cold]
    fn translate(&mut self, cpu: &mut Cpu, gpa: u64, mode: ModeBits) -> Option<Unit> {
        let start = Clock::ticks();
        if self.is_full() {
            self.clear(cpu);
        }
        let vm = cpu.vm.clone();
        let page = vm.ram.page(gpa)?;
        let (version, fresh) = page.state.mark_code();
        let keep = vm.settle_code(cpu.id, fresh);
        if fresh {
            cpu.tlb.protect_writes();
        }
        if !keep {
            self.stats.unsettled += 1;
            return None;
        }
        let bytes = copy_page(&page);
        let unit = self.translate_bytes(cpu, &bytes, gpa, mode)?;
        let key = Key::new(gpa, mode);
        let known = self.pages.entry(gpa & !OFFSET).or_insert(Page { version, units: Vec::new() });
        known.units.push(key);
        if known.version != version {
            // Written in between: noticed at the next look at the changes.
            self.seen = self.seen.wrapping_sub(1);
        }
        self.units.insert(key, unit);
        self.stats.units += 1;
        self.stats.translation_ticks += Clock::ticks() - start;
        Some(unit)
    }

    /// The instruction at offset `at` of the current page, whose last bytes are in the next one. `None`
    /// if the interpreter must have a look: the page is not there, or written, or not only ours.
    pub(super) fn straddling(&mut self, cpu: &mut Cpu, at: u16) -> Option<Op> {
        let rip = cpu.frame.page | u64::from(at);
        let user = cpu.cpl == 3;
        let next = (rip | OFFSET).wrapping_add(1);
        if beyond(cpu, next) {
            return None;
        }
        let first = cpu.tlb.code(user, rip)?;
        let second = cpu.tlb.code(user, next)?;
        let vm = cpu.vm.clone();
        let pages = [vm.ram.page(first)?, vm.ram.page(second)?];
        let versions = pages.map(|page| page.state.version());
        let key = Key::new(first | u64::from(at), mode_bits(cpu));
        if let Some(known) = self.straddles.get(&key)
            && (known.versions, known.second) == (versions, second)
        {
            return Some(known.op);
        }
        let mut versions = [0; 2];
        for (page, version) in pages.iter().zip(&mut versions) {
            let (now, fresh) = page.state.mark_code();
            *version = now;
            if fresh {
                cpu.tlb.protect_writes();
            }
            if !vm.settle_code(cpu.id, fresh) {
                return None;
            }
        }
        let bytes = pages.map(|page| copy_page(&page));
        let both = [&bytes[0][at.into()..], &bytes[1][..MAX_LEN]].concat();
        let op = decode::decode(&both[..MAX_LEN.min(both.len())], &cpu.mode).ok()??;
        self.straddles.insert(key, Straddle { versions, second, op, guard: None });
        Some(op)
    }

    fn translate_bytes(&mut self, cpu: &mut Cpu, page: &[u8], gpa: u64, mode: ModeBits) -> Option<Unit> {
        let at = (gpa & OFFSET) as u32;
        let (mut insns, end) = self.decode_run(cpu, page, at, mode);
        mark_shadows(&mut insns);
        if insns.is_empty() {
            if end != End::Straddle {
                return None;
            }
            if let Some(unit) = self.translate_across(cpu, page, gpa, mode) {
                return Some(unit);
            }
            let place = Place { stubs: &self.stubs, view: cpu.view(), mode };
            let (code, unit) = build_straddle(at, self.cache.cursor(), &place, &mut self.sites);
            self.cache.append(&code)?;
            return Some(unit);
        }
        let lockstep = self.lockstep;
        let bits = cpu.mode.code_bits;
        let live_at = |at: u32| if lockstep { ARITHMETIC } else { look_ahead(page, at, bits) };
        liveness(&mut insns, &live_at);
        let place = Place { stubs: &self.stubs, view: cpu.view(), mode: mode & !PLAIN };
        let uses = if mode & PLAIN == 0 { plan(&insns) } else { Vec::new() };
        let (code, unit) = build(&insns, &uses, end, self.cache.cursor(), &place, &mut self.sites);
        if self.lockstep {
            self.steps.insert(Key::new(gpa, mode), (insns.iter().map(Step::new).collect(), 0));
        }
        if std::env::var_os("OSPITE_DUMP").is_some() {
            dump(&insns, &code, self.cache.cursor());
        }
        self.cache.append(&code)?;
        self.stats.instructions += insns.len() as u64;
        self.stats.code_bytes += code.len() as u64;
        Some(unit)
    }

    /// Translates the instruction at RIP and `gpa`, which goes on in the next page.
    fn translate_across(&mut self, cpu: &mut Cpu, page: &[u8], gpa: u64, mode: ModeBits) -> Option<Unit> {
        let next = (cpu.regs[RIP as usize] | OFFSET).wrapping_add(1);
        if beyond(cpu, next) {
            return None;
        }
        let second = code_page(cpu, next).ok()?;
        let vm = cpu.vm.clone();
        let pages = [vm.ram.page(gpa)?, vm.ram.page(second)?];
        let (version, fresh) = pages[1].state.mark_code();
        if fresh {
            cpu.tlb.protect_writes();
        }
        if !vm.settle_code(cpu.id, fresh) {
            return None;
        }
        let at = gpa & OFFSET;
        let mut bytes = page[at as usize..].to_vec();
        bytes.extend_from_slice(&copy_page(&pages[1])[..MAX_LEN]);
        bytes.truncate(MAX_LEN);
        let features = features_of(mode);
        let insn = decode(&bytes, at as u32, &cpu.mode, features, &mut self.factory).ok()??;
        let mut insns = [insn];
        liveness(&mut insns, &|_| ARITHMETIC);
        let place = Place { stubs: &self.stubs, view: cpu.view(), mode: mode & !PLAIN };
        let (code, unit, guard) = build_across(&insns[0], self.cache.cursor(), &place, &mut self.sites);
        self.cache.append(&code)?;
        // A change of either page voids it.
        let known = self.pages.entry(second).or_insert(Page { version, units: Vec::new() });
        known.units.push(Key::new(gpa, mode));
        let versions = [pages[0].state.version(), version];
        let (op, guard) = (insns[0].op, Some(guard));
        self.straddles.insert(Key::new(gpa, mode_bits(cpu)), Straddle { versions, second, op, guard });
        Some(unit)
    }

    /// Lets the unit of the instruction across pages at `at` run as long as the pages stay where they are.
    /// Its handler is about to run.
    pub(super) fn link_straddle(&mut self, cpu: &mut Cpu, at: u16) {
        let rip = cpu.frame.page | u64::from(at);
        let next = (rip | OFFSET).wrapping_add(1);
        let user = cpu.cpl == 3;
        let jumps = &mut cpu.tlb.jumps;
        let known = jumps.link_id != 0 && self.link_context == cpu.frame.context && !self.lockstep;
        let Some(first) = cpu.tlb.code(user, rip).filter(|_| known) else { return };
        let key = Key::new(first | u64::from(at), mode_bits(cpu));
        if let Some(guard) = self.straddles.get(&key).and_then(|straddle| straddle.guard) {
            let private = !user && !cpu.tlb.code_is_global(user, next);
            cpu.tlb.jumps.note(next, private);
            self.cache.patch(guard, cpu.tlb.jumps.link_id as u32);
        }
    }

    /// Decodes up to an unconditional jump, the end of the page, or what does not decode.
    fn decode_run(&mut self, cpu: &Cpu, page: &[u8], at: u32, mode: ModeBits) -> (Vec<Insn>, End) {
        let features = features_of(mode);
        let mut insns: Vec<Insn> = Vec::with_capacity(MAX_INSNS);
        let mut at = at as usize;
        while insns.len() < MAX_INSNS && at < page.len() {
            let bytes = &page[at..page.len().min(at + MAX_LEN)];
            let insn = match decode(bytes, at as u32, &cpu.mode, features, &mut self.factory) {
                Ok(Some(insn)) => insn,
                Ok(None) if !self.lockstep => return (insns, End::Straddle),
                _ => return (insns, End::Interpret),
            };
            if self.lockstep && matches!(insn.class, Class::Handler | Class::Sti) {
                return (insns, End::Interpret);
            }
            at += insn.length() as usize;
            let goes_on = matches!(insn.class, Class::Branch | Class::Loop | Class::Sti);
            let ends = insn.op.has(flag::ENDS_BLOCK) && !goes_on;
            insns.push(insn);
            if ends {
                break;
            }
        }
        (insns, End::Cut)
    }
}

#[cfg(test)]
impl Translator {
    /// Changes host code behind the translator's back.
    pub fn tamper(&mut self, from: &[u8], to: &[u8]) {
        self.cache.replace(from, to);
    }

    /// How often the check of a group was in vain, at most.
    pub fn most_refusals(&self) -> u32 {
        self.refusals.values().copied().max().unwrap_or(0)
    }
}

impl Drop for Translator {
    fn drop(&mut self) {
        if self.lockstep {
            eprintln!("lockstep: {} units compared, {} differ", self.stats.compared, self.stats.mismatches);
        }
    }
}

/// Prints guest and host code, for debugging.
#[cold]
fn dump(insns: &[Insn], code: &[u8], at: u64) {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    for insn in insns {
        let bytes = hex(&insn.bytes[..insn.length() as usize]);
        eprintln!("{:03x} {bytes} {:?} live {:#x}", insn.at, insn.class, insn.live_after);
    }
    eprintln!("{at:x}: {}", hex(code));
}

/// Arithmetic flags that may be read at an offset of a page before they are written.
fn look_ahead(page: &[u8], at: u32, bits: u8) -> u32 {
    let mut live = ARITHMETIC;
    let mut decoder = Decoder::new(bits.into(), &page[at as usize..], DecoderOptions::NONE);
    for _ in 0..LOOK_AHEAD {
        let ins = decoder.decode();
        let kills = ins.rflags_modified() & ARITHMETIC;
        if ins.is_invalid() || ins.rflags_read() & live != 0 || ins.flow_control() != FlowControl::Next {
            return live;
        }
        if kills != 0 && super::insn::surely_writes(&ins) {
            live &= !kills;
        }
        if live == 0 {
            break;
        }
    }
    live
}

/// Marks what is in the shadow of an `STI`. If that is not in the unit, the interpreter sees to it.
fn mark_shadows(insns: &mut [Insn]) {
    for i in 0..insns.len() {
        let shadow = insns[i].class == Class::Sti;
        match insns.get_mut(i + 1) {
            Some(next) if next.class != Class::Sti => next.shadow = shadow,
            _ if shadow => insns[i].hand_over(),
            _ => {}
        }
    }
}

/// Whether an address is outside of the code segment: the interpreter raises the fault.
fn beyond(cpu: &Cpu, linear: u64) -> bool {
    !cpu.mode.long64 && linear > u32::MAX.into()
}

/// Linear address that a check, which failed, was of.
pub(super) fn missed_address(cpu: &Cpu, site: &OpSite) -> u64 {
    let slot = (cpu.frame.scratch[1] >> 5) as usize % FAST_ENTRIES;
    let entry = &cpu.tlb.fast.entries[cpu.view() as usize][slot];
    cpu.frame.scratch[0].wrapping_add(if site.write { entry.write } else { entry.read })
}
