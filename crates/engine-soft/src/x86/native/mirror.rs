//! Which pages of the guest program a jail has: a TLB of the host's page tables.
//!
//! It follows the vCPU's TLB: an entry is made when the program touches the page, with all that the guest's
//! page table allows at that time, and goes when the guest flushes it ([`Flushes`]).

use mem::PAGE_SIZE;

use super::super::cpu::Cpu;
use super::super::decode::MAX_LEN;
use super::super::run::copy_page;
use super::super::tlb::View;
use super::super::translate::translator::Map;
use super::super::walk::{Intent, UserLeaf};
use super::flushes::{Flushes, LATEST};
use super::jail::{END, Jail, MEMORY_FD};
use super::scan::{AFTER, BEFORE, Differences};
use super::stub::{Call, STUB_LEN};
use super::suits::host_xcr0;

/// Pages around the one that is touched, by alignment, that come with it if the program used them before.
const AROUND: u64 = 64;
/// Most pages of a mirror: each may be a mapping of its own, of which Linux allows 65,530.
const MOST_PAGES: usize = 60_000;
/// Most regions of 2 MiB that it has had pages in: each may cost the host two page tables.
const MOST_REGIONS: usize = 8192;
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
fn is_harmless(cpu: &mut Cpu, jail: &Jail, linear: u64, gpa: u64, page: &[u8]) -> bool {
    let other = |linear: u64| {
        let leaf = cpu.user_leaf(linear)?;
        Some(copy_page(&cpu.vm.ram.page(leaf.address(linear))?))
    };
    let before = linear.checked_sub(PAGE_SIZE).and_then(other);
    let before = before.as_ref().map_or(&[][..], |page| &page[page.len() - BEFORE..]);
    let after = if page.ends_with(&[0x0f]) { other(linear + PAGE_SIZE) } else { None };
    let after = after.as_ref().map_or(&[][..], |page| &page[..AFTER]);
    let host = Differences { state: host_xcr0() != cpu.fpu.xcr0, cpuid: !jail.refuses_cpuid() };
    cpu.native.verdicts.harmless(gpa, [before, page, after], host)
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

    /// The program was refused an access to `linear`.
    pub fn fault(&mut self, cpu: &mut Cpu, jail: &Jail, linear: u64) -> Fault {
        let rip = cpu.rip();
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
                    && rip.wrapping_add(MAX_LEN as u64 - 1) / PAGE_SIZE == number =>
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

    fn map(&mut self, cpu: &mut Cpu, jail: &Jail, linear: u64, leaf: &UserLeaf) {
        let gpa = leaf.address(linear);
        let vm = cpu.vm.clone();
        let Some(page) = vm.ram.page(gpa).filter(|_| !cpu.lapic.claims(gpa)) else { return };
        let mut rights = 0;
        if leaf.execute && is_harmless(cpu, jail, linear, gpa, &copy_page(&page)) {
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
mod tests;
