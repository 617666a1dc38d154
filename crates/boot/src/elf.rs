//! As much of ELF as a boot loader needs: headers, loadable segments, notes (System V gABI, chapters
//! 4 and 5). Every offset and size in the file is checked before it is used.

use std::ops::Range;

use mem::GuestRam;

use crate::bytes::Fields;
use crate::setup;
use crate::sniff;
use crate::space::Space;
use crate::{Problem, layout};

const EI_CLASS: u64 = 4;
const EI_DATA: u64 = 5;
const ELFCLASS64: u8 = 2;
const ELFDATA2LSB: u8 = 1;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// Whether the file is one at all.
pub(crate) fn is_elf(file: &[u8]) -> bool {
    file.starts_with(b"\x7fELF")
}

/// A piece of a kernel: bytes of the file at a guest-physical address, then zeroes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub paddr: u64,
    /// Length in memory, at least that of `file`.
    pub size: u64,
    /// Where its bytes are in the file.
    pub file: Range<usize>,
}

impl Piece {
    pub fn memory(&self) -> Range<u64> {
        self.paddr..self.paddr.saturating_add(self.size)
    }
}

/// Loads pieces that neither overlap nor leave free RAM; returns the first address after the last.
pub(crate) fn load_pieces(
    pieces: &[Piece],
    file: &[u8],
    ram: &GuestRam,
    space: &mut Space,
) -> Result<u64, Problem> {
    for piece in pieces {
        if !space.claim(piece.memory()) {
            return Err(space.refusal(piece.memory()));
        }
    }
    for piece in pieces {
        let bytes = &file[piece.file.clone()];
        setup::write(ram, piece.paddr, bytes)?;
        let filled = bytes.len() as u64;
        setup::zero(ram, piece.paddr + filled, piece.size - filled)?;
    }
    Ok(pieces.iter().map(|p| p.memory().end).max().unwrap_or(layout::HIGH_MEMORY))
}

/// Offsets and sizes that differ between the two classes.
struct Class {
    wide: bool,
    entry: u64,
    phoff: u64,
    phentsize: u64,
    phnum: u64,
    ph_size: u64,
    p_offset: u64,
    p_vaddr: u64,
    p_paddr: u64,
    p_filesz: u64,
    p_memsz: u64,
    p_align: u64,
}

const ELF32: Class = Class {
    wide: false,
    entry: 24,
    phoff: 28,
    phentsize: 42,
    phnum: 44,
    ph_size: 32,
    p_offset: 4,
    p_vaddr: 8,
    p_paddr: 12,
    p_filesz: 16,
    p_memsz: 20,
    p_align: 28,
};

const ELF64: Class = Class {
    wide: true,
    entry: 24,
    phoff: 32,
    phentsize: 54,
    phnum: 56,
    ph_size: 56,
    p_offset: 8,
    p_vaddr: 16,
    p_paddr: 24,
    p_filesz: 32,
    p_memsz: 40,
    p_align: 48,
};

impl Class {
    fn word(&self, fields: &Fields, offset: u64) -> Result<u64, Problem> {
        if self.wide { fields.u64(offset) } else { fields.u32(offset).map(u64::from) }
    }
}

/// A little-endian x86 ELF file with at least one loadable segment.
#[derive(Debug)]
pub(crate) struct Elf {
    pub pieces: Vec<Piece>,
    /// Virtual address of each piece.
    vaddrs: Vec<u64>,
    /// File ranges of the notes, with their alignment.
    notes: Vec<(Range<usize>, u64)>,
    /// `e_entry`, as the file has it: usually a virtual address.
    entry: u64,
}

impl Elf {
    /// Checks the headers of a file that [`is_elf`].
    pub fn parse(file: &[u8]) -> Result<Elf, Problem> {
        let fields = Fields::new(file, "its ELF header");
        let class = if fields.u8(EI_CLASS)? == ELFCLASS64 { &ELF64 } else { &ELF32 };
        if fields.u8(EI_DATA)? != ELFDATA2LSB {
            return Err(Problem::WrongArchitecture { found: "a big-endian architecture" });
        }
        let machine = fields.u16(18)?;
        if machine != EM_386 && machine != EM_X86_64 {
            return Err(Problem::WrongArchitecture { found: sniff::elf_machine(machine) });
        }
        let phentsize = u64::from(fields.u16(class.phentsize)?);
        let phnum = u64::from(fields.u16(class.phnum)?);
        if phnum > 0 && phentsize < class.ph_size {
            return Err(Problem::Damaged(format!("its program headers are {phentsize} bytes each")));
        }
        let mut elf = Elf {
            pieces: Vec::new(),
            vaddrs: Vec::new(),
            notes: Vec::new(),
            entry: class.word(&fields, class.entry)?,
        };
        let phoff = class.word(&fields, class.phoff)?;
        let headers = Fields::new(file, "its program header table");
        for header in headers.slice(phoff, phentsize * phnum)?.chunks_exact(phentsize.max(1) as usize) {
            elf.add(file, class, Fields::new(header, "a program header"))?;
        }
        if elf.pieces.is_empty() {
            return Err(Problem::NotKernel { looks: "it is an ELF file with nothing to load" });
        }
        Ok(elf)
    }

    fn add(&mut self, file: &[u8], class: &Class, header: Fields) -> Result<(), Problem> {
        let field = |offset| class.word(&header, offset);
        let content = Fields::new(file, "a program segment");
        let (offset, filesz) = (field(class.p_offset)?, field(class.p_filesz)?);
        match header.u32(0)? {
            PT_LOAD if field(class.p_memsz)? > 0 => {
                let size = field(class.p_memsz)?;
                if filesz > size {
                    let text = format!("a segment is {filesz} bytes in the file and {size} in memory");
                    return Err(Problem::Damaged(text));
                }
                let file = content.range(offset, filesz)?;
                self.pieces.push(Piece { paddr: field(class.p_paddr)?, size, file });
                self.vaddrs.push(field(class.p_vaddr)?);
            }
            PT_NOTE => self.notes.push((content.range(offset, filesz)?, field(class.p_align)?)),
            _ => {}
        }
        Ok(())
    }

    /// The entry's physical address: translated by the segment whose virtual addresses hold it; an
    /// entry that is in none is physical already.
    pub fn physical_entry(&self) -> u64 {
        let holder = self.pieces.iter().zip(&self.vaddrs).find_map(|(piece, vaddr)| {
            let offset = self.entry.wrapping_sub(*vaddr);
            (offset < piece.size).then(|| piece.paddr.wrapping_add(offset))
        });
        holder.unwrap_or(self.entry)
    }

    /// The content of the first note of this owner and type.
    pub fn note<'a>(&self, file: &'a [u8], owner: &[u8], kind: u32) -> Option<&'a [u8]> {
        self.notes.iter().find_map(|(range, align)| find_note(&file[range.clone()], *align, owner, kind))
    }
}

/// Whether a 32-bit entry is in what was loaded.
pub(crate) fn check_entry(pieces: &[Piece], entry: u64) -> Result<(), Problem> {
    if entry < layout::FOUR_GIB && pieces.iter().any(|p| p.memory().contains(&entry)) {
        return Ok(());
    }
    Err(Problem::Damaged(format!("its entry {entry:#x} is in none of its segments")))
}

fn find_note<'a>(notes: &'a [u8], align: u64, owner: &[u8], kind: u32) -> Option<&'a [u8]> {
    let fields = Fields::new(notes, "a note");
    let align = if align == 8 { 8 } else { 4 };
    let mut at = 0u64;
    loop {
        let (name_len, content_len) = (fields.u32(at).ok()?, fields.u32(at + 4).ok()?);
        let name = fields.slice(at + 12, u64::from(name_len)).ok()?;
        let content_at = (at + 12 + u64::from(name_len)).next_multiple_of(align);
        let content = fields.slice(content_at, u64::from(content_len)).ok()?;
        if name == owner && fields.u32(at + 8).ok()? == kind {
            return Some(content);
        }
        at = (content_at + u64::from(content_len)).next_multiple_of(align);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::bytes::put;

    /// An ELF64 file of one segment at `paddr` (and a high virtual address), with `content` in it and
    /// a note if one is given.
    pub fn sample(paddr: u64, content: &[u8], note: Option<(&[u8], u32, &[u8])>) -> Vec<u8> {
        let mut notes = Vec::new();
        if let Some((owner, kind, desc)) = note {
            notes.extend((owner.len() as u32).to_le_bytes());
            notes.extend((desc.len() as u32).to_le_bytes());
            notes.extend(kind.to_le_bytes());
            notes.extend(owner);
            notes.resize(notes.len().next_multiple_of(4), 0);
            notes.extend(desc);
        }
        let mut file = vec![0; 64 + 2 * 56];
        put(&mut file, 0, *b"\x7fELF\x02\x01\x01");
        put(&mut file, 16, 2u16.to_le_bytes());
        put(&mut file, 18, EM_X86_64.to_le_bytes());
        put(&mut file, 24, (VADDR + 0x10).to_le_bytes());
        put(&mut file, 32, 64u64.to_le_bytes());
        put(&mut file, 54, 56u16.to_le_bytes());
        put(&mut file, 56, 2u16.to_le_bytes());
        let content_at = file.len() as u64;
        let notes_at = content_at + content.len() as u64;
        let len = content.len() as u64;
        header(&mut file, 0, [1, content_at, VADDR, paddr, len, len + 0x1000]);
        let len = notes.len() as u64;
        header(&mut file, 1, [4, notes_at, 0, 0, len, len]);
        file.extend(content);
        file.extend(notes);
        file
    }

    const VADDR: u64 = 0xffff_ffff_8100_0000;

    fn header(file: &mut [u8], index: usize, fields: [u64; 6]) {
        let at = 64 + index * 56;
        put(file, at, (fields[0] as u32).to_le_bytes());
        for (i, field) in fields[1..].iter().enumerate() {
            put(file, at + 8 + i * 8, field.to_le_bytes());
        }
        put(file, at + 48, 4u64.to_le_bytes());
    }

    #[test]
    fn a_virtual_entry_is_translated_by_its_segment() {
        let elf = Elf::parse(&sample(0x20_0000, &[0x90; 64], None)).unwrap();
        assert_eq!(elf.physical_entry(), 0x20_0010);
        assert!(check_entry(&elf.pieces, 0x20_0010).is_ok());
        assert!(check_entry(&elf.pieces, 0x20_0000 + 64 + 0x1000).is_err());
    }

    #[test]
    fn notes_are_found_by_owner_and_type() {
        let file = sample(0x20_0000, &[0; 16], Some((b"Xen\0", 18, &[1, 2, 3, 4])));
        let elf = Elf::parse(&file).unwrap();
        assert_eq!(elf.note(&file, b"Xen\0", 18), Some(&[1, 2, 3, 4][..]));
        assert_eq!(elf.note(&file, b"Xen\0", 17), None);
        assert_eq!(elf.note(&file, b"GNU\0", 18), None);
    }

    #[test]
    fn headers_that_lie_are_caught() {
        let good = sample(0x20_0000, &[0; 16], None);
        let parse = |at: usize, value: u64| {
            let mut file = good.clone();
            put(&mut file, at, value.to_le_bytes());
            Elf::parse(&file).unwrap_err()
        };
        assert!(matches!(parse(32, u64::MAX), Problem::Truncated { .. }));
        assert!(matches!(parse(64 + 8, u64::MAX - 4), Problem::Truncated { .. }));
        assert!(matches!(parse(64 + 40, 3), Problem::Damaged(_)), "memory size below file size");
        let mut arm = good.clone();
        put(&mut arm, 18, 183u16.to_le_bytes());
        assert!(Elf::parse(&arm).unwrap_err().to_string().contains("arm64"));
    }
}
