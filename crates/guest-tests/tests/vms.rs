//! VMs that last: a life from `create` to `rm`, and what happens when its processes die.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use guest_tests::artefacts::{self, cloud_kernel};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const WRONG_STATE: i32 = 16;

/// A home of its own, with nothing in it. Whatever still runs in it is killed at the end.
struct Home(TempDir);

impl Home {
    fn new() -> Home {
        Home(TempDir::new().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(artefacts::ospite());
        command.args(line.split_whitespace()).env("OSPITE_HOME", self.path("home"));
        command
    }

    fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    /// Does what must work; what it prints.
    fn ospite(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(output.status.success(), "{line}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What cannot work: the exit code, and what it says.
    fn refused(&self, line: &str) -> (i32, String) {
        let output = self.run(line);
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    }

    /// Creates a VM whose guest does `script` with /dev/vda, and then has a shell.
    fn create(&self, name: &str, options: &str, script: &str) {
        let kernel = cloud_kernel();
        let append = format!(
            "console=ttyS0 ospite.modules=virtio_pci,virtio_blk ospite.shell ospite.run=\"{script}\""
        );
        let mut command = self.command(&format!("create {name} -m 256M --network none {options}"));
        command.arg("--kernel").arg(kernel.vmlinuz).arg("--initrd").arg(kernel.initrd);
        let output = command.arg("--append").arg(append).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    /// A field of `info --json`, as text.
    fn info(&self, name: &str, field: &str) -> String {
        let text = self.ospite(&format!("info {name} --json"));
        let key = format!("\"{field}\": ");
        let line = text.lines().find_map(|line| line.trim().strip_prefix(&key));
        line.unwrap_or_else(|| panic!("no {field} in {text}")).trim_matches(|c| "\",".contains(c)).into()
    }

    fn until(&self, what: &str, done: impl Fn() -> bool) {
        let begun = Instant::now();
        while !done() {
            assert!(begun.elapsed() < Duration::from_secs(120), "{what}: {}", self.ospite("list"));
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn wait_for(&self, name: &str, text: &str) {
        self.until(text, || self.ospite(&format!("logs {name}")).contains(text));
    }

    fn kill(&self, name: &str, which: &str) {
        let pid = self.info(name, which).parse().ok().and_then(Pid::from_raw).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = self.run("rm --force --all");
    }
}

fn disk(path: &Path) {
    fs::File::create(path).unwrap().set_len(1 << 20).unwrap();
}

/// Counts its starts on the disk: the number is read, raised, and on the disk before it is printed.
const COUNT: &str = "n=$(head -c 8 /dev/vda | tr -dc 0-9); n=$((n + 1)); \
    printf $n | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null; echo this is start $n";

#[test]
#[ignore = "boots a guest: make guest-test"]
fn a_vm_lives_from_create_to_rm_and_its_data_with_it() {
    let home = Home::new();
    disk(&home.path("data.raw"));
    let options = format!("--restart on-failure -d {},format=raw", home.path("data.raw").display());
    home.create("web", &options, COUNT);
    assert_eq!(home.info("web", "state"), "off");
    assert_eq!(home.refused("create web --kernel /dev/null").0, WRONG_STATE);
    home.ospite("start web");
    assert_eq!(home.info("web", "state"), "running");
    home.wait_for("web", "this is start 1");
    let (code, said) = home.refused("start web");
    assert!(code == WRONG_STATE && said.contains("running already"), "{said}");
    let (code, said) = home.refused("stop wep");
    assert!(code == WRONG_STATE && said.contains("did you mean `web`"), "{said}");

    // This guest does not listen to its power button.
    let begun = Instant::now();
    assert!(home.ospite("stop web --timeout 1").contains("power cut"));
    assert!(begun.elapsed() < Duration::from_secs(20));
    assert_eq!(home.info("web", "state"), "off");
    assert_eq!(home.refused("stop web").0, WRONG_STATE);

    home.ospite("start web");
    home.wait_for("web", "this is start 2");
    home.kill("web", "pid");
    home.wait_for("web", "this is start 3");
    assert_eq!(home.info("web", "restarts"), "1");
    // Without its keeper it runs on, and can still be stopped.
    home.kill("web", "keeper");
    assert_eq!(home.info("web", "state"), "running");
    assert_eq!(home.refused("rm web").0, WRONG_STATE);
    home.ospite("kill web");
    home.ospite("rm web");
    assert_eq!(home.ospite("list --json").trim(), "[]");
    assert_eq!(fs::read_dir(home.path("home/vms")).unwrap().count(), 1, "only the lock");
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn the_console_is_shared_and_the_guest_ends_it() {
    use std::io::Write;
    use std::process::Stdio;
    let home = Home::new();
    home.create("web", "", "true");
    home.ospite("start web");
    home.wait_for("web", "/ # ");
    let console = |typed: &[u8]| {
        let mut command = home.command("console web");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(typed).unwrap();
        child
    };
    let watching = console(b"");
    thread::sleep(Duration::from_secs(1));
    let typing = console(b"echo $((6 * 7))-fold; exit\r");
    for console in [watching, typing] {
        let output = console.wait_with_output().unwrap();
        let seen = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && seen.contains("42-fold"), "{output:?}");
    }
    home.until("it is off", || home.info("web", "state") == "off");
    assert!(home.ospite("info web").contains("the guest powered itself off"));
    assert!(home.ospite("logs web --tail 30").contains("42-fold"));
}

/// What bash offers for the last of `words`.
fn bash_offers(home: &Home, words: &str) -> String {
    let script = format!(
        "source <(ospite completions bash); COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
         COMP_TYPE=9; _clap_complete_ospite ospite \"${{COMP_WORDS[-1]}}\" \"${{COMP_WORDS[-2]}}\"; \
         echo \"${{COMPREPLY[*]}}\""
    );
    let bin = home.path("bin");
    fs::create_dir_all(&bin).unwrap();
    // OSPITE may name a program that is called otherwise.
    let _ = std::os::unix::fs::symlink(artefacts::ospite().canonicalize().unwrap(), bin.join("ospite"));
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let mut bash = Command::new("bash");
    bash.args(["-c", &script]).env("PATH", path).env("OSPITE_HOME", home.path("home"));
    String::from_utf8(bash.output().unwrap().stdout).unwrap().trim().into()
}

#[test]
#[ignore = "needs the release binary: make guest-test"]
fn bash_completes_the_names_of_vms() {
    let home = Home::new();
    for name in ["web", "mail", "mirror"] {
        home.ospite(&format!("create {name} --kernel /dev/null"));
    }
    assert_eq!(bash_offers(&home, "ospite sta"), "start");
    assert_eq!(bash_offers(&home, "ospite start w"), "web");
    assert_eq!(bash_offers(&home, "ospite console m"), "mail mirror");
    assert_eq!(bash_offers(&home, "ospite run mi"), "mirror");
    assert_eq!(bash_offers(&home, "ospite cp mi"), "mirror:");
    home.ospite("rm mirror");
    assert_eq!(bash_offers(&home, "ospite console m"), "mail");
}

#[test]
#[ignore = "needs the release binary: make guest-test"]
fn bash_completes_the_names_of_images() {
    let home = Home::new();
    disk(&home.path("disk.raw"));
    for name in ["debian", "web-image"] {
        let import = format!(
            "image import {name} {} --kernel /etc/hostname --append root=/dev/vda",
            home.path("disk.raw").display()
        );
        home.ospite(&import);
    }
    assert_eq!(bash_offers(&home, "ospite image rm d"), "debian");
    assert_eq!(bash_offers(&home, "ospite image export w"), "web-image");
    assert_eq!(bash_offers(&home, "ospite create x --image w"), "web-image");
    assert!(bash_offers(&home, "ospite image info \"\"").starts_with("debian web-image --"));
}

#[test]
#[ignore = "needs the release binary: make guest-test"]
fn a_vm_that_cannot_start_says_why_and_does_not_try_again() {
    let home = Home::new();
    fs::write(home.path("vmlinuz"), "no kernel").unwrap();
    home.ospite(&format!("create web --restart always --kernel {}", home.path("vmlinuz").display()));
    let (code, said) = home.refused("start web");
    assert!(code == 4 && said.contains("cannot start web") && said.contains("is no kernel"), "{said}");
    home.until("it is off", || home.info("web", "state") == "failed");
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn a_guest_is_told_the_same_by_its_seed_at_each_start() {
    let home = Home::new();
    fs::write(home.path("user-data"), "#cloud-config\nhostname: told\n").unwrap();
    let (code, said) = home.refused("create web --kernel /dev/null --cloud-init /dev/null");
    assert!(code == 4 && said.contains("empty"), "{said}");
    let options = format!("--cloud-init {}", home.path("user-data").display());
    home.create("web", &options, "strings /dev/vda | grep -e instance -e hostname");
    let told = || {
        home.ospite("start web");
        home.wait_for("web", "hostname: told");
        let log = home.ospite("logs web");
        home.ospite("kill web");
        let line = |word| log.lines().rev().find(|line| line.contains(word)).unwrap().trim().to_owned();
        (line("instance-id"), line("local-hostname"))
    };
    let (instance, host) = told();
    assert!(
        instance.starts_with("instance-id: \"web-") && host == "local-hostname: \"web\"",
        "{instance} {host}"
    );
    assert_eq!(told().0, instance);
}

/// Gives a VM that is off a health check that cannot pass.
fn make_ill(home: &Home, name: &str, on_failure: &str) {
    let path = home.path(&format!("home/vms/{name}/vm.json"));
    let check = format!(
        r#""health": {{ "probe": {{ "tcp": 80 }}, "interval": 1, "timeout": 1, "retries": 2,
            "start_period": 0, "on_failure": "{on_failure}" }}"#
    );
    let text = fs::read_to_string(&path).unwrap().replace("\"health\": null", &check);
    assert!(text.contains("retries"), "{text}");
    fs::write(path, text).unwrap();
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn an_unhealthy_vm_is_told_and_restarted_if_that_is_wanted() {
    let home = Home::new();
    home.create("ill", "--restart on-failure", "true");
    home.create("worse", "--stop-timeout 1 --restart on-failure", "true");
    make_ill(&home, "ill", "none");
    make_ill(&home, "worse", "restart");
    home.ospite("start ill worse");
    home.until("it comes back", || home.info("worse", "restarts") != "0");
    home.until("it is ill", || home.info("ill", "state") == "unhealthy");
    assert_eq!(
        (home.info("ill", "restarts"), home.info("ill", "reason")),
        ("0".into(), "port 80 is not published".into())
    );
    assert!(home.ospite("info worse").contains("it was unhealthy"));
    assert!(home.ospite("logs ill --messages").contains("ill is unhealthy: port 80"));
    // Whoever switches them off, in whatever they are, finds them off.
    home.until("it rests", || home.info("worse", "state") == "restarting");
    home.ospite("kill worse ill");
    assert_eq!((home.info("worse", "state"), home.info("ill", "state")), ("off".into(), "off".into()));
    home.ospite("start worse");
    home.until("it is powered off", || home.ospite("logs worse --messages").ends_with("is cut in 1 s\n"));
    home.ospite("kill worse");
    assert_eq!(home.info("worse", "state"), "off");
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn what_ran_when_the_host_went_down_comes_back_with_it_and_nothing_else() {
    let home = Home::new();
    for (name, policy) in [("web", "on-failure"), ("stopped", "always"), ("plain", "no"), ("never", "always")]
    {
        home.create(name, &format!("--restart {policy}"), "true");
    }
    home.ospite("start web stopped plain");
    home.ospite("kill stopped");
    for name in ["web", "plain"] {
        home.kill(name, "keeper");
        home.kill(name, "pid");
        home.until("it is off", || ["off", "failed"].contains(&&*home.info(name, "state")));
    }
    assert_eq!(home.ospite("autostart"), "web: started\n");
    assert_eq!(home.ospite("autostart"), "");
    assert!(home.ospite("autostart --unit").contains("ExecStart="));
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn a_vms_process_has_given_up_what_it_does_not_need() {
    let home = Home::new();
    home.create("web", "-c 2", "true");
    home.ospite("start web");
    home.wait_for("web", "/ # ");
    let tasks = format!("/proc/{}/task", home.info("web", "pid"));
    let tasks: Vec<_> = fs::read_dir(tasks).unwrap().map(|task| task.unwrap().path()).collect();
    assert!(tasks.len() > 4, "{tasks:?}");
    for task in tasks {
        let status = fs::read_to_string(task.join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim_start_matches(':').trim().to_owned()
        };
        let name = field("Name");
        assert_eq!((field("NoNewPrivs").as_str(), field("Seccomp").as_str()), ("1", "2"), "{name}");
        // CAP_DAC_OVERRIDE, for root's VMs on disks of others.
        assert_eq!(u64::from_str_radix(&field("CapPrm"), 16).unwrap() & !2, 0, "{name}");
    }
    let messages = home.ospite("logs web --messages");
    assert!(!messages.contains("refused"), "{messages}");
}
