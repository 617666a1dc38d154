//! Where things lie.

use std::env;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::Name;

/// The folders of one user's images and VMs.
///
/// `OSPITE_HOME` names it. Otherwise root's is `/var/lib/ospite`, with sockets in `/run/ospite`, and a
/// user's is `$XDG_DATA_HOME/ospite` (`~/.local/share/ospite`), with sockets in `$XDG_RUNTIME_DIR/ospite`
/// (XDG Base Directory Specification 0.8). Only its owner may look in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    data: PathBuf,
    runtime: PathBuf,
}

impl Home {
    /// The one that the environment names.
    ///
    /// # Errors
    /// Where it names none, in words.
    pub fn find() -> Result<Home, String> {
        let root = rustix::process::geteuid().is_root();
        Home::of(root, |variable| env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute()))
    }

    fn of(root: bool, folder: impl Fn(&str) -> Option<PathBuf>) -> Result<Home, String> {
        if let Some(data) = folder("OSPITE_HOME") {
            return Ok(Home::at(data));
        }
        if root {
            return Ok(Home { data: "/var/lib/ospite".into(), runtime: "/run/ospite".into() });
        }
        let data = folder("XDG_DATA_HOME").or_else(|| Some(folder("HOME")?.join(".local/share")));
        let data = data.ok_or("neither OSPITE_HOME, XDG_DATA_HOME nor HOME names a folder")?.join("ospite");
        let runtime =
            folder("XDG_RUNTIME_DIR").map_or_else(|| data.join("run"), |runtime| runtime.join("ospite"));
        Ok(Home { data, runtime })
    }

    /// One that lies in `data` alone.
    pub fn at(data: impl Into<PathBuf>) -> Home {
        let data = data.into();
        Home { runtime: data.join("run"), data }
    }

    /// Makes its folders where they are not there yet.
    ///
    /// # Errors
    /// What the host says; the text names the folder.
    pub fn prepare(&self) -> io::Result<()> {
        for folder in [&self.images(), &self.vms(), &self.runtime] {
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
            made.map_err(|error| {
                io::Error::new(error.kind(), format!("cannot make {}: {error}", folder.display()))
            })?;
        }
        Ok(())
    }

    /// The folder of all images.
    pub fn images(&self) -> PathBuf {
        self.data.join("images")
    }

    /// The folder of all VMs.
    pub fn vms(&self) -> PathBuf {
        self.data.join("vms")
    }

    /// An image's folder.
    pub fn image(&self, name: &Name) -> PathBuf {
        self.images().join(name.as_str())
    }

    /// A VM's folder.
    pub fn vm(&self, name: &Name) -> PathBuf {
        self.vms().join(name.as_str())
    }

    /// Sockets, and what else is void after a restart of the host.
    pub fn runtime(&self) -> &Path {
        &self.runtime
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn of(root: bool, variables: &[(&str, &str)]) -> Result<Home, String> {
        Home::of(root, |asked| {
            variables.iter().find(|(name, _)| *name == asked).map(|(_, value)| PathBuf::from(value))
        })
    }

    #[test]
    fn users_and_root_have_homes_where_the_specification_says() {
        let web = "web".parse().unwrap();
        let home = of(true, &[("HOME", "/root")]).unwrap();
        assert_eq!(home.vm(&web), Path::new("/var/lib/ospite/vms/web"));
        assert_eq!(home.runtime(), Path::new("/run/ospite"));
        let home = of(false, &[("HOME", "/home/ada"), ("XDG_RUNTIME_DIR", "/run/user/7")]).unwrap();
        assert_eq!(home.image(&web), Path::new("/home/ada/.local/share/ospite/images/web"));
        assert_eq!(home.runtime(), Path::new("/run/user/7/ospite"));
        assert_eq!(of(true, &[("OSPITE_HOME", "/x")]).unwrap(), Home::at("/x"));
        assert!(of(false, &[]).unwrap_err().contains("OSPITE_HOME"));
    }

    #[test]
    fn nobody_else_looks_in() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::at(folder.path().join("new"));
        home.prepare().unwrap();
        home.prepare().unwrap();
        let mode = std::fs::metadata(home.vms()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }
}
