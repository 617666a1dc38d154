//! What can be wrong with the files a guest is started from.

use std::fmt;
use std::path::{Path, PathBuf};

/// What a file was given as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The kernel.
    Kernel,
    /// The initial RAM disk.
    Initrd,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Kernel => "kernel",
            Role::Initrd => "initrd",
        })
    }
}

/// A file that cannot be booted: which one, and why.
#[derive(Debug)]
pub struct Error {
    /// What the file was given as.
    pub role: Role,
    /// Its path as the user wrote it.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: Problem,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.role, self.path.display(), self.problem)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&self.problem)
    }
}

/// What is wrong, and what to do about it; reads as the rest of a sentence that begins with the file.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The host would not open or read it.
    #[error("cannot be read; check its path and permissions")]
    Read(#[source] std::io::Error),
    /// A directory.
    #[error("is a directory; name a file in it")]
    Directory,
    /// A device, pipe or socket.
    #[error("is not a regular file; save it to one first")]
    NotRegular,
    /// Zero bytes long.
    #[error("is empty; make or download it again")]
    Empty,
    /// Longer than anything bootable.
    #[error("is {size} bytes long, more than the {limit} that can be booted; is it a disk image?")]
    TooLarge {
        /// Its length in bytes.
        size: u64,
        /// The most that is accepted.
        limit: u64,
    },
    /// Shorter than its own headers say.
    #[error("is cut short: {what} ends at byte {needs} but the file has {has}; make or download it again")]
    Truncated {
        /// Which part is not complete.
        what: &'static str,
        /// Where it ought to end.
        needs: u64,
        /// Length of the file.
        has: u64,
    },
    /// No kernel format that is known.
    #[error("is no kernel: {looks}; a Linux bzImage, a PVH ELF or a multiboot file is needed")]
    NotKernel {
        /// What it looks like instead.
        looks: &'static str,
    },
    /// A kernel for some other machine.
    #[error("is for {found}; this guest needs a kernel for x86-64 (Debian's packages of it end in -amd64)")]
    WrongArchitecture {
        /// The architecture it is for.
        found: &'static str,
    },
    /// A Linux kernel without a 64-bit entry.
    #[error("is a 32-bit Linux kernel without a 64-bit entry; use an amd64 (x86-64) kernel")]
    Only32Bit,
    /// A bzImage older than the 64-bit boot protocol.
    #[error("uses Linux boot protocol {}.{:02}; 2.12 (Linux 3.8) or newer is needed", version >> 8, version & 0xff)]
    OldProtocol {
        /// The header's version field.
        version: u16,
    },
    /// An ELF file nobody said how to enter.
    #[error(
        "is an ELF file without a PVH entry note or multiboot header; use the bzImage (vmlinuz), \
         or a Linux built with CONFIG_PVH=y"
    )]
    NoEntry,
    /// A header field that contradicts itself.
    #[error("is damaged: {0}; make or download it again")]
    Damaged(String),
    /// A multiboot feature that the kernel insists on and that there is none of.
    #[error("asks for multiboot features {0:#x}, which are unknown; build it without them")]
    MultibootFeatures(u32),
    /// Needs more memory than the guest has.
    #[error("needs a guest with {needs_mib} MiB of memory or more, this one has {has_mib}; raise --memory")]
    NoRoom {
        /// The least amount that it fits in.
        needs_mib: u64,
        /// What the guest has.
        has_mib: u64,
    },
    /// Wants to be where there can be no memory for it.
    #[error(
        "asks to be loaded at {start:#x}-{end:#x}, where this machine has no free memory; build it for another address"
    )]
    NoPlace {
        /// First guest-physical address.
        start: u64,
        /// First one after it.
        end: u64,
    },
    /// Memory is there, but none where the kernel can use it.
    #[error(
        "is {size} bytes long, and nothing that large is free below {below:#x}, where the kernel wants it; make it smaller"
    )]
    InitrdPlace {
        /// Length of the initrd.
        size: u64,
        /// The kernel's limit.
        below: u64,
    },
    /// The command line exceeds what the kernel takes.
    #[error("takes a command line of at most {max} bytes, this one has {len}; shorten --append")]
    CommandLineTooLong {
        /// Most bytes, without the NUL.
        max: u64,
        /// Bytes given.
        len: u64,
    },
    /// A NUL inside the command line.
    #[error("cannot be given a command line with a NUL byte in it; remove it from --append")]
    CommandLineNul,
    /// More entries than any boot protocol carries.
    #[error("cannot be given a memory map of {0} ranges; 128 are the most")]
    MemoryMapTooLong(usize),
    /// The memory map promised memory that is not there.
    #[error("cannot be written to guest memory at {addr:#x}")]
    GuestMemory {
        /// Guest-physical address.
        addr: u64,
        /// What guest memory answered.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

impl Problem {
    pub(crate) fn of(self, role: Role, path: &Path) -> Error {
        Error { role, path: path.to_owned(), problem: self }
    }
}
