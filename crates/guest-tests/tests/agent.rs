//! Commands and files through the guest agent: what a user of `exec` and `cp` sees.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use guest_tests::artefacts::{debian_disk, debian_kernel, ospite};
use guest_tests::{Ospite, Session};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A Debian that boots, and the socket of its agent.
struct Guest {
    session: Session,
    dir: TempDir,
}

impl Guest {
    fn boot() -> Guest {
        let dir = TempDir::new().unwrap();
        let disk = dir.path().join("debian.img");
        let copied = Command::new("cp").arg("--sparse=always").arg(debian_disk()).arg(&disk).status();
        assert!(copied.unwrap().success());
        let socket = dir.path().join("agent");
        let ospite = Ospite::run().memory("512M").kernel(&debian_kernel()).disk(&disk);
        let ospite = ospite.append("root=/dev/vda quiet").option("--agent-socket", &socket);
        let session = ospite.start();
        while UnixStream::connect(&socket).is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
        Guest { session, dir }
    }

    fn socket(&self) -> String {
        self.dir.path().join("agent").display().to_string()
    }

    fn host(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn start(&self, options: &[&str], command: &[&str]) -> Child {
        let mut exec = Command::new(ospite());
        exec.args(["exec", "--wait", "300"]).args(options).arg(self.socket()).arg("--").args(command);
        exec.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn exec(&self, options: &[&str], command: &[&str], input: &[u8]) -> (i32, String, String) {
        let mut child = self.start(options, command);
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let typist = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let output = child.wait_with_output().unwrap();
        typist.join().unwrap();
        (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
    }

    fn sh(&self, script: &str) -> (i32, String, String) {
        self.exec(&[], &["sh", "-c", script], b"")
    }

    fn cp(&self, from: &str, to: &str) -> Output {
        Command::new(ospite()).args(["cp", "--output", "json", from, to]).output().unwrap()
    }

    fn powers_off(self) {
        self.session.signal(Signal::TERM);
        assert_eq!(self.session.end(300).code(), 0);
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn a_command_in_the_guest_is_like_one_here() {
    let guest = Guest::boot();
    assert_eq!(guest.sh("echo out; echo err >&2; exit 7"), (7, "out\n".into(), "err\n".into()));
    assert_eq!(guest.sh("kill -9 $$").0, 137);
    let environment = guest.exec(
        &["-u", "nobody", "-e", "A=b c", "-w", "/tmp"],
        &["sh", "-c", "id -un; pwd; echo \"$A\" \"$0\"", "x  y"],
        b"",
    );
    assert_eq!(environment.1, "nobody\n/tmp\nb c x  y\n");
    let (code, _, words) = guest.sh("exec nonsuch");
    assert!(code == 127 && words.contains("nonsuch"), "{code} {words}");

    // Streams: input to its end, output as it comes, both at once, much more than any buffer.
    let bytes: Vec<u8> = (0..3_000_000u32).map(|i| b'a' + (i % 23) as u8).collect();
    assert!(guest.exec(&[], &["cat"], &bytes).1.as_bytes() == bytes);
    assert_eq!(guest.exec(&[], &["true"], &bytes).0, 0, "nobody reads the input");
    let started = Instant::now();
    let background = guest.sh("sleep 60 & echo started");
    assert_eq!((background.0, background.1.as_str()), (0, "started\n"));
    assert!(started.elapsed() < Duration::from_secs(30), "what stays in the background is not waited for");

    // Several at once, more than there are ports for; and one whose reader leaves early.
    let many: Vec<Child> =
        (0..8).map(|i| guest.start(&["-n"], &["sh", "-c", &format!("sleep 0.3; echo {i}")])).collect();
    for (i, child) in many.into_iter().enumerate() {
        assert_eq!(text(&child.wait_with_output().unwrap().stdout), format!("{i}\n"));
    }
    let mut endless = guest.start(&["-n"], &["yes"]);
    drop(endless.stdout.take());
    assert_ne!(endless.wait().unwrap().code(), Some(0));

    // Ctrl-C here interrupts it there.
    let mut sleeper = guest.start(&["-n"], &["sh", "-c", "echo ready; sleep 321"]);
    let mut ready = [0; 6];
    std::io::Read::read_exact(&mut sleeper.stdout.take().unwrap(), &mut ready).unwrap();
    kill_process(Pid::from_raw(sleeper.id() as i32).unwrap(), Signal::INT).unwrap();
    assert_eq!(sleeper.wait().unwrap().code(), Some(130));
    assert_eq!(guest.sh("pgrep -f 'sleep [3]21'").0, 1);
    assert_eq!(guest.sh("ls /run | grep -c ospite-exec").1, "1\n", "nothing is left behind but this one");
    guest.powers_off();
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn files_and_folders_go_there_and_back() {
    let guest = Guest::boot();
    let from = guest.host("from");
    fs::create_dir_all(from.join("sub/empty")).unwrap();
    fs::write(from.join("sub/data"), vec![7; 5_000_000]).unwrap();
    fs::set_permissions(from.join("sub/data"), fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::symlink("nowhere", from.join("link")).unwrap();
    guest.sh("true"); // has booted
    let there = format!("{}:/root", guest.socket());
    let copied = guest.cp(&from.display().to_string(), &there);
    assert!(copied.status.success(), "{}", text(&copied.stderr));
    assert!(text(&copied.stdout).contains("\"bytes\": 5000000"), "{}", text(&copied.stdout));
    let seen =
        guest.sh("cd /root/from && stat -c '%n %F %a %U %s' sub/data && readlink link && ls -d sub/empty");
    assert_eq!(seen.1, "sub/data regular file 640 root 5000000\nnowhere\nsub/empty\n");

    let back = guest.host("back");
    assert!(guest.cp(&format!("{there}/from"), &back.display().to_string()).status.success());
    assert_eq!(fs::read(back.join("sub/data")).unwrap(), vec![7; 5_000_000]);
    assert_eq!(fs::metadata(back.join("sub/data")).unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(fs::read_link(back.join("link")).unwrap(), Path::new("nowhere"));

    for (from, to) in [("nonsuch", "x"), ("from/sub/data", "/nonexistent/x")] {
        let failed = guest.cp(&format!("{there}/{from}"), &guest.host(to).display().to_string());
        assert!(!failed.status.success() && text(&failed.stderr).lines().count() == 1, "{failed:?}");
    }
    guest.powers_off();
}
