//! Real programs in a Debian guest: JITs, debuggers, 32-bit code, signals, programs that change themselves,
//! arithmetic of every kind. What they print is compared with what they print on the host, or with the
//! known answer.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use guest_tests::artefacts::{debian_kernel, programs_disk};
use guest_tests::{Ospite, Shell};
use tempfile::TempDir;

/// Our own programs, in `programs/`, and how each is compiled: statically, for both sides.
const OURS: &[(&str, &[&str])] = &[
    ("patch", &["-O2"]),
    ("signals", &["-O2"]),
    ("arithmetic", &["-O2", "-frounding-math"]),
    ("debuggee", &["-O0", "-g"]),
    ("thirty_two", &["-m32", "-O1", "-nostdlib", "-ffreestanding", "-fno-pic", "-fno-stack-protector"]),
];

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {text}", output.status);
    output
}

/// Our programs, compiled once, and on a disk for the guest.
struct Programs {
    dir: TempDir,
}

impl Programs {
    fn get() -> &'static Programs {
        static MADE: OnceLock<Programs> = OnceLock::new();
        MADE.get_or_init(Programs::make)
    }

    fn make() -> Programs {
        let programs = Programs { dir: TempDir::new().unwrap() };
        std::fs::create_dir(programs.folder()).unwrap();
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs");
        for &(name, options) in OURS {
            let mut compiler = Command::new("cc");
            compiler.args(["-static", "-w"]).args(options).arg("-o").arg(programs.file(name));
            compiler.arg(sources.join(name).with_extension("c"));
            if !options.contains(&"-nostdlib") {
                compiler.args(["-lm", "-lpthread"]);
            }
            run(&mut compiler);
        }
        let mut mke2fs = Command::new("/sbin/mke2fs");
        run(mke2fs.args(["-q", "-t", "ext4", "-d"]).arg(programs.folder()).arg(programs.disk()).arg("32M"));
        programs
    }

    fn folder(&self) -> PathBuf {
        self.dir.path().join("programs")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    fn disk(&self) -> PathBuf {
        self.dir.path().join("programs.img")
    }

    fn on_the_host(&self, name: &str) -> String {
        String::from_utf8(run(&mut Command::new(self.file(name))).stdout).unwrap().trim().into()
    }
}

/// A guest with nothing but a shell, and our programs in /mnt.
struct Guest(Shell);

impl Guest {
    fn boot(cpus: u32) -> Guest {
        let read_only = |path: &Path| format!("{},readonly,format=raw", path.display());
        let ospite = Ospite::run().cpus(cpus).memory("1G").kernel(&debian_kernel());
        let ospite = ospite.disk(read_only(&programs_disk())).disk(read_only(&Programs::get().disk()));
        let session = ospite.append("root=/dev/vda ro init=/bin/bash quiet").start();
        let mut shell = Shell::at_root(session);
        shell.run("mount -t tmpfs none /tmp; mount -t tmpfs none /run; mount -o ro /dev/vdb /mnt; cd /tmp");
        shell.run("ip link set lo up; export HOME=/tmp NO_COLOR=1");
        Guest(shell)
    }

    fn run(&mut self, command: &str) -> String {
        self.0.run_for(command, 300)
    }

    fn powers_off(self) {
        let end = self.0.leave("poweroff -f").end(60);
        assert_eq!(end.code(), 0, "{}", end.messages);
    }

    /// One of our programs prints here what it prints on the host.
    fn agrees(&mut self, name: &str) {
        let here = self.run(&format!("/mnt/{name}"));
        assert_eq!(here, Programs::get().on_the_host(name), "{name} in the guest, and on the host");
    }

    fn prints(&mut self, command: &str, words: &[&str]) {
        let printed = self.run(command);
        for word in words {
            assert!(printed.contains(word), "`{command}` does not print {word:?}, but:\n{printed}");
        }
    }
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn programs_may_change_their_own_code_from_any_thread_and_mapping() {
    let mut guest = Guest::boot(2);
    guest.agrees("patch");
    guest.powers_off();
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn signals_interrupt_system_calls_and_nothing_else() {
    let mut guest = Guest::boot(1);
    guest.agrees("signals");
    guest.powers_off();
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn arithmetic_is_the_hosts_to_the_last_bit() {
    let mut guest = Guest::boot(1);
    guest.agrees("arithmetic");
    // The same digests by code for wide vectors and by plain code, and by another program.
    guest.run("head -c 3000000 /mnt/arithmetic > data; head -c 3000000 /dev/urandom >> data");
    for digest in ["sha1", "sha256", "sha512", "md5"] {
        let wide = guest.run(&format!("openssl dgst -r -{digest} data | cut -d' ' -f1"));
        let plain = guest.run(&format!("OPENSSL_ia32cap=0:0 openssl dgst -r -{digest} data | cut -d' ' -f1"));
        let other = guest.run(&format!("{digest}sum data | cut -d' ' -f1"));
        assert_eq!((&wide, &plain), (&other, &other), "{digest}");
    }
    for cipher in ["aes-256-ctr", "aes-128-cbc", "chacha20"] {
        let sum = |guest: &mut Guest, variable: &str| {
            let key = "-K 000102030405060708090a0b0c0d0e0f -iv 00112233445566778899aabbccddeeff";
            guest.run(&format!("{variable} openssl enc -{cipher} {key} -in data 2>&1 | md5sum"))
        };
        assert_eq!(sum(&mut guest, ""), sum(&mut guest, "OPENSSL_ia32cap=0:0"), "{cipher}");
    }
    guest.prints("xz -1 -c data | xz -dc | cmp - data && echo same", &["same"]);
    guest.prints(
        "echo 'scale=60; 4*a(1)' | BC_LINE_LENGTH=0 bc -l",
        &["3.14159265358979323846264338327950288419716939937510582097494"],
    );
    guest.powers_off();
}

/// Euler's problem, a hash, n bodies (whose energies are well known), text: what just-in-time compilers
/// specialize, and what makes them take it back.
const SCRIPT: &str = "\
function primes(n) { const s = new Uint8Array(n + 1); let c = 0; for (let i = 2; i <= n; i++) { if (s[i]) \
continue; c++; for (let j = i * 2; j <= n; j += i) s[j] = 1; } return c; }\
function add(a, b) { return a + b; }\
let t = 0; for (let i = 0; i < 300000; i++) t = add(t, i);\
console.log(primes(1000000), t, add('a', 1), add(0.5, 0.25), add(1n << 70n, 1n));\
let h = 0; for (const c of JSON.stringify([...Array(20000).keys()]).replace(/(\\\\d)(\\\\d)/g, '$2$1')) \
h = (Math.imul(h, 31) + c.charCodeAt(0)) | 0;\
console.log(h, [3, 1, 2].sort((a, b) => a - b).join(''), Math.hypot(3, 4));\
let e = 0; for (let i = 0; i < 5000; i++) { try { null[i]; } catch (x) { e++; } } console.log(e);";

#[test]
#[ignore = "boots a guest: make guest-test"]
fn just_in_time_compilers_compute_what_they_should() {
    let mut guest = Guest::boot(2);
    guest.run(&format!("cat > t.js <<'END'\r{SCRIPT}\rEND"));
    let printed = guest.run("node t.js");
    assert_eq!(
        printed,
        guest.run("node --jitless t.js 2>&1 | grep -v ^Warning"),
        "compiled, and interpreted"
    );
    for word in ["78498 44999850000 a1 0.75 1180591620717411303425n", "123 5", "5000"] {
        assert!(printed.contains(word), "no {word} in {printed}");
    }
    let lua = "local function f(n) local s, x = 0, 1.0 for i = 1, n do s = (s * 31 + i) % 1000003 \
               x = x + 1 / (i * i) end return s, x end print(f(5000000)) \
               local t = {} for i = 1, 200000 do t[#t + 1] = (i * 7919) % 10007 end table.sort(t) \
               print(t[1], t[#t / 2], t[#t], (string.rep(\"ab\", 1000):gsub(\"b\", \"c\")):sub(-3))";
    let jit = guest.run(&format!("luajit -e '{lua}'"));
    assert_eq!(jit, guest.run(&format!("luajit -joff -e '{lua}'")));
    assert!(jit.contains("2.6449338668") && jit.contains("10006\tcac"), "{jit}");
    guest.powers_off();
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn gdb_sets_breakpoints_and_watchpoints_and_steps() {
    let mut guest = Guest::boot(1);
    let gdb = |commands: &[&str]| {
        let commands = commands.iter().map(|command| format!(" -ex '{command}'")).collect::<String>();
        format!("gdb -q -batch -nx{commands} /mnt/debuggee 2>&1")
    };
    guest.prints(
        &gdb(&["break work if n == 3", "run", "backtrace", "print total", "finish", "delete", "continue"]),
        &[
            "work (n=3)",
            "in main",
            "$1 = 3",
            "Value returned is $2 = 12",
            "sum 70, total 15",
            "exited with code 0106",
        ],
    );
    // The debug registers: a hardware watchpoint and a hardware breakpoint.
    guest.prints(
        &gdb(&[
            "break main",
            "run",
            "watch total",
            "continue",
            "continue",
            "hbreak work",
            "continue",
            "info breakpoints",
        ]),
        &[
            "Hardware watchpoint 2: total",
            "New value = 1",
            "New value = 3",
            "work (n=3)",
            "breakpoint already hit 2 times",
        ],
    );
    guest.prints(
        &gdb(&[
            "break work",
            "run",
            "stepi 3",
            "set $before = $pc",
            "stepi",
            "print $pc != $before",
            "next",
            "next",
            "print total",
            "disable",
            "print work(100)",
            "set var i = 4",
            "continue",
        ]),
        &["$1 = 1", "$2 = 1", "= 202", "sum 214, total 106"],
    );
    guest.prints(
        &gdb(&["starti", "stepi 1000", "print $pc > 0x400000", "continue"]),
        &["$1 = 1", "sum 70, total 15"],
    );
    guest.powers_off();
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn strace_sees_every_system_call() {
    let mut guest = Guest::boot(1);
    guest.prints(
        "strace -f -e trace=write,exit_group /mnt/debuggee 2>&1",
        &[
            "write(1, \"sum 70, total 15\\n\", 17",
            "write(1, \"bye\\n\", 4",
            "= 4",
            "exit_group(70)",
            "exited with 70",
        ],
    );
    guest.prints("strace -f -c sh -c 'for i in 1 2 3 4 5; do /bin/true; done' 2>&1", &["execve", "wait4"]);
    // 32-bit system calls are told apart.
    guest.prints("strace /mnt/thirty_two 2>&1 >/dev/null", &["32 bit mode", "modify_ldt(1, ", "exit(0)"]);
    // A system call changed by its tracer.
    guest.prints(
        "strace -e inject=write:retval=4 -o log /mnt/debuggee; echo status $?; cat log",
        &["status 70", "(INJECTED)"],
    );
    guest.powers_off();
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn thirty_two_bit_programs_run_beside_the_others() {
    let mut guest = Guest::boot(1);
    guest.agrees("thirty_two");
    // Debian's busybox for i386.
    guest.prints("od -An -j4 -N1 -t d1 $(readlink -f /bin/busybox)", &["1"]);
    guest.run("head -c 2000000 /dev/urandom > data");
    let theirs = guest.run("sha256sum < data; md5sum < data");
    assert_eq!(guest.run("busybox sha256sum < data; busybox md5sum < data"), theirs);
    guest.prints("busybox gzip -c data | gzip -dc | busybox cmp - data && echo same", &["same"]);
    guest.prints("busybox bzip2 -c data | bzip2 -dc | cmp - data && echo same", &["same"]);
    guest.prints(
        "busybox sh -c 'i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done; echo $i; uname -m'",
        &["20000", "x86_64"],
    );
    guest.powers_off();
}
