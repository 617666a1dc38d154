//! Where the work is done: on the metal, in ospite, in QEMU.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::workload::Workload;
use crate::{Args, Error, cpio, workload};

const CMDLINE: &str = "console=ttyS0 quiet panic=-1";
const DEBIAN: &str = "console=ttyS0 quiet panic=-1 root=/dev/vda";
const SCRIPT: &str = "bench.sh";
/// The busybox that is measured, in the guest. It goes by its name.
const MEASURED: &str = "busybox";

/// The files of one script, and how many vCPUs it is run on.
pub struct Guest {
    kernel: PathBuf,
    initrd: PathBuf,
    busybox: PathBuf,
    script: PathBuf,
    cpus: u32,
}

impl Guest {
    /// Makes the initramfs: the busybox one with the script for `items` and what runs it behind it.
    pub fn prepare(args: &Args, items: &[Workload], cpus: u32) -> Result<Guest, Error> {
        let read = |path: &Path| std::fs::read(path).map_err(|e| Error::Missing(path.into(), e));
        let script = workload::script(items, args.divide());
        let mut initrd = read(&args.cache.join("busybox.cpio"))?;
        initrd.resize(initrd.len().next_multiple_of(4), 0);
        initrd.extend(cpio::with_file(SCRIPT, script.as_bytes()));
        let busybox = args.cache.join(&args.busybox);
        initrd.extend(cpio::with_file(MEASURED, &read(&busybox)?));
        let guest = Guest {
            kernel: args.cache.join("cloud/vmlinuz"),
            initrd: args.cache.join(format!("bench-{cpus}.cpio")),
            busybox,
            script: args.cache.join(format!("bench-{cpus}.sh")),
            cpus,
        };
        let write =
            |path: &Path, data: &[u8]| std::fs::write(path, data).map_err(|e| Error::Write(path.into(), e));
        write(&guest.initrd, &initrd)?;
        write(&guest.script, script.as_bytes())?;
        Ok(guest)
    }

    /// On as many of the host's CPUs as the guests have.
    pub fn native(&self) -> Command {
        let mut command = Command::new(&self.busybox);
        command.args(["taskset", &format!("{:x}", (1u64 << self.cpus) - 1)]).arg(&self.busybox);
        command.arg("sh").arg("-c").arg(". \"$1\"").arg(&self.busybox).arg(&self.script);
        command
    }

    fn cmdline(&self) -> String {
        format!("{CMDLINE} ospite.run=\"/{MEASURED} sh -c '. /{SCRIPT}' /{MEASURED}\"")
    }

    /// In ospite.
    pub fn ospite(&self, args: &Args) -> Command {
        ospite(args, self.cpus, &self.kernel, &self.initrd, &self.cmdline())
    }

    /// In QEMU's translator.
    pub fn qemu(&self, args: &Args) -> Command {
        qemu(args, self.cpus, &self.kernel, &self.initrd, &self.cmdline())
    }
}

/// A whole Debian 12 with systemd on a disk of its own.
pub struct Debian {
    kernel: PathBuf,
    initrd: PathBuf,
    master: PathBuf,
    disk: PathBuf,
}

impl Debian {
    /// The Debian of the cache, where there is one.
    pub fn find(args: &Args) -> Option<Debian> {
        let debian = Debian {
            kernel: args.cache.join("cloud/vmlinuz"),
            initrd: args.cache.join("debian12.cpio"),
            master: args.cache.join("debian12.raw"),
            disk: args.cache.join("bench-debian.raw"),
        };
        (debian.master.exists() && debian.initrd.exists()).then_some(debian)
    }

    /// In ospite.
    pub fn ospite(&self, args: &Args) -> Result<Command, Error> {
        self.fresh_disk()?;
        let mut command = ospite(args, 1, &self.kernel, &self.initrd, DEBIAN);
        command.arg("--disk").arg(format!("{},format=raw", self.disk.display()));
        Ok(command)
    }

    /// In QEMU's translator.
    pub fn qemu(&self, args: &Args) -> Result<Command, Error> {
        self.fresh_disk()?;
        let mut command = qemu(args, 1, &self.kernel, &self.initrd, DEBIAN);
        command.arg("-drive").arg(format!("file={},format=raw,if=virtio", self.disk.display()));
        Ok(command)
    }

    /// Each boot is a first one.
    fn fresh_disk(&self) -> Result<(), Error> {
        let mut copy = Command::new("cp");
        copy.args(["--reflink=auto", "--sparse=always"]).arg(&self.master).arg(&self.disk);
        match copy.status() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => {
                Err(Error::Write(self.disk.clone(), std::io::Error::other(format!("cp: {status}"))))
            }
            Err(error) => Err(Error::Write(self.disk.clone(), error)),
        }
    }
}

impl Drop for Debian {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.disk);
    }
}

fn ospite(args: &Args, cpus: u32, kernel: &Path, initrd: &Path, cmdline: &str) -> Command {
    let mut command = Command::new(&args.ospite);
    command.arg("run").args(args.ospite_args.split_whitespace());
    command.args(["-c", &cpus.to_string(), "-m", "512M"]);
    command.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd).arg("--append").arg(cmdline);
    command
}

fn qemu(args: &Args, cpus: u32, kernel: &Path, initrd: &Path, cmdline: &str) -> Command {
    let mut command = Command::new(&args.qemu);
    command.args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "512"]);
    command.args(["-smp", &cpus.to_string()]);
    command.args(["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]);
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd).arg("-append").arg(cmdline);
    command
}
