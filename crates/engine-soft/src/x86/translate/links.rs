//! Jumps: where they go, and how they are linked to it.
//!
//! A jump that has no link, or whose target is not in the jump cache, asks here ([`Translator::resolve`])
//! without leaving translated code. Only what is not translated yet goes back to [`Translator::step`].

use engine::x86::Activity;
use mem::PAGE_SIZE;

use super::super::cpu::Cpu;
use super::super::op::RIP;
use super::build::Unit;
use super::mode::{ModeBits, PLAIN, context_of, mode_bits, mode_of, translatable};
use super::site::{Entry, FarSite, Site};
use super::translator::{Key, OFFSET, Translator};

/// Page and context pairs remembered.
pub(super) const MAX_ALIASES: usize = 1 << 19;

/// A jump that can be linked if the next unit to run is its target.
pub(super) struct Link {
    how: Joint,
    /// Linear and guest-physical address and mode of the target.
    target: u64,
    gpa: u64,
    mode: ModeBits,
    /// The number of links where the jump was left: the page it is in is known by that.
    id: u64,
}

/// How a jump is linked.
#[derive(Clone, Copy)]
pub(super) enum Joint {
    /// Within the page: the place of its offset.
    Near(u64, Entry),
    Far(FarSite),
}

impl Translator {
    /// The jump that translated code was left at can be linked when its target is known.
    pub(super) fn want_link(&mut self, cpu: &Cpu, how: Joint) {
        let target = cpu.regs[RIP as usize];
        // If the page is not in the TLB, the jump is linked the next time.
        if let Some(gpa) = cpu.tlb.code(cpu.cpl == 3, target) {
            let mode = mode_bits(cpu) | if self.plain { PLAIN } else { 0 };
            let gpa = gpa | target & OFFSET;
            self.link = Some(Link { how, target, gpa, mode, id: cpu.tlb.jumps.link_id });
        }
    }

    /// Patches the jump that translated code was left at, if this is where it goes.
    pub(super) fn follow_link(
        &mut self,
        cpu: &Cpu,
        rip: u64,
        gpa: u64,
        mode: ModeBits,
        unit: Unit,
        linkable: bool,
    ) {
        let Some(link) = self.link.take() else { return };
        if (link.target, link.gpa, link.mode) == (rip, gpa, mode) {
            let known = link.id == cpu.tlb.jumps.link_id && link.id != 0;
            self.connect(cpu, link.how, unit, linkable && known);
        }
    }

    fn connect(&mut self, cpu: &Cpu, how: Joint, unit: Unit, linkable: bool) {
        match how {
            Joint::Near(patch, entry) => self.cache.patch_jump(patch, unit.entry(entry)),
            Joint::Far(site) => {
                self.cache.patch_jump(site.other, site.lookup);
                if linkable {
                    self.cache.patch(site.guard, cpu.tlb.jumps.link_id as u32);
                    // 32-bit code comes by again forwards, too.
                    let forward = cpu.mode.long64 && site.offset >= PAGE_SIZE as i64;
                    self.cache.patch_jump(site.jump, if forward { unit.forward } else { unit.indirect });
                }
            }
        }
        self.stats.links += 1;
    }

    /// Sees to the number that links across pages are guarded by. Answers whether the current page may
    /// be linked to: not if it is executed at several linear addresses, from which the same jump goes
    /// to different places.
    pub(super) fn number_links(&mut self, cpu: &mut Cpu, rip: u64, gpa: u64, context: u64) -> bool {
        let jumps = &mut cpu.tlb.jumps;
        if self.aliases.len() > MAX_ALIASES {
            // Numbers are not used twice, so links made until now are never followed again.
            self.aliases.clear();
            self.link_ids.clear();
            jumps.clear();
        }
        if jumps.link_id == 0 || self.link_context != context {
            let next = self.next_link_id;
            let known = self.link_ids.entry(context).or_insert((jumps.epoch, next));
            if known.0 != jumps.epoch {
                *known = (jumps.epoch, next);
            }
            if known.1 == next {
                self.next_link_id += 1;
            }
            jumps.link_id = known.1;
            self.link_context = context;
        }
        let id = jumps.link_id;
        let linear = rip & !OFFSET;
        let alias = self.aliases.entry(gpa >> 12 << 32 | id).or_insert(linear);
        if *alias == linear {
            return true;
        }
        // Void all links: some may have been made from here at the other address.
        *alias = linear;
        jumps.clear();
        false
    }

    /// Where the jump at a site goes in translated code, which it is linked to; `None` if that is not
    /// translated yet, or to be looked at otherwise.
    pub(super) fn resolve(&mut self, cpu: &mut Cpu, site: u64) -> Option<u64> {
        if self.lockstep || self.code_changed() {
            return None;
        }
        let (here, context) = (cpu.frame.page, cpu.frame.context);
        let (rip, far) = match self.site(site)? {
            Site::Indirect => (cpu.frame.scratch[0], None),
            Site::FarMiss => match self.site(cpu.frame.far_site)? {
                Site::Far(far) => (cpu.frame.scratch[0], Some(far)),
                _ => return None,
            },
            Site::Far(far) => (cpu.cut(here.wrapping_add(far.offset as u64)), Some(far)),
            Site::Link { patch, target, entry, plain } => {
                let mode = mode_of(context) | if plain { PLAIN } else { 0 };
                let page = cpu.tlb.code(cpu.cpl == 3, here)?;
                let unit = *self.units.get(&Key::new(page | u64::from(target), mode))?;
                self.connect(cpu, Joint::Near(patch, entry), unit, true);
                return Some(unit.indirect);
            }
            _ => return None,
        };
        if cpu.tlb.jumps.link_id == 0 {
            // Links may be made from here under a number that does not know this page yet.
            let page = cpu.tlb.code(cpu.cpl == 3, here)?;
            self.number_links(cpu, here, page, context);
        }
        let id = cpu.tlb.jumps.link_id;
        let (unit, linkable) = self.lookup(cpu, rip, context)?;
        if let Some(far) = far {
            let linkable = linkable && cpu.tlb.jumps.link_id == id;
            self.connect(cpu, Joint::Far(far), unit, linkable);
        }
        self.stats.resolved += 1;
        cpu.frame.page = rip & !OFFSET;
        Some(unit.indirect)
    }

    /// The unit at a linear address if there is one, and whether its page may be linked to. Enters it
    /// into the jump cache.
    fn lookup(&mut self, cpu: &mut Cpu, rip: u64, context: u64) -> Option<(Unit, bool)> {
        let gpa = cpu.tlb.code(cpu.cpl == 3, rip)? | rip & OFFSET;
        let unit = *self.units.get(&Key::new(gpa, mode_of(context)))?;
        let linkable = self.number_links(cpu, rip, gpa, context);
        let private = cpu.cpl != 3 && !cpu.tlb.code_is_global(false, rip);
        cpu.tlb.jumps.fill(rip, context, unit.indirect, private);
        Some((unit, linkable))
    }

    /// The way on at RIP, whatever led there, if that is translated. Flags are to be in their slot.
    pub(super) fn known(&mut self, cpu: &mut Cpu) -> Option<u64> {
        cpu.end_idle_resume();
        let rip = cpu.regs[RIP as usize];
        let changed = self.code_changed() || cpu.activity != Activity::Running;
        if self.lockstep || changed || !translatable(cpu) {
            return None;
        }
        if cpu.cpl == 3 && cpu.native.is_on(cpu.tlb.asid()) {
            cpu.native.returned = true;
            return None;
        }
        let context = context_of(cpu, mode_bits(cpu));
        let code = match cpu.tlb.jumps.find(rip, context) {
            Some(entry) if self.renumber(cpu, context) => entry.code,
            _ => self.lookup(cpu, rip, context)?.0.indirect,
        };
        cpu.tlb.jumps.enter(context);
        cpu.frame.context = context;
        cpu.frame.page = rip & !OFFSET;
        cpu.frame.attention = cpu.vm.vcpus[cpu.id as usize].attention_address();
        cpu.leave_block = false;
        cpu.debug_shadow = false;
        Translator::set_mask(cpu);
        Some(code)
    }

    /// Makes the number of links that of a context that has one already.
    fn renumber(&mut self, cpu: &mut Cpu, context: u64) -> bool {
        if cpu.tlb.jumps.link_id != 0 && self.link_context == context {
            return true;
        }
        match self.link_ids.get(&context) {
            Some(&(epoch, id)) if epoch == cpu.tlb.jumps.epoch => cpu.tlb.jumps.link_id = id,
            _ => return false,
        }
        self.link_context = context;
        true
    }
}
