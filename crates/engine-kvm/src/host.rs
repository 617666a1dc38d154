//! Whether this host has hardware virtualization that we may use, and what would mend it.

use std::fs;
use std::io::{Error as IoError, ErrorKind};

use engine::Error;
use kvm_ioctls::{Cap, Kvm};

use crate::NAME;

/// The CPU's virtualization extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extension {
    /// Intel VT-x.
    Vmx,
    /// AMD-V.
    Svm,
}

impl Extension {
    /// The kernel module for it.
    pub fn module(self) -> &'static str {
        match self {
            Extension::Vmx => "kvm_intel",
            Extension::Svm => "kvm_amd",
        }
    }
}

/// The extension that the text of `/proc/cpuinfo` names. The kernel takes the flag away where firmware
/// has locked the feature.
pub fn extension(cpuinfo: &str) -> Option<Extension> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    flags.split_whitespace().find_map(|word| match word {
        "vmx" => Some(Extension::Vmx),
        "svm" => Some(Extension::Svm),
        _ => None,
    })
}

fn unavailable(why: impl Into<String>) -> Error {
    Error::Unavailable { engine: NAME, why: why.into() }
}

/// Refuses where nothing but software is behind `/dev/kvm`, or nothing at all.
pub(crate) fn require_hardware() -> Result<(), Error> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let there = fs::exists("/dev/kvm").unwrap_or(false);
    match (extension(&cpuinfo), there) {
        (Some(_), true) => Ok(()),
        (Some(extension), false) => Err(unavailable(format!(
            "there is no /dev/kvm, though the CPU could; `sudo modprobe {}` loads the module",
            extension.module()
        ))),
        (None, true) => Err(unavailable(
            "the CPU shows neither vmx nor svm, so there is no hardware behind /dev/kvm; use --engine soft",
        )),
        (None, false) => Err(unavailable(
            "the CPU shows neither vmx nor svm; enable virtualization in the firmware's setup, in a VM ask \
             its host for nested virtualization, or use --engine soft",
        )),
    }
}

/// What the engine cannot do without. All of it is older than Linux 4.12.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
];

/// Opens `/dev/kvm`.
pub(crate) fn open() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|errno| why_not_opened(&IoError::from_raw_os_error(errno.errno())))?;
    if kvm.get_api_version() != 12 {
        return Err(unavailable(format!("its API has version {}, not 12", kvm.get_api_version())));
    }
    match NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => {
            Err(unavailable(format!("the host's kernel does not offer {name}; Linux 4.12 and newer do")))
        }
        None => Ok(kvm),
    }
}

fn why_not_opened(error: &IoError) -> Error {
    unavailable(match error.kind() {
        ErrorKind::PermissionDenied => "/dev/kvm is not for this user; \
            `sudo usermod -aG kvm \"$USER\"` and a new login change that"
            .into(),
        ErrorKind::NotFound => "there is no /dev/kvm".into(),
        _ => format!("/dev/kvm cannot be opened: {error}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_flag_itself_counts() {
        let flags = |words: &str| format!("processor\t: 0\nflags\t\t: fpu {words} ht\nbugs\t\t: vmx\n");
        assert_eq!(extension(&flags("vmx")), Some(Extension::Vmx));
        assert_eq!(extension(&flags("svm npt")), Some(Extension::Svm));
        assert_eq!(extension(&flags("svm_lock vmx_flexpriority")), None);
        assert_eq!(extension(""), None);
    }

    #[test]
    fn a_refusal_names_the_command_that_mends_it() {
        let error = why_not_opened(&ErrorKind::PermissionDenied.into()).to_string();
        assert!(error.contains("usermod -aG kvm"), "{error}");
    }
}
