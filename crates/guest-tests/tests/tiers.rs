//! The tiers of the software engine: the interpreter alone, and the translator beside it.

use std::path::PathBuf;
use std::process::Command;

use guest_tests::artefacts::{cloud_kernel, debian_disk, debian_kernel, programs_disk};
use guest_tests::{End, Ospite, Session, Shell};
use tempfile::TempDir;

/// How many units of code lockstep compared, after checking that all agreed.
fn agreed(end: &End) -> u64 {
    assert_eq!(end.code(), 0, "{}", end.messages);
    let verdict = end.messages.lines().find_map(|line| line.strip_prefix("lockstep: "));
    let verdict = verdict.unwrap_or_else(|| panic!("no verdict in: {}", end.messages));
    assert!(verdict.ends_with(" 0 differ"), "{}", end.messages);
    verdict.split_whitespace().next().and_then(|count| count.parse().ok()).unwrap()
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn the_interpreter_alone_boots_the_cloud_kernel_within_a_minute() {
    let mut session = Ospite::run().tier("interpreter").kernel(&cloud_kernel()).memory("512M").start();
    session.wait_for("ospite-init: ready ", 60);
    assert_eq!(session.end(60).code(), 0);
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn the_translator_agrees_with_the_interpreter_over_a_kernel_boot() {
    let session = Ospite::run().tier("lockstep").kernel(&cloud_kernel()).memory("512M").start();
    assert!(agreed(&session.end(300)) > 100_000);
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn the_translator_agrees_with_the_interpreter_over_a_debian_boot() {
    let dir = TempDir::new().unwrap();
    let disk: PathBuf = dir.path().join("debian.img");
    let copied =
        Command::new("cp").args(["--reflink=auto", "--sparse=always"]).arg(debian_disk()).arg(&disk).status();
    assert!(copied.unwrap().success());
    let ospite = Ospite::run().tier("lockstep").memory("1G").kernel(&debian_kernel()).disk(&disk);
    let mut shell = Shell::login(ospite.append("root=/dev/vda quiet").start());
    assert_eq!(shell.run("echo $((6 * 7))").trim(), "42");
    assert!(agreed(&shell.leave("poweroff").end(300)) > 500_000);
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn the_translator_agrees_with_the_interpreter_over_a_32_bit_program_with_floats() {
    let disk = format!("{},readonly,format=raw", programs_disk().display());
    let ospite = Ospite::run().tier("lockstep").memory("1G").kernel(&debian_kernel()).disk(disk);
    let mut shell = Shell::at_root(ospite.append("root=/dev/vda ro init=/bin/bash quiet").start());
    let program =
        "BEGIN { for (i = 0; i < 2000; i++) { s += i * 1.5 / 3; t += int(s / 7) % 11 }; print s, t }";
    assert_eq!(shell.run(&format!("busybox awk '{program}'")).trim(), "999500 9285");
    assert!(agreed(&shell.leave("poweroff -f").end(300)) > 100_000);
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn statistics_tell_where_the_time_went() {
    let run = |words: &[&str]| {
        let ospite = Ospite::run().tier("translator").kernel(&cloud_kernel()).memory("512M").arg("--stats");
        words.iter().fold(ospite, |ospite, word| ospite.arg(word)).start().end(120)
    };
    let text = run(&[]).messages;
    for part in ["translated code", "tlb misses", "fallbacks to the interpreter", "hit in", "devices"] {
        assert!(text.contains(part), "no {part} in: {text}");
    }
    let json = run(&["--output", "json"]).messages;
    for part in ["\"translated_code\"", "\"seconds\":", "\"lookups\":", "out to port 0x3f8"] {
        assert!(json.contains(part), "no {part} in: {json}");
    }
}

/// Seconds of vCPU time that the statistics give to a part.
fn seconds(end: &End, part: &str) -> f64 {
    let line = end.messages.lines().find(|line| line.ends_with(part));
    let line = line.unwrap_or_else(|| panic!("no {part} in: {}", end.messages));
    line.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap()
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn programs_that_compute_run_on_the_hosts_cpu() {
    let sum = "awk -v n=4000000 'BEGIN { for (i = 0; i < n; i++) s += i * 1.5 / 3; print s }'";
    let ospite = Ospite::run().kernel(&cloud_kernel()).memory("512M").cpus(2).arg("--stats");
    let mut session = ospite.guest_command(&format!("{sum} & {sum}; wait")).start();
    for _ in 0..2 {
        session.wait_for("3999999000000", 60); // n (n - 1) / 4
    }
    let end = session.end(60);
    assert_eq!(end.code(), 0, "{}", end.messages);
    let (native, translated) = (seconds(&end, "on the hosts cpu"), seconds(&end, "translated code"));
    assert!(native > translated / 2.0, "{native} s on the host's CPU, {translated} s translated");
}

/// A guest with a program that has been in a jail for some time.
fn computing() -> Session {
    let ospite = Ospite::run().kernel(&cloud_kernel()).memory("512M");
    let mut session = ospite.guest_command("echo computing; while :; do :; done").start();
    session.wait_for("computing", 60);
    std::thread::sleep(std::time::Duration::from_secs(1));
    session
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn a_vm_whose_jails_are_killed_ends_and_says_so() {
    let session = computing();
    let vm = session.id().to_string();
    let killed = Command::new("pkill").args(["-KILL", "-P", &vm, "guest-program"]).status();
    assert!(killed.unwrap().success(), "there are processes to kill");
    let end = session.end(60);
    assert_ne!(end.code(), 0);
    assert!(end.messages.contains("guest-program"), "{}", end.messages);
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn no_jail_is_left_of_a_vm_that_is_killed() {
    let session = computing();
    let vm = session.id().to_string();
    let jails = Command::new("pgrep").args(["-P", &vm, "guest-program"]).output().unwrap().stdout;
    let jails = String::from_utf8(jails).unwrap();
    assert!(!jails.is_empty(), "there are processes to be left");
    assert!(Command::new("kill").args(["-KILL", &vm]).status().unwrap().success());
    session.end(60);
    let is_there = |jail: &str| {
        let stat = std::fs::read_to_string(format!("/proc/{jail}/stat")).unwrap_or_default();
        stat.contains("guest-program") && !stat.contains(") Z ")
    };
    let deadline = std::time::Instant::now() + guest_tests::patience(5);
    while jails.lines().any(is_there) {
        assert!(std::time::Instant::now() < deadline, "left: {jails}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
