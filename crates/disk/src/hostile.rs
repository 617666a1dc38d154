//! Image files that mean harm: whatever is in their structures, nothing panics, nothing takes for ever, and
//! nothing outside of an image's folder is read.
//!
//! `OSPITE_SEEDS=N` tries N seeds; a failure names its own, and `OSPITE_SEED=S` begins there.

use std::fs;
use std::os::unix::fs::symlink;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use dice::{Dice, seeds};

use crate::testing::Guest;
use crate::{Disk, Format};

const SEEDS: u64 = 400;
/// More than anything here may take.
const PATIENCE: Duration = Duration::from_secs(5);
const CLUSTER: u64 = 0x1_0000;

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// A sound image with some data in it.
fn qcow2(folder: &Path) -> Vec<u8> {
    let path = folder.join("sound.qcow2");
    crate::create(&path, 64 << 20).unwrap();
    let (disk, guest) = (crate::open(&path, Some(Format::Qcow2), false).unwrap(), Guest::new());
    guest.fill(0, &[3; 0x1_0000]);
    for at in [0, 0x1_0000, 0x4_2000, 0x200_0000] {
        disk.write_vectored_at(&[guest.slice(0, 0x1_0000)], at).unwrap();
    }
    drop(disk);
    fs::read(path).unwrap()
}

/// An entry of a table, or what could stand there: clusters of the file's own structures above all.
fn entry(dice: &mut Dice, clusters: u64) -> u64 {
    const COPIED: u64 = 1 << 63;
    const COMPRESSED: u64 = 1 << 62;
    let inside = dice.below(clusters + 2) * CLUSTER;
    let flags =
        dice.of(&[0, COPIED, COPIED, COPIED | 1, 1, COMPRESSED, COMPRESSED | 1 << 54, COPIED | COMPRESSED]);
    let some = dice.roll();
    let place =
        dice.of(&[inside, inside, inside, inside, inside + 512, 0, 1 << 40, 0x00ff_ffff_ffff_0000, some]);
    place | flags
}

/// Puts something into its structures that has no business there.
fn damage(dice: &mut Dice, image: &mut [u8]) {
    let clusters = image.len() as u64 / CLUSTER;
    let (l1, counts) = (be64(image, 40) as usize, be64(image, 48) as usize);
    let l2 = (be64(image, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    let block = be64(image, counts) as usize;
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = image.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    for _ in 0..1 + dice.below(4) {
        let index = dice.below(10) as usize;
        match dice.below(10) {
            0 => {
                let field = dice.of(&[4, 16, 20, 32, 36, 56, 60, 96, 100, 104]);
                let some = dice.roll() as u32;
                let value = dice.of(&[
                    0,
                    1,
                    2,
                    3,
                    4,
                    6,
                    7,
                    9,
                    16,
                    21,
                    22,
                    64,
                    104,
                    112,
                    1023,
                    0x7fff_ffff,
                    u32::MAX,
                    some,
                ]);
                put(field, &value.to_be_bytes());
            }
            1 => {
                let field = dice.of(&[8, 24, 24, 40, 48, 64, 72, 80, 88]);
                let value = entry(dice, clusters);
                let value = dice.of(&[0, 1, 4, 8, 16, 1 << 20, 1 << 50, u64::MAX, value, value]);
                put(field, &value.to_be_bytes());
            }
            2 => {
                // An extension of the header, and its length.
                let kind = dice.of(&[0u32, 0xe279_2aca, 0x6803_f857, 0x2385_2875, 0x0537_be77, 0x4441_5441]);
                let length = dice.of(&[0u32, 1, 8, 24, 48, 400, 0xffff, u32::MAX]);
                put(dice.of(&[104, 112]), &[kind.to_be_bytes(), length.to_be_bytes()].concat());
            }
            3 => put(l1 + 8 * index, &entry(dice, clusters).to_be_bytes()),
            4..7 => put(l2 + 8 * index, &entry(dice, clusters).to_be_bytes()),
            7 => put(counts + 8 * index, &entry(dice, clusters).to_be_bytes()),
            8 => put(block + 2 * index, &dice.of(&[0u16, 1, 2, 0xffff]).to_be_bytes()),
            _ => {
                let at = dice.below(clusters * CLUSTER) as usize & !7;
                put(at, &dice.roll().to_be_bytes());
            }
        }
    }
}

/// Uses a disk as a guest would, also where it should not.
fn exercise(dice: &mut Dice, disk: &dyn Disk, guest: &Guest) {
    // Half a GiB more than there is of a disk that says that it is large.
    let sectors = (disk.size() / 512).min(1 << 20);
    for _ in 0..25 {
        let length = dice.of(&[1, 8, 64, 128, 129, 1024]).min(sectors);
        let near = dice.below(20) * 64;
        let first = dice.of(&[0, near, near, near, sectors - length]).min(sectors - length);
        let (offset, bytes) = (first * 512, length * 512);
        let slice = [guest.slice(0, bytes as usize)];
        // What comes of it is the guest's affair.
        let _ = match dice.below(8) {
            0..3 => disk.read_vectored_at(&slice, offset),
            3..6 => disk.write_vectored_at(&slice, offset),
            6 => disk.discard(offset, bytes).and_then(|()| disk.write_zeroes(offset, bytes, true)),
            _ => disk.write_zeroes(offset, bytes, false).and_then(|()| disk.flush()),
        };
    }
}

#[test]
fn a_qcow2_image_whose_header_is_not_counted_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (mut image, path) = (qcow2(folder.path()), folder.path().join("a.qcow2"));
    let counts = be64(&image, 48) as usize;
    let sound: [u8; 8] = image[counts..counts + 8].try_into().unwrap();
    for entry in [0, CLUSTER + 512, 1 << 40] {
        image[counts..counts + 8].copy_from_slice(&u64::to_be_bytes(entry));
        fs::write(&path, &image).unwrap();
        assert!(crate::open(&path, None, false).is_err(), "{entry:#x}");
    }
    image[counts..counts + 8].copy_from_slice(&sound);
    image[56..60].fill(0); // a table of none
    fs::write(&path, &image).unwrap();
    assert!(crate::open(&path, None, false).is_err());
}

#[test]
fn no_qcow2_image_panics_or_takes_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    let (sound, path, guest) = (qcow2(folder.path()), folder.path().join("a.qcow2"), Guest::new());
    let (mut opened, mut failed) = (0, Vec::new());
    for seed in seeds(SEEDS) {
        let (mut dice, mut image) = (Dice::new(seed), sound.clone());
        damage(&mut dice, &mut image);
        fs::write(&path, image).unwrap();
        let began = Instant::now();
        let used = catch_unwind(AssertUnwindSafe(|| {
            let read_only = dice.below(4) == 0;
            if let Ok(disk) = crate::open(&path, None, read_only) {
                opened += 1;
                exercise(&mut dice, &*disk, &guest);
            }
            if let Ok(disk) = crate::open_overlay(&path, &folder.path().join("sound.qcow2"), false) {
                exercise(&mut dice, &*disk, &guest);
            }
        }));
        if used.is_err() || began.elapsed() > PATIENCE {
            failed.push((seed, began.elapsed()));
        }
    }
    assert!(failed.is_empty(), "these OSPITE_SEEDs panicked, or took so long: {failed:?}");
    let tried = seeds(SEEDS).count();
    assert!(opened > tried / 10 || tried < 20, "it would prove nothing: {opened}");
}

/// A folder with an image in a folder below it, and what nobody there may read.
fn beside_a_secret() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("images")).unwrap();
    fs::write(folder.path().join("secret"), [b'S'; 0x1_0000]).unwrap();
    symlink("../secret", folder.path().join("images/link")).unwrap();
    symlink("..", folder.path().join("images/up")).unwrap();
    folder
}

/// Ways to name it.
fn names(folder: &Path) -> Vec<String> {
    let absolute = folder.join("secret").display().to_string();
    let names = ["../secret", "link", "up/secret", "./../secret", "file:../secret", "../images/../secret"];
    let mut names = names.map(str::to_owned).to_vec();
    names.extend([
        format!("file:{absolute}"),
        format!("json:{{\"driver\":\"file\",\"filename\":\"{absolute}\"}}"),
        format!("/proc/self/cwd/{absolute}"),
        absolute,
    ]);
    names
}

fn shows_no_secret(disk: &dyn Disk) -> bool {
    let guest = Guest::new();
    let length = disk.size().min(0x1_0000) as usize;
    disk.read_vectored_at(&[guest.slice(0, length)], 0).is_err() || !guest.bytes(0, length).contains(&b'S')
}

#[test]
fn no_image_reads_what_is_not_in_its_folder() {
    let folder = beside_a_secret();
    let image = folder.path().join("images/a.qcow2");
    let sound = qcow2(&folder.path().join("images"));
    for name in names(folder.path()) {
        for (format, data_file) in [("raw", false), ("qcow2", false), ("", false), ("raw", true)] {
            let mut bytes = sound.clone();
            let l1 = be64(&bytes, 40) as usize;
            bytes[l1..l1 + 8].fill(0); // all of it is the backing file's
            let mut place = 112;
            let mut extend = |kind: u32, data: &[u8]| {
                bytes[place..place + 4].copy_from_slice(&kind.to_be_bytes());
                bytes[place + 4..place + 8].copy_from_slice(&(data.len() as u32).to_be_bytes());
                bytes[place + 8..place + 8 + data.len()].copy_from_slice(data);
                place += (8 + data.len()).next_multiple_of(8);
            };
            extend(0xe279_2aca, format.as_bytes());
            extend(if data_file { 0x4441_5441 } else { 0 }, if data_file { name.as_bytes() } else { b"" });
            extend(0, b"");
            if data_file {
                bytes[79] |= 4; // "external data file"
                bytes[95] |= 2; // and it is raw
            } else {
                bytes[8..16].copy_from_slice(&0x8000u64.to_be_bytes());
                bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
                bytes[0x8000..0x8000 + name.len()].copy_from_slice(name.as_bytes());
            }
            fs::write(&image, bytes).unwrap();
            for read_only in [false, true] {
                if let Ok(disk) = crate::open(&image, Some(Format::Qcow2), read_only) {
                    assert!(shows_no_secret(&*disk), "{name} as {format:?}, data file: {data_file}");
                }
            }
        }
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\
             RW 128 FLAT \"{}\" 0\n",
            name.replace('"', "")
        );
        let vmdk = folder.path().join("images/a.vmdk");
        fs::write(&vmdk, text).unwrap();
        if let Ok(disk) = crate::open(&vmdk, Some(Format::Vmdk), true) {
            assert!(shows_no_secret(&*disk), "{name} in a VMDK");
        }
    }
}

#[test]
fn no_vmdk_image_panics_or_takes_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    let (path, guest) = (folder.path().join("a.vmdk"), Guest::new());
    fs::write(folder.path().join("flat"), vec![7; 0x2_0000]).unwrap();
    for seed in seeds(SEEDS) {
        let mut dice = Dice::new(seed);
        let mut text = String::from("# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n");
        text += dice.of(&[
            "createType=\"monolithicFlat\"\n",
            "createType=\"twoGbMaxExtentFlat\"\n",
            "createType=\"x\"\n",
            "",
        ]);
        for _ in 0..dice.of(&[1, 1, 2, 3, 2000]) {
            let numbers = [
                "0",
                "1",
                "64",
                "128",
                "256",
                "-1",
                "18446744073709551615",
                "36028797018963968",
                "9e9",
                "x",
                "",
            ];
            let (access, size) = (dice.of(&["RW", "RW", "RW", "RDONLY", "NOACCESS", "X"]), dice.of(&numbers));
            let kind = dice.of(&["FLAT", "FLAT", "FLAT", "VMFS", "ZERO", "SPARSE", "X"]);
            let file = dice.of(&[
                "\"flat\"",
                "\"flat\"",
                "\"flat\"",
                "\"a.vmdk\"",
                "\"\"",
                "flat",
                "\"",
                "\"none\"",
            ]);
            text += &format!("{access} {size} {kind} {file} {}\n", dice.of(&numbers));
        }
        let mut bytes = text.into_bytes();
        if dice.below(3) == 0 {
            let at = dice.below(bytes.len() as u64) as usize;
            bytes[at] = dice.roll() as u8;
        }
        fs::write(&path, bytes).unwrap();
        let began = Instant::now();
        if let Ok(disk) = crate::open(&path, Some(Format::Vmdk), true) {
            exercise(&mut dice, &*disk, &guest);
        }
        assert!(began.elapsed() < PATIENCE, "OSPITE_SEED={seed} took {:?}", began.elapsed());
    }
}
