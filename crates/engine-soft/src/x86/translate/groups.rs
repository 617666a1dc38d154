//! Accesses of a unit that share one check of the TLB.
//!
//! Most loads and stores go to a few places: the stack frame, the fields of a structure. Accesses whose
//! addresses differ by constants are a group. The first one checks that all of the group is in one page,
//! and keeps what is to be added to the guest's addresses to get the host's; the others only add it, and
//! leave flags alone. A group that turns out to lie across two pages, or in a page that is not in the
//! TLB, is left to the unit's plain variant, which checks every access ([`PLAIN`](super::mode::PLAIN)).
//!
//! A group is checked for writing even if its writes are behind a branch that is seldom taken. Where that
//! goes wrong too often, because the page may be read only, the check gives way to the plain variant for
//! good ([`REFUSALS`]).
//!
//! What was checked stays true to the end of the unit as long as no handler runs: translations change in
//! handlers and between units.

use iced_x86::{Mnemonic, OpKind, Register};

use super::super::op::reg;
use super::insn::{Class, Insn, gpr};
use super::regs::host_of;

/// Groups of a unit.
pub const MAX_GROUPS: usize = 16;
/// How often a page may be readable but not writable where a group is checked.
pub const REFUSALS: u32 = 100;
/// Bytes of a group: the longer, the more often it lies across pages.
const MAX_SPAN: i64 = 1024;

/// An access's part in its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use {
    /// Number of the group's slot.
    pub group: u8,
    /// The check, if this is the first access.
    pub check: Option<Check>,
}

/// What the first access of a group checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check {
    /// Where the group starts, relative to the address of the first access.
    pub low: i32,
    /// Its bytes.
    pub span: u32,
    /// Whether any of them are written.
    pub write: bool,
}

/// The groups that an instruction's accesses are in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    /// Its memory operand's.
    pub memory: Option<Use>,
    /// That of what it pushes or pops.
    pub stack: Option<Use>,
}

/// A register's value, up to a constant.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Value {
    register: u8,
    version: u32,
}

/// What the addresses of a group have in common.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Base {
    None,
    Rip,
    Register(Value),
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    /// FS or GS, else 0.
    segment: u8,
    base: Base,
    /// With scale and offset.
    index: Option<(Value, u32, i64)>,
}

struct Group {
    key: Key,
    low: i64,
    high: i64,
    write: bool,
    /// Instruction, whether it is the stack's access, and where.
    members: Vec<(usize, bool, i64)>,
}

#[derive(Default)]
struct Planner {
    versions: [u32; 16],
    offsets: [i64; 16],
    open: Vec<Group>,
    closed: Vec<Group>,
}

/// Finds the groups of a unit.
pub fn plan(insns: &[Insn]) -> Vec<Uses> {
    let mut planner = Planner::default();
    for (n, insn) in insns.iter().enumerate() {
        planner.instruction(n, insn);
    }
    planner.end();
    let mut uses = vec![Uses::default(); insns.len()];
    let shared = planner.closed.iter().filter(|group| group.members.len() > 1);
    for (number, group) in shared.take(MAX_GROUPS).enumerate() {
        let mut check = Some(group);
        for &(n, stack, at) in &group.members {
            let check = check.take().map(|group| Check {
                low: (group.low - at) as i32,
                span: (group.high - group.low) as u32,
                write: group.write,
            });
            let entry = Some(Use { group: number as u8, check });
            *(if stack { &mut uses[n].stack } else { &mut uses[n].memory }) = entry;
        }
    }
    uses
}

impl Planner {
    fn instruction(&mut self, n: usize, insn: &Insn) {
        match insn.class {
            Class::Handler | Class::Cli | Class::Sti | Class::Stac | Class::Clac | Class::Swapgs => {
                self.end();
                self.versions.iter_mut().for_each(|version| *version += 1);
                return;
            }
            _ => {}
        }
        if let Some(access) = insn.memory
            && !matches!(insn.class, Class::Leave | Class::BitString)
            && let Some((key, at)) = self.operand(insn)
        {
            self.access(n, false, key, at, access.size, access.write);
        }
        let (sp, bp) = (reg::RSP, reg::RBP);
        match insn.class {
            // Where the operand misses, the handler does the stack's access as well, and no check is made.
            Class::Push | Class::Pop if insn.memory.is_some() => {}
            Class::Push | Class::Call | Class::CallIndirect => self.stack(n, insn, sp, true),
            Class::Pop | Class::Return => self.stack(n, insn, sp, false),
            Class::Leave => self.stack(n, insn, bp, false),
            _ => {}
        }
        self.written(insn);
    }

    fn value(&self, register: u8) -> (Value, i64) {
        let n = usize::from(register);
        (Value { register, version: self.versions[n] }, self.offsets[n])
    }

    fn stack(&mut self, n: usize, insn: &Insn, register: u8, write: bool) {
        let (value, offset) = self.value(register);
        let key = Key { segment: 0, base: Base::Register(value), index: None };
        let disp = if write { -i64::from(insn.word()) } else { 0 };
        self.access(n, true, key, disp + offset, insn.word(), write);
    }

    /// What the memory operand's address is made of; `None` if it is not to be in a group.
    fn operand(&self, insn: &Insn) -> Option<(Key, i64)> {
        let ins = &insn.ins;
        let whole = insn.op.mem.mask == u64::MAX || insn.narrow();
        let disp = insn.displacement();
        let segment = if insn.op.mem.seg >= 4 { insn.op.mem.seg } else { 0 };
        let (base, index) = (ins.memory_base(), ins.memory_index());
        // In 32-bit code, the sum of offset and base wraps.
        if !whole || insn.class == Class::String || insn.narrow() && segment != 0 {
            return None;
        }
        if base == Register::RIP {
            let at = disp.wrapping_add(insn.at.into());
            near(at)?;
            return Some((Key { segment, base: Base::Rip, index: None }, at));
        }
        near(disp)?;
        let (base, index) = (gpr(base), gpr(index));
        if [base, index].into_iter().flatten().filter(|&number| host_of(number).is_none()).count() > 1 {
            return None; // more than the scratch registers can hold
        }
        let (base, offset) = base.map_or((Base::None, 0), |number| {
            let (value, offset) = self.value(number);
            (Base::Register(value), offset)
        });
        let index = index.map(|number| {
            let (value, offset) = self.value(number);
            (value, ins.memory_index_scale(), offset)
        });
        Some((Key { segment, base, index }, disp + offset))
    }

    fn access(&mut self, n: usize, stack: bool, key: Key, at: i64, size: u32, write: bool) {
        let end = at + i64::from(size);
        if let Some(known) = self.open.iter().position(|group| group.key == key) {
            let group = &mut self.open[known];
            let (low, high) = (group.low.min(at), group.high.max(end));
            if high - low <= MAX_SPAN {
                (group.low, group.high) = (low, high);
                group.write |= write;
                group.members.push((n, stack, at));
                return;
            }
            self.closed.push(self.open.swap_remove(known));
        }
        let members = vec![(n, stack, at)];
        self.open.push(Group { key, low: at, high: end, write, members });
    }

    fn end(&mut self) {
        self.closed.append(&mut self.open);
    }

    /// Keeps track of the values of registers that the instruction writes.
    fn written(&mut self, insn: &Insn) {
        let moved = moved(insn);
        for number in (0..16u8).filter(|number| insn.written >> number & 1 != 0) {
            let n = usize::from(number);
            match moved {
                Some((register, by)) if register == number => {
                    self.offsets[n] = self.offsets[n].wrapping_add(by)
                }
                _ => {
                    self.versions[n] += 1;
                    self.offsets[n] = 0;
                }
            }
            let far = self.offsets[n].unsigned_abs() > 1 << 24;
            if far {
                self.versions[n] += 1;
                self.offsets[n] = 0;
            }
        }
    }
}

/// A displacement that stays one if the span of a group is added.
fn near(disp: i64) -> Option<()> {
    (disp.unsigned_abs() < 1 << 30).then_some(())
}

/// The register to which the instruction adds a constant, and which.
fn moved(insn: &Insn) -> Option<(u8, i64)> {
    let ins = &insn.ins;
    let word = insn.word();
    let whole = |register: Register| register.is_gpr() && register.size() == word as usize;
    let first =
        || (ins.op0_kind() == OpKind::Register && whole(ins.op0_register())).then(|| ins.op0_register());
    let immediate = || match ins.op1_kind() {
        OpKind::Immediate8to64 | OpKind::Immediate32to64 => Some(ins.immediate(1) as i64),
        OpKind::Immediate8to32 | OpKind::Immediate32 => Some((ins.immediate(1) as i32).into()),
        _ => None,
    };
    match (insn.class, ins.mnemonic()) {
        (Class::Push, _) => Some((reg::RSP, -i64::from(word))),
        (Class::Pop, _) if gpr(ins.op0_register()) != Some(reg::RSP) => Some((reg::RSP, word.into())),
        (_, Mnemonic::Add) => Some((gpr(first()?)?, immediate()?)),
        (_, Mnemonic::Sub) => Some((gpr(first()?)?, immediate()?.wrapping_neg())),
        (_, Mnemonic::Inc) => Some((gpr(first()?)?, 1)),
        (_, Mnemonic::Dec) => Some((gpr(first()?)?, -1)),
        (Class::Lea, _)
            if ins.memory_base() == ins.op0_register()
                && ins.memory_index() == Register::None
                && (insn.op.mem.mask == u64::MAX || insn.narrow()) =>
        {
            Some((gpr(first()?)?, insn.displacement()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::op::RIP;
    use crate::x86::testing::{CODE, DATA};
    use crate::x86::translate::tests::pair::Pair;

    /// `mov rax, [rbx]; test rdx, rdx; jz over; mov [rbx+8], rax; over: add rcx, [rbx+16]; dec rsi; jnz; ud2`
    const LOOP: [u8; 23] = [
        0x48, 0x8b, 0x03, 0x48, 0x85, 0xd2, 0x74, 4, 0x48, 0x89, 0x43, 8, 0x48, 0x03, 0x4b, 16, 0x48, 0xff,
        0xce, 0x75, 0xeb, 0x0f, 0x0b,
    ];

    fn run(pair: &mut Pair, rbx: u64, rdx: u64, rounds: u64) {
        pair.set(RIP, CODE);
        pair.set(reg::RBX, rbx);
        pair.set(reg::RDX, rdx);
        pair.set(reg::RSI, rounds);
        pair.run();
    }

    #[test]
    fn a_group_across_pages_is_accessed_one_by_one() {
        let mut pair = Pair::new(&LOOP);
        for rbx in [DATA, DATA + 0xfe8, DATA + 0xff0, DATA + 0xff8, DATA + 0xffc, DATA + 0x1000] {
            for rdx in [0, 1] {
                run(&mut pair, rbx, rdx, 20);
            }
        }
        assert_eq!(pair.translator.stats.handlers, 0);
    }

    #[test]
    fn a_page_that_is_only_read_is_not_checked_for_writing_for_ever() {
        let mut pair = Pair::new(&LOOP);
        run(&mut pair, CODE + 0x800, 0, 3000);
        assert_eq!(pair.translator.most_refusals(), REFUSALS);
        // Now the code's page is written, and then data's.
        run(&mut pair, CODE + 0x800, 1, 50);
        run(&mut pair, DATA, 1, 50);
    }

    #[test]
    fn a_group_faults_at_the_access_that_does() {
        let mut pair = Pair::new(&LOOP);
        run(&mut pair, DATA, 1, 20);
        run(&mut pair, 0x7000_0000_0000, 1, 20);
        run(&mut pair, 0x3f_fff0, 1, 20); // memory ends before the third
    }
}
