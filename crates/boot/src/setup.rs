//! Parts of the entry state that more than one boot protocol needs.

use mem::{Bytes, GuestAddress, GuestRam};

use crate::bytes::put;
use crate::{DescriptorTable, Entry, MemoryMap, Mode, Problem, Segment, layout};

// Control register bits (Intel SDM 3A, 2.5) and EFER (2.2.1).
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_FIXED: u64 = 1 << 1;

// Selectors: Linux' 64-bit boot protocol wants __BOOT_CS = 0x10 and __BOOT_DS = 0x18.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

// Access rights (SDM 3A, 3.4.5): present, ring 0; G, and L or D/B for the code segment.
const CODE64: u16 = 0xa09b;
const CODE32: u16 = 0xc09b;
const DATA: u16 = 0xc093;
const TSS_BUSY: u16 = 0x008b;

/// Writes bytes into guest memory.
pub(crate) fn write(ram: &GuestRam, addr: u64, bytes: &[u8]) -> Result<(), Problem> {
    ram.write_slice(bytes, GuestAddress(addr)).map_err(|source| Problem::GuestMemory { addr, source })
}

/// Zeroes guest memory: after a reset it holds what the guest left there.
pub(crate) fn zero(ram: &GuestRam, addr: u64, len: u64) -> Result<(), Problem> {
    const CHUNK: u64 = 0x1_0000;
    for start in (addr..addr + len).step_by(CHUNK as usize) {
        let left = (addr + len - start).min(CHUNK);
        write(ram, start, &[0; CHUNK as usize][..left as usize])?;
    }
    Ok(())
}

/// Checks the map's length and clears the loader's part of memory, then fills in the BIOS data area.
pub(crate) fn low_memory(ram: &GuestRam, map: &MemoryMap) -> Result<(), Problem> {
    const MOST_ENTRIES: usize = 128; // the zero page has no room for more
    let entries = map.entries().len();
    if entries > MOST_ENTRIES {
        return Err(Problem::MemoryMapTooLong(entries));
    }
    zero(ram, layout::LOADER.start, layout::LOADER.end)?;
    write(ram, layout::BDA, &0x3f8u16.to_le_bytes())?;
    write(ram, layout::BDA + 0x0e, &((layout::EBDA >> 4) as u16).to_le_bytes())?;
    write(ram, layout::BDA + 0x13, &((layout::EBDA >> 10) as u16).to_le_bytes())?;
    write(ram, layout::EBDA, &[1]) // the EBDA's length in KiB
}

/// Writes the command line with its NUL; `max` is the most the kernel takes, without the NUL.
pub(crate) fn command_line(ram: &GuestRam, line: &str, max: u64) -> Result<(), Problem> {
    let len = line.len() as u64;
    let max = max.min(layout::COMMAND_LINE_SIZE - 1);
    if len > max {
        return Err(Problem::CommandLineTooLong { max, len });
    }
    if line.contains('\0') {
        return Err(Problem::CommandLineNul);
    }
    write(ram, layout::COMMAND_LINE, line.as_bytes())?;
    write(ram, layout::COMMAND_LINE + len, &[0])
}

/// Identity page tables over the first 4 GiB in pages of 2 MiB, which every CPU with long mode has.
pub(crate) fn page_tables(ram: &GuestRam) -> Result<(), Problem> {
    const TABLE: u64 = 0x1000;
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let pdpt = layout::PAGE_TABLES + TABLE;
    let directories = pdpt + TABLE;
    write(ram, layout::PAGE_TABLES, &(pdpt | PRESENT_WRITABLE).to_le_bytes())?;
    for gib in 0..4 {
        let directory = directories + gib * TABLE;
        write(ram, pdpt + gib * 8, &(directory | PRESENT_WRITABLE).to_le_bytes())?;
        let entry = |i: u64| ((gib << 30) + (i << 21)) | PRESENT_WRITABLE | LARGE;
        let table: Vec<u8> = (0..512).flat_map(|i| entry(i).to_le_bytes()).collect();
        write(ram, directory, &table)?;
    }
    Ok(())
}

/// The state of a 64-bit entry at `rip`; the page tables must have been written.
pub(crate) fn long64(ram: &GuestRam, rip: u64) -> Result<Entry, Problem> {
    let entry = Entry {
        mode: Mode::Long64,
        cr0: CR0_PE | CR0_ET | CR0_PG,
        cr3: layout::PAGE_TABLES,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        cs: flat(CODE_SELECTOR, CODE64),
        ..protected(rip)
    };
    write_gdt(ram, &entry)?;
    Ok(entry)
}

/// The state of a 32-bit entry at `eip`.
pub(crate) fn protected32(ram: &GuestRam, eip: u64) -> Result<Entry, Problem> {
    let entry = protected(eip);
    write_gdt(ram, &entry)?;
    Ok(entry)
}

fn protected(rip: u64) -> Entry {
    Entry {
        mode: Mode::Protected32,
        rip,
        rflags: RFLAGS_FIXED,
        rax: 0,
        rbx: 0,
        rsi: 0,
        rsp: layout::STACK_TOP,
        cr0: CR0_PE | CR0_ET,
        cr3: 0,
        cr4: 0,
        efer: 0,
        cs: flat(CODE_SELECTOR, CODE32),
        data: flat(DATA_SELECTOR, DATA),
        tr: Segment { selector: TSS_SELECTOR, base: 0, limit: 0x67, access: TSS_BUSY },
        gdtr: DescriptorTable { base: layout::GDT, limit: GDT_SIZE as u16 - 1 },
        idtr: DescriptorTable::default(),
    }
}

fn flat(selector: u16, access: u16) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, access }
}

/// Null, unused, code, data, and a TSS that is two entries long in long mode.
const GDT_SIZE: usize = 6 * 8;

fn write_gdt(ram: &GuestRam, entry: &Entry) -> Result<(), Problem> {
    let mut gdt = [0; GDT_SIZE];
    for segment in [entry.cs, entry.data, entry.tr] {
        put(&mut gdt, usize::from(segment.selector), descriptor(&segment).to_le_bytes());
    }
    write(ram, layout::GDT, &gdt)
}

/// SDM 3A, figure 3-8, for a base below 16 MiB.
fn descriptor(segment: &Segment) -> u64 {
    let granular = segment.access & 0x8000 != 0;
    let limit = u64::from(if granular { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.access);
    limit & 0xffff | segment.base << 16 | access << 40 | (limit >> 16) << 48
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_well_known_flat_ones() {
        assert_eq!(descriptor(&flat(0x10, CODE64)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&flat(0x10, CODE32)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&flat(0x18, DATA)), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn the_page_tables_map_every_address_below_4_gib_to_itself() {
        let ram = GuestRam::new(&[0..0x10_0000]).unwrap();
        page_tables(&ram).unwrap();
        let entry = |table: u64, index: u64| ram.read_obj::<u64>(GuestAddress(table + index * 8)).unwrap();
        for addr in [0, 0x1f_ffff, 0x20_0000, 0x4000_0000, 0xfee0_0000, 0xffff_ffff_u64] {
            let pdpt = entry(layout::PAGE_TABLES, addr >> 39) & !0xfff;
            let directory = entry(pdpt, addr >> 30 & 511) & !0xfff;
            let page = entry(directory, addr >> 21 & 511);
            assert_eq!(page & 0x83, 0x83);
            assert_eq!((page & !0x1f_ffff) | (addr & 0x1f_ffff), addr);
        }
        assert_eq!(entry(layout::PAGE_TABLES, 1), 0);
    }

    #[test]
    fn command_lines_are_terminated_and_limited() {
        let ram = GuestRam::new(&[0..0x10_0000]).unwrap();
        zero(&ram, 0, 0x10_0000).unwrap();
        write(&ram, layout::COMMAND_LINE, &[0xff; 16]).unwrap();
        command_line(&ram, "quiet", 5).unwrap();
        let mut line = [0; 6];
        ram.read_slice(&mut line, GuestAddress(layout::COMMAND_LINE)).unwrap();
        assert_eq!(&line, b"quiet\0");
        assert!(matches!(
            command_line(&ram, "quiet!", 5),
            Err(Problem::CommandLineTooLong { max: 5, len: 6 })
        ));
        assert!(matches!(command_line(&ram, "a\0b", 5), Err(Problem::CommandLineNul)));
        let long = "x".repeat(70000);
        assert!(matches!(
            command_line(&ram, &long, u64::MAX),
            Err(Problem::CommandLineTooLong { max: 65535, .. })
        ));
    }
}
