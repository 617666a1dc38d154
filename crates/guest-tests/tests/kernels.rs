//! Debian's stock kernels boot to an init and power off.

use guest_tests::artefacts::{Kernel, cloud_kernel, generic_kernel};
use guest_tests::{End, Ospite};

/// Boots to the initramfs' report, powers off; the number that follows `NAME=` in it.
fn boot(kernel: &Kernel, cpus: u32, memory: &str) -> impl Fn(&str) -> u64 + use<> {
    let mut session = Ospite::run().kernel(kernel).cpus(cpus).memory(memory).start();
    session.wait_for("ospite-init: ready ", 240);
    let report = session.wait_for("\n", 10);
    assert_eq!(session.end(60).code(), 0);
    move |name| {
        let word = report.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        let number = word.unwrap_or_else(|| panic!("no {name} in {report}"));
        let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap()
    }
}

fn powers_off(end: End) -> String {
    assert_eq!(end.code(), 0, "{}", end.messages);
    end.console
}

const MIB: u64 = 1024; // in the guest's kilobytes

#[test]
#[ignore = "boots a guest: make guest-test"]
fn boots_the_cloud_kernel_with_1_cpu_and_256_mib_within_a_minute() {
    let report = boot(&cloud_kernel(), 1, "256M");
    assert_eq!(report("nproc"), 1);
    assert!((150 * MIB..256 * MIB).contains(&report("MemTotal")));
    assert!(report("uptime") < 60);
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn boots_the_cloud_kernel_with_4_cpus_and_6_gib() {
    let report = boot(&cloud_kernel(), 4, "6G");
    assert_eq!(report("nproc"), 4);
    assert!((5600 * MIB..6144 * MIB).contains(&report("MemTotal")), "memory above the hole counts");
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn boots_the_generic_kernel_with_1_cpu_and_6_gib() {
    let report = boot(&generic_kernel(), 1, "6G");
    assert_eq!(report("nproc"), 1);
    assert!((5600 * MIB..6144 * MIB).contains(&report("MemTotal")));
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn boots_the_generic_kernel_with_4_cpus_and_256_mib() {
    let report = boot(&generic_kernel(), 4, "256M");
    assert_eq!(report("nproc"), 4);
    assert!((130 * MIB..256 * MIB).contains(&report("MemTotal")));
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn linux_sees_the_hpet_that_was_asked_for_and_keeps_its_own_clock() {
    let clocks = "/sys/devices/system/clocksource/clocksource0";
    let look = format!(
        "cd {clocks}; echo offers: $(cat available_clocksource); echo takes: $(cat current_clocksource); \
         dmesg | grep hpet; echo hpet > current_clocksource; sleep 1; echo then: $(cat current_clocksource)"
    );
    let boot = |words: &str| {
        let guest = Ospite::run().kernel(&cloud_kernel()).append(words).guest_command(&look);
        powers_off(guest.arg("--hpet").start().end(240))
    };
    let seen = boot("quiet");
    for part in ["kvm-clock hpet acpi_pm", "takes: tsc", "3 comparators, 64-bit 100.000000 MHz", "then: hpet"]
    {
        assert!(seen.contains(part), "no {part} in:\n{seen}");
    }
    assert!(!seen.contains("BUG") && !seen.contains("WARN"), "{seen}");
    // And one that has no other timer, and no I/O APIC to route it.
    let seen = boot("quiet nolapic noapic");
    assert!(seen.contains("then: hpet"), "{seen}");
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn the_end_of_standard_input_ends_nothing() {
    let mut session = Ospite::run().kernel(&cloud_kernel()).guest_command("echo still here").start();
    session.close_keyboard();
    assert!(powers_off(session.end(240)).contains("still here"));
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn what_is_typed_reaches_the_guest() {
    let mut session = Ospite::run().kernel(&cloud_kernel()).append("ospite.shell").start();
    session.wait_for("# ", 240);
    session.type_line("echo $((6 * 7))-fold");
    session.wait_for("42-fold", 60);
    session.type_line("exit");
    powers_off(session.end(60));
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn the_debug_exit_port_sets_the_exit_code() {
    let write = "printf '\\020' | dd of=/dev/port bs=1 seek=244"; // 16 to port 0xf4
    let session = Ospite::run().kernel(&generic_kernel()).guest_command(write).start();
    assert_eq!(session.end(240).code(), 16 << 1 | 1);
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn a_triple_fault_with_no_reboot_ends_the_vm_with_a_message() {
    let ospite = Ospite::run().kernel(&cloud_kernel()).append("reboot=triple").guest_command("reboot -f");
    let end = ospite.arg("--no-reboot").start().end(240);
    assert_eq!(end.code(), 10);
    assert!(end.messages.contains("triple-faulted on vCPU 0"), "{}", end.messages);
}

#[test]
#[ignore = "boots a guest: make guest-test"]
fn a_reboot_boots_again_and_with_no_reboot_ends_the_vm() {
    let ospite = Ospite::run().kernel(&cloud_kernel()).guest_command("reboot -f");
    let mut session = ospite.start();
    session.wait_for("ospite-init: ready ", 240);
    session.wait_for("Linux version", 60);
    session.wait_for("ospite-init: ready ", 240);
    drop(session);
    assert_eq!(ospite.arg("--no-reboot").start().end(240).code(), 12);
}
