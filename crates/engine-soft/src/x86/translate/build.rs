//! From guest instructions to a unit of host code.
//!
//! A unit is a run of instructions with one way in: up to an unconditional jump, past conditional ones.
//! Arithmetic flags stay in the host's flags as long as nothing disturbs them. What does (TLB checks,
//! calls of handlers) first saves them to [`Frame::flags`](super::frame::Frame::flags) if they are live.
//!
//! | edge | live flags are in |
//! |---|---|
//! | direct jump to a unit of the same page | the host's flags |
//! | jump to another page, indirect jump, call, return, exit to Rust | [`Frame::flags`](super::frame::Frame::flags) |

use super::super::op::flag;
use super::super::tlb::View;
use super::asm::{Alu, Asm, Fixup, Mem, cc, host};
use super::frame::at;
use super::groups::Uses;
use super::insn::{ARITHMETIC, Class, Insn};
use super::mode::{ModeBits, NARROW};
use super::regs::{A, SP, host_of};
use super::site::{Entry as LinkEntry, FarSite, OpSite, Site};
use super::stubs::Stubs;
use super::x87::Use;

/// Entries of a translated unit.
#[derive(Clone, Copy, Debug)]
pub struct Unit {
    /// For jumps forward within the page: live flags in the host's flags.
    pub direct: u64,
    /// For jumps backward within the page: the same, and looks at the attention word.
    pub checked: u64,
    /// For all others: flags in their slot; looks at the attention word.
    pub indirect: u64,
    /// For those of them that go forward: the same, and does not.
    pub forward: u64,
}

impl Unit {
    /// Address of an entry.
    pub fn entry(&self, entry: LinkEntry) -> u64 {
        match entry {
            LinkEntry::Direct => self.direct,
            LinkEntry::Checked => self.checked,
            LinkEntry::Indirect => self.indirect,
            LinkEntry::Forward => self.forward,
        }
    }
}

/// What the builder needs to know of where it builds.
pub struct Place<'a> {
    /// The fixed code.
    pub stubs: &'a Stubs,
    /// How memory is seen at the start.
    pub view: View,
    /// The mode that the unit is keyed by.
    pub mode: ModeBits,
}

/// Where live flags are when the body of a unit starts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Entry {
    Dead,
    Host,
    Slot,
}

/// Code to be placed behind the unit, out of the way.
pub(super) enum Cold {
    /// A TLB miss, or what the handler has to do for another reason (`run`).
    Miss { jump: Fixup, site: u32, resume: usize, restore: bool, run: bool },
    /// A jump to a unit of the same page that is not there yet.
    Link { jump: Fixup, target: u32, entry: LinkEntry, save: bool },
    /// A jump to another page.
    Far { jump: Fixup, offset: i64, save: bool },
    /// A check of a group of accesses failed at an offset of the page.
    Group { jump: Fixup, site: u32, at: u32 },
    /// The guest's vector or x87 registers are not in the host's: what brings them there.
    Load { jump: Fixup, resume: usize, stub: u64 },
    /// Something wants attention.
    Attend { jump: Fixup, at: u32 },
}

pub(super) struct Builder<'a> {
    pub asm: Asm,
    pub place: &'a Place<'a>,
    sites: &'a mut Vec<Site>,
    pub cold: Vec<Cold>,
    /// Live flags are in the host's flags.
    pub host: bool,
    /// Live flags are in their slot.
    pub slot: bool,
    /// The guest's vector registers are in the host's.
    pub vectors: bool,
    /// The guest's x87 unit is in the host's.
    pub x87: bool,
    /// How memory is seen.
    pub view: View,
    /// What the current instruction's accesses share with others.
    pub uses: Uses,
    /// The group that B is of in front of the current instruction, and the one behind it.
    pub held: Option<u8>,
    /// See [`Builder::held`].
    pub holds: Option<u8>,
    /// The guest registers whose slots' values are in A and B in front of the current instruction, and behind it.
    pub kept: [Option<u8>; 2],
    /// See [`Builder::kept`].
    pub keeps: [Option<u8>; 2],
    /// The host has BMI2.
    pub bmi2: bool,
    /// The guest's code is 32-bit code.
    pub narrow: bool,
}

/// How a unit ends behind its last instruction, if that is not a jump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was cut: the next instruction is in the page.
    Cut,
    /// The next instruction must be interpreted.
    Interpret,
    /// The next instruction lies across the end of the page: it is a unit of its own.
    Straddle,
}

/// Works out which flags are live behind each instruction; `live_at` tells which are at an offset of the page.
pub fn liveness(insns: &mut [Insn], live_at: &dyn Fn(u32) -> u32) {
    let Some(last) = insns.last() else { return };
    let mut live = if last.end() < 4096 { live_at(last.end()) } else { ARITHMETIC };
    for insn in insns.iter_mut().rev() {
        match insn.class {
            Class::Branch | Class::Loop => live |= target_live(insn, live_at),
            Class::Jump => live = target_live(insn, live_at),
            Class::Call => live = target_live(insn, live_at),
            Class::Return | Class::JumpIndirect | Class::CallIndirect => live = ARITHMETIC,
            _ => {}
        }
        insn.live_after = live;
        live = insn.live_before();
    }
}

fn target_live(insn: &Insn, live_at: &dyn Fn(u32) -> u32) -> u32 {
    in_page(insn.target()).map_or(ARITHMETIC, live_at)
}

/// How a jump within the page enters its target: where loops and the windows behind `STI` must come by,
/// attention is looked at.
pub(super) fn link_entry(target: u32, from: &Insn) -> LinkEntry {
    if target <= from.at || from.shadow { LinkEntry::Checked } else { LinkEntry::Direct }
}

/// The offset within the page, if it is one.
pub(super) fn in_page(target: i64) -> Option<u32> {
    (0..4096).contains(&target).then_some(target as u32)
}

/// Builds a unit of `insns` at `base`. `uses` are their groups, if there are any. Its sites are appended to `sites`.
pub fn build(
    insns: &[Insn],
    uses: &[Uses],
    end: End,
    base: u64,
    place: &Place<'_>,
    sites: &mut Vec<Site>,
) -> (Vec<u8>, Unit) {
    let mut b = Builder::new(base, place, sites);
    let unit = b.entries(insns);
    for (n, insn) in insns.iter().enumerate() {
        b.uses = uses.get(n).copied().unwrap_or_default();
        b.held = b.holds.take();
        b.kept = std::mem::take(&mut b.keeps);
        b.instruction(insn);
        if spares_scratch(insn) {
            b.holds = b.holds.or(b.held);
            b.keeps = b.kept;
        }
        if insn.shadow {
            b.window(insn);
        }
    }
    b.end(insns, end);
    b.emit_cold();
    (b.asm.bytes().to_vec(), unit)
}

/// Whether the code for an instruction surely leaves A and B alone.
fn spares_scratch(insn: &Insn) -> bool {
    match insn.class {
        Class::Nothing | Class::Branch => true,
        Class::Generic | Class::Copy => {
            insn.memory.is_none() && insn.slots == 0 && !insn.vector && insn.x87 == Use::None
        }
        _ => false,
    }
}

/// Builds a unit of nothing but an instruction across the end of the page.
pub fn build_straddle(at: u32, base: u64, place: &Place<'_>, sites: &mut Vec<Site>) -> (Vec<u8>, Unit) {
    let mut b = Builder::new(base, place, sites);
    let direct = b.asm.here();
    b.save_flags();
    let indirect = b.asm.here();
    b.attention(at);
    let forward = b.asm.here();
    b.straddle(at);
    b.emit_cold();
    (b.asm.bytes().to_vec(), Unit { direct, checked: direct, indirect, forward })
}

/// Builds a unit of an instruction across the end of the page. Answers with it where the number of the
/// link is that its bytes in the next page are guarded by: as a jump there, it is good for one mapping.
pub fn build_across(
    insn: &Insn,
    base: u64,
    place: &Place<'_>,
    sites: &mut Vec<Site>,
) -> (Vec<u8>, Unit, u64) {
    let mut b = Builder::new(base, place, sites);
    let direct = b.asm.here();
    b.save_flags();
    let indirect = b.asm.here();
    b.attention(insn.at);
    let forward = b.asm.here();
    let (guard, other) = b.link_guard();
    b.slot = true;
    b.instruction(insn);
    b.end(std::slice::from_ref(insn), End::Cut);
    b.asm.bind(other);
    b.straddle(insn.at);
    b.emit_cold();
    (b.asm.bytes().to_vec(), Unit { direct, checked: direct, indirect, forward }, guard)
}

impl<'a> Builder<'a> {
    fn new(base: u64, place: &'a Place<'a>, sites: &'a mut Vec<Site>) -> Builder<'a> {
        Builder {
            asm: Asm::new(base),
            place,
            sites,
            cold: Vec::with_capacity(16),
            host: false,
            slot: false,
            vectors: false,
            x87: false,
            view: place.view,
            uses: Uses::default(),
            held: None,
            holds: None,
            kept: [None; 2],
            keeps: [None; 2],
            bmi2: std::arch::is_x86_feature_detected!("bmi2"),
            narrow: place.mode & NARROW != 0,
        }
    }
}

impl Builder<'_> {
    fn entries(&mut self, insns: &[Insn]) -> Unit {
        let start = insns[0].at;
        match entry_of(insns) {
            Entry::Dead => {
                let checked = self.asm.here();
                self.attention(start);
                let direct = self.asm.here();
                Unit { direct, checked, indirect: checked, forward: direct }
            }
            Entry::Slot => {
                let direct = self.asm.here();
                self.save_flags();
                let indirect = self.asm.here();
                self.attention(start);
                self.slot = true;
                Unit { direct, checked: direct, indirect, forward: self.asm.here() }
            }
            Entry::Host => {
                let checked = self.asm.here();
                self.save_flags();
                let indirect = self.asm.here();
                self.attention(start);
                let forward = self.asm.here();
                self.restore_flags();
                self.host = true;
                Unit { direct: self.asm.here(), checked, indirect, forward }
            }
        }
    }

    /// Leaves the unit at its start if the attention word says so. Disturbs the flags.
    fn attention(&mut self, start: u32) {
        self.asm.load(A, slot(at::ATTENTION));
        self.asm.load32(A, Mem::at(A, 0));
        self.asm.op_mem(false, &[0x85], A, &slot(at::ATTENTION_MASK));
        let jump = self.asm.jcc_forward(cc::NZ);
        self.cold.push(Cold::Attend { jump, at: start });
    }

    /// Behind the shadow of `STI`: what waited for the flag comes here at the latest, as the next
    /// instruction may be a `CLI`.
    fn window(&mut self, shadow: &Insn) {
        (self.holds, self.keeps) = (None, [None; 2]);
        self.disturb(shadow.live_after);
        self.attention(shadow.end());
    }

    /// Host flags to their slot. Uses A.
    pub fn save_flags(&mut self) {
        self.asm.mov(A, host::RAX);
        self.asm.flags_to_ax();
        self.asm.store32(slot(at::FLAGS), host::RAX);
        self.asm.mov(host::RAX, A);
    }

    /// And back. Uses nothing: an instruction's operand may be in A and B.
    fn restore_flags(&mut self) {
        self.asm.store(slot(at::RAX), host::RAX);
        self.asm.load32(host::RAX, slot(at::FLAGS));
        self.asm.flags_from_ax();
        self.asm.load(host::RAX, slot(at::RAX));
    }

    /// The host's flags are about to be disturbed; `live` are those still wanted. Uses A.
    pub fn disturb(&mut self, live: u32) {
        if live != 0 && self.host && !self.slot {
            self.save_flags();
            self.slot = true;
        }
        self.host = false;
    }

    /// The guest's flags are wanted in the host's.
    pub fn want_host(&mut self, flags: u32) {
        if flags != 0 && !self.host && self.slot {
            self.restore_flags();
            self.host = true;
        }
    }

    /// The guest's flags are wanted in their slot.
    pub fn want_slot(&mut self, flags: u32) {
        if flags != 0 && self.host && !self.slot {
            self.save_flags();
            self.slot = true;
        }
    }

    /// A native instruction was emitted.
    pub fn executed(&mut self, insn: &Insn) {
        if insn.writes != 0 {
            (self.host, self.slot) = (true, false);
        }
    }

    /// A site for an instruction's handler.
    pub fn op_site(&mut self, insn: &Insn, retry: u64, size: u32, write: bool) -> u32 {
        self.site(Site::Op(OpSite {
            write,
            retry,
            size: size as u16,
            ..OpSite::new(insn.op, insn.at as u16)
        }))
    }

    /// A site for the check of a group.
    pub fn group_site(&mut self, insn: &Insn, retry: u64, size: u32, write: bool) -> u32 {
        let new = OpSite::new(insn.op, insn.at as u16);
        self.site(Site::Op(OpSite { write, retry, size: size as u16, group: true, ..new }))
    }

    fn site(&mut self, site: Site) -> u32 {
        self.sites.push(site);
        self.sites.len() as u32 - 1
    }

    fn instruction(&mut self, insn: &Insn) {
        match insn.class {
            Class::Handler => self.handler(insn),
            Class::Nothing => {}
            Class::Copy => {
                if insn.vector {
                    self.want_vectors(insn);
                }
                self.want_x87(insn);
                self.note_x87(insn);
                self.want_host(insn.needs());
                let len = insn.length() as usize;
                self.asm.raw(&insn.bytes[..len]);
                self.executed(insn);
            }
            Class::Generic => self.generic(insn),
            Class::Cli | Class::Sti => self.interrupt_flag(insn),
            Class::Stac | Class::Clac => self.user_access(insn),
            Class::Swapgs => self.swap_gs(),
            Class::Divide => self.divide(insn),
            Class::Lea => self.lea(insn),
            Class::Fldcw => self.load_control(insn),
            Class::Cld => self.clear_direction(insn),
            Class::PushFlags => self.push_flags(insn),
            Class::LoadString => self.load_string(insn),
            Class::BitString => self.bit_string(insn),
            Class::Loop => self.count_down(insn),
            Class::String => self.string(insn),
            Class::OpcodeReg => self.opcode_reg(insn),
            Class::Push => self.push(insn),
            Class::Pop => self.pop(insn),
            Class::Leave => self.leave(insn),
            Class::Jump => self.jump(insn),
            Class::Branch => self.branch(insn),
            Class::Call => self.call(insn),
            Class::Return => self.ret(insn),
            Class::JumpIndirect => self.jump_indirect(insn),
            Class::CallIndirect => self.call_indirect(insn),
        }
    }

    /// Calls the interpreter's handler.
    fn handler(&mut self, insn: &Insn) {
        self.want_slot(ARITHMETIC);
        let site = self.op_site(insn, 0, 0, false);
        self.asm.push_imm(site);
        self.asm.jmp(self.place.stubs.run);
        let resume = self.asm.here();
        self.set_resume(site, resume);
        (self.host, self.slot) = (false, true);
    }

    fn set_resume(&mut self, site: u32, resume: u64) {
        if let Site::Op(op) = &mut self.sites[site as usize] {
            op.resume = resume;
        }
    }

    fn end(&mut self, insns: &[Insn], end: End) {
        let last = &insns[insns.len() - 1];
        if last.class == Class::Handler && last.op.has(flag::ENDS_BLOCK) {
            return; // its handler leaves
        }
        let open = !matches!(
            last.class,
            Class::Jump | Class::Call | Class::Return | Class::JumpIndirect | Class::CallIndirect
        );
        if !open {
            return;
        }
        let live = last.live_after;
        match end {
            End::Interpret => {
                self.want_slot(live);
                let site = self.site(Site::Leave { at: last.end() as u16 });
                self.asm.push_imm(site);
                self.asm.jmp(self.place.stubs.exit);
            }
            End::Straddle | End::Cut => self.go(last, last.end().into(), live),
        }
    }

    fn straddle(&mut self, at: u32) {
        let site = self.site(Site::Straddle { at: at as u16 });
        self.asm.push_imm(site);
        self.asm.jmp(self.place.stubs.run);
    }

    /// An unconditional jump to a place relative to the page.
    pub fn go(&mut self, from: &Insn, target: i64, live: u32) {
        match in_page(target) {
            Some(target) => {
                self.want_host(live);
                let jump = self.asm.jmp_forward();
                let save = live != 0 && self.host && !self.slot;
                self.cold.push(Cold::Link { jump, target, entry: link_entry(target, from), save });
            }
            None => {
                self.want_slot(live);
                self.far(target);
            }
        }
    }

    /// Goes on in another page. Flags are in their slot.
    ///
    /// The jump is linked to its target as it is mapped now; the guard tells whether it still is. Whoever
    /// finds it linked for others uses the jump cache, or links it anew if that was not done too often.
    pub fn far(&mut self, offset: i64) {
        let Ok(delta) = i32::try_from(offset & !0xfff) else {
            self.page_relative(A, offset);
            return self.indirect();
        };
        let (guard, other) = self.link_guard();
        if self.narrow {
            self.asm.alu_mem32_imm(Alu::Add, slot(at::PAGE), delta as u32);
        } else {
            self.asm.add_mem_imm(slot(at::PAGE), delta);
        }
        let jump = self.asm.jmp_forward();
        // Not linked yet: to Rust. Once it is, those who find it linked for others use the jump cache.
        self.asm.bind(other);
        self.asm.bind(jump);
        let site = self.sites.len() as u32;
        self.asm.push_imm(site);
        self.asm.jmp(self.place.stubs.go);
        let lookup = self.asm.here();
        self.asm.alu_mem32_imm(Alu::Sub, slot(at::RELINKS), 1);
        let relink = self.asm.jcc_forward(cc::NS);
        self.asm.store_imm32(slot(at::FAR_SITE), site);
        self.page_relative(A, offset);
        self.asm.jmp(self.place.stubs.far);
        self.asm.bind(relink);
        self.asm.push_imm(site);
        self.asm.jmp(self.place.stubs.go);
        let (jump, other) = (self.asm.address(jump.position()), self.asm.address(other.position()));
        self.site(Site::Far(FarSite { guard, jump, other, lookup, offset }));
    }

    /// Compares the link number with one to be filled in: where that is, and a jump for when they differ.
    fn link_guard(&mut self) -> (u64, Fixup) {
        self.asm.alu_mem32_imm(Alu::Cmp, slot(at::LINK_ID), u32::MAX);
        (self.asm.here() - 4, self.asm.jcc_forward(cc::NZ))
    }

    /// `reg` = page + offset, without touching flags.
    pub fn page_relative(&mut self, reg: u8, offset: i64) {
        self.asm.load(reg, slot(at::PAGE));
        let wide = !self.narrow;
        match i32::try_from(offset) {
            Ok(disp) => self.asm.lea(wide, reg, &Mem::at(reg, disp)),
            Err(_) => {
                // Two steps: a displacement has 31 bits and a sign.
                self.asm.lea(wide, reg, &Mem::at(reg, (offset / 2) as i32));
                self.asm.lea(wide, reg, &Mem::at(reg, (offset - offset / 2) as i32));
            }
        }
    }

    fn emit_cold(&mut self) {
        for cold in std::mem::take(&mut self.cold) {
            match cold {
                Cold::Miss { jump, site, resume, restore, run } => {
                    self.asm.bind(jump);
                    self.asm.push_imm(site);
                    let stubs = self.place.stubs;
                    self.asm.jmp(if run { stubs.run } else { stubs.miss });
                    let mut target = self.asm.address(resume);
                    if restore {
                        let here = self.asm.here();
                        self.restore_flags();
                        self.asm.jmp(target);
                        target = here;
                    }
                    self.set_resume(site, target);
                }
                Cold::Group { jump, site, at } => {
                    self.asm.bind(jump);
                    self.asm.alu_imm(true, Alu::Cmp, A, 4095);
                    let crosses = self.asm.jcc_forward(cc::BE);
                    self.asm.push_imm(site);
                    self.asm.jmp(self.place.stubs.miss);
                    // Until it is linked, to where it is linked.
                    self.asm.bind(crosses);
                    let (patch, target) = (self.asm.address(crosses.position()), at as u16);
                    let site =
                        self.site(Site::Link { patch, target, entry: LinkEntry::Indirect, plain: true });
                    self.asm.push_imm(site);
                    self.asm.jmp(self.place.stubs.exit);
                }
                Cold::Link { jump, target, entry, save } => {
                    self.asm.bind(jump);
                    if save {
                        self.save_flags();
                    }
                    let patch = self.asm.address(jump.position());
                    let site = self.site(Site::Link { patch, target: target as u16, entry, plain: false });
                    self.asm.push_imm(site);
                    self.asm.jmp(self.place.stubs.go);
                }
                Cold::Far { jump, offset, save } => {
                    self.asm.bind(jump);
                    if save {
                        self.save_flags();
                    }
                    self.far(offset);
                }
                Cold::Load { jump, resume, stub } => {
                    self.asm.bind(jump);
                    self.asm.call(stub);
                    let resume = self.asm.address(resume);
                    self.asm.jmp(resume);
                }
                Cold::Attend { jump, at } => {
                    self.asm.bind(jump);
                    let site = self.site(Site::Leave { at: at as u16 });
                    self.asm.push_imm(site);
                    self.asm.jmp(self.place.stubs.exit);
                }
            }
        }
    }
}

/// Where the body wants live flags: where its first use of them needs them.
fn entry_of(insns: &[Insn]) -> Entry {
    if insns[0].live_before() == 0 {
        return Entry::Dead;
    }
    for insn in insns {
        match insn.class {
            Class::Nothing | Class::Lea | Class::Swapgs => {}
            _ if insn.vector || insn.x87 != Use::None => return Entry::Slot,
            Class::Copy | Class::Branch => return Entry::Host,
            Class::Jump if in_page(insn.target()).is_some() => return Entry::Host,
            Class::Generic | Class::OpcodeReg if insn.memory.is_none() => {
                if insn.needs() != 0 || insn.writes != 0 {
                    return Entry::Host;
                }
            }
            _ => return Entry::Slot,
        }
    }
    Entry::Host
}

impl Builder<'_> {
    /// `mov` of a word of the guest's: an address or what is on its stack.
    pub fn load_word(&mut self, reg: u8, mem: Mem) {
        self.asm.op_mem(!self.narrow, &[0x8b], reg, &mem);
    }

    /// The same to memory.
    pub fn store_word(&mut self, mem: Mem, reg: u8) {
        self.asm.op_mem(!self.narrow, &[0x89], reg, &mem);
    }

    /// The stack pointer moves.
    pub fn move_stack(&mut self, by: i32) {
        self.asm.lea(!self.narrow, SP, &Mem::at(SP, by));
    }
}

/// A slot of the frame.
pub(super) fn slot(disp: i32) -> Mem {
    Mem::at(host::RSP, disp)
}

/// The slot of a guest register without a host register.
pub(super) fn guest_slot(number: u8) -> Mem {
    debug_assert!(host_of(number).is_none());
    slot(at::reg(number))
}
