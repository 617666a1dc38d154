//! What guests are made of. The scripts in `tools/` make it once and keep it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// A kernel and the initramfs that tells what it sees, runs a command or mounts a disk, as
/// `tools/guest-init.sh` says.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The bzImage.
    pub vmlinuz: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

/// The workspace's folder.
pub fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// Where `tools/` keeps what it makes.
pub fn guests() -> PathBuf {
    let cache = std::env::var_os("OSPITE_CACHE").map(PathBuf::from);
    cache.unwrap_or_else(|| root().join(".cache")).join("guests")
}

/// Debian's stock cloud kernel.
pub fn cloud_kernel() -> Kernel {
    kernel("cloud")
}

/// Debian's stock kernel for everything.
pub fn generic_kernel() -> Kernel {
    kernel("generic")
}

fn kernel(name: &str) -> Kernel {
    static MADE: OnceLock<()> = OnceLock::new();
    MADE.get_or_init(|| tool("guest-kernels.sh"));
    Kernel { vmlinuz: guests().join(name).join("vmlinuz"), initrd: guests().join("busybox.cpio") }
}

/// The Debian 12 disk: raw ext4, root logs in on the serial line without a password. A master: boot
/// copies.
pub fn debian_disk() -> PathBuf {
    static MADE: OnceLock<()> = OnceLock::new();
    MADE.get_or_init(|| tool("guest-debian.sh"));
    guests().join("debian12.raw")
}

/// The Debian 12 disk with more programs. A master, to be used read-only.
pub fn programs_disk() -> PathBuf {
    static MADE: OnceLock<()> = OnceLock::new();
    MADE.get_or_init(|| run(Command::new(root().join("tools/guest-debian.sh")).arg("programs")));
    guests().join("debian12-programs.raw")
}

/// The kernel to start it with.
pub fn debian_kernel() -> Kernel {
    debian_disk();
    Kernel { vmlinuz: guests().join("cloud/vmlinuz"), initrd: guests().join("debian12.cpio") }
}

/// The release binary, freshly built; `OSPITE` names another one.
pub fn ospite() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| std::env::var_os("OSPITE").map_or_else(build, PathBuf::from))
}

fn build() -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    run(Command::new(cargo)
        .args(["build", "--quiet", "--release", "--package", "ospite"])
        .current_dir(root()));
    target().join("release/ospite")
}

/// Tests and tools run from `target/PROFILE/` or its `deps/`.
fn target() -> PathBuf {
    let exe = std::env::current_exe().unwrap_or_default();
    let target = exe.ancestors().find(|dir| dir.join("CACHEDIR.TAG").exists());
    target.map_or_else(|| root().join("target"), Path::to_owned)
}

fn tool(script: &str) {
    run(&mut Command::new(root().join("tools").join(script)));
}

fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    assert!(status.success(), "{command:?}: {status}");
}
