//! Kernel loaders and firmware tables: everything a guest finds in its memory when it starts.
//!
//! A kernel file is told apart by content ([`Kernel::open`]): Linux bzImage with the
//! 64-bit boot protocol, ELF with a PVH entry note, multiboot 1. [`Kernel::load`] puts it, its
//! initrd and its boot information into guest memory and returns the register state to start vCPU 0
//! with ([`Entry`]). [`acpi::build`] writes the ACPI tables.
//!
//! # Low memory
//!
//! What is where below 1 MiB when the guest starts ([`layout`] has the constants). A guest may reuse
//! all of it once it has read what it needs, except what its memory map calls reserved.
//!
//! | address           | what                                                            | for            |
//! |-------------------|-----------------------------------------------------------------|----------------|
//! | `0x00400-0x004ff` | BIOS data area: COM1's port, base memory in KiB, EBDA segment   | all            |
//! | `0x00500-0x0052f` | GDT                                                             | all            |
//! | `0x06000-0x06fff` | `hvm_start_info`, module list, memory map                       | PVH            |
//! | `0x07000-0x07fff` | zero page (`boot_params`)                                       | bzImage        |
//! | `0x08000-0x08fff` | stack, growing down from `0x9000` (multiboot: from `0x1000`)    | all            |
//! | `0x09000-0x0efff` | page tables: PML4, PDPT, four page directories of 2 MiB pages   | bzImage        |
//! | `0x10000-0x1ffff` | multiboot information, memory map, modules, strings             | multiboot      |
//! | `0x20000-0x2ffff` | command line                                                    | all            |
//! | `0x9fc00-0xfffff` | reserved in the memory map: EBDA, video hole, ROM               | all            |
//! | `0xe0000-0xfffff` | ACPI tables, the RSDP first                                     | all            |
//!
//! Above 1 MiB are the kernel, where its header asks to be, and the initrd: as high as the kernel
//! allows below 4 GiB (bzImage, PVH), or right after the kernel (multiboot). A bzImage packed with LZ4 is
//! unpacked here, which is faster than the guest would do it, and to a random place as the guest would,
//! unless its command line says `nokaslr`.

#![cfg_attr(test, allow(clippy::single_range_in_vec_init))] // guests of one RAM range

pub mod acpi;
mod bytes;
mod bzimage;
mod elf;
mod entry;
mod error;
mod file;
mod image;
mod kernel;
pub mod layout;
mod lz4;
mod memory_map;
mod multiboot;
mod pvh;
mod setup;
mod sniff;
mod space;
mod vmlinux;

pub use entry::{DescriptorTable, Entry, Mode, Segment};
pub use error::{Error, Problem, Role};
pub use file::Initrd;
pub use kernel::{Kernel, Kind, LoadParams};
pub use memory_map::{MemoryKind, MemoryMap, MemoryRange};
