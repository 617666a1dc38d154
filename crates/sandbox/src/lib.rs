//! What a process gives up before it touches what others have made.
//!
//! [`confine`] takes away the file system (Landlock), privileges (capabilities, and set-uid programs), core
//! dumps, and all system calls but those that the process needs (seccomp), and leaves as many descriptors as
//! the host allows. It cannot be undone. [`forget_code`] gives memory back.

mod calls;
mod forget;
mod refusal;

use std::path::{Path, PathBuf};

pub use calls::Calls;
pub use forget::forget_code;
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_no_new_privs};

/// What a process keeps.
#[derive(Clone, Debug, Default)]
pub struct Keep {
    /// Files, and folders with all in them, that it may read; what is not there is left out.
    pub read: Vec<PathBuf>,
    /// Files that it may read and write; what is not there is left out.
    pub write: Vec<PathBuf>,
    /// Folders in which it may make, write, rename and remove files.
    pub folders: Vec<PathBuf>,
    /// It may listen on ports below 1024 and use raw sockets, where it could before.
    pub network: bool,
    /// The system calls that it may make; all where there is no list.
    pub calls: Option<Calls>,
    /// It opens files of other users, where it could before.
    pub others_files: bool,
}

/// Why a process could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused to take privileges away.
    #[error("the kernel does not take privileges away from the process")]
    Privileges(#[from] rustix::io::Errno),
    /// The kernel refused to take the file system away.
    #[error("the kernel does not take the file system away from the process")]
    Files(#[from] landlock::RulesetError),
    /// The kernel refused to take system calls away.
    #[error("the kernel does not take system calls away from the process")]
    Calls(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Confines the process, which has one thread, to `keep`. A kernel without Landlock leaves the file system.
///
/// # Errors
/// The kernel refused something that every kernel has.
pub fn confine(keep: &Keep) -> Result<(), Error> {
    set_no_new_privs(true)?;
    drop_capabilities(keep)?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    let files = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files })?;
    restrict_files(keep)?;
    keep.calls.map_or(Ok(()), calls::restrict)
}

/// Has a VM's process ([`Calls::Vm`]) start no more processes, and send signals to, trace, and move to other CPUs
/// none but itself and `children`; all its threads. Before, it could: there are engines that have a guest's code run
/// in processes of its own.
///
/// # Errors
/// The kernel refused it.
pub fn settle(children: &[u32]) -> Result<(), Error> {
    calls::settle(children)
}

fn drop_capabilities(keep: &Keep) -> Result<(), Error> {
    let mut kept = CapabilitySet::empty();
    if keep.network {
        kept |= CapabilitySet::NET_BIND_SERVICE | CapabilitySet::NET_RAW;
    }
    if keep.others_files {
        kept |= CapabilitySet::DAC_OVERRIDE;
    }
    let had = capabilities(None)?;
    let left = had.permitted & kept;
    let sets = CapabilitySets { effective: left, permitted: left, inheritable: CapabilitySet::empty() };
    Ok(set_capabilities(None, sets)?)
}

fn restrict_files(keep: &Keep) -> Result<(), Error> {
    // The rights that kernels since 6.2 know; older ones take what they know of them.
    let all = AccessFs::from_all(ABI::V3);
    let mut rules = Ruleset::default().set_compatibility(CompatLevel::BestEffort).handle_access(all)?;
    if !keep.network {
        // No TCP of its own, and no signals to others. Kernels since 6.7 and 6.12 know it.
        rules = rules.handle_access(AccessNet::from_all(ABI::V4))?.scope(Scope::from_all(ABI::V6))?;
    }
    let mut rules = rules.create()?;
    let look = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
    let make = look | write | AccessFs::MakeReg | AccessFs::MakeSock | AccessFs::RemoveFile;
    for (paths, access) in [(&keep.read, look), (&keep.write, write), (&keep.folders, make)] {
        for path in paths {
            let Ok(fd) = PathFd::new(path) else { continue };
            let fits = if path.is_dir() { access } else { access & AccessFs::from_file(ABI::V3) };
            rules = rules.add_rule(PathBeneath::new(fd, fits))?;
        }
    }
    if rules.restrict_self()?.ruleset == RulesetStatus::NotEnforced {
        log::info!("this kernel has no Landlock: the file system stays within the process's reach");
    }
    Ok(())
}

/// What to keep of the file system for a file that others replace now and then: where it really is, with its
/// folder if that has a purpose of its own (not `/etc`).
pub fn replaced_file(path: &Path) -> Vec<PathBuf> {
    let Ok(file) = path.canonicalize() else { return Vec::new() };
    let folder = file.parent().filter(|folder| *folder != Path::new("/etc") && *folder != Path::new("/"));
    vec![folder.map_or_else(|| file.clone(), Path::to_owned)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Confinement is for good, so that it happens in a copy of this test.
    #[test]
    fn a_confined_process_has_no_privileges_and_reads_what_it_kept() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("kept"), "text").unwrap();
        let mut copy = Command::new(std::env::current_exe().unwrap());
        copy.args(["--exact", "tests::inside", "--ignored", "--test-threads=1"]);
        let output = copy.env("KEPT", folder.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }

    #[test]
    #[ignore = "run by the test above"]
    fn inside() {
        let kept = PathBuf::from(std::env::var_os("KEPT").unwrap());
        let (log, disk) = (kept.join("log"), kept.join("kept"));
        std::fs::create_dir(&log).unwrap();
        let keep = Keep { write: vec![disk.clone()], folders: vec![log.clone()], ..Keep::default() };
        confine(&keep).unwrap();
        assert_eq!(std::fs::read_to_string(&disk).unwrap(), "text");
        std::fs::write(&disk, "words").unwrap();
        std::fs::write(log.join("a"), "a line").unwrap();
        std::fs::rename(log.join("a"), log.join("b")).unwrap();
        std::fs::remove_file(log.join("b")).unwrap();
        if std::fs::read_to_string("/proc/self/status").is_err() {
            // Landlock works here.
            assert!(std::fs::write(kept.join("other"), "").is_err());
            assert!(std::fs::rename(&disk, kept.join("other")).is_err());
            assert!(std::fs::read("/etc/passwd").is_err() && std::fs::read_dir("/").is_err());
        }
        assert!(capabilities(None).unwrap().permitted.is_empty());
        assert_eq!(getrlimit(Resource::Core).maximum, Some(0));
        let status = std::fs::read_to_string("/proc/self/status");
        // Where Landlock works, not even that can be read.
        assert!(status.is_err() || status.unwrap().contains("NoNewPrivs:\t1"));
    }
}
