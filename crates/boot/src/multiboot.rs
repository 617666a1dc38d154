//! Multiboot 1 (the Multiboot Specification, version 0.6.96): ELF files of either class, and any file
//! whose header says where it goes (the "a.out kludge").

use mem::GuestRam;

use crate::bytes::{Fields, put};
use crate::elf::{self, Elf, Piece};
use crate::kernel::{LoadParams, RawError};
use crate::setup;
use crate::space::Space;
use crate::{Entry, Problem, layout};

const HEADER_MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u64 = 0x2bad_b002;
/// The header lies whole within the first 8 KiB (section 3.1).
const SEARCH: usize = 8192;

// Header flags (3.1.1).
const VIDEO_MODE: u32 = 1 << 2;
const REQUIRED: u32 = 0xffff;
/// Page-aligned modules and memory information, which every kernel gets.
const ALWAYS: u32 = 0b11;
const ADDRESSES: u32 = 1 << 16;

// Information flags and fields (3.3).
const INFO_MEMORY: u32 = 1 << 0;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MMAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;
const INFO_SIZE: usize = 0x78;
const MODULE_SIZE: usize = 16;
const MMAP_ENTRY_SIZE: usize = 24;
const LOADER_NAME: &[u8] = b"ospite\0";

/// A checked multiboot kernel.
#[derive(Debug)]
pub(crate) struct Multiboot {
    pieces: Vec<Piece>,
    entry: u64,
}

/// A header whose checksum is right.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    offset: u64,
    flags: u32,
}

/// Finds the header, if there is one that can be followed: Xen's EFI program holds a copy of the one
/// of its ELF file, which says nothing about the program.
pub(crate) fn find_header(file: &[u8]) -> Option<Header> {
    let head = &file[..file.len().min(SEARCH)];
    head.chunks_exact(4).enumerate().find_map(|(i, word)| {
        let offset = i as u64 * 4;
        let fields = Fields::new(head, "its multiboot header");
        let (flags, checksum) = (fields.u32(offset + 4).ok()?, fields.u32(offset + 8).ok()?);
        let sum = HEADER_MAGIC.wrapping_add(flags).wrapping_add(checksum);
        let header = Header { offset, flags };
        let valid = word == HEADER_MAGIC.to_le_bytes() && sum == 0;
        (valid && (header.has_addresses() || elf::is_elf(file))).then_some(header)
    })
}

impl Header {
    /// Whether the header itself says what goes where, in a file of any format.
    fn has_addresses(&self) -> bool {
        self.flags & ADDRESSES != 0
    }
}

impl Multiboot {
    /// Works out what goes where.
    pub fn parse(file: &[u8], header: Header) -> Result<Multiboot, Problem> {
        let unknown = header.flags & REQUIRED & !ALWAYS & !VIDEO_MODE;
        if unknown != 0 {
            return Err(Problem::MultibootFeatures(unknown));
        }
        if header.flags & VIDEO_MODE != 0 {
            log::warn!("the kernel asks for a video mode; this machine has no display");
        }
        let (pieces, entry) = if header.has_addresses() {
            let (piece, entry) = by_addresses(file, header)?;
            (vec![piece], entry)
        } else {
            let elf = Elf::parse(file)?;
            let entry = elf.physical_entry();
            (elf.pieces, entry)
        };
        elf::check_entry(&pieces, entry)?;
        Ok(Multiboot { pieces, entry })
    }

    /// Loads kernel, initrd (as the only module), command line and multiboot information.
    pub fn load(
        &self,
        file: &[u8],
        name: &str,
        ram: &GuestRam,
        params: &LoadParams,
    ) -> Result<Entry, RawError> {
        setup::low_memory(ram, params.memory_map)?;
        let mut space = Space::new(params.memory_map)?;
        space.release(layout::FREE_FOR_MULTIBOOT);
        let end = elf::load_pieces(&self.pieces, file, ram, &mut space)?;
        let module = match params.initrd {
            Some(initrd) => {
                let size = initrd.size();
                let from = end.max(layout::HIGH_MEMORY);
                let addr = space.claim_lowest(size, mem::PAGE_SIZE, from, layout::FOUR_GIB);
                let addr =
                    addr.ok_or_else(|| initrd.error(space.no_initrd_place(end, size, layout::FOUR_GIB)))?;
                initrd.load(ram, addr)?;
                Some((addr, size))
            }
            None => None,
        };
        // The first word is the kernel's own name, as argv[0] is to a program.
        let line = if params.cmdline.is_empty() { name.into() } else { format!("{name} {}", params.cmdline) };
        setup::command_line(ram, &line, u64::MAX)?;
        setup::write(ram, layout::MULTIBOOT_INFO, &information(module, params))?;
        let entry = setup::protected32(ram, self.entry)?;
        // ESP is the kernel's to set (3.2); until then it is in memory that no kernel lies in.
        let rsp = layout::FREE_FOR_MULTIBOOT.start;
        Ok(Entry { rax: LOADER_MAGIC, rbx: layout::MULTIBOOT_INFO, rsp, ..entry })
    }
}

/// The load and entry addresses of the header itself (3.1.3).
fn by_addresses(file: &[u8], header: Header) -> Result<(Piece, u64), Problem> {
    let fields = Fields::new(file, "its multiboot header");
    let field = |i: u64| fields.u32(header.offset + 12 + i * 4).map(u64::from);
    let (header_addr, load_addr, load_end, bss_end, entry) =
        (field(0)?, field(1)?, field(2)?, field(3)?, field(4)?);
    let damaged = |text: &str| Problem::Damaged(format!("its multiboot header says that {text}"));
    let before = header_addr.checked_sub(load_addr).ok_or_else(|| damaged("it starts after its header"))?;
    let start = header.offset.checked_sub(before).ok_or_else(|| damaged("it starts before the file does"))?;
    let len = match load_end {
        0 => file.len() as u64 - start,
        end => end.checked_sub(load_addr).ok_or_else(|| damaged("it ends before it starts"))?,
    };
    let size = match bss_end {
        0 => len,
        end => end.saturating_sub(load_addr).max(len),
    };
    let file = Fields::new(file, "its loadable part").range(start, len)?;
    Ok((Piece { paddr: load_addr, size, file }, entry))
}

/// The information structure, then loader name, module and memory map.
fn information(module: Option<(u64, u64)>, params: &LoadParams) -> Vec<u8> {
    let name_at = INFO_SIZE;
    let module_at = name_at + 8;
    let map_at = module_at + MODULE_SIZE;
    let entries = params.memory_map.entries();
    let mut info = vec![0; map_at + entries.len() * MMAP_ENTRY_SIZE];
    let address = |offset: usize| (layout::MULTIBOOT_INFO as u32 + offset as u32).to_le_bytes();
    let mut flags = INFO_MEMORY | INFO_CMDLINE | INFO_MMAP | INFO_LOADER_NAME;
    let kib = |bytes: u64| u32::try_from(bytes >> 10).unwrap_or(u32::MAX).to_le_bytes();
    put(&mut info, 4, kib(layout::EBDA));
    put(&mut info, 8, kib(params.memory_map.upper_memory()));
    put(&mut info, 16, (layout::COMMAND_LINE as u32).to_le_bytes());
    if let Some((addr, size)) = module {
        flags |= INFO_MODULES;
        put(&mut info, 20, 1u32.to_le_bytes());
        put(&mut info, 24, address(module_at));
        put(&mut info, module_at, (addr as u32).to_le_bytes());
        put(&mut info, module_at + 4, ((addr + size) as u32).to_le_bytes());
        // An empty string: the NUL after the loader's name.
        put(&mut info, module_at + 8, address(name_at + LOADER_NAME.len() - 1));
    }
    put(&mut info, 44, ((entries.len() * MMAP_ENTRY_SIZE) as u32).to_le_bytes());
    put(&mut info, 48, address(map_at));
    put(&mut info, 64, address(name_at));
    info[name_at..name_at + LOADER_NAME.len()].copy_from_slice(LOADER_NAME);
    put(&mut info, 0, flags.to_le_bytes());
    for (i, entry) in entries.iter().enumerate() {
        let at = map_at + i * MMAP_ENTRY_SIZE;
        put(&mut info, at, (MMAP_ENTRY_SIZE as u32 - 4).to_le_bytes()); // the size field counts itself out
        put(&mut info, at + 4, entry.range.start.to_le_bytes());
        put(&mut info, at + 12, (entry.range.end - entry.range.start).to_le_bytes());
        put(&mut info, at + 20, (entry.kind as u32).to_le_bytes());
    }
    info
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{Initrd, Kernel, Kind, MemoryMap, Mode};
    use mem::{Bytes, GuestAddress};
    use std::path::Path;

    const MIB: u64 = 1 << 20;

    fn header(flags: u32) -> Vec<u8> {
        let checksum = 0u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(flags);
        [HEADER_MAGIC, flags, checksum].iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    /// A flat file that loads at 1 MiB: header at 0x20, entry at 0x40, 0x200 bytes of bss.
    pub fn flat() -> Vec<u8> {
        let mut file = vec![0xaa; 0x100];
        let mut head = header(ADDRESSES | 3);
        for value in [0x10_0020u32, 0x10_0000, 0x10_0100, 0x10_0300, 0x10_0040] {
            head.extend(value.to_le_bytes());
        }
        file[0x20..0x20 + head.len()].copy_from_slice(&head);
        file
    }

    pub fn in_elf() -> Vec<u8> {
        let mut content = vec![0x90; 64];
        content[..12].copy_from_slice(&header(0));
        elf::tests::sample(4 * MIB, &content, None)
    }

    fn load(file: Vec<u8>, initrd: Option<&Initrd>) -> (GuestRam, Result<Entry, crate::Error>) {
        let ram = GuestRam::new(&[0..8 * MIB]).unwrap();
        let memory_map = MemoryMap::pc(&ram, &[]);
        let params = LoadParams { initrd, cmdline: "-v 1", acpi_rsdp: 0, memory_map: &memory_map };
        let entry = Kernel::parse(Path::new("dir/msr.flat"), file).and_then(|k| k.load(&ram, &params));
        (ram, entry)
    }

    fn word(ram: &GuestRam, addr: u64) -> u64 {
        u64::from(ram.read_obj::<u32>(GuestAddress(addr)).unwrap())
    }

    #[test]
    fn the_information_names_memory_command_line_and_module() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"module").unwrap();
        let initrd = Initrd::open(file.path()).unwrap();
        let (ram, entry) = load(in_elf(), Some(&initrd));
        let entry = entry.unwrap();
        assert_eq!((entry.mode, entry.rax, entry.rip), (Mode::Protected32, 0x2bad_b002, 4 * MIB + 0x10));
        let info = entry.rbx;
        assert_eq!(word(&ram, info), 0b10_0100_1101);
        assert_eq!((word(&ram, info + 4), word(&ram, info + 8)), (639, 7 * 1024));
        let mut line = [0; 14];
        ram.read_slice(&mut line, GuestAddress(word(&ram, info + 16))).unwrap();
        assert_eq!(&line, b"msr.flat -v 1\0");

        let module = word(&ram, info + 24);
        let (start, end) = (word(&ram, module), word(&ram, module + 4));
        assert_eq!((start, end), (4 * MIB + 0x2000, 4 * MIB + 0x2006), "the page after the kernel");
        assert_eq!(&ram.read_obj::<[u8; 6]>(GuestAddress(start)).unwrap(), b"module");
        assert_eq!(ram.read_obj::<u8>(GuestAddress(word(&ram, module + 8))).unwrap(), 0);

        let (len, map) = (word(&ram, info + 44), word(&ram, info + 48));
        assert_eq!(len, 3 * 24);
        let last = map + 2 * 24;
        assert_eq!((word(&ram, last), word(&ram, last + 4), word(&ram, last + 20)), (20, MIB, 1));
        let name: [u8; 7] = ram.read_obj(GuestAddress(word(&ram, info + 64))).unwrap();
        assert_eq!(&name, b"ospite\0");
    }

    #[test]
    fn a_flat_file_goes_where_its_header_says() {
        let (ram, entry) = load(flat(), None);
        assert_eq!(entry.unwrap().rip, 0x10_0040);
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0x10_00ff)).unwrap(), 0xaa);
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0x10_0100)).unwrap(), 0);
    }

    #[test]
    fn a_real_mode_program_may_be_loaded_low() {
        let mut file = flat();
        for (i, value) in [0x8020u32, 0x8000, 0x8100, 0x8300, 0x8040].into_iter().enumerate() {
            put(&mut file, 0x20 + 12 + 4 * i, value.to_le_bytes());
        }
        let (ram, entry) = load(file, None);
        let entry = entry.unwrap();
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0x80ff)).unwrap(), 0xaa);
        assert!(entry.rsp <= 0x8000 && entry.rbx >= 0x8300, "what it is given lies outside of it");
    }

    #[test]
    fn a_multiboot_header_wins_over_a_pvh_note() {
        let mut content = vec![0x90; 64];
        content[..12].copy_from_slice(&header(0));
        let both = elf::tests::sample(4 * MIB, &content, Some((b"Xen\0", 18, &[0x20, 0, 0x40, 0])));
        assert_eq!(Kernel::parse(Path::new("xen"), both).unwrap().kind(), Kind::Multiboot);
    }

    #[test]
    fn headers_that_cannot_be_followed_are_refused() {
        let problem = |file| load(file, None).1.unwrap_err().problem;
        let mut efi = b"MZ".to_vec();
        efi.resize(0x1000, 0);
        efi.extend(header(3));
        assert!(problem(efi).to_string().contains("EFI"));
        let mut demanding = flat();
        demanding[0x20..0x2c].copy_from_slice(&header(ADDRESSES | 1 << 7));
        assert!(matches!(problem(demanding), Problem::MultibootFeatures(0x80)));
        let mut outside = flat();
        put(&mut outside, 0x20 + 12, 0x10_0030u32.to_le_bytes());
        assert!(matches!(problem(outside), Problem::Damaged(_)));
        let mut short = flat();
        put(&mut short, 0x20 + 20, 0x20_0000u32.to_le_bytes());
        assert!(matches!(problem(short), Problem::Truncated { .. }));
    }
}
