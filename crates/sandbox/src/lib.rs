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
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_no_new_privs};

/// What a process keeps.
#[derive(Clone, Debug, Default)]
pub struct Keep {
    /// Files, and folders with all in them, that it may read; what is not there is left out.
    pub read: Vec<PathBuf>,
    /// It may listen on ports below 1024 and use raw sockets, where it could before.
    pub network: bool,
    /// The system calls that it may make; all where there is no list.
    pub calls: Option<Calls>,
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
    restrict_files(&keep.read)?;
    keep.calls.map_or(Ok(()), calls::restrict)
}

fn drop_capabilities(keep: &Keep) -> Result<(), Error> {
    let kept = match keep.network {
        true => CapabilitySet::NET_BIND_SERVICE | CapabilitySet::NET_RAW,
        false => CapabilitySet::empty(),
    };
    let had = capabilities(None)?;
    let left = had.permitted & kept;
    let sets = CapabilitySets { effective: left, permitted: left, inheritable: CapabilitySet::empty() };
    Ok(set_capabilities(None, sets)?)
}

fn restrict_files(read: &[PathBuf]) -> Result<(), Error> {
    // The rights that kernels since 6.2 know; older ones take what they know of them.
    let all = AccessFs::from_all(ABI::V3);
    let mut rules =
        Ruleset::default().set_compatibility(CompatLevel::BestEffort).handle_access(all)?.create()?;
    for path in read {
        if let Ok(fd) = PathFd::new(path) {
            let access = if path.is_dir() {
                AccessFs::ReadFile | AccessFs::ReadDir
            } else {
                AccessFs::ReadFile.into()
            };
            rules = rules.add_rule(PathBeneath::new(fd, access))?;
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
        confine(&Keep { read: vec![kept.clone()], ..Keep::default() }).unwrap();
        assert_eq!(std::fs::read_to_string(kept.join("kept")).unwrap(), "text");
        assert!(capabilities(None).unwrap().permitted.is_empty());
        assert_eq!(getrlimit(Resource::Core).maximum, Some(0));
        let status = std::fs::read_to_string("/proc/self/status");
        // Where Landlock works, not even that can be read.
        assert!(status.is_err() || status.unwrap().contains("NoNewPrivs:\t1"));
    }
}
