//! A database's promise through a power cut: what was acknowledged is there.
//!
//! A guest appends records to a file, each with fsync, and says so on its serial line. What a VM leaves
//! behind when its process is killed is what its image holds at that instant: so the process is stopped,
//! the image is copied, and the process goes on, as many times as there shall be cuts; at the end it is
//! killed for real. Every copy must be a sound image, its file system recover, and all that was
//! acknowledged before the cut be in it.
//!
//! When the power of the host itself is cut, what the VM wrote and did not synchronize may be there, or not, or
//! in part. That is made of a record of its system calls, for moments and parts that dice choose.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use dice::Dice;
use guest_tests::Ospite;
use guest_tests::artefacts::cloud_kernel;
use guest_tests::disk_log::{DiskLog, Luck};
use rustix::process::Signal;
use tempfile::TempDir;

/// Power cuts of the running guest, before the real one.
const CUTS: u32 = 200;
/// Bytes of a record: `record NNNNNNNN` and a newline.
const RECORD: usize = 16;

/// Power cuts of the host, for each image.
const HOST_CUTS: usize = 70;
/// Records written for them.
const RECORDS: usize = 250;

/// What the guest does until `$end`. Now and then it writes much without fsync, so that data which was promised
/// to nobody is under way, too.
const LOAD: &str = "mount -t ext4 -o discard /dev/vda /root && cd /root && n=0 && while [ $n -lt $end ]; do \
    printf 'record %08d\\n' $n | dd of=log bs=16 seek=$n conv=notrunc,fsync 2>/dev/null && echo \
    acknowledged $n.; n=$((n+1)); [ $((n%16)) = 5 ] && dd if=/dev/urandom of=noise bs=64k count=$noise \
    2>/dev/null; [ $((n%48)) = 7 ] && rm noise; done";

fn load(end: usize, noise: u32) -> String {
    LOAD.replace("$end", &end.to_string()).replace("$noise", &noise.to_string())
}

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
    let to = if format == "qcow2" { &["-O", "qcow2", "-o", "cluster_size=4k"][..] } else { &["-O", "raw"] };
    run(Command::new("qemu-img").args(["convert", "-f", "raw"]).args(to).arg(&raw).arg(&image));
    image
}

/// The number of records that are acknowledged in what the guest has printed.
fn acknowledged(printed: &str) -> Option<usize> {
    let end = printed.rfind('.')?;
    let number = printed[..end].rsplit_once("acknowledged ")?.1;
    Some(number.parse::<usize>().ok()? + 1)
}

/// Panics unless `image` is sound, recovers, and holds the first `count` records. Sound may be an image with
/// clusters that nothing uses: a cut between taking one and writing down what for costs space, and no data.
fn check(image: &Path, format: &str, count: usize) {
    let raw = image.with_extension("checked");
    if format == "qcow2" {
        let check = Command::new("qemu-img").args(["check", "-f", format]).arg(image).output().unwrap();
        assert!(matches!(check.status.code(), Some(0 | 3)), "{}: {check:?}", image.display());
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
        .guest_command(&load(1_000_000, 20))
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

/// Runs the load once under a record, and cuts the power of the host in it `HOST_CUTS` times.
fn host_cuts(format: &str, disk: &Path, option: &str, dir: &Path) {
    let (log, before) = (dir.join("strace"), fs::read(disk).unwrap());
    let mut session = Ospite::run()
        .memory("256M")
        .kernel(&cloud_kernel())
        .disk(format!("{}{option}", disk.display()))
        .append("quiet ospite.modules=virtio")
        .guest_command(&load(RECORDS, 6))
        .recorded(&log)
        .start();
    session.wait_for(&format!("acknowledged {}.", RECORDS - 1), 300);
    assert_eq!(session.end(60).code(), 0);
    let log = DiskLog::read(&log, disk).unwrap();
    let syncs = log.syncs(log.len());
    assert!(syncs > RECORDS, "{syncs} times synchronized");

    let seed = std::env::var("OSPITE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    let mut dice = Dice::new(seed);
    println!("OSPITE_SEED={seed} repeats this");
    // Not while it is mounted or all is over: ext4 then writes its superblock outside its journal, which has two
    // sectors and one checksum.
    let first = log.when_printed("acknowledged 0.").unwrap();
    let last = log.when_printed(&format!("acknowledged {}.", RECORDS - 1)).unwrap();
    for _ in 0..HOST_CUTS {
        let cut = first + dice.below((last - first) as u64) as usize;
        let luck = Luck { survive: [0, 100, 500, 900, 1000][dice.below(5) as usize], torn: dice.below(1000) };
        let mut left = before.clone();
        log.cut(&mut left, cut, luck, &mut dice);
        let copy = dir.join("copy");
        fs::write(&copy, left).unwrap();
        let count = acknowledged(&log.printed(cut)).unwrap_or(0);
        println!("cut at {cut} of {}, {count} records acknowledged, {luck:?}", log.len());
        check(&copy, format, count);
    }
    println!(
        "{HOST_CUTS} cuts of the host's power, among {} calls and {syncs} flushes of {format}",
        log.len()
    );
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn nor_by_cuts_of_the_hosts_power_from_a_raw_image() {
    let dir = TempDir::new().unwrap();
    host_cuts("raw", &image(dir.path(), "raw"), ",format=raw", dir.path());
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn nor_from_a_qcow2_that_grows_all_its_tables() {
    let dir = TempDir::new().unwrap();
    host_cuts("qcow2", &image(dir.path(), "qcow2"), "", dir.path());
}

/// Clusters are larger than the guest's writes: the rest of them is copied from the base.
#[test]
#[ignore = "boots a guest: make guest-test"]
fn nor_from_an_overlay_of_which_the_base_holds_the_rest() {
    let dir = TempDir::new().unwrap();
    let (base, top) = (image(dir.path(), "qcow2"), dir.path().join("top.qcow2"));
    let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"];
    run(Command::new("qemu-img").args(create).arg(&base).arg(&top));
    host_cuts("qcow2", &top, &format!(",base={}", base.display()), dir.path());
}
