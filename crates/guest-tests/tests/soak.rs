//! Everything at once for long: stress-ng from Debian in a guest with two vCPUs, its checks on.

use guest_tests::artefacts::{debian_kernel, programs_disk};
use guest_tests::{Ospite, Shell};

const MIB: u64 = 1 << 20;
const GUEST: u64 = 768 * MIB;
const CPUS: u32 = 2;
/// All that ospite may have beside the guest's memory: what it remembers of the guest's code, as the engine states
/// it, and the program, its threads' stacks and its devices.
const BESIDE: u64 = CPUS as u64 * engine_soft::MEMORY_PER_VCPU as u64 + 128 * MIB;
/// What that may grow by in the second half of ten minutes, without guest memory and translated code, which are
/// as large as they are: what is full is full.
const GROWTH: u64 = 48 * MIB;

/// Computing, memory, processes, signals and faults, changing mappings and code, and a network on `lo`.
const STRESSORS: &str = "cpu matrix vm fork switch mmap mremap zlib qsort sigsegv sigfpe sigtrap futex pipe \
    tlb-shootdown icache mprotect vforkmany clone memcpy atomic timer sock userfaultfd funccall vecmath fp \
    opcode affinity str wcs hash crypt udp";
const OPTIONS: &str = "--vm-bytes 48M --mmap-bytes 24M --mremap-bytes 12M --verify --temp-path /tmp";

/// Some sixty processes share two vCPUs, which on a busy host get a small part of two cores: one may well wait
/// for half a minute. A stall or lockup is what lasts for minutes.
const PATIENT_KERNEL: &str =
    "rcupdate.rcu_cpu_stall_timeout=300 watchdog_thresh=60 sysctl.kernel.hung_task_timeout_secs=600";

/// Processes at a time. `vforkmany` makes as many as there is memory for, and the guest would be out of it.
const MOST_PROCESSES: &str = "sysctl.kernel.pid_max=4096";

/// What a kernel prints when something is wrong.
const ALARMS: &[&str] = &[
    "WARNING:",
    "BUG:",
    "Oops",
    "Call Trace",
    "lockup",
    "rcu: INFO",
    "stall",
    "hung",
    "MCE",
    "Out of memory",
];

#[test]
#[ignore = "boots a guest: make guest-test, or make soak for ten minutes of it"]
fn a_guest_under_every_kind_of_load_stays_sound_and_ospite_within_its_memory() {
    let seconds = std::env::var("OSPITE_SOAK").ok().and_then(|text| text.parse().ok()).unwrap_or(45);
    let disk = format!("{},readonly,format=raw", programs_disk().display());
    let ospite = Ospite::run().option("--engine", "soft").cpus(CPUS).memory("768M").kernel(&debian_kernel());
    let session = ospite
        .disk(disk)
        .append("root=/dev/vda ro init=/bin/bash quiet")
        .append(PATIENT_KERNEL)
        .append(MOST_PROCESSES)
        .start();
    let mut shell = Shell::at_root(session);
    shell.run("mount -t tmpfs none /tmp; mount -t tmpfs none /run; cd /tmp; ip link set lo up; dmesg -C");
    let stressors: String = STRESSORS.split_whitespace().map(|name| format!("--{name} 1 ")).collect();
    let mut sizes = Vec::new();
    let printed = shell.watch(
        &format!("stress-ng {stressors} {OPTIONS} --timeout {seconds} 2>&1; echo status $?"),
        seconds * 3 + 240,
        |session| sizes.push((session.resident(), session.anonymous())),
    );
    let half = sizes[sizes.len() / 2].1;
    let [most, own] = [|size: &(u64, u64)| size.0, |size: &(u64, u64)| size.1]
        .map(|part| sizes.iter().map(part).max().unwrap_or_default());
    println!(
        "resident: {} MiB at most; of ospite's own {} MiB at half time, {} MiB at most",
        most / MIB,
        half / MIB,
        own / MIB
    );
    assert!(printed.contains("status 0"), "{printed}");
    assert!(!printed.contains("fail:"), "{printed}");
    let messages = shell.run("dmesg");
    for alarm in ALARMS {
        assert!(!messages.contains(alarm), "{alarm} in:\n{messages}");
    }
    assert!(most > 100 * MIB && most <= GUEST + BESIDE, "{} MiB", most / MIB);
    assert!(seconds < 600 || own <= half + GROWTH, "from {} MiB to {} MiB", half / MIB, own / MIB);
    assert_eq!(shell.leave("poweroff -f").end(60).code(), 0);
}
