//! A database's promise through a power cut: what was acknowledged is there.
//!
//! A guest appends records to a file, each with fsync, and says so on its serial line. What a VM leaves
//! behind when its process is killed is what its image holds at that instant: so the process is stopped,
//! the image is copied, and the process goes on, as many times as there shall be cuts; at the end it is
//! killed for real. Every copy must be a sound image, its file system recover, and all that was
//! acknowledged before the cut be in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use guest_tests::Ospite;
use guest_tests::artefacts::cloud_kernel;
use rustix::process::Signal;
use tempfile::TempDir;

/// Power cuts of the running guest, before the real one.
const CUTS: u32 = 200;
/// Bytes of a record: `record NNNNNNNN` and a newline.
const RECORD: usize = 16;

/// What the guest does. Now and then it writes much without fsync, so that data which was promised to
/// nobody is under way, too.
const LOAD: &str = "mount -t ext4 /dev/vda /root && cd /root && n=0 && while true; do \
    printf 'record %08d\\n' $n | dd of=log bs=16 seek=$n conv=notrunc,fsync 2>/dev/null && echo \
    acknowledged $n.; n=$((n+1)); [ $((n%16)) = 5 ] && dd if=/dev/urandom of=noise bs=64k count=20 \
    2>/dev/null; done";

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {text}", output.status);
    text.into_owned()
}

fn image(dir: &Path, format: &str) -> PathBuf {
    let (raw, image) = (dir.join("new.raw"), dir.join(format!("disk.{format}")));
    fs::File::create(&raw).unwrap().set_len(48 << 20).unwrap();
    run(Command::new("/sbin/mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&raw));
    run(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", format]).arg(&raw).arg(&image));
    image
}

/// The number of records that are acknowledged in what the guest has printed.
fn acknowledged(printed: &str) -> Option<usize> {
    let end = printed.rfind('.')?;
    let number = printed[..end].rsplit_once("acknowledged ")?.1;
    Some(number.parse::<usize>().ok()? + 1)
}

/// Panics unless `image` is sound, recovers, and holds the first `count` records.
fn check(image: &Path, format: &str, count: usize) {
    let raw = image.with_extension("checked");
    if format == "qcow2" {
        run(Command::new("qemu-img").args(["check", "-q", "-f", format]).arg(image));
    }
    run(Command::new("qemu-img").args(["convert", "-f", format, "-O", "raw"]).arg(image).arg(&raw));
    // Plays the journal back, as the next mount would, and mends nothing else without a person.
    let preen = Command::new("/sbin/e2fsck").arg("-p").arg(&raw).output().unwrap();
    assert!(matches!(preen.status.code(), Some(0 | 1)), "{preen:?}");
    run(Command::new("/sbin/e2fsck").arg("-fn").arg(&raw));
    let log = run(Command::new("/sbin/debugfs").args(["-R", "cat log"]).arg(&raw));
    let log = &log[..log.rfind('\n').map_or(0, |end| end + 1)];
    for n in 0..count {
        let at = n * RECORD;
        let record = log.get(at..at + RECORD);
        assert_eq!(record, Some(format!("record {n:08}\n").as_str()), "acknowledged {count} records");
    }
}

fn power_cuts(format: &str, cuts: u32) {
    let dir = TempDir::new().unwrap();
    let image = image(dir.path(), format);
    let copy = dir.path().join("copy");
    let mut session = Ospite::run()
        .memory("256M")
        .kernel(&cloud_kernel())
        .disk(format!("{},format={format}", image.display()))
        .append("quiet ospite.modules=virtio")
        .guest_command(LOAD)
        .start();
    session.wait_for("acknowledged 0.", 300);
    let mut count = 1;
    for cut in 0..cuts {
        // At least one more record, and a moment that is not in step with the guest.
        let one = session.wait_for(".", 60);
        std::thread::sleep(Duration::from_micros(u64::from(cut * 7919 % 23) * 1000));
        session.signal(Signal::STOP);
        // System calls that are under way come to their end.
        std::thread::sleep(Duration::from_millis(5));
        count = acknowledged(&(one + &session.printed())).unwrap_or(count);
        fs::copy(&image, &copy).unwrap();
        session.signal(Signal::CONT);
        check(&copy, format, count);
    }
    let before = session.wait_for(".", 60);
    session.signal(Signal::KILL);
    let end = session.end(60);
    assert!(end.console.contains(&before));
    count = acknowledged(&end.console).unwrap();
    check(&image, format, count);
    println!("{cuts} power cuts and a kill, {count} records acknowledged and found in the {format} image");
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn no_acknowledged_write_is_lost_by_power_cuts_of_a_qcow2() {
    power_cuts("qcow2", CUTS);
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn nor_of_a_raw_image() {
    power_cuts("raw", CUTS / 4);
}
