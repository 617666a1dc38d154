//! Hardware virtualization: whether the CPU has it, and whether the kernel lets us at it.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind};

use super::host::Host;
use super::{Check, Verdict};

/// The CPU flag and the module that goes with it.
fn extension(host: &Host) -> Option<(&'static str, &'static str)> {
    let cpuinfo = host.read("proc/cpuinfo");
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    let mut words = flags.split_whitespace();
    words.find_map(|word| match word {
        "vmx" => Some(("Intel VT-x (vmx)", "kvm_intel")),
        "svm" => Some(("AMD-V (svm)", "kvm_amd")),
        _ => None,
    })
}

/// The CPU says that it is a virtual one itself.
fn is_vm(host: &Host) -> bool {
    let cpuinfo = host.read("proc/cpuinfo");
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    flags.split_whitespace().any(|word| word == "hypervisor")
}

/// For the host of this VM, by the maker of its CPU.
fn allow_nesting(host: &Host) -> &'static str {
    if host.read("proc/cpuinfo").contains("GenuineIntel") {
        "sudo modprobe -r kvm_intel; sudo modprobe kvm_intel nested=1    (on this VM's host; give the VM its CPU)"
    } else {
        "sudo modprobe -r kvm_amd; sudo modprobe kvm_amd nested=1    (on this VM's host; give the VM its CPU)"
    }
}

/// Whether the CPU can run guests by itself.
pub fn hardware(host: &Host) -> Check {
    let none = |text: &str| {
        let text = format!("none: the CPU shows neither vmx nor svm{text}");
        let check = Check::new("hardware virtualization", Verdict::Note, text);
        if is_vm(host) { check.mend(allow_nesting(host)) } else { check }
    };
    match extension(host) {
        Some((name, _)) => Check::new("hardware virtualization", Verdict::Good, name),
        None if host.path("dev/kvm").exists() => {
            none(", so the /dev/kvm here emulates and is slow; not for auto")
        }
        None if is_vm(host) => none("; this is a VM whose host does not pass it on"),
        None => none("; enable it in the firmware's setup"),
    }
}

/// Whether we may use it.
pub fn device(host: &Host) -> Check {
    let path = host.path("dev/kvm");
    opened(host, OpenOptions::new().read(true).write(true).open(&path).map(drop))
}

fn opened(host: &Host, outcome: io::Result<()>) -> Check {
    match outcome {
        Ok(()) => Check::new("/dev/kvm", Verdict::Good, "may be opened"),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            Check::new("/dev/kvm", Verdict::Note, "there, but not for this user")
                .mend("sudo usermod -aG kvm \"$USER\", then log in again")
        }
        Err(error) if error.kind() == ErrorKind::NotFound => absent(host),
        Err(error) => Check::new("/dev/kvm", Verdict::Note, format!("cannot be opened: {error}")),
    }
}

fn absent(host: &Host) -> Check {
    match extension(host) {
        Some((_, module)) => Check::new("/dev/kvm", Verdict::Note, "not there, though the CPU could")
            .mend(format!("sudo modprobe {module}")),
        None => Check::new("/dev/kvm", Verdict::Note, "not there"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn host(flags: &str, device: bool) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("proc")).unwrap();
        fs::create_dir(dir.path().join("dev")).unwrap();
        fs::write(dir.path().join("proc/cpuinfo"), format!("flags\t\t: fpu {flags} ht\n")).unwrap();
        if device {
            fs::write(dir.path().join("dev/kvm"), "").unwrap();
        }
        let host = Host::new(dir.path());
        (dir, host)
    }

    #[test]
    fn a_device_without_the_cpu_flag_is_not_hardware_virtualization() {
        let (_dir, host) = host("sse2", true);
        let check = hardware(&host);
        assert_eq!(check.verdict, Verdict::Note);
        assert!(check.finding.contains("emulates"), "{}", check.finding);
    }

    #[test]
    fn a_vm_is_told_what_its_host_must_do() {
        let (_dir, host) = host("hypervisor", false);
        let check = hardware(&host);
        assert!(check.finding.contains("this is a VM"), "{}", check.finding);
        assert!(check.mend.unwrap().contains("nested=1"));
    }

    #[test]
    fn a_cpu_that_could_is_told_which_module_it_lacks() {
        let (_dir, host) = host("svm", false);
        assert_eq!(hardware(&host).verdict, Verdict::Good);
        assert_eq!(device(&host).mend.as_deref(), Some("sudo modprobe kvm_amd"));
    }

    #[test]
    fn a_flag_that_only_looks_similar_does_not_count() {
        let (_dir, host) = host("svm_lock", false);
        assert_eq!(hardware(&host).verdict, Verdict::Note);
        assert_eq!(device(&host).mend, None);
    }

    #[test]
    fn a_user_who_may_not_is_told_the_group() {
        let (_dir, host) = host("vmx", true);
        assert_eq!(device(&host).finding, "may be opened");
        let check = opened(&host, Err(ErrorKind::PermissionDenied.into()));
        assert_eq!((check.verdict, check.finding.as_str()), (Verdict::Note, "there, but not for this user"));
        assert_eq!(check.mend.as_deref(), Some("sudo usermod -aG kvm \"$USER\", then log in again"));
        let check = opened(&host, Err(io::Error::from_raw_os_error(16)));
        assert!(check.finding.contains("cannot be opened: ") && check.mend.is_none(), "{}", check.finding);
    }

    #[test]
    fn a_machine_of_metal_is_sent_to_its_firmware_and_a_vm_of_intel_to_the_right_module() {
        let (dir, host) = host("sse2", false);
        let check = hardware(&host);
        assert!(check.finding.contains("enable it in the firmware's setup") && check.mend.is_none());
        let intel = "vendor_id\t: GenuineIntel\nflags\t\t: fpu hypervisor ht\n";
        fs::write(dir.path().join("proc/cpuinfo"), intel).unwrap();
        let check = hardware(&host);
        assert!(check.mend.unwrap().contains("sudo modprobe kvm_intel nested=1"));
    }
}
