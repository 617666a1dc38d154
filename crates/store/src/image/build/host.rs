//! What a build needs of the host.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::child::Tools;
use crate::image::Error;

/// Programs, and the Debian packages that have them.
const NEEDED: &[(&str, &str)] = &[
    ("mmdebstrap", "mmdebstrap"),
    ("apt-get", "apt"),
    ("dpkg-query", "dpkg"),
    ("mke2fs", "e2fsprogs"),
    ("gzip", "gzip"),
    ("unshare", "util-linux"),
    ("setpriv", "util-linux"),
];

/// What makes the namespaces. The first dies with us, the second takes everything in its process namespace
/// with it; mounts live in its mount namespace only.
const PREFIX: &[&str] = &[
    "setpriv",
    "--pdeathsig=KILL",
    "unshare",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child=KILL",
    "--mount-proc",
];
/// Root in a namespace where users are ours.
const USERS: &[&str] = &["--map-root-user", "--map-auto"];

/// Finds the tools and sees whether they work here.
pub(super) fn tools() -> Result<Tools, Error> {
    let path = search_path();
    let missing: Vec<&(&str, &str)> = NEEDED.iter().filter(|(tool, _)| find(&path, tool).is_none()).collect();
    if let Some((tool, _)) = missing.first() {
        let packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
        return Err(Error::Tool { tool: (*tool).into(), packages: packages.join(" ") });
    }
    let root = rustix::process::geteuid().is_root();
    let users: &[&str] = if root { &[] } else { USERS };
    if !root && find(&path, "newuidmap").is_none() {
        return Err(Error::Tool { tool: "newuidmap".into(), packages: "uidmap".into() });
    }
    let tools = Tools { prefix: PREFIX.iter().chain(users).map(OsString::from).collect(), path };
    try_out(&tools).map_err(|why| Error::Namespace { why, mend: mend(root, read_sysctl) })?;
    Ok(tools)
}

/// A user's PATH often lacks the folders where `mke2fs` is.
fn search_path() -> OsString {
    let own = std::env::var_os("PATH").unwrap_or_default();
    let folders =
        std::env::split_paths(&own).chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from));
    std::env::join_paths(folders).unwrap_or(own)
}

fn find(path: &OsString, tool: &str) -> Option<PathBuf> {
    std::env::split_paths(path).map(|folder| folder.join(tool)).find(|file| file.is_file())
}

fn try_out(tools: &Tools) -> Result<(), String> {
    let output = tools.command("true", Path::new("/")).stdin(Stdio::null()).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn read_sysctl(name: &str) -> Option<String> {
    let path = Path::new("/proc/sys").join(name.replace('.', "/"));
    Some(fs::read_to_string(path).ok()?.trim().into())
}

/// What to type so that namespaces work.
fn mend(root: bool, sysctl: impl Fn(&str) -> Option<String>) -> String {
    if root {
        return "this container may not make namespaces: give it CAP_SYS_ADMIN, or build on the host".into();
    }
    let switches = [
        ("user.max_user_namespaces", "0", "15000"),
        ("kernel.unprivileged_userns_clone", "0", "1"),
        ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
    ];
    match switches.iter().find(|(name, off, _)| sysctl(name).as_deref() == Some(off)) {
        Some((name, _, on)) => format!("sudo sysctl {name}={on}"),
        None => format!("sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {}", user()),
    }
}

fn user() -> String {
    let name = Command::new("id").arg("-un").output().ok().and_then(|out| String::from_utf8(out.stdout).ok());
    name.map(|name| name.trim().into()).filter(|name: &String| !name.is_empty()).unwrap_or("$USER".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_switches_namespaces_off_is_what_is_switched_on() {
        let with = |name: &'static str, value: &'static str| {
            mend(false, move |asked| (asked == name).then(|| value.to_owned()))
        };
        assert_eq!(with("user.max_user_namespaces", "0"), "sudo sysctl user.max_user_namespaces=15000");
        assert!(with("kernel.apparmor_restrict_unprivileged_userns", "1").ends_with("userns=0"));
        assert!(with("user.max_user_namespaces", "9000").contains("--add-subuids"));
        assert!(mend(true, |_| None).contains("CAP_SYS_ADMIN"));
    }

    #[test]
    fn tools_are_found_where_only_root_looks() {
        let path = search_path();
        assert!(find(&path, "sh").is_some() && find(&path, "no-such-tool").is_none());
        assert!(std::env::split_paths(&path).any(|folder| folder == Path::new("/usr/sbin")));
    }
}
