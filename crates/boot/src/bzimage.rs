//! Linux bzImage, 64-bit boot protocol (Linux Documentation/arch/x86/boot.rst and zero-page.rst).

use std::ops::Range;

use mem::GuestRam;
use rustix::rand::GetRandomFlags;

use crate::bytes::{Fields, put};
use crate::image::Image;
use crate::kernel::{LoadParams, RawError};
use crate::setup;
use crate::space::Space;
use crate::vmlinux::{self, Place, Vmlinux};
use crate::{Entry, MemoryMap, Problem, layout};

// Setup header fields, at the same offsets in the file and in the zero page.
const SETUP_SECTS: u64 = 0x1f1;
const SYSSIZE: u64 = 0x1f4;
const BOOT_FLAG: u64 = 0x1fe;
const HEADER_LENGTH: u64 = 0x201;
const HEADER_MAGIC: u64 = 0x202;
const VERSION: u64 = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const CODE32_START: usize = 0x214;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const INITRD_ADDR_MAX: u64 = 0x22c;
const KERNEL_ALIGNMENT: u64 = 0x230;
const RELOCATABLE_KERNEL: u64 = 0x234;
const XLOADFLAGS: u64 = 0x236;
const CMDLINE_SIZE: u64 = 0x238;
const PAYLOAD_OFFSET: u64 = 0x248;
const PAYLOAD_LENGTH: u64 = 0x24c;
const PREF_ADDRESS: u64 = 0x258;
const INIT_SIZE: u64 = 0x260;

// Zero page fields outside the header.
const ACPI_RSDP_ADDR: usize = 0x070;
const E820_ENTRIES: usize = 0x1e8;
const E820_TABLE: usize = 0x2d0;
const ZERO_PAGE_SIZE: usize = 0x1000;

/// The header may reach up to the zero page's next field.
const HEADER_START: u64 = 0x1f1;
const HEADER_END: u64 = 0x290;

/// Boot protocol 2.12 brought `xloadflags`.
const OLDEST_VERSION: u16 = 0x20c;
const XLF_KERNEL_64: u16 = 1 << 0;
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;
/// `type_of_loader` of a loader without a number of its own.
const UNDEFINED_LOADER: u8 = 0xff;
/// `loadflags`: the kernel's address was randomized; it randomizes its own data then.
const KASLR_FLAG: u8 = 1 << 1;
/// The 64-bit entry is this far into the protected-mode part.
const ENTRY64: u64 = 0x200;
const PAGE: u64 = 4096;

/// A bzImage whose header was checked.
#[derive(Debug)]
pub(crate) struct BzImage {
    /// The header, [`HEADER_START`] onward, as it goes into the zero page.
    header: Vec<u8>,
    /// The protected-mode part in the file.
    payload: Range<usize>,
    /// The compressed kernel in it; empty if it is not where the header says.
    packed: Range<usize>,
    /// Memory it needs from its load address on until it has unpacked itself.
    init_size: u64,
    pref_address: u64,
    /// Power of two; `None` when it only runs at `pref_address`.
    alignment: Option<u64>,
    cmdline_max: u64,
    /// First address after the highest that the initrd may take.
    initrd_end_max: u64,
}

/// Whether the file is one at all.
pub(crate) fn is_bzimage(file: &[u8]) -> bool {
    let fields = Fields::new(file, "");
    fields.u16(BOOT_FLAG).is_ok_and(|flag| flag == 0xaa55)
        && fields.slice(HEADER_MAGIC, 4).is_ok_and(|magic| magic == b"HdrS")
}

impl BzImage {
    /// Checks the header of a file that [`is_bzimage`]: its first bytes, of `size`.
    pub fn parse(head: &[u8], size: u64) -> Result<BzImage, Problem> {
        let fields = Fields::new(head, "its setup header");
        let version = fields.u16(VERSION)?;
        if version < OLDEST_VERSION {
            return Err(Problem::OldProtocol { version });
        }
        let xloadflags = fields.u16(XLOADFLAGS)?;
        if xloadflags & XLF_KERNEL_64 == 0 {
            return Err(Problem::Only32Bit);
        }
        let payload = payload(size, &fields)?;
        let header_end = (HEADER_MAGIC + u64::from(fields.u8(HEADER_LENGTH)?)).min(HEADER_END);
        if header_end < INIT_SIZE + 4 {
            return Err(Problem::Damaged(format!(
                "its setup header ends at {header_end:#x}, inside its fields"
            )));
        }
        let alignment = match fields.u8(RELOCATABLE_KERNEL)? {
            0 => None,
            _ => Some(alignment(fields.u32(KERNEL_ALIGNMENT)?)?),
        };
        let packed = packed(&payload, &fields)?;
        let above_4g = xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0;
        let initrd_max = if above_4g { u32::MAX } else { fields.u32(INITRD_ADDR_MAX)? };
        Ok(BzImage {
            header: fields.slice(HEADER_START, header_end - HEADER_START)?.to_vec(),
            init_size: u64::from(fields.u32(INIT_SIZE)?).max(payload.len() as u64),
            payload,
            packed,
            pref_address: fields.u64(PREF_ADDRESS)?,
            alignment,
            cmdline_max: u64::from(fields.u32(CMDLINE_SIZE)?),
            initrd_end_max: u64::from(initrd_max) + 1,
        })
    }

    /// Loads kernel, initrd, command line and zero page.
    pub fn load(&self, image: &Image, ram: &GuestRam, params: &LoadParams) -> Result<Entry, RawError> {
        setup::low_memory(ram, params.memory_map)?;
        let mut space = Space::new(params.memory_map)?;
        let load = self.place(&mut space)?;
        let initrd = match params.initrd {
            Some(initrd) => {
                let size = initrd.size();
                let addr = space.claim_highest(size, PAGE, self.initrd_end_max);
                let addr = addr.ok_or_else(|| {
                    initrd.error(space.no_initrd_place(load + self.init_size, size, self.initrd_end_max))
                })?;
                initrd.load(ram, addr)?;
                addr..addr + size
            }
            None => 0..0,
        };
        setup::command_line(ram, params.cmdline, self.cmdline_max)?;
        let mut zero_page = self.zero_page(load, &initrd, params);
        let rip = match self.unpack(image, ram, params, load, &initrd) {
            Some(Unpacked { entry, randomized }) => {
                zero_page[LOADFLAGS] |= if randomized { KASLR_FLAG } else { 0 };
                entry
            }
            None => {
                image.copy(ram, load, self.payload.clone())?;
                load + ENTRY64
            }
        };
        setup::write(ram, layout::ZERO_PAGE, &zero_page)?;
        setup::page_tables(ram)?;
        let entry = setup::long64(ram, rip)?;
        Ok(Entry { rsi: layout::ZERO_PAGE, ..entry })
    }

    /// Puts the kernel itself into memory, so that the guest need not unpack it. `None` if that is left to the
    /// guest: then memory holds nothing that matters.
    fn unpack(
        &self,
        image: &Image,
        ram: &GuestRam,
        params: &LoadParams,
        load: u64,
        initrd: &Range<u64>,
    ) -> Option<Unpacked> {
        let memory = self.pref_address..self.pref_address.checked_add(self.init_size)?;
        let mut kernel = Vmlinux::find(image, self.packed.clone(), memory.clone())?;
        let wanted = !params.cmdline.split_ascii_whitespace().any(|word| word == "nokaslr");
        let align = self.alignment.filter(|_| wanted && kernel.moves());
        let place = match align {
            Some(align) => self.random_place(params, &memory, align, initrd)?,
            None => Place { load, moved: 0 },
        };
        match kernel.load(ram, place) {
            Ok(()) => Some(Unpacked { entry: place.load + kernel.entry, randomized: align.is_some() }),
            Err(problem) => {
                log::debug!("the guest unpacks its kernel: it {problem}");
                None
            }
        }
    }

    /// Any that is aligned, below 4 GiB, and not lower than where the kernel prefers to be.
    fn random_place(
        &self,
        params: &LoadParams,
        memory: &Range<u64>,
        align: u64,
        initrd: &Range<u64>,
    ) -> Option<Place> {
        let mut random = [[0; 8]; 2];
        rustix::rand::getrandom(random.as_flattened_mut(), GetRandomFlags::empty()).ok()?;
        let [first, second] = random.map(u64::from_le_bytes);
        let mut space = Space::new(params.memory_map).ok()?;
        space.claim(initrd.clone());
        let places = space.places(self.init_size, align, self.pref_address, layout::FOUR_GIB);
        let load = *places.get(vmlinux::pick(first, places.len() as u64) as usize)?;
        Some(Place { load, moved: vmlinux::random_move(memory, align, second) })
    }

    /// The preferred address, or the lowest that is free for a kernel that can be moved.
    fn place(&self, space: &mut Space) -> Result<u64, Problem> {
        let end = self.pref_address.saturating_add(self.init_size);
        let preferred = self.pref_address..end;
        if end <= layout::FOUR_GIB && space.claim(preferred.clone()) {
            return Ok(self.pref_address);
        }
        let Some(alignment) = self.alignment else { return Err(space.refusal(preferred)) };
        let lowest = layout::HIGH_MEMORY.next_multiple_of(alignment);
        space
            .claim_lowest(self.init_size, alignment, lowest, layout::FOUR_GIB)
            .ok_or_else(|| space.refusal(lowest..lowest + self.init_size))
    }

    fn zero_page(&self, load: u64, initrd: &Range<u64>, params: &LoadParams) -> Vec<u8> {
        let mut page = vec![0; ZERO_PAGE_SIZE];
        let header = HEADER_START as usize;
        page[header..header + self.header.len()].copy_from_slice(&self.header);
        put(&mut page, TYPE_OF_LOADER, [UNDEFINED_LOADER]);
        put(&mut page, CODE32_START, (load as u32).to_le_bytes());
        put(&mut page, RAMDISK_IMAGE, (initrd.start as u32).to_le_bytes());
        put(&mut page, RAMDISK_SIZE, ((initrd.end - initrd.start) as u32).to_le_bytes());
        put(&mut page, CMD_LINE_PTR, (layout::COMMAND_LINE as u32).to_le_bytes());
        put(&mut page, ACPI_RSDP_ADDR, params.acpi_rsdp.to_le_bytes());
        e820(&mut page, params.memory_map);
        page
    }
}

/// A kernel that was unpacked: its entry, and whether its place was left to chance.
struct Unpacked {
    entry: u64,
    randomized: bool,
}

fn packed(payload: &Range<usize>, fields: &Fields) -> Result<Range<usize>, Problem> {
    let start = payload.start as u64 + u64::from(fields.u32(PAYLOAD_OFFSET)?);
    let packed = start..start + u64::from(fields.u32(PAYLOAD_LENGTH)?);
    let inside = packed.end <= payload.end as u64;
    Ok(if inside { packed.start as usize..packed.end as usize } else { 0..0 })
}

/// The protected-mode part: after the boot sector and the setup sectors, `syssize` paragraphs long.
fn payload(size: u64, fields: &Fields) -> Result<Range<usize>, Problem> {
    let setup_sects = match fields.u8(SETUP_SECTS)? {
        0 => 4, // boot.rst: for compatibility
        n => u64::from(n),
    };
    let start = (setup_sects + 1) * 512;
    let len = u64::from(fields.u32(SYSSIZE)?) * 16;
    if len <= ENTRY64 {
        return Err(Problem::Damaged("its setup header says that it has no 64-bit code".into()));
    }
    // `syssize` counts whole paragraphs; the last one need not be complete in the file.
    let available = size.saturating_sub(start);
    let len = if available < len && len - available < 16 { available } else { len };
    let needs = start + len;
    if needs > size {
        return Err(Problem::Truncated { what: "its compressed kernel", needs, has: size });
    }
    Ok(start as usize..needs as usize)
}

fn alignment(value: u32) -> Result<u64, Problem> {
    if value.is_power_of_two() {
        Ok(u64::from(value).max(PAGE))
    } else {
        Err(Problem::Damaged(format!("its setup header asks for an alignment of {value:#x}")))
    }
}

fn e820(page: &mut [u8], map: &MemoryMap) {
    put(page, E820_ENTRIES, [map.entries().len() as u8]);
    for (i, entry) in map.entries().iter().enumerate() {
        let at = E820_TABLE + i * 20;
        put(page, at, entry.range.start.to_le_bytes());
        put(page, at + 8, (entry.range.end - entry.range.start).to_le_bytes());
        put(page, at + 16, (entry.kind as u32).to_le_bytes());
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{Initrd, Kernel, Mode};
    use linux_loader::bootparam::boot_params;
    use mem::{Bytes, GuestAddress};
    use std::path::Path;

    const MIB: u64 = 1 << 20;

    /// A bzImage as Debian's: relocatable, preferred at 16 MiB, 4 KiB of payload.
    pub fn sample() -> Vec<u8> {
        let mut file = vec![0; 0x400 + 0x1000];
        put(&mut file, 0x1f1, [1]);
        put(&mut file, 0x1f4, 0x100u32.to_le_bytes());
        put(&mut file, 0x1fe, 0xaa55u16.to_le_bytes());
        put(&mut file, 0x200, [0xeb, 0x6a]);
        put(&mut file, 0x202, *b"HdrS");
        put(&mut file, 0x206, 0x20fu16.to_le_bytes());
        put(&mut file, 0x22c, 0x7fff_ffffu32.to_le_bytes());
        put(&mut file, 0x230, 0x20_0000u32.to_le_bytes());
        put(&mut file, 0x234, [1, 21]);
        put(&mut file, 0x236, 0x3fu16.to_le_bytes());
        put(&mut file, 0x238, 2047u32.to_le_bytes());
        put(&mut file, 0x258, (16 * MIB).to_le_bytes());
        put(&mut file, 0x260, (4 * MIB as u32).to_le_bytes());
        put(&mut file, 0x400, *b"payload!");
        file
    }

    fn patched<const N: usize>(at: u64, value: [u8; N]) -> Vec<u8> {
        let mut file = sample();
        put(&mut file, at as usize, value);
        file
    }

    fn load(
        file: Vec<u8>,
        mib: u64,
        initrd: Option<&Initrd>,
    ) -> (GuestRam, MemoryMap, Result<Entry, crate::Error>) {
        let ram = GuestRam::new(&[0..mib * MIB]).unwrap();
        let memory_map = MemoryMap::pc(&ram, &[0xe000_0000..0xf000_0000]);
        let entry = Kernel::parse(Path::new("vmlinuz"), file).and_then(|kernel| {
            let params = LoadParams { initrd, cmdline: "quiet", acpi_rsdp: 0xe0000, memory_map: &memory_map };
            kernel.load(&ram, &params)
        });
        (ram, memory_map, entry)
    }

    fn initrd(size: usize) -> (tempfile::NamedTempFile, Initrd) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![0x5a; size]).unwrap();
        let initrd = Initrd::open(file.path()).unwrap();
        (file, initrd)
    }

    #[test]
    fn the_kernel_finds_what_the_protocol_promises() {
        let (_file, initrd) = initrd(10_000);
        let (ram, map, entry) = load(sample(), 64, Some(&initrd));
        let entry = entry.unwrap();
        assert_eq!((entry.mode, entry.rip, entry.rsi), (Mode::Long64, 16 * MIB + 0x200, layout::ZERO_PAGE));
        let payload: [u8; 8] = ram.read_obj(GuestAddress(16 * MIB)).unwrap();
        assert_eq!(&payload, b"payload!");

        // Read back with another project's definition of the zero page.
        let zero_page: boot_params = ram.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap();
        let header = zero_page.hdr;
        assert_eq!({ header.type_of_loader }, 0xff);
        assert_eq!({ header.cmd_line_ptr }, layout::COMMAND_LINE as u32);
        assert_eq!({ header.init_size }, 4 * MIB as u32);
        assert_eq!({ header.ramdisk_size }, 10_000);
        assert_eq!({ header.ramdisk_image }, (64 * MIB - 3 * 4096) as u32);
        assert_eq!({ zero_page.acpi_rsdp_addr }, 0xe0000);
        assert_eq!(usize::from(zero_page.e820_entries), map.entries().len());
        let last = zero_page.e820_table[map.entries().len() - 1];
        assert_eq!(({ last.addr }, { last.size }, { last.r#type }), (0xe000_0000, 0x1000_0000, 2));
        assert_eq!(ram.read_obj::<u8>(GuestAddress(64 * MIB - 3 * 4096 + 9_999)).unwrap(), 0x5a);
    }

    #[test]
    fn a_guest_without_the_preferred_memory_gets_the_kernel_lower() {
        let (ram, _, entry) = load(sample(), 12, None);
        assert_eq!(entry.unwrap().rip, 2 * MIB + 0x200);
        assert_eq!(&ram.read_obj::<[u8; 8]>(GuestAddress(2 * MIB)).unwrap(), b"payload!");
    }

    #[test]
    fn too_little_memory_is_said_with_the_amount() {
        let (_, _, entry) = load(sample(), 4, None);
        let error = entry.unwrap_err();
        assert!(matches!(error.problem, Problem::NoRoom { needs_mib: 6, has_mib: 4 }), "{error}");
        let (_, _, entry) = load(patched(RELOCATABLE_KERNEL, [0]), 12, None);
        assert!(matches!(entry.unwrap_err().problem, Problem::NoRoom { needs_mib: 20, has_mib: 12 }));
        let (_file, initrd) = initrd(8 * MIB as usize);
        let (_, _, entry) = load(sample(), 8, Some(&initrd));
        let error = entry.unwrap_err();
        assert!(matches!(error.problem, Problem::NoRoom { needs_mib: 15, has_mib: 8 }), "{error}");
        assert!(error.to_string().starts_with("initrd "), "{error}");
    }

    #[test]
    fn the_initrd_stays_below_the_kernels_limit() {
        let (_file, initrd) = initrd(4096);
        let mut file = patched(INITRD_ADDR_MAX, (32 * MIB as u32 - 1).to_le_bytes());
        put(&mut file, XLOADFLAGS as usize, XLF_KERNEL_64.to_le_bytes());
        let (ram, _, entry) = load(file, 64, Some(&initrd));
        entry.unwrap();
        let at: u32 = ram.read_obj(GuestAddress(layout::ZERO_PAGE + RAMDISK_IMAGE as u64)).unwrap();
        assert_eq!(u64::from(at), 32 * MIB - 4096);
    }

    #[test]
    fn kernels_that_cannot_run_here_are_told_apart() {
        let problem = |file| load(file, 64, None).2.unwrap_err().problem;
        assert!(matches!(problem(patched(XLOADFLAGS, [0, 0])), Problem::Only32Bit));
        assert!(matches!(problem(patched(VERSION, [4, 2])), Problem::OldProtocol { version: 0x204 }));
        assert!(matches!(problem(patched(KERNEL_ALIGNMENT, [3, 0, 0, 0])), Problem::Damaged(_)));
        assert!(matches!(problem(patched(SYSSIZE, [0; 4])), Problem::Damaged(_)));
        assert!(matches!(
            problem(patched(PREF_ADDRESS, [0xff; 8])[..0x1000].to_vec()),
            Problem::Truncated { .. }
        ));
        let mut fixed = patched(PREF_ADDRESS, [0xff; 8]);
        put(&mut fixed, RELOCATABLE_KERNEL as usize, [0]);
        assert!(matches!(problem(fixed), Problem::NoPlace { .. }));
    }
}
