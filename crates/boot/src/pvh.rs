//! ELF kernels with a PVH entry (Xen's docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h).

use mem::GuestRam;

use crate::bytes::put;
use crate::elf::{self, Elf};
use crate::kernel::{LoadParams, RawError};
use crate::setup;
use crate::space::Space;
use crate::{Entry, Problem, layout};

const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const START_INFO_MAGIC: u32 = 0x336e_c578;
const START_INFO_VERSION: u32 = 1;
const START_INFO_SIZE: usize = 56;
const MODULE_SIZE: usize = 32;
const MEMMAP_ENTRY_SIZE: usize = 24;

/// A checked PVH kernel.
#[derive(Debug)]
pub(crate) struct Pvh {
    elf: Elf,
    entry: u64,
}

impl Pvh {
    /// Finds the entry note.
    pub fn parse(elf: Elf, file: &[u8]) -> Result<Pvh, Problem> {
        let note = elf.note(file, b"Xen\0", XEN_ELFNOTE_PHYS32_ENTRY).ok_or(Problem::NoEntry)?;
        // The note is 4 bytes of 32-bit kernels and 8 of 64-bit ones; the entry is 32-bit either way.
        let entry = match *note {
            [a, b, c, d] | [a, b, c, d, 0, 0, 0, 0] => u64::from(u32::from_le_bytes([a, b, c, d])),
            _ => return Err(Problem::Damaged("its PVH entry note holds no 32-bit address".into())),
        };
        elf::check_entry(&elf.pieces, entry)?;
        Ok(Pvh { elf, entry })
    }

    /// Loads kernel, initrd, command line and start info.
    pub fn load(&self, file: &[u8], ram: &GuestRam, params: &LoadParams) -> Result<Entry, RawError> {
        setup::low_memory(ram, params.memory_map)?;
        let mut space = Space::new(params.memory_map)?;
        let end = elf::load_pieces(&self.elf.pieces, file, ram, &mut space)?;
        let initrd = match params.initrd {
            Some(initrd) => {
                let size = initrd.size();
                let addr = space.claim_highest(size, mem::PAGE_SIZE, layout::FOUR_GIB);
                let addr =
                    addr.ok_or_else(|| initrd.error(space.no_initrd_place(end, size, layout::FOUR_GIB)))?;
                initrd.load(ram, addr)?;
                Some((addr, size))
            }
            None => None,
        };
        setup::command_line(ram, params.cmdline, u64::MAX)?;
        setup::write(ram, layout::PVH_INFO, &start_info(initrd, params))?;
        let entry = setup::protected32(ram, self.entry)?;
        Ok(Entry { rbx: layout::PVH_INFO, ..entry })
    }
}

/// `struct hvm_start_info`, then the module list, then the memory map.
fn start_info(initrd: Option<(u64, u64)>, params: &LoadParams) -> Vec<u8> {
    let modules_at = START_INFO_SIZE;
    let map_at = modules_at + MODULE_SIZE;
    let entries = params.memory_map.entries();
    let mut info = vec![0; map_at + entries.len() * MEMMAP_ENTRY_SIZE];
    let address = |offset: usize| (layout::PVH_INFO + offset as u64).to_le_bytes();
    put(&mut info, 0, START_INFO_MAGIC.to_le_bytes());
    put(&mut info, 4, START_INFO_VERSION.to_le_bytes());
    if let Some((addr, size)) = initrd {
        put(&mut info, 12, 1u32.to_le_bytes());
        put(&mut info, 16, address(modules_at));
        put(&mut info, modules_at, addr.to_le_bytes());
        put(&mut info, modules_at + 8, size.to_le_bytes());
    }
    put(&mut info, 24, layout::COMMAND_LINE.to_le_bytes());
    put(&mut info, 32, params.acpi_rsdp.to_le_bytes());
    put(&mut info, 40, address(map_at));
    put(&mut info, 48, (entries.len() as u32).to_le_bytes());
    for (i, entry) in entries.iter().enumerate() {
        let at = map_at + i * MEMMAP_ENTRY_SIZE;
        put(&mut info, at, entry.range.start.to_le_bytes());
        put(&mut info, at + 8, (entry.range.end - entry.range.start).to_le_bytes());
        put(&mut info, at + 16, (entry.kind as u32).to_le_bytes());
    }
    info
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{Initrd, Kernel, MemoryMap, Mode};
    use linux_loader::start_info as oracle;
    use mem::{Bytes, GuestAddress};
    use std::path::Path;

    const MIB: u64 = 1 << 20;

    pub fn sample() -> Vec<u8> {
        let entry = (0x20_0020u64).to_le_bytes();
        elf::tests::sample(2 * MIB, &[0x90; 64], Some((b"Xen\0", 18, &entry)))
    }

    fn load(file: Vec<u8>, mib: u64, initrd: Option<&Initrd>) -> (GuestRam, Result<Entry, crate::Error>) {
        let ram = GuestRam::new(&[0..mib * MIB]).unwrap();
        setup::write(&ram, MIB, &vec![0xee; ((mib - 1) * MIB) as usize]).unwrap();
        let memory_map = MemoryMap::pc(&ram, &[]);
        let params = LoadParams { initrd, cmdline: "a=b", acpi_rsdp: 0xe0000, memory_map: &memory_map };
        let entry = Kernel::parse(Path::new("vmlinux"), file).and_then(|k| k.load(&ram, &params));
        (ram, entry)
    }

    #[test]
    fn the_start_info_names_everything() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"initrd").unwrap();
        let initrd = Initrd::open(file.path()).unwrap();
        let (ram, entry) = load(sample(), 8, Some(&initrd));
        let entry = entry.unwrap();
        assert_eq!((entry.mode, entry.rip, entry.rbx), (Mode::Protected32, 0x20_0020, layout::PVH_INFO));
        let info: oracle::hvm_start_info = ram.read_obj(GuestAddress(entry.rbx)).unwrap();
        assert_eq!((info.magic, info.version, info.nr_modules), (0x336e_c578, 1, 1));
        assert_eq!(info.rsdp_paddr, 0xe0000);
        let module: oracle::hvm_modlist_entry = ram.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), (8 * MIB - 4096, 6));
        assert_eq!(&ram.read_obj::<[u8; 6]>(GuestAddress(module.paddr)).unwrap(), b"initrd");
        assert_eq!(info.memmap_entries, 3);
        let last: oracle::hvm_memmap_table_entry =
            ram.read_obj(GuestAddress(info.memmap_paddr + 2 * 24)).unwrap();
        assert_eq!((last.addr, last.size, last.type_), (MIB, 7 * MIB, 1));
        assert_eq!(&ram.read_obj::<[u8; 4]>(GuestAddress(info.cmdline_paddr)).unwrap(), b"a=b\0");
    }

    #[test]
    fn bss_is_zeroed_even_where_a_former_run_left_bytes() {
        let (ram, entry) = load(sample(), 8, None);
        entry.unwrap();
        let mut bytes = vec![0; 64 + 0x1000 + 1];
        ram.read_slice(&mut bytes, GuestAddress(2 * MIB)).unwrap();
        assert!(bytes[..64].iter().all(|b| *b == 0x90));
        assert!(bytes[64..64 + 0x1000].iter().all(|b| *b == 0));
        assert_eq!(bytes[64 + 0x1000], 0xee);
    }

    #[test]
    fn what_cannot_be_entered_or_loaded_is_refused() {
        let problem = |file, mib| load(file, mib, None).1.unwrap_err().problem;
        let no_note = elf::tests::sample(2 * MIB, &[0; 64], None);
        assert!(matches!(problem(no_note, 8), Problem::NoEntry));
        let far = elf::tests::sample(2 * MIB, &[0; 64], Some((b"Xen\0", 18, &[0, 0, 0, 0x10])));
        assert!(matches!(problem(far, 8), Problem::Damaged(_)));
        assert!(matches!(problem(sample(), 2), Problem::NoRoom { needs_mib: 3, has_mib: 2 }));
        let low = elf::tests::sample(0x7000, &[0; 64], Some((b"Xen\0", 18, &[0, 0x70, 0, 0])));
        assert!(matches!(problem(low, 8), Problem::NoPlace { start: 0x7000, .. }));
    }
}
