//! VMs whose devices have limits.

use std::fs::File;
use std::time::{Duration, Instant};

use guest_tests::Ospite;
use guest_tests::artefacts::cloud_kernel;
use rustix::process::Signal;

#[test]
#[ignore = "boots a guest: make guest-test"]
fn a_guest_that_floods_its_disk_gets_what_it_may_and_can_still_be_talked_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    File::create(&path).unwrap().set_len(64 << 20).unwrap();
    let disk = format!("{},format=raw,bandwidth=4M,bandwidth-burst=1M", path.display());
    let guest = Ospite::run().kernel(&cloud_kernel()).memory("256M").disk(disk);
    let mut guest = guest.append("quiet ospite.modules=virtio_pci,virtio_blk ospite.shell").start();
    guest.wait_for("/ # ", 120);
    let write = "dd if=/dev/zero of=/dev/vda oflag=direct bs=1M count=";

    let begun = Instant::now();
    guest.type_line(&format!("{write}12 2> /dev/null; echo writ''ten"));
    guest.wait_for("written", 60);
    let took = begun.elapsed();
    // 11 MiB had to wait.
    assert!(took >= Duration::from_millis(2700), "12 MiB in {took:?}");
    assert!(took < Duration::from_secs(12), "12 MiB in {took:?}");

    // Two floods, of 8 s each, and what is typed meanwhile.
    guest.type_line(&format!("for n in 1 2; do {write}32 2> /dev/null && echo writ''ten & done"));
    let begun = Instant::now();
    guest.type_line("sleep 1; sync & echo li''stens");
    let meanwhile = guest.wait_for("listens", 10);
    assert!(!meanwhile.contains("written") && begun.elapsed() < Duration::from_secs(6), "{meanwhile}");
    // And the end of the VM waits for nobody.
    guest.signal(Signal::QUIT);
    let end = guest.end(10);
    assert!(!end.console[end.console.find("listens").unwrap()..].contains("written"), "{}", end.console);
}
