//! The console on a terminal: raw while the guest runs, and never left raw.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use guest_tests::artefacts::cloud_kernel;
use guest_tests::{Ospite, Session};
use rustix::process::Signal;
use rustix::termios::{LocalModes, Termios, tcgetattr};

fn start() -> (Session, File, Termios) {
    let ospite = Ospite::run().kernel(&cloud_kernel()).append("ospite.shell");
    let (mut session, terminal) = ospite.start_on_terminal().unwrap();
    let before = tcgetattr(&terminal).unwrap();
    session.wait_for("Ctrl-] opens the menu", 60);
    session.wait_for("# ", 240);
    assert!(!tcgetattr(&terminal).unwrap().local_modes.contains(LocalModes::ICANON), "raw");
    (session, terminal, before)
}

fn is_as_before(terminal: &File, before: &Termios) {
    let after = tcgetattr(terminal).unwrap();
    assert_eq!(after.local_modes, before.local_modes);
    assert_eq!(after.input_modes, before.input_modes);
    assert_eq!(after.output_modes, before.output_modes);
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn ctrl_c_goes_to_the_guest_and_the_menu_cuts_the_power() {
    let (mut session, terminal, before) = start();
    session.type_line("sleep 1000");
    std::thread::sleep(Duration::from_secs(2));
    session.send(b"\x03");
    session.type_line("echo status-$?");
    session.wait_for("status-130", 60);
    session.send(b"\x1di");
    session.wait_for("running, started", 10);
    session.send(b"\x1dz");
    session.wait_for("paused, started", 10);
    session.send(b"\x1dz");
    session.wait_for("running, started", 10);
    session.send(b"\x1dq");
    assert_eq!(session.end(30).code(), 14);
    is_as_before(&terminal, &before);
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn signals_leave_the_terminal_as_it_was() {
    let (session, terminal, before) = start();
    let started = Instant::now();
    // This guest does not listen to its power button: the second signal cuts.
    session.signal(Signal::TERM);
    std::thread::sleep(Duration::from_secs(1));
    session.signal(Signal::TERM);
    let end = session.end(30);
    assert_eq!(end.status.signal(), Some(15), "{end:?}");
    assert!(started.elapsed() < Duration::from_secs(30));
    is_as_before(&terminal, &before);
}
