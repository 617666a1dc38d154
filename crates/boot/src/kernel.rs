//! One type for every kernel that can be booted.

use std::fmt;
use std::path::{Path, PathBuf};

use mem::GuestRam;

use crate::bzimage::{self, BzImage};
use crate::elf::{self, Elf};
use crate::image::Image;
use crate::multiboot::{self, Multiboot};
use crate::pvh::Pvh;
use crate::{Entry, Error, Initrd, MemoryMap, Problem, Role, sniff};

/// The boot protocol a kernel file speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Linux bzImage, entered in 64-bit mode.
    BzImage,
    /// ELF with a PVH entry note, entered in 32-bit mode.
    Pvh,
    /// Multiboot 1, entered in 32-bit mode.
    Multiboot,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::BzImage => "Linux bzImage (64-bit)",
            Kind::Pvh => "PVH ELF",
            Kind::Multiboot => "multiboot 1",
        })
    }
}

/// What a kernel is given.
#[derive(Clone, Copy, Debug)]
pub struct LoadParams<'a> {
    /// Initial RAM disk; for multiboot, the only module.
    pub initrd: Option<&'a Initrd>,
    /// Command line. Multiboot kernels find the kernel file's name before it, as the protocol wants.
    pub cmdline: &'a str,
    /// Where the ACPI RSDP is ([`crate::acpi::build`] returns it); 0 if there is none.
    pub acpi_rsdp: u64,
    /// The guest's memory; must describe the RAM that is loaded into.
    pub memory_map: &'a MemoryMap,
}

/// A problem of the kernel's, or an error that names another file already.
pub(crate) enum RawError {
    Kernel(Problem),
    Other(Error),
}

impl From<Problem> for RawError {
    fn from(problem: Problem) -> Self {
        RawError::Kernel(problem)
    }
}

impl From<Error> for RawError {
    fn from(error: Error) -> Self {
        RawError::Other(error)
    }
}

#[derive(Debug)]
enum Format {
    BzImage(BzImage),
    Pvh(Pvh),
    Multiboot(Multiboot),
}

/// A kernel file that was checked. It can be loaded any number of times, as after resets; it is not kept in
/// memory in between.
pub struct Kernel {
    path: PathBuf,
    image: Image,
    format: Format,
}

impl Kernel {
    /// Opens the file and finds out by its content what it is.
    pub fn open(path: impl AsRef<Path>) -> Result<Kernel, Error> {
        let path = path.as_ref();
        Kernel::of(path, Image::open(path)?)
    }

    /// The same for a file that is in memory already; `path` is for messages.
    pub fn parse(path: &Path, file: Vec<u8>) -> Result<Kernel, Error> {
        Kernel::of(path, Image::Memory(file))
    }

    fn of(path: &Path, image: Image) -> Result<Kernel, Error> {
        match recognize(&image) {
            Ok(format) => Ok(Kernel { path: path.to_owned(), image, format }),
            Err(problem) => Err(problem.of(Role::Kernel, path)),
        }
    }

    /// Its boot protocol.
    pub fn kind(&self) -> Kind {
        match self.format {
            Format::BzImage(_) => Kind::BzImage,
            Format::Pvh(_) => Kind::Pvh,
            Format::Multiboot(_) => Kind::Multiboot,
        }
    }

    /// Puts the kernel and what it is given into guest memory; returns the state to start it with.
    ///
    /// Writes the loader's part of low memory anew each time, so that a second load after a reset
    /// starts as the first did.
    pub fn load(&self, ram: &GuestRam, params: &LoadParams) -> Result<Entry, Error> {
        self.try_load(ram, params).map_err(|error| match error {
            RawError::Kernel(problem) => problem.of(Role::Kernel, &self.path),
            RawError::Other(error) => error,
        })
    }

    fn try_load(&self, ram: &GuestRam, params: &LoadParams) -> Result<Entry, RawError> {
        let image = &self.image;
        image.is_unchanged()?;
        match &self.format {
            Format::BzImage(kernel) => kernel.load(image, ram, params),
            Format::Pvh(kernel) => kernel.load(&image.whole()?, ram, params),
            Format::Multiboot(kernel) => kernel.load(&image.whole()?, &self.name(), ram, params),
        }
    }

    fn name(&self) -> String {
        self.path.file_name().map_or_else(|| "kernel".into(), |name| name.to_string_lossy().into_owned())
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel").field("path", &self.path).field("format", &self.format).finish()
    }
}

/// An ELF file may have both a multiboot header and a PVH note (Xen has): multiboot is the one for a
/// loader that is not Xen.
fn recognize(image: &Image) -> Result<Format, Problem> {
    let head = image.head();
    if head.is_empty() {
        return Err(Problem::Empty);
    }
    if bzimage::is_bzimage(head) {
        return BzImage::parse(head, image.size()).map(Format::BzImage);
    }
    let file = &*image.whole()?;
    if let Some(header) = multiboot::find_header(file) {
        return Multiboot::parse(file, header).map(Format::Multiboot);
    }
    if elf::is_elf(file) {
        return Pvh::parse(Elf::parse(file)?, file).map(Format::Pvh);
    }
    Err(sniff::not_a_kernel(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_is_told_by_content() {
        let kind = |file| Kernel::parse(Path::new("x"), file).unwrap().kind();
        assert_eq!(kind(bzimage::tests::sample()), Kind::BzImage);
        assert_eq!(kind(crate::pvh::tests::sample()), Kind::Pvh);
        assert_eq!(kind(multiboot::tests::flat()), Kind::Multiboot);
        assert_eq!(kind(multiboot::tests::in_elf()), Kind::Multiboot);
    }

    #[test]
    fn this_very_program_is_no_kernel() {
        let error = Kernel::open(std::env::current_exe().unwrap()).unwrap_err();
        assert!(matches!(error.problem, Problem::NoEntry), "{error}");
    }

    mod property {
        use super::*;
        use proptest::prelude::*;
        use proptest::sample::Index;

        const MIB: u64 = 1 << 20;

        /// Loads whatever parses; the entry must lie in the guest's memory.
        fn survives(file: Vec<u8>) {
            let Ok(kernel) = Kernel::parse(Path::new("x"), file) else { return };
            let ram = GuestRam::new(&[0..32 * MIB]).unwrap();
            let memory_map = MemoryMap::pc(&ram, &[]);
            let params =
                LoadParams { initrd: None, cmdline: "x", acpi_rsdp: 0xe0000, memory_map: &memory_map };
            if let Ok(entry) = kernel.load(&ram, &params) {
                assert!(ram.page(entry.rip).is_some(), "entry {:#x} is outside memory", entry.rip);
            }
        }

        fn samples() -> impl Strategy<Value = Vec<u8>> {
            prop_oneof![
                Just(bzimage::tests::sample()),
                Just(crate::pvh::tests::sample()),
                Just(multiboot::tests::flat()),
                Just(multiboot::tests::in_elf()),
            ]
        }

        proptest! {
            #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..Default::default() })]

            #[test]
            fn random_bytes_never_panic(file in proptest::collection::vec(any::<u8>(), 0..2048)) {
                survives(file);
            }

            #[test]
            fn random_bytes_behind_a_true_magic_never_panic(
                mut file in proptest::collection::vec(any::<u8>(), 0x300..1024), which in 0..2,
            ) {
                let (at, magic): (usize, &[u8]) = if which == 0 { (0x202, b"HdrS") } else { (0, b"\x7fELF") };
                file[at..at + 4].copy_from_slice(magic);
                file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
                survives(file);
            }

            #[test]
            fn every_truncation_is_survived(file in samples(), end in any::<Index>()) {
                let end = end.index(file.len());
                survives(file[..end].to_vec());
            }

            #[test]
            fn flipped_bits_and_extreme_fields_are_survived(
                mut file in samples(),
                flips in proptest::collection::vec((any::<Index>(), any::<u8>()), 1..8),
                word in any::<Index>(),
                extreme in prop_oneof![Just(0u32), Just(u32::MAX), Just(0x7fff_ffff), any::<u32>()],
            ) {
                // Headers are where damage matters: stay in the first KiB.
                let head = file.len().min(1024);
                for (index, mask) in flips {
                    file[index.index(head)] ^= mask;
                }
                let at = word.index(head - 4);
                file[at..at + 4].copy_from_slice(&extreme.to_le_bytes());
                survives(file);
            }
        }
    }
}
