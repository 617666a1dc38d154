//! Files that are broken each get one clear error line and an exit code; nothing panics.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use guest_tests::artefacts::cloud_kernel;
use guest_tests::{Ospite, Refusal};
use tempfile::TempDir;

const BROKEN_FILE: i32 = 4;

/// A folder that everybody may look into.
fn folder() -> TempDir {
    let dir = TempDir::new().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

fn file(dir: &TempDir, name: &str, content: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    fs::write(&path, content).unwrap();
    path
}

/// Random enough for a parser, and the same every time.
fn noise(len: usize, mut seed: u64) -> Vec<u8> {
    let mut byte = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 56) as u8
    };
    (0..len).map(|_| byte()).collect()
}

fn kernel(path: &Path) -> Refusal {
    let refusal = Ospite::run().option("--kernel", path).refused();
    assert_eq!(refusal.code, BROKEN_FILE, "{}", refusal.text);
    refusal
}

#[test]
#[ignore = "needs the release binary: make guest-test"]
fn kernels_of_random_bytes_are_refused() {
    let dir = folder();
    for (seed, len) in (1..).zip([0, 1, 511, 512, 513, 4096, 100_000, 3_000_000]) {
        kernel(&file(&dir, "vmlinuz", &noise(len, seed)));
    }
}

#[test]
#[ignore = "needs the release binary: make guest-test"]
fn truncated_kernels_are_refused() {
    let (dir, whole) = (folder(), fs::read(cloud_kernel().vmlinuz).unwrap());
    for len in [100, 512, 700, 4096, whole.len() / 2, whole.len() - 4096] {
        let refusal = kernel(&file(&dir, "vmlinuz", &whole[..len]));
        assert!(refusal.text.contains("vmlinuz"), "the file is named: {}", refusal.text);
    }
}

#[test]
#[ignore = "needs the release binary: make guest-test"]
fn kernels_for_another_architecture_are_refused() {
    let dir = folder();
    // ELF header fields: class, data, version, then e_type 2 (EXEC) and e_machine 183 (AArch64).
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\xb7\0\x01\0\0\0".to_vec();
    elf.resize(4096, 0);
    kernel(&file(&dir, "vmlinux", &elf));
    // An arm64 Image has its magic at offset 56.
    let mut image = vec![0; 1 << 20];
    image[56..60].copy_from_slice(b"ARM\x64");
    kernel(&file(&dir, "Image", &image));
}

#[test]
#[ignore = "needs the release binary: make guest-test"]
fn a_folder_nothing_and_a_file_without_permission_are_refused() {
    let dir = folder();
    kernel(dir.path());
    assert!(kernel(&dir.path().join("nothing")).text.contains("No such file"));
    let secret = file(&dir, "secret", &noise(4096, 1));
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o000)).unwrap();
    let nobody = Ospite::run().option("--kernel", &secret).as_user(65_534).refused();
    assert!(nobody.text.contains("ermission denied"), "{}", nobody.text);
}

#[test]
#[ignore = "needs the release binary: make guest-test"]
fn broken_initial_ram_disks_and_disks_are_refused() {
    let (dir, good) = (folder(), cloud_kernel());
    let with = |option: &str, path: &Path| {
        let refusal = Ospite::run().option("--kernel", &good.vmlinuz).option(option, path).refused();
        assert_eq!(refusal.code, BROKEN_FILE, "{}", refusal.text);
        assert!(
            refusal.text.contains(path.to_str().unwrap()),
            "{option}: the file is named: {}",
            refusal.text
        );
    };
    for option in ["--initrd", "--disk"] {
        with(option, &dir.path().join("nothing"));
        with(option, dir.path());
    }
    with("--disk", &file(&dir, "short.qcow2", b"QFI\xfb\0\0\0\x03"));
    let mut noisy = noise(100_000, 7);
    noisy[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    with("--disk", &file(&dir, "noisy.qcow2", &noisy));
    let huge = dir.path().join("huge");
    File::create(&huge).unwrap().set_len(8 << 30).unwrap();
    with("--initrd", &huge);
}

#[test]
#[ignore = "needs the release binary: make guest-test"]
fn nothing_to_boot_and_a_missing_engine_are_said_with_what_to_type() {
    let nothing = Ospite::run().refused();
    assert!(nothing.code == 2 && nothing.text.contains("--kernel"), "{}", nothing.text);
    let disk_only = Ospite::run().disk("debian.img").refused();
    assert!(disk_only.code == 2 && disk_only.text.contains("-d debian.img"), "{}", disk_only.text);
    let kvm = Ospite::run().option("--kernel", "vmlinuz").option("--engine", "kvm").refused();
    assert!(kvm.code == 6 && kvm.text.contains("--engine soft"), "{}", kvm.text);
}
