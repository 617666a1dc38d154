//! The host as its /proc tells it.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Resource, getrlimit};

use super::{Check, Verdict};
use store::Size;

/// A host's file system; tests make a small one.
pub struct Host {
    root: PathBuf,
}

impl Host {
    /// The host whose `/` is `root`.
    pub fn new(root: &Path) -> Host {
        Host { root: root.to_owned() }
    }

    /// A path on it.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// A file's text; empty where there is none.
    pub fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap_or_default()
    }

    /// Architecture and kernel.
    pub fn system(&self) -> Check {
        let release = self.read("proc/sys/kernel/osrelease");
        let finding = format!("Linux {} on {}", release.trim(), std::env::consts::ARCH);
        if cfg!(target_arch = "x86_64") {
            Check::new("system", Verdict::Good, finding)
        } else {
            Check::new("system", Verdict::Bad, format!("{finding}; ospite needs x86-64 for now"))
        }
    }

    /// How large a guest may be.
    pub fn memory(&self) -> Check {
        let kib = |name: &str| {
            let text = self.read("proc/meminfo");
            let line = text.lines().find_map(|line| line.strip_prefix(name).map(str::to_owned))?;
            line.trim_start_matches(':').split_whitespace().next()?.parse::<u64>().ok()
        };
        let (Some(total), Some(free)) = (kib("MemTotal"), kib("MemAvailable")) else {
            return Check::new("memory", Verdict::Note, "unknown: cannot read /proc/meminfo");
        };
        let mib = |kib: u64| Size::from(kib >> 10 << 20);
        let finding = format!("{} of {} free for guests", mib(free), mib(total));
        if let Some(limit) = getrlimit(Resource::As).current {
            let finding = format!("{finding}, but this shell limits a process to {}", Size::from(limit));
            return Check::new("memory", Verdict::Bad, finding).mend("ulimit -v unlimited");
        }
        if free < 512 << 10 {
            return Check::new("memory", Verdict::Note, format!("{finding}: small guests only (-m 256M)"));
        }
        Check::new("memory", Verdict::Good, finding)
    }

    /// Open files: disks and their layers.
    pub fn files(&self) -> Check {
        match getrlimit(Resource::Nofile).current {
            Some(limit) if limit < 256 => {
                Check::new("open files", Verdict::Note, format!("at most {limit}: few disks per guest"))
                    .mend("ulimit -n 1024")
            }
            Some(limit) => Check::new("open files", Verdict::Good, format!("up to {limit}")),
            None => Check::new("open files", Verdict::Good, "no limit"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_much_memory_is_told_so() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("proc")).unwrap();
        fs::write(dir.path().join("proc/meminfo"), "MemTotal:  2097152 kB\nMemAvailable:  262144 kB\n")
            .unwrap();
        let check = Host::new(dir.path()).memory();
        assert!(check.finding.contains("256 MiB of 2 GiB free"), "{}", check.finding);
    }

    #[test]
    fn a_host_without_proc_is_no_panic() {
        assert_eq!(Host::new(Path::new("/no/such/root")).memory().verdict, Verdict::Note);
    }
}
