//! Images: built from Debian's packages, and what a VM on one is.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use guest_tests::artefacts::{self, guests};
use guest_tests::{Ospite, Shell};
use tempfile::TempDir;

/// The home of images that are kept between runs: what takes a minute to build is built when its recipe
/// has changed.
fn home() -> PathBuf {
    guests().join("images")
}

fn ospite(line: &[&str]) -> Output {
    let mut command = Command::new(artefacts::ospite());
    command.args(line).env("OSPITE_HOME", home()).stdin(Stdio::null());
    command.output().unwrap()
}

fn answer(line: &[&str]) -> String {
    let output = ospite(line);
    assert!(output.status.success(), "{line:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A text field of an answer in JSON.
fn field(json: &str, name: &str) -> String {
    let start = format!("\"{name}\": \"");
    let (_, rest) = json.split_once(&start).unwrap_or_else(|| panic!("no {name} in {json}"));
    rest.split_once('"').unwrap().0.into()
}

fn build() -> String {
    let note = "echo 'made by a recipe' > /etc/note";
    let options = ["--if-changed", "--autologin", "--size", "2G", "--hostname", "built", "--run", note];
    answer(&[["image", "build", "guest-test", "--json"].as_slice(), &options].concat())
}

fn check(image: &Path) {
    let output = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(image).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
#[ignore = "builds an image and boots it: make guest-test"]
fn a_built_image_boots_and_its_file_system_grows_to_the_disk() {
    let image = build();
    let folder = PathBuf::from(field(&image, "folder"));
    let base = folder.join("disk.qcow2");
    check(&base);
    let vm = TempDir::new().unwrap();
    let disk = vm.path().join("disk.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base.to_str().unwrap()];
    assert!(Command::new("qemu-img").args(create).arg(&disk).arg("5G").status().unwrap().success());

    let session = Ospite::run()
        .option("--kernel", folder.join("vmlinuz"))
        .option("--initrd", folder.join("initrd"))
        .disk(format!("{},base={}", disk.display(), base.display()))
        .append(&field(&image, "cmdline"))
        .start();
    let mut shell = Shell::at_prompt(session);
    assert_eq!(shell.run("cat /etc/note; hostname"), "made by a recipe\nbuilt");
    let size: u64 = shell.run("df --output=size -BM / | tail -n 1 | tr -dc 0-9").parse().unwrap();
    assert!((4600..5120).contains(&size), "{size} MiB");
    assert_eq!(shell.run("systemctl --failed --no-legend | wc -l"), "0");
    let end = shell.leave("poweroff").end(300);
    assert_eq!(end.code(), 0, "{}", end.messages);
    check(&disk);
    // The base is as it was.
    answer(&["image", "info", "guest-test", "--verify"]);
}

#[test]
#[ignore = "needs the release binary: make guest-test"]
fn what_cannot_be_built_says_why_and_leaves_nothing() {
    let home = TempDir::new().unwrap();
    let refused = |line: &[&str]| {
        let mut command = Command::new(artefacts::ospite());
        let output = command.args(line).env("OSPITE_HOME", home.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(4), "{line:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refused(&["image", "build", "x", "--package=--foo=1"]).contains("is no package"));
    assert!(refused(&["image", "build", "x", "--file", "/no/such:/x"]).contains("/no/such"));
    assert!(refused(&["image", "info", "x"]).contains("ospite image build x"));
    assert!(refused(&["image", "rm", "x"]).contains("no image x"));
    let nothing = std::fs::read_dir(home.path().join("images"));
    assert!(nothing.map_or(0, Iterator::count) <= 1, "only the lock");
}
