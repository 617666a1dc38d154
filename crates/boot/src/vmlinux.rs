//! The kernel proper inside a bzImage, unpacked here and not by the guest: the ELF file that Linux'
//! `arch/x86/boot/compressed` would unpack, its relocations applied and its addresses randomized as there
//! (`misc.c`, `kaslr.c`). Kernels that are packed with LZ4; whatever is not exactly as expected is left to the
//! guest.

use std::ops::Range;

use mem::{Bytes, GuestAddress, GuestMemoryBackend, GuestRam};

use crate::bytes::Fields;
use crate::image::Image;
use crate::lz4::{BEYOND_HEAP, Packed};
use crate::{Problem, elf, setup};

/// Physical address 0 is linked here (`__START_KERNEL_map`).
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// Where the kernel may be in virtual memory, from [`KERNEL_MAP`] on (`KERNEL_IMAGE_SIZE`).
const VIRTUAL_ROOM: u64 = 1 << 30;
/// Much more than any kernel has, in bytes.
const MOST_RELOCATIONS: u64 = 16 << 20;

// ELF-64: header and program header fields.
const EM_X86_64: u16 = 62;
const E_MACHINE: u64 = 18;
const E_ENTRY: u64 = 24;
const E_PHOFF: u64 = 32;
const E_SHOFF: u64 = 40;
const E_PHENTSIZE: u64 = 54;
const E_PHNUM: u64 = 56;
const E_SHENTSIZE: u64 = 58;
const E_SHNUM: u64 = 60;
const PT_LOAD: u32 = 1;
const P_OFFSET: u64 = 8;
const P_PADDR: u64 = 24;
const P_FILESZ: u64 = 32;
const P_MEMSZ: u64 = 40;

struct Segment {
    file: Range<u64>,
    /// Offset and size in the kernel's memory.
    memory: Range<u64>,
}

/// An unpacked kernel to be.
pub(crate) struct Vmlinux<'a> {
    packed: Packed<'a>,
    segments: Vec<Segment>,
    /// Offset of its 64-bit entry.
    pub entry: u64,
    /// Where the relocations are in the file, behind the ELF file proper.
    table: Range<u64>,
    /// Where the kernel is linked to be.
    memory: Range<u64>,
}

/// Where a kernel is put: its physical address, and how far from its own virtual one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub load: u64,
    pub moved: u64,
}

impl Vmlinux<'_> {
    /// The kernel that is packed in `part` of a bzImage, linked to `memory`; `None` if the guest has to
    /// unpack it.
    pub fn find(image: &Image, part: Range<usize>, memory: Range<u64>) -> Option<Vmlinux<'_>> {
        let mut packed = Packed::find(image, part)?;
        let size = packed.size;
        let (_, head) = packed.unpack(0).ok()?;
        let fields = Fields::new(head, "");
        if !elf::is_elf(head) || fields.u16(E_MACHINE).ok()? != EM_X86_64 {
            return None;
        }
        let segments = segments(fields, size, &memory)?;
        let sections = u64::from(fields.u16(E_SHENTSIZE).ok()?) * u64::from(fields.u16(E_SHNUM).ok()?);
        let end = fields.u64(E_SHOFF).ok()?.checked_add(sections).filter(|end| *end <= size)?;
        let table = end..size;
        let entry = fields.u64(E_ENTRY).ok()?.checked_sub(memory.start)?;
        let entered = segments.iter().any(|segment| segment.memory.contains(&entry));
        let sound = entered && table.end - table.start <= MOST_RELOCATIONS;
        sound.then_some(Vmlinux { packed, segments, entry, table, memory })
    }

    /// Whether it can be at any virtual address.
    pub fn moves(&self) -> bool {
        !self.table.is_empty()
    }

    /// Puts it into guest memory.
    pub fn load(&mut self, ram: &GuestRam, place: Place) -> Result<(), Problem> {
        let mut table = Vec::new();
        for index in 0..self.packed.blocks() {
            let (block, bytes) = self.packed.unpack(index)?;
            let part = |of: &Range<u64>| {
                let (start, end) = (of.start.max(block.start), of.end.min(block.end));
                let within = |at| (at - block.start) as usize;
                (start < end).then(|| (start, &bytes[within(start)..within(end)]))
            };
            for Segment { file, memory } in &self.segments {
                if let Some((start, bytes)) = part(file) {
                    setup::write(ram, place.load + memory.start + (start - file.start), bytes)?;
                }
            }
            if let Some((_, bytes)) = part(&self.table) {
                table.reserve(BEYOND_HEAP);
                table.extend_from_slice(bytes);
            }
        }
        for Segment { file, memory } in &self.segments {
            let filled = memory.start + (file.end - file.start);
            setup::zero(ram, place.load + filled, memory.end - filled)?;
        }
        self.relocate(ram, place, &table)
    }

    /// Tells the kernel, which is in memory, where that is.
    fn relocate(&self, ram: &GuestRam, place: Place, table: &[u8]) -> Result<(), Problem> {
        let damaged = || Problem::Damaged("its compressed kernel has relocations of another kind".into());
        let [wide, inverse, narrow] = lists(table).ok_or_else(damaged)?;
        let failed = |source| Problem::GuestMemory { addr: place.load, source };
        let size = (self.memory.end - self.memory.start) as usize;
        let kernel = ram.get_slice(GuestAddress(place.load), size).map_err(failed)?;
        let failed = |error: vm_memory::VolatileMemoryError| failed(error.into());
        for word in wide {
            let at = self.offset(word).ok_or_else(damaged)?;
            let value: u64 = kernel.read_obj(at).map_err(failed)?;
            kernel.write_obj(value.wrapping_add(place.moved), at).map_err(failed)?;
        }
        let moved = place.moved as u32;
        for (list, by) in [(narrow, moved), (inverse, moved.wrapping_neg())] {
            for word in list {
                let at = self.offset(word).ok_or_else(damaged)?;
                let value: u32 = kernel.read_obj(at).map_err(failed)?;
                kernel.write_obj(value.wrapping_add(by), at).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Where in the kernel is what the low half of its virtual address tells.
    fn offset(&self, word: &[u8; 4]) -> Option<usize> {
        let address = i64::from(i32::from_le_bytes(*word)) as u64;
        let offset = address.checked_sub(KERNEL_MAP)?.checked_sub(self.memory.start)?;
        (offset + 8 <= self.memory.end - self.memory.start).then_some(offset as usize)
    }
}

/// The places of a kernel's own addresses, each the low half of a virtual address: of those with 64 bits, of
/// differences of 32 bits to something that does not move, and of sign-extended ones with 32 bits. In the file
/// each list is behind a 0; newer kernels than 6.14 have no differences, and those that do not move have
/// nothing at all.
fn lists(table: &[u8]) -> Option<[&[[u8; 4]]; 3]> {
    let (words, rest) = table.as_chunks::<4>();
    if table.is_empty() {
        return Some([&[]; 3]);
    }
    let ([0, 0, 0, 0], words) = words.split_first()? else { return None };
    let mut lists = words.split(|word| *word == [0; 4]);
    let (first, second, third) = (lists.next()?, lists.next()?, lists.next());
    let sound = rest.is_empty() && lists.next().is_none();
    sound.then_some(third.map_or([first, &[], second], |third| [first, second, third]))
}

/// The segments to load, none of them outside `memory` or the file of `size` bytes.
fn segments(head: Fields<'_>, size: u64, memory: &Range<u64>) -> Option<Vec<Segment>> {
    let count = u64::from(head.u16(E_PHNUM).ok()?);
    let (table, each) = (head.u64(E_PHOFF).ok()?, u64::from(head.u16(E_PHENTSIZE).ok()?));
    let mut segments = Vec::new();
    for index in 0..count {
        let header = Fields::new(head.slice(table.checked_add(index * each)?, each).ok()?, "");
        if header.u32(0).ok()? != PT_LOAD {
            continue;
        }
        let field = |offset| header.u64(offset).ok();
        let (offset, filled, length) = (field(P_OFFSET)?, field(P_FILESZ)?, field(P_MEMSZ)?);
        let start = field(P_PADDR)?.checked_sub(memory.start)?;
        let segment =
            Segment { file: offset..offset.checked_add(filled)?, memory: start..start.checked_add(length)? };
        if filled > length || segment.file.end > size || segment.memory.end > memory.end - memory.start {
            return None;
        }
        segments.push(segment);
    }
    // Those of a kernel do not overlap. Made-up ones could all be as large as the kernel's memory: hours of clearing.
    let all: u64 = segments.iter().map(|segment| segment.memory.end - segment.memory.start).sum();
    (!segments.is_empty() && all <= memory.end - memory.start).then_some(segments)
}

/// How far the kernel is moved in virtual memory: one of all that `align` and its `size` leave.
pub(crate) fn random_move(memory: &Range<u64>, align: u64, random: u64) -> u64 {
    pick(random, VIRTUAL_ROOM.saturating_sub(memory.end) / align + 1) * align
}

/// One of `count` numbers from 0 on.
pub(crate) fn pick(random: u64, count: u64) -> u64 {
    ((u128::from(random) * u128::from(count)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::put;
    use crate::lz4::tests::pack;
    use crate::{Entry, Kernel, LoadParams, MemoryMap, bzimage, layout};
    use std::path::Path;

    const MIB: u64 = 1 << 20;
    const LINKED: u64 = 16 * MIB;
    const WIDE: u64 = 0xffff_ffff_8100_0200;
    const NARROW: u32 = 0x8100_0300;
    const INVERSE: u32 = 0x1234;

    /// A kernel of one page and two that are zero, entered at 0x10; at 0x100 are addresses of each kind.
    fn elf(table: &[u32]) -> Vec<u8> {
        let mut file = vec![0; 0x2000];
        put(&mut file, 0, *b"\x7fELF\x02\x01\x01");
        put(&mut file, E_MACHINE as usize, EM_X86_64.to_le_bytes());
        put(&mut file, E_ENTRY as usize, (LINKED + 0x10).to_le_bytes());
        put(&mut file, E_PHOFF as usize, 64u64.to_le_bytes());
        put(&mut file, E_SHOFF as usize, 0x2000u64.to_le_bytes());
        put(&mut file, E_PHENTSIZE as usize, 56u16.to_le_bytes());
        put(&mut file, E_PHNUM as usize, 1u16.to_le_bytes());
        put(&mut file, 64, PT_LOAD.to_le_bytes());
        for (offset, value) in [(P_OFFSET, 0x1000), (P_PADDR, LINKED), (P_FILESZ, 0x1000), (P_MEMSZ, 0x3000)]
        {
            put(&mut file, 64 + offset as usize, value.to_le_bytes());
        }
        put(&mut file, 0x1010, *b"entry");
        put(&mut file, 0x1100, WIDE.to_le_bytes());
        put(&mut file, 0x1108, NARROW.to_le_bytes());
        put(&mut file, 0x110c, INVERSE.to_le_bytes());
        file.extend(table.iter().flat_map(|word| word.to_le_bytes()));
        file
    }

    const TABLE: [u32; 6] = [0, 0x8100_0100, 0, 0x8100_010c, 0, 0x8100_0108];

    /// A bzImage with that in it.
    fn image(elf: &[u8]) -> Vec<u8> {
        let mut file = bzimage::tests::sample();
        file.truncate(0x700);
        let packed = pack(elf);
        put(&mut file, 0x248, 0x300u32.to_le_bytes());
        put(&mut file, 0x24c, (packed.len() as u32).to_le_bytes());
        file.extend(packed);
        file.resize(file.len().next_multiple_of(16), 0);
        let paragraphs = (file.len() as u32 - 0x400) / 16;
        put(&mut file, 0x1f4, paragraphs.to_le_bytes());
        file
    }

    struct Loaded {
        ram: GuestRam,
        entry: Entry,
    }

    impl Loaded {
        fn new(file: Vec<u8>, cmdline: &str) -> Loaded {
            let ram = GuestRam::new(&[0..64 * MIB]).unwrap();
            ram.write_slice(&vec![0xff; 48 * MIB as usize], GuestAddress(LINKED)).unwrap();
            let memory_map = MemoryMap::pc(&ram, &[]);
            let params = LoadParams { initrd: None, cmdline, acpi_rsdp: 0xe0000, memory_map: &memory_map };
            let entry = Kernel::parse(Path::new("vmlinuz"), file).unwrap().load(&ram, &params).unwrap();
            Loaded { ram, entry }
        }

        fn read<const N: usize>(&self, at: u64) -> [u8; N] {
            let mut bytes = [0; N];
            self.ram.read_slice(&mut bytes, GuestAddress(self.entry.rip - 0x10 + at)).unwrap();
            bytes
        }

        fn addresses(&self) -> (u64, u32, u32) {
            let word = |at| u32::from_le_bytes(self.read(at));
            (u64::from_le_bytes(self.read(0x100)), word(0x108), word(0x10c))
        }

        fn randomized(&self) -> bool {
            let flags: u8 = self.ram.read_obj(GuestAddress(layout::ZERO_PAGE + 0x211)).unwrap();
            flags & 2 != 0
        }
    }

    #[test]
    fn the_kernel_is_unpacked_to_where_it_was_linked() {
        let kernel = Loaded::new(image(&elf(&TABLE)), "quiet nokaslr");
        assert_eq!(kernel.entry.rip, LINKED + 0x10);
        assert_eq!(&kernel.read(0x10), b"entry");
        assert_eq!(kernel.addresses(), (WIDE, NARROW, INVERSE));
        assert_eq!((kernel.read(0x1000), kernel.read(0x2fff), kernel.read(0x3000)), ([0], [0], [0xff]));
        assert!(!kernel.randomized());
    }

    #[test]
    fn it_comes_to_a_random_place_and_knows_its_addresses_there() {
        let mut places = Vec::new();
        for _ in 0..12 {
            let kernel = Loaded::new(image(&elf(&TABLE)), "quiet");
            let (load, (wide, narrow, inverse)) = (kernel.entry.rip - 0x10, kernel.addresses());
            let moved = wide - WIDE;
            assert!(load.is_multiple_of(2 * MIB) && (LINKED..60 * MIB + 1).contains(&load), "{load:#x}");
            assert!(moved.is_multiple_of(2 * MIB) && wide < KERNEL_MAP + VIRTUAL_ROOM, "{wide:#x}");
            assert_eq!(narrow, NARROW + moved as u32);
            assert_eq!(inverse, INVERSE.wrapping_sub(moved as u32));
            assert!(kernel.randomized());
            places.push((load, moved));
        }
        places.sort_unstable();
        places.dedup();
        assert!(places.len() > 6, "{places:x?}");
    }

    #[test]
    fn tables_of_newer_kernels_have_no_differences_and_of_fixed_ones_nothing() {
        let newer = Loaded::new(image(&elf(&[0, 0x8100_0100, 0, 0x8100_0108])), "");
        assert_eq!(newer.addresses().2, INVERSE);
        assert_ne!((newer.addresses().0, newer.randomized()), (0, false));
        let fixed = Loaded::new(image(&elf(&[])), "");
        assert_eq!((fixed.entry.rip, fixed.randomized()), (LINKED + 0x10, false));
    }

    #[test]
    fn whatever_is_unexpected_is_left_to_the_guest() {
        let guests_own = LINKED + 0x200;
        let rip = |elf: Vec<u8>| Loaded::new(image(&elf), "").entry.rip;
        assert_eq!(rip(elf(&[0, 1, 0, 2, 0, 3])), guests_own, "addresses outside the kernel");
        assert_eq!(rip(elf(&[0, 0x8100_0100])), guests_own, "one list");
        assert_eq!(rip(elf(&[7, 0x8100_0100, 0, 0x8100_0108])), guests_own, "no mark");
        let patched = |at: u64, value: u64| {
            let mut elf = elf(&TABLE);
            put(&mut elf, at as usize, value.to_le_bytes());
            rip(elf)
        };
        for value in [0, LINKED - 1, LINKED + 0x3000, u64::MAX] {
            assert_eq!(patched(E_ENTRY, value), guests_own);
            assert_eq!(patched(64 + P_PADDR, value.max(LINKED + 0x3000)), guests_own);
        }
        for value in [0x2100, u64::MAX] {
            assert_eq!(patched(64 + P_FILESZ, value), guests_own);
            assert_eq!(patched(64 + P_OFFSET, value), guests_own);
            assert_eq!(patched(E_PHOFF, value), guests_own);
            assert_eq!(patched(E_SHOFF, value), guests_own);
        }
        let mut twice = elf(&TABLE);
        put(&mut twice, 64 + P_MEMSZ as usize, (3 * MIB).to_le_bytes());
        let header = twice[64..120].to_vec();
        twice[120..176].copy_from_slice(&header);
        put(&mut twice, E_PHNUM as usize, 2u16.to_le_bytes());
        assert_eq!(rip(twice), guests_own, "more than the kernel has memory");
    }
}
