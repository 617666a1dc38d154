//! A guest's way through the tables: find the RSDP, follow the pointers, check every sum.

use std::process::Command;

use super::*;

fn tables(params: &AcpiParams) -> (GuestRam, u64) {
    let ram = GuestRam::new(&[0..0x20_0000]).unwrap();
    let rsdp = build(params, &ram).unwrap();
    (ram, rsdp)
}

fn read(ram: &GuestRam, addr: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    ram.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
    bytes
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// A table with a right checksum.
fn sdt(ram: &GuestRam, addr: u64) -> Vec<u8> {
    let len = u32_at(&read(ram, addr, 8), 4);
    let table = read(ram, addr, len.into());
    assert_eq!(sum(&table), 0, "checksum of {:?}", String::from_utf8_lossy(&table[..4]));
    table
}

/// All tables by signature, reached from the RSDP as a guest does.
fn follow(ram: &GuestRam, rsdp: u64) -> Vec<(String, Vec<u8>)> {
    let rsdp = read(ram, rsdp, 36);
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(&rsdp), rsdp[15]), (0, 0, 2));
    let xsdt = sdt(ram, u64_at(&rsdp, 24));
    let mut found: Vec<_> = xsdt[36..].chunks_exact(8).map(|p| sdt(ram, u64_at(p, 0))).collect();
    let fadt = found.iter().find(|t| t.starts_with(b"FACP")).unwrap();
    let dsdt = sdt(ram, u64_at(fadt, 140));
    assert_eq!(u64::from(u32_at(fadt, 40)), u64_at(fadt, 140));
    found.push(dsdt);
    found.into_iter().map(|t| (String::from_utf8(t[..4].to_vec()).unwrap(), t)).collect()
}

fn one(tables: &[(String, Vec<u8>)], signature: &str) -> Vec<u8> {
    tables.iter().find(|(s, _)| s == signature).unwrap().1.clone()
}

#[test]
fn a_guest_finds_every_table_with_a_right_checksum() {
    let (ram, rsdp) = tables(&AcpiParams::pc(4));
    assert_eq!(rsdp, 0xe0000);
    let tables = follow(&ram, rsdp);
    let signatures: Vec<_> = tables.iter().map(|(s, _)| s.as_str()).collect();
    assert_eq!(signatures, ["FACP", "APIC", "MCFG", "DSDT"]);

    let fadt = one(&tables, "FACP");
    assert_eq!((fadt.len(), fadt[8]), (276, 6), "revision 6 is 276 bytes long");
    let facs = read(&ram, u32_at(&fadt, 36).into(), 64);
    assert_eq!((&facs[..4], u32_at(&facs, 4)), (&b"FACS"[..], 64));
    assert!(u32_at(&fadt, 36).is_multiple_of(64));
    let flags = u32_at(&fadt, 112);
    assert_eq!(flags & (1 << 4), 0, "power button is fixed hardware");
    assert_ne!(flags & (1 << 10), 0, "reset register is supported");
    assert_ne!(flags & (1 << 8), 0, "timer has 32 bits");
    assert_eq!(flags & (1 << 20), 0, "not hardware-reduced");
    assert_eq!((fadt[116], u64_at(&fadt, 120), fadt[128]), (1, 0xcf9, 6));
    assert_eq!((u32_at(&fadt, 56), u32_at(&fadt, 64), u32_at(&fadt, 76)), (0x600, 0x604, 0x608));

    let mcfg = one(&tables, "MCFG");
    assert_eq!((u64_at(&mcfg, 44), mcfg[54], mcfg[55]), (0xe000_0000, 0, 0));
}

fn with_hpet() -> AcpiParams {
    let hpet = Hpet { address: 0xfed0_0000, id: 0x8086_a201, min_ticks: 10_000 };
    AcpiParams { hpet: Some(hpet), ..AcpiParams::pc(4) }
}

#[test]
fn a_guest_finds_the_event_timers_of_a_machine_that_has_them() {
    let (ram, rsdp) = tables(&with_hpet());
    let hpet = one(&follow(&ram, rsdp), "HPET");
    assert_eq!((hpet.len(), u32_at(&hpet, 36)), (56, 0x8086_a201));
    assert_eq!((&hpet[40..44], u64_at(&hpet, 44)), (&[0, 64, 0, 0][..], 0xfed0_0000));
    assert_eq!(hpet[52..], [0, 0x10, 0x27, 1]);
}

/// (type, body) of each interrupt controller structure.
fn structures(madt: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut rest = &madt[44..];
    let mut found = Vec::new();
    while !rest.is_empty() {
        let (this, next) = rest.split_at(rest[1].into());
        found.push((this[0], this[2..].to_vec()));
        rest = next;
    }
    found
}

#[test]
fn the_madt_lists_processors_overrides_and_nmi() {
    let (ram, rsdp) = tables(&AcpiParams::pc(2));
    let madt = one(&follow(&ram, rsdp), "APIC");
    assert_eq!((u32_at(&madt, 36), u32_at(&madt, 40)), (0xfee0_0000, 1));
    let expected: [(u8, &[u8]); 6] = [
        (0, &[0, 0, 1, 0, 0, 0]),
        (0, &[1, 1, 1, 0, 0, 0]),
        (1, &[0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]),
        (2, &[0, 0, 2, 0, 0, 0, 0, 0]),
        (2, &[0, 9, 9, 0, 0, 0, 0b1101, 0]),
        (4, &[0xff, 0, 0, 1]),
    ];
    assert_eq!(structures(&madt), expected.map(|(kind, body)| (kind, body.to_vec())));
}

#[test]
fn processors_beyond_8_bit_ids_are_x2apics() {
    let (ram, rsdp) = tables(&AcpiParams::pc(300));
    let madt = one(&follow(&ram, rsdp), "APIC");
    let all = structures(&madt);
    let of = |kind| all.iter().filter(|(k, _)| *k == kind).count();
    assert_eq!((of(0), of(9), of(10)), (255, 45, 1));
    let first = &all.iter().find(|(k, _)| *k == 9).unwrap().1;
    assert_eq!((u32_at(first, 2), u32_at(first, 10)), (255, 255));
}

#[test]
fn what_does_not_fit_is_refused() {
    let ram = GuestRam::new(&[0..0x20_0000]).unwrap();
    assert!(matches!(build(&AcpiParams::pc(10_000), &ram), Err(Error::TooLarge { cpus: 10_000, .. })));
    let params = AcpiParams { mmio32: 0xc000_0000..0x1_c000_0000, ..AcpiParams::pc(1) };
    assert!(matches!(build(&params, &ram), Err(Error::Window { what: "32-bit PCI", .. })));
    let params = AcpiParams { ecam: 0xe000_0000..0xe000_1000, ..AcpiParams::pc(1) };
    assert!(matches!(build(&params, &ram), Err(Error::Window { what: "ECAM", .. })));
    let tiny = GuestRam::new(&[0..0x8_0000]).unwrap();
    assert!(matches!(build(&AcpiParams::pc(1), &tiny), Err(Error::GuestMemory { .. })));
}

/// The disassembly of a table by ACPICA, or `None` where `iasl` is not installed.
fn disassemble(table: &[u8], signature: &str) -> Option<String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(format!("{signature}.dat"));
    std::fs::write(&path, table).unwrap();
    let run = match Command::new("iasl").arg("-d").arg(&path).current_dir(dir.path()).output() {
        Ok(run) => run,
        Err(error) => {
            eprintln!("SKIPPED: {signature} was not disassembled, iasl cannot be run ({error}).");
            eprintln!("         Install it: apt-get install acpica-tools");
            return None;
        }
    };
    let log = format!("{}{}", String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{log}");
    assert!(!log.contains("rror") && !log.contains("nvalid"), "{log}");
    if signature == "DSDT" {
        let source = dir.path().join("DSDT.dsl");
        let compiled = Command::new("iasl").arg("-we").arg(&source).current_dir(dir.path()).output().unwrap();
        let log = String::from_utf8_lossy(&compiled.stdout).into_owned();
        assert!(compiled.status.success() && log.contains(" 0 Errors"), "{log}");
        assert!(log.contains(" 0 Warnings"), "{log}");
    }
    Some(std::fs::read_to_string(dir.path().join(format!("{signature}.dsl"))).unwrap())
}

#[test]
fn acpica_reads_the_tables_and_compiles_its_reading_without_warnings() {
    let (ram, rsdp) = tables(&AcpiParams { apic_ids: (0..300).collect(), ..with_hpet() });
    for (signature, table) in follow(&ram, rsdp) {
        let Some(text) = disassemble(&table, &signature) else { return };
        let expected: &[&str] = match signature.as_str() {
            "FACP" => &["Control Method Power Button (V1) : 0", "Reset Register Supported (V2) : 1"],
            "APIC" => &["[Interrupt Source Override]", "[Processor Local x2APIC]"],
            "MCFG" => &["00000000E0000000"],
            "HPET" => &["8086A201", "00000000FED00000", "2710"],
            "DSDT" => &[
                "PNP0A08",
                "_OSC",
                "PNP0103",
                "0x001FFFFF",
                "PNP0501",
                "PNP0B00",
                "_S5",
                "0x0000004000000000",
            ],
            other => panic!("unexpected table {other}"),
        };
        for part in expected {
            assert!(text.contains(part), "{signature} lacks {part}:\n{text}");
        }
    }
}
