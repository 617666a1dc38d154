//! Which pages of the guest program a jail has: a TLB of the host's page tables.
//!
//! It follows the vCPU's TLB: an entry is made when the program touches the page, with all that the guest's
//! page table allows at that time, and goes when the guest flushes it ([`Flushes`]).

use mem::PAGE_SIZE;

use super::super::cpu::Cpu;
use super::super::run::copy_page;
use super::super::tlb::View;
use super::super::translate::translator::Map;
use super::super::walk::{Intent, UserLeaf};
use super::flushes::{Flushes, LATEST};
use super::jail::{END, Jail, MEMORY_FD};
use super::scan::{AFTER, BEFORE, Differences, harmless};
use super::stub::{Call, STUB_LEN};
use super::suits::host_xcr0;

/// Pages around the one that is touched, by alignment, that come with it if the program used them before.
const AROUND: u64 = 64;
/// Most pages of a mirror: each may be a mapping of its own, of which Linux allows 65,530.
const MOST_PAGES: usize = 60_000;
/// Most regions of 2 MiB that it has had pages in: each may cost the host two page tables.
const MOST_REGIONS: usize = 8192;
/// Bytes of the longest instruction.
const LONGEST: u64 = 15;
/// Low bits of an entry; the rest is the guest-physical address.
const WRITE: u64 = 2;
const EXECUTE: u64 = 4;

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The page is there now.
    Mapped,
    /// The guest's own, or one that the engine has to look at.
    Guest,
    /// The program wants to run code that is not for the host's CPU.
    Foreign,
}

/// The pages of one address space in a jail.
pub struct Mirror {
    pages: Map<u64, u64>,
    regions: Map<u64, ()>,
    calls: Vec<Call>,
    run: Option<Run>,
    all: u64,
    writes: u64,
    seen: u64,
}

/// Pages that one mapping brings.
#[derive(Clone, Copy)]
struct Run {
    linear: u64,
    offset: u64,
    len: u64,
    rights: u64,
}

impl Run {
    fn call(self) -> Call {
        let mut prot = libc::PROT_READ;
        if self.rights & WRITE != 0 {
            prot |= libc::PROT_WRITE;
        }
        if self.rights & EXECUTE != 0 {
            prot |= libc::PROT_EXEC;
        }
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE;
        let numbers = [prot, flags, MEMORY_FD].map(|number| number as u64);
        [libc::SYS_mmap as u64, self.linear, self.len, numbers[0], numbers[1], numbers[2], self.offset]
    }
}

/// Whether the host's CPU may run a page of code, seen with what is around it.
fn is_harmless(cpu: &Cpu, jail: &Jail, linear: u64, page: &[u8]) -> bool {
    let other = |linear: u64| {
        let leaf = cpu.user_leaf(linear)?;
        Some(copy_page(&cpu.vm.ram.page(leaf.address(linear))?))
    };
    let before = linear.checked_sub(PAGE_SIZE).and_then(other);
    let before = before.as_ref().map_or(&[][..], |page| &page[page.len() - BEFORE..]);
    let after = if page.ends_with(&[0x0f]) { other(linear + PAGE_SIZE) } else { None };
    let after = after.as_ref().map_or(&[][..], |page| &page[..AFTER]);
    let differences = Differences { state: host_xcr0() != cpu.fpu.xcr0, cpuid: !jail.refuses_cpuid() };
    harmless(before, page, after, differences)
}

fn unmap(from: u64, len: u64) -> Call {
    [libc::SYS_munmap as u64, from, len, 0, 0, 0, 0]
}

impl Mirror {
    /// Of a jail that has no pages.
    pub fn new(flushes: &Flushes) -> Mirror {
        let (all, writes, seen) = (flushes.all, flushes.writes, flushes.pages);
        let (pages, regions) = (Map::default(), Map::default());
        Mirror { pages, regions, calls: Vec::new(), run: None, all, writes, seen }
    }

    /// Pages that are there.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Takes all pages away, to begin anew or for another address space.
    pub fn clear(&mut self, jail: &Jail, flushes: &Flushes) {
        (self.all, self.writes, self.seen) = (flushes.all, flushes.writes, flushes.pages);
        self.calls.clear();
        self.run = None;
        self.regions.clear();
        if !self.pages.is_empty() {
            self.pages.clear();
            let above = jail.stub() + STUB_LEN;
            self.calls.extend([unmap(0, jail.stub()), unmap(above, END - above)]);
        }
    }

    /// Takes away what the vCPU's TLB has forgotten since.
    pub fn follow(&mut self, cpu: &Cpu, jail: &Jail) {
        let flushes = &cpu.tlb.flushes_log;
        if self.all != flushes.all || flushes.pages - self.seen > LATEST as u64 {
            return self.clear(jail, flushes);
        }
        for page in flushes.since(self.seen) {
            self.remove(page);
        }
        self.seen = flushes.pages;
        if self.writes != flushes.writes {
            self.writes = flushes.writes;
            self.protect(cpu);
        }
    }

    fn remove(&mut self, number: u64) {
        if self.pages.remove(&number).is_some() {
            self.calls.push(unmap(number * PAGE_SIZE, PAGE_SIZE));
        }
    }

    /// Takes away the writable pages whose next write must be seen.
    fn protect(&mut self, cpu: &Cpu) {
        let seen = |&(_, &entry): &(&u64, &u64)| {
            entry & WRITE != 0
                && cpu.vm.ram.page(entry).is_none_or(|page| page.state.has_code() || !page.state.is_dirty())
        };
        let gone: Vec<u64> = self.pages.iter().filter(seen).map(|(&number, _)| number).collect();
        gone.into_iter().for_each(|number| self.remove(number));
    }

    /// Carries out what has been decided; guest registers must be set anew afterwards. If the host refuses
    /// any of it, nothing is mapped, and the answer is `false`.
    pub fn settle(&mut self, jail: &mut Jail, flushes: &Flushes) -> Result<bool, std::io::Error> {
        self.end_run();
        if self.calls.is_empty() {
            return Ok(true);
        }
        let result = jail.call(&self.calls);
        self.calls.clear();
        if let Err(error) = result {
            log::debug!("a guest program's pages were not mapped: {error}");
            self.clear(jail, flushes);
            jail.call(&self.calls)?;
            self.calls.clear();
            return Ok(false);
        }
        Ok(true)
    }

    /// The program, at `rip`, was refused an access to `linear`.
    pub fn fault(&mut self, cpu: &mut Cpu, jail: &Jail, linear: u64, rip: u64) -> Fault {
        let stub = jail.stub();
        if linear >= END || (stub..stub + STUB_LEN).contains(&linear) {
            return Fault::Guest;
        }
        let number = linear / PAGE_SIZE;
        match self.pages.get(&number) {
            None => self.bring(cpu, jail, linear),
            Some(entry) if entry & EXECUTE == 0 && rip / PAGE_SIZE == number => Fault::Foreign,
            // The end of an instruction, or what it writes: the interpreter knows.
            Some(_)
                if linear.is_multiple_of(PAGE_SIZE)
                    && rip.wrapping_add(LONGEST - 1) / PAGE_SIZE == number =>
            {
                Fault::Guest
            }
            Some(entry) if entry & WRITE == 0 => self.open(cpu, linear, *entry),
            Some(_) => Fault::Guest,
        }
    }

    /// Maps a page, and those around it that the program has used.
    fn bring(&mut self, cpu: &mut Cpu, jail: &Jail, linear: u64) -> Fault {
        if cpu.probe(View::User, linear, Intent::Read).is_none() {
            return Fault::Guest;
        }
        let Some(leaf) = cpu.user_leaf(linear) else { return Fault::Guest };
        let region = linear >> 21;
        let crowded = self.regions.len() >= MOST_REGIONS && !self.regions.contains_key(&region);
        if crowded || self.pages.len() + 512 > MOST_PAGES {
            self.clear(jail, &cpu.tlb.flushes_log);
        }
        self.regions.insert(region, ());
        let number = linear / PAGE_SIZE;
        let around = if leaf.bits == 12 { AROUND } else { 512 };
        let first = number & !(around - 1);
        for page in first..first + around {
            let Some(leaf) =
                (if leaf.bits == 12 { leaf.neighbour(cpu, page * PAGE_SIZE) } else { Some(leaf) })
            else {
                continue;
            };
            if page == number || leaf.accessed && !self.pages.contains_key(&page) {
                self.map(cpu, jail, page * PAGE_SIZE, &leaf);
            }
        }
        self.end_run();
        if self.pages.contains_key(&number) { Fault::Mapped } else { Fault::Guest }
    }

    fn map(&mut self, cpu: &Cpu, jail: &Jail, linear: u64, leaf: &UserLeaf) {
        let gpa = leaf.address(linear);
        let Some(page) = cpu.vm.ram.page(gpa).filter(|_| !cpu.lapic.claims(gpa)) else { return };
        let mut rights = 0;
        if leaf.execute && is_harmless(cpu, jail, linear, &copy_page(&page)) {
            rights |= EXECUTE;
        }
        if leaf.write && leaf.dirty && !page.state.has_code() {
            page.state.mark_dirty();
            rights |= WRITE;
        }
        self.put(cpu, linear, gpa, rights);
    }

    /// A write to a page that could only be read so far.
    fn open(&mut self, cpu: &mut Cpu, linear: u64, entry: u64) -> Fault {
        let code = cpu.vm.ram.page(entry).is_none_or(|page| page.state.has_code());
        let Some(walked) = (if code { None } else { cpu.probe(View::User, linear, Intent::Write) }) else {
            return Fault::Guest;
        };
        if walked.gpa / PAGE_SIZE != entry / PAGE_SIZE {
            return Fault::Guest; // the TLB's own contents may be old as well: the interpreter decides
        }
        if let Some(page) = cpu.vm.ram.page(entry) {
            page.state.mark_dirty();
        }
        self.put(cpu, linear & !(PAGE_SIZE - 1), walked.gpa & !(PAGE_SIZE - 1), entry & EXECUTE | WRITE);
        Fault::Mapped
    }

    fn put(&mut self, cpu: &Cpu, linear: u64, gpa: u64, rights: u64) {
        let Some((_, offset)) = cpu.vm.ram.file(gpa) else { return };
        self.pages.insert(linear / PAGE_SIZE, gpa & !(PAGE_SIZE - 1) | rights);
        if let Some(run) = &mut self.run
            && (run.linear + run.len, run.offset + run.len, run.rights) == (linear, offset, rights)
        {
            run.len += PAGE_SIZE;
            return;
        }
        self.end_run();
        self.run = Some(Run { linear, offset, len: PAGE_SIZE, rights });
    }

    fn end_run(&mut self) {
        self.calls.extend(self.run.take().map(Run::call));
    }
}

#[cfg(test)]
mod tests {
    use engine::x86::bits::cr4;

    use super::super::super::exception::{Exception, vector};
    use super::super::super::op::{RIP, reg};
    use super::super::super::systest::GDT;
    use super::super::super::testing::{CODE, DATA};
    use super::super::testing::{Program, READ, USER, WRITE};
    use super::*;

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
            let fault = cell.mirror.fault(&mut program.cpu, &cell.jail, gigabyte << 30 | DATA, CODE);
            assert_eq!(fault, Fault::Mapped);
            assert!(cell.mirror.settle(&mut cell.jail, &program.cpu.tlb.flushes_log).unwrap());
        }
        let status = std::fs::read_to_string(format!("/proc/{}/status", cell.jail.pid())).unwrap();
        let tables = status.lines().find_map(|line| line.strip_prefix("VmPTE:")).unwrap();
        let kib: u64 = tables.split_whitespace().next().unwrap().parse().unwrap();
        assert!((1000..80_000).contains(&kib), "{tables}");
        assert_eq!(program.cpu.regs[RIP as usize], CODE + 3);
    }
}
