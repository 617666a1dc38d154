//! VMs whose devices have limits.

use std::fs::File;
use std::io::Write;
use std::net::TcpListener;
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

/// Takes what the guest sends; bytes and how long they took.
fn sink(listener: &TcpListener) -> (u64, Duration) {
    let (mut guest, _) = listener.accept().unwrap();
    let begun = Instant::now();
    (std::io::copy(&mut guest, &mut std::io::sink()).unwrap(), begun.elapsed())
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn a_guest_sends_and_receives_what_its_card_may() {
    const LENGTH: usize = 4 << 20;
    let home = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let options = ["--net-limit", "bandwidth=2M,bandwidth-burst=256K", "--net-allow", "127.0.0.1"];
    let guest = Ospite::run().home(home.path()).kernel(&cloud_kernel()).memory("256M");
    let guest = options.iter().fold(guest, |guest, option| guest.arg(option));
    let mut guest = guest.append("quiet ospite.modules=virtio ospite.shell").start();
    guest.wait_for("/ # ", 120);
    guest.type_line("ip link set eth0 up; ip addr add 10.200.0.2/16 dev eth0; echo a''ddressed");
    guest.wait_for("addressed", 20);

    guest.type_line(&format!("head -c {LENGTH} /dev/zero | nc 10.200.0.1 {port}"));
    let (sent, took) = sink(&listener);
    assert_eq!(sent, LENGTH as u64);
    // All but the burst has to wait; what was sent before the connection was accepted is part of that.
    assert!(took > Duration::from_millis(1500) && took < Duration::from_secs(10), "{sent} bytes in {took:?}");

    guest.type_line(&format!("nc 10.200.0.1 {port} < /dev/null | wc -c | sed 's/^/got /'"));
    let (mut client, _) = listener.accept().unwrap();
    let begun = Instant::now();
    client.write_all(&vec![7; LENGTH]).unwrap();
    drop(client);
    guest.wait_for(&format!("got {LENGTH}"), 20);
    let took = begun.elapsed();
    assert!(
        took > Duration::from_millis(1500) && took < Duration::from_secs(10),
        "{LENGTH} bytes in {took:?}"
    );
}
