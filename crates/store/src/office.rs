//! A file that declares several VMs.
//!
//! ```toml
//! [vm.web]
//! memory = "256M"
//! disk = "4G"
//! network = "office"
//! publish = ["8080:80"]
//! restart = "always"
//! image.packages = ["nginx-light"]
//! health.http = "80/"
//! ```

mod member;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

pub use member::{Check, Member, Source};

use crate::{Name, image};

/// Several VMs that belong together.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Office {
    /// The VMs, by name.
    #[serde(rename = "vm", default)]
    pub members: BTreeMap<Name, Member>,
}

/// Why a file declares nothing that could be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no TOML, or TOML that says something else. The reason names the line.
    #[error("{} declares no VMs: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// There is no VM in it.
    #[error("{} declares no VM; write a section [vm.NAME] for each", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// An image's recipe is none.
    #[error("{}: the image of `{vm}` cannot be made", path.display())]
    Recipe {
        /// The file.
        path: PathBuf,
        /// Whose image.
        vm: Name,
        /// Why.
        source: image::Bad,
    },
    /// A VM that cannot be.
    #[error("{}: `{vm}`: {reason}", path.display())]
    Member {
        /// The file.
        path: PathBuf,
        /// Which.
        vm: Name,
        /// Why, and what to write.
        reason: String,
    },
}

impl Office {
    /// Reads one. Files that its recipes name are relative to its folder.
    ///
    /// # Errors
    /// What is wrong with it, where.
    pub fn read(path: &Path) -> Result<Office, Error> {
        let text = fs::read_to_string(path).map_err(|source| Error::Read { path: path.into(), source })?;
        let mut office: Office = toml::from_str(&text)
            .map_err(|source| Error::Parse { path: path.into(), source: Box::new(source) })?;
        let folder = path.parent().unwrap_or(Path::new(""));
        for member in office.members.values_mut() {
            if let Source::Recipe(recipe) = &mut member.image {
                recipe.relative_to(folder);
            }
            if let Some(files) = &mut member.cloud_init {
                files.relative_to(folder);
            }
        }
        office.check(path)?;
        Ok(office)
    }

    fn check(&self, path: &Path) -> Result<(), Error> {
        if self.members.is_empty() {
            return Err(Error::Empty { path: path.into() });
        }
        let mut taken = HashMap::new();
        for (vm, member) in &self.members {
            let wrong = |reason| Error::Member { path: path.into(), vm: vm.clone(), reason };
            if let Source::Recipe(recipe) = &member.image {
                recipe.check().map_err(|source| Error::Recipe {
                    path: path.into(),
                    vm: vm.clone(),
                    source,
                })?;
            }
            member.check().map_err(wrong)?;
            for port in &member.publish {
                if let Some(other) = taken.insert((port.host, port.protocol, port.address), vm) {
                    return Err(wrong(format!("publishes {port}, and so does `{other}`; take another port")));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::{Probe, Restart};

    fn office(text: &str) -> Result<Office, Error> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("office.toml");
        fs::write(&path, text).unwrap();
        Office::read(&path)
    }

    #[test]
    fn what_the_file_says_is_what_the_vms_are() {
        let office = office(
            r#"
            [vm.web]
            memory = "256M"
            disk = "4G"
            disk-limit = { iops = 500, bandwidth = "20M", bandwidth-burst = "1G" }
            network = "office"
            net-limit.bandwidth = "10M"
            publish = ["8080:80"]
            restart = "always"
            [vm.web.image]
            packages = ["nginx-light"]
            files = [{ to = "/etc/motd", from = "motd" }]
            [vm.web.health]
            http = "80/index.html"
            [vm.old]
            image = "debian"
            disk-limit.iops = 9
            [vm.old.health]
            command = ["systemctl", "is-system-running"]
            timeout = 20
            "#,
        )
        .unwrap();
        let web = &office.members[&"web".parse().unwrap()];
        assert_eq!((web.cpus, web.memory.bytes(), web.restart), (1, 256 << 20, Restart::Always));
        assert_eq!(web.disk_limit.to_string(), "at most 500 requests/s and 20 MiB/s (1 GiB at once)");
        assert_eq!(web.net_limit.to_string(), "at most 10 MiB/s each way");
        let Source::Recipe(recipe) = &web.image else { panic!("{web:?}") };
        assert_eq!(recipe.packages, ["nginx-light"]);
        assert!(recipe.files[0].from.as_ref().unwrap().is_absolute(), "relative to the file");
        let health = web.health().unwrap();
        assert_eq!(health.probe, Probe::Http(80, "/index.html".into()));
        let old = &office.members[&"old".parse().unwrap()];
        assert_eq!(old.image, Source::Image("debian".parse().unwrap()));
        assert_eq!(old.health().unwrap().timeout, 20);
    }

    #[test]
    fn the_example_is_an_office() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/office.toml");
        let office = Office::read(&path).unwrap();
        let names: Vec<_> = office.members.keys().map(Name::as_str).collect();
        assert_eq!(names, ["ftp", "mail", "web"]);
    }

    #[test]
    fn mistakes_are_told_with_their_place() {
        for (text, told) in [
            ("", "[vm.NAME]"),
            ("[vm.Web]\nimage = \"d\"", "a-z"),
            ("[vm.web]\ncpus = 1", "image"),
            ("[vm.web]\nimage = \"d\"\nmemry = \"1G\"", "memry"),
            ("[vm.web]\nimage = \"d\"\nmemory = \"1X\"", "256M"),
            ("[vm.web]\nimage.package = [\"x\"]", "package"),
            ("[vm.web]\nimage.packages = [\"-o x\"]", "image of `web`"),
            ("[vm.web]\nimage = \"d\"\ncpus = 0", "1 to 254"),
            ("[vm.web]\nimage = \"d\"\nhealth.tcp = 25", "publish"),
            ("[vm.web]\nimage = \"d\"\npublish = [\"80\"]", "8080:80"),
            ("[vm.web]\nimage = \"d\"\nhealth = {}", "one of"),
            ("[vm.web]\nimage = \"d\"\ndisk-limit.iops = 0", "at least 1"),
            ("[vm.web]\nimage = \"d\"\ndisk-limit.bandwidth = \"5\"", "20M"),
            ("[vm.web]\nimage = \"d\"\ndisk-limit.bandwith = \"5M\"", "`bandwidth`"),
            ("[vm.web]\nimage = \"d\"\ndisk-limit.iops-burst = 5", "add iops=500"),
            ("[vm.web]\nimage = \"d\"\nnet-limit.iops = 5", "bandwidth"),
            ("[vm.web]\nimage = \"d\"\nnet-limit.bandwidth-burst = \"1M\"", "add bandwidth="),
            (
                "[vm.web]\nimage = \"d\"\nhealth = { command = [\"true\"], on-failure = \"restart\" }",
                "needs restart",
            ),
            (
                "[vm.a]\nimage = \"d\"\npublish = [\"1:1\"]\n[vm.b]\nimage = \"d\"\npublish = [\"1:2\"]",
                "another port",
            ),
        ] {
            let error = office(text).unwrap_err();
            let mut all = error.to_string();
            if let Error::Recipe { source, .. } = &error {
                all += &source.to_string();
            }
            assert!(all.contains(told), "{text:?} is told as {all}");
        }
    }
}
