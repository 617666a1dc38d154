//! A Debian 12 on a virtio disk: what its user sees.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use guest_tests::artefacts::{debian_disk, debian_kernel};
use guest_tests::{Ospite, Session, Shell};
use rustix::process::Signal;
use tempfile::TempDir;

/// A copy of the Debian disk that a test may write to.
struct Disk {
    path: PathBuf,
    _dir: TempDir,
}

impl Disk {
    fn raw() -> Disk {
        Disk::made("debian.img", |path| {
            run(Command::new("cp").args(["--reflink=auto", "--sparse=always"]).arg(debian_disk()).arg(path));
        })
    }

    fn qcow2() -> Disk {
        Disk::made("debian.qcow2", |path| {
            let convert = ["convert", "-f", "raw", "-O", "qcow2"];
            run(Command::new("qemu-img").args(convert).arg(debian_disk()).arg(path));
        })
    }

    fn made(name: &str, make: impl Fn(&Path)) -> Disk {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join(name);
        make(&path);
        Disk { path, _dir: dir }
    }

    fn ospite(&self) -> Ospite {
        Ospite::run().memory("1G").kernel(&debian_kernel()).disk(&self.path).append("root=/dev/vda quiet")
    }

    fn boot(&self) -> Shell {
        Shell::login(self.ospite().start())
    }

    fn is_clean(&self) {
        run(Command::new("/sbin/e2fsck").arg("-fn").arg(&self.path));
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {text}", output.status);
}

fn powers_off(session: Session) {
    let end = session.end(300);
    assert_eq!(end.code(), 0, "{}", end.messages);
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn the_guest_sees_what_was_asked_for() {
    let disk = Disk::raw();
    let data = tempfile::NamedTempFile::new().unwrap();
    data.as_file().set_len(64 << 20).unwrap();
    let second = format!("{},readonly,format=raw,serial=DATA1", data.path().display());
    let mut shell = Shell::login(disk.ospite().cpus(2).disk(second).start());
    assert_eq!(shell.run("nproc"), "2");
    let total: u64 = shell.run("free -m | awk '/^Mem:/ { print $2 }'").parse().unwrap();
    assert!((900..=1024).contains(&total), "{total}");
    assert_eq!(shell.run("lsblk -dnbo SIZE,RO,SERIAL /dev/vdb | xargs"), "67108864 1 DATA1");
    let devices = shell.run("lspci");
    for device in ["Host bridge", "Virtio", "block device", "network"] {
        assert!(devices.to_lowercase().contains(&device.to_lowercase()), "no {device} in:\n{devices}");
    }
    assert!(shell.run("timedatectl").contains("RTC time"));
    let (here, there) = (now(), shell.run("date +%s").parse::<u64>().unwrap());
    assert!(here.abs_diff(there) < 10, "the guest's clock is off: {there} instead of {here}");
    powers_off(shell.leave("poweroff"));
}

fn now() -> u64 {
    std::time::UNIX_EPOCH.elapsed().unwrap().as_secs()
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn files_written_before_poweroff_are_there_after_the_next_boot() {
    let disk = Disk::raw();
    let mut shell = disk.boot();
    shell.run_for("head -c 50000000 /dev/urandom > /root/data; md5sum /root/data > /root/sum", 300);
    powers_off(shell.leave("poweroff"));
    disk.is_clean();
    let mut shell = disk.boot();
    assert_eq!(shell.run_for("md5sum -c /root/sum", 300), "/root/data: OK");
    powers_off(shell.leave("poweroff"));
    disk.is_clean();
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn a_qcow2_disk_stays_whole() {
    let disk = Disk::qcow2();
    let before = fs::metadata(&disk.path).unwrap().len();
    let mut shell = disk.boot();
    shell.run_for("head -c 50000000 /dev/urandom > /root/data; sync", 300);
    powers_off(shell.leave("poweroff"));
    run(Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&disk.path));
    assert!(fs::metadata(&disk.path).unwrap().len() > before, "the image has grown by what was written");
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn reboot_in_the_guest_reboots_it() {
    let disk = Disk::raw();
    let mut shell = disk.boot();
    let first = shell.run("cat /proc/sys/kernel/random/boot_id");
    let mut shell = Shell::login(shell.leave("reboot"));
    assert_ne!(shell.run("cat /proc/sys/kernel/random/boot_id"), first);
    powers_off(shell.leave("poweroff"));
    disk.is_clean();
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn ctrl_c_at_the_host_is_an_orderly_power_off() {
    let disk = Disk::raw();
    let mut shell = disk.boot();
    shell.run("echo kept > /root/note");
    let session = shell.into_session();
    session.signal(Signal::INT);
    let end = session.end(300);
    assert_eq!(end.code(), 0, "{}", end.messages);
    assert!(end.messages.contains("power button pressed"), "{}", end.messages);
    disk.is_clean();
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn a_power_cut_in_the_middle_of_writing_leaves_a_whole_qcow2_and_what_was_synced() {
    let disk = Disk::qcow2();
    let mut shell = disk.boot();
    shell.run("echo kept > /root/note; sync");
    let session = shell.leave("while :; do head -c 5000000 /dev/urandom > /root/data; sync; done");
    std::thread::sleep(std::time::Duration::from_secs(3));
    session.signal(Signal::QUIT);
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&session.end(60).status), Some(3));
    run(Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&disk.path));
    let mut shell = disk.boot();
    assert_eq!(shell.run("cat /root/note"), "kept");
    powers_off(shell.leave("poweroff"));
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn a_virtio_console_has_a_login_of_its_own() {
    let disk = Disk::raw();
    let mut session = disk.ospite().option("--console", "virtio").start();
    session.wait_for("ospite hvc0", 600);
    let mut shell = Shell::login(session);
    assert_eq!(shell.run("tty"), "/dev/hvc0");
    powers_off(shell.leave("poweroff"));
}
