//! Where things are in the guest's first MiB; the crate's front page has the table.

use std::ops::Range;

/// BIOS data area. Kernels look up the EBDA's segment and the size of base memory in it.
pub const BDA: u64 = 0x400;
/// Global descriptor table of the entry state.
pub const GDT: u64 = 0x500;
/// PVH start info, module list and memory map: one page.
pub const PVH_INFO: u64 = 0x6000;
/// Linux' zero page (`struct boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer.
pub const STACK_TOP: u64 = 0x9000;
/// Identity page tables of the long-mode entry: six pages.
pub const PAGE_TABLES: u64 = 0x9000;
/// Multiboot information and what it points to.
pub const MULTIBOOT_INFO: u64 = 0x1_0000;
/// Room for it in bytes.
pub const MULTIBOOT_INFO_SIZE: u64 = 0x1_0000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Room for it in bytes, with its terminating NUL.
pub const COMMAND_LINE_SIZE: u64 = 0x1_0000;
/// What the loader itself may write; no part of a kernel may be loaded here.
pub const LOADER: Range<u64> = 0..COMMAND_LINE + COMMAND_LINE_SIZE;
/// What of it the loader leaves alone for a multiboot kernel, which may ask to be loaded there.
pub const FREE_FOR_MULTIBOOT: Range<u64> = 0x1000..MULTIBOOT_INFO;
/// Extended BIOS data area: 1 KiB, empty.
pub const EBDA: u64 = 0x9_fc00;
/// Not RAM to the guest: EBDA, video hole and ROM area.
pub const LEGACY_HOLE: Range<u64> = EBDA..0x10_0000;
/// ACPI tables; the RSDP is at the first byte, where a scan of the ROM area finds it.
pub const ACPI: Range<u64> = 0xe_0000..0x10_0000;
/// First byte above the legacy megabyte.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// The end of what 32-bit pointers and the entry page tables reach.
pub const FOUR_GIB: u64 = 1 << 32;
