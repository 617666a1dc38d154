//! What a file that is no kernel looks like, so that the message can say it.

use crate::Problem;

/// (offset, bytes there, what such a file is)
const LOOKS: &[(usize, &[u8], &str)] = &[
    (0, b"\x1f\x8b", "it is gzip-compressed (decompress it with gunzip if a kernel is inside)"),
    (0, b"\xfd7zXZ", "it is xz-compressed (decompress it with unxz if a kernel is inside)"),
    (0, b"\x28\xb5\x2f\xfd", "it is zstd-compressed (decompress it with unzstd if a kernel is inside)"),
    (0, b"070701", "it is an initramfs (pass it with --initrd)"),
    (0, b"QFI\xfb", "it is a qcow2 disk image (pass it with --disk)"),
    (0x8001, b"CD001", "it is a CD image"),
    (0, b"!<arch>", "it is a Debian package or archive (extract the vmlinuz inside)"),
    (0, b"#!", "it is a script"),
    (0x1fe, b"\x55\xaa", "it is a boot sector or disk image (a disk is passed with --disk)"),
    (0, b"MZ", "it is an EFI or Windows program"),
];

/// Names the file for the message.
pub(crate) fn not_a_kernel(bytes: &[u8]) -> Problem {
    // Linux Documentation/arch/arm64/booting: magic 0x644d5241 at offset 56; riscv: "RSC\x05".
    if has(bytes, 56, b"ARM\x64") {
        return Problem::WrongArchitecture { found: "64-bit ARM (arm64)" };
    }
    if has(bytes, 56, b"RSC\x05") {
        return Problem::WrongArchitecture { found: "RISC-V" };
    }
    let looks = LOOKS.iter().find(|(offset, magic, _)| has(bytes, *offset, magic));
    Problem::NotKernel { looks: looks.map_or("its content is of no known format", |(_, _, looks)| looks) }
}

fn has(bytes: &[u8], offset: usize, magic: &[u8]) -> bool {
    bytes.get(offset..).is_some_and(|rest| rest.starts_with(magic))
}

/// The architecture's name for an ELF `e_machine` value.
pub(crate) fn elf_machine(machine: u16) -> &'static str {
    match machine {
        2 | 43 => "SPARC",
        8 => "MIPS",
        20 | 21 => "PowerPC",
        22 => "s390",
        40 => "32-bit ARM",
        183 => "64-bit ARM (arm64)",
        243 => "RISC-V",
        258 => "LoongArch",
        _ => "another architecture",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_mistakes_are_named() {
        let text = |bytes: &[u8]| not_a_kernel(bytes).to_string();
        assert!(text(b"070701000").contains("--initrd"));
        assert!(text(b"QFI\xfb\0\0\0\x03").contains("--disk"));
        assert!(text(b"hello").contains("no known format"));
        let mut arm = vec![0; 64];
        arm[56..60].copy_from_slice(b"ARM\x64");
        assert!(text(&arm).contains("arm64"));
    }
}
