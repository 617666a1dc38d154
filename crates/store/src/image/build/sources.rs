//! Where packages come from: the mirrors of the host's apt, and no others.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::image::Error;

/// What apt is told.
#[derive(Debug)]
pub(super) struct Sources {
    /// A `sources.list`.
    pub(super) list: String,
    /// Configuration: how the mirror is reached from here.
    pub(super) options: String,
}

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The sources of a release of Debian.
pub(super) fn sources(release: &str) -> Result<Sources, Error> {
    let options = options(&apt("apt-config", &["dump"]));
    if let Some(path) = std::env::var_os("OSPITE_SOURCES") {
        let list = fs::read_to_string(&path).map_err(|source| Error::io("read", Path::new(&path), source))?;
        return Ok(Sources { list, options });
    }
    let form = "$(REPO_URI) $(RELEASE)";
    let wanted = ["Created-By: Packages", "Origin: Debian", "Component: main"];
    let known = apt("apt-get", &[["indextargets", "--format", form].as_slice(), &wanted].concat());
    let list = list(&known, release);
    if list.is_empty() {
        return Err(Error::Sources { release: release.into() });
    }
    if !Path::new(KEYRING).exists() {
        return Err(Error::Tool { tool: KEYRING.into(), packages: "debian-archive-keyring".into() });
    }
    Ok(Sources { list, options })
}

fn apt(tool: &str, args: &[&str]) -> String {
    let output = Command::new(tool).args(args).env("LC_ALL", "C").stdin(Stdio::null()).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

/// What lies behind a release's own name.
const POCKETS: [&str; 3] = ["", "-updates", "-security"];

/// The lines of a `sources.list` for `release`, of `URI RELEASE` lines. A host with another release lends
/// its mirrors.
fn list(known: &str, release: &str) -> String {
    let pairs: Vec<(&str, &str)> = known.lines().filter_map(|line| line.split_once(' ')).collect();
    let own = |wanted: &str| -> BTreeSet<(String, String)> {
        let pockets = POCKETS.map(|pocket| (format!("{wanted}{pocket}"), format!("{release}{pocket}")));
        let matching = pairs.iter().flat_map(|(uri, suite)| {
            let of = pockets.iter().find(|(have, _)| have == suite);
            of.map(|(_, want)| ((*uri).to_owned(), want.clone()))
        });
        matching.collect()
    };
    let mut found = own(release);
    if found.is_empty() {
        let plain = pairs.iter().map(|(_, suite)| suite.split('-').next().unwrap_or(suite));
        found = plain.collect::<BTreeSet<_>>().into_iter().next().map(own).unwrap_or_default();
    }
    let line = |(uri, suite): (String, String)| format!("deb [signed-by={KEYRING}] {uri} {suite} main\n");
    found.into_iter().map(line).collect()
}

/// Proxies, and what a mirror that is a snapshot needs.
fn options(dump: &str) -> String {
    let wanted = ["Acquire::http::Proxy", "Acquire::https::Proxy", "Acquire::Check-Valid-Until"];
    let lines = dump.lines().filter(|line| wanted.iter().any(|wanted| line.starts_with(wanted)));
    lines.map(|line| format!("{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_mirrors_of_a_release_are_used() {
        let known = "http://a/debian/ bookworm\nhttp://a/debian/ bookworm-updates\nhttp://a/debian/ bookworm\n\
                     http://a/debian/ bookworm-backports\nhttp://b/security/ bookworm-security\n";
        let found = list(known, "bookworm");
        let ends: Vec<&str> =
            found.lines().filter_map(|line| line.split_once("] ")).map(|(_, end)| end).collect();
        assert_eq!(
            ends,
            [
                "http://a/debian/ bookworm main",
                "http://a/debian/ bookworm-updates main",
                "http://b/security/ bookworm-security main"
            ]
        );
        assert!(found.contains("signed-by=/usr/share/keyrings/"));
        assert!(
            list(known, "trixie").contains("http://b/security/ trixie-security main"),
            "mirrors are lent"
        );
        assert_eq!(list("", "bookworm"), "");
    }

    #[test]
    fn what_the_host_needs_to_reach_its_mirror_is_passed_on() {
        let dump = "APT::Foo \"1\";\nAcquire::http::Proxy \"http://p:1\";\nAcquire::Languages \"none\";\n";
        assert_eq!(options(dump), "Acquire::http::Proxy \"http://p:1\";\n");
    }
}
