//! Building an image from Debian's packages.
//!
//! `mmdebstrap` installs the packages into a folder and runs the recipe's part there, `mke2fs` puts the
//! folder on a disk, and [`disk::copy`] makes that a qcow2 image. All of it happens in namespaces of its own
//! ([`host`]): without root the build is root in a user namespace; with root nothing of what it mounts is
//! ever seen outside; and when this process ends, however it ends, so does the build. Its files lie in a
//! [`Draft`], which nobody takes for an image.

mod child;
mod host;
mod script;
mod sources;

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use child::Tools;

use super::{Draft, Error, Image, Manifest, Origin, Recipe};
use crate::{Home, Name};

/// What a build tells while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress<'a> {
    /// A step begins.
    Step(&'a str),
    /// A line that a tool has printed.
    Line(&'a str),
    /// So many bytes of so many are done.
    Bytes(u64, u64),
    /// Nothing new; comes several times a second, so that whoever waits can stop it.
    Alive,
}

/// Hears how a build is getting on, and may end it.
pub type Listener<'a> = &'a mut dyn FnMut(Progress<'_>) -> ControlFlow<()>;

/// The packages of every image: what a guest needs to start, to have a network and to be talked to.
const PACKAGES: &[&str] = &[
    "ca-certificates",
    "dbus",
    "e2fsprogs",
    "initramfs-tools",
    "iproute2",
    "kmod",
    "linux-image-cloud-amd64",
    "login",
    "procps",
    "qemu-guest-agent",
    "systemd",
    "systemd-resolved",
    "systemd-sysv",
    "udev",
    "util-linux",
];

/// Builds the image `name`; one that is there is replaced. The mirror is that of the host's apt, or what the
/// file says that `OSPITE_SOURCES` names.
///
/// # Errors
/// Where the recipe or the host does not do, a VM is on the image, a step fails, or `progress` ends it.
/// Nothing is left behind then, and an image that was there is still there.
pub fn build(home: &Home, name: &Name, recipe: &Recipe, progress: Listener<'_>) -> Result<Image, Error> {
    let digest = recipe.digest()?;
    super::not_in_use(home, name)?;
    home.prepare().map_err(|source| Error::io("make", &home.images(), source))?;
    let tools = host::tools()?;
    let draft = Draft::new(home, name)?;
    let work = Work::new(&draft, recipe)?;
    work.install(&tools, progress)?;
    work.pack(&tools, progress)?;
    work.convert(&draft, progress)?;
    go_on(progress(Progress::Step("computing checksums")))?;
    let manifest = work.manifest(&draft, digest)?;
    go_on(progress(Progress::Step("publishing")))?;
    draft.publish(home, manifest)
}

pub(super) fn go_on(answer: ControlFlow<()>) -> Result<(), Error> {
    if answer.is_break() { Err(Error::Stopped) } else { Ok(()) }
}

/// A build's files, all of them in the draft's folder.
struct Work<'a> {
    recipe: &'a Recipe,
    folder: PathBuf,
    uuid: String,
}

impl<'a> Work<'a> {
    fn new(draft: &Draft, recipe: &'a Recipe) -> Result<Work<'a>, Error> {
        let folder = draft.path().to_path_buf();
        let uuid = uuid().map_err(|source| Error::io("choose the UUID of", &folder, source))?;
        let work = Work { recipe, folder, uuid };
        let sources = sources::sources(&recipe.release)?;
        let write = |name: &str, content: &[u8]| {
            let path = work.path(name);
            fs::write(&path, content).map_err(|source| Error::io("write", &path, source))
        };
        write("sources.list", sources.list.as_bytes())?;
        write("apt.conf", sources.options.as_bytes())?;
        write("essential.sh", script::ESSENTIAL.as_bytes())?;
        write("pack.sh", script::PACK.as_bytes())?;
        write("customize.sh", script::customize(recipe, &work.uuid).as_bytes())?;
        for (index, file) in recipe.files.iter().enumerate() {
            let path = work.path(&script::file_name(index));
            match (&file.from, &file.content) {
                (Some(from), _) => {
                    fs::copy(from, &path).map_err(|source| Error::io("copy", from, source))?;
                }
                (None, content) => {
                    fs::write(&path, content.as_deref().unwrap_or_default())
                        .map_err(|source| Error::io("write", &path, source))?;
                }
            }
        }
        fs::create_dir(work.path("tmp")).map_err(|source| Error::io("make", &work.folder, source))?;
        Ok(work)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn text(&self, name: &str) -> Result<String, Error> {
        let path = self.path(name);
        fs::read_to_string(&path).map_err(|source| Error::io("read", &path, source))
    }

    /// Debian and the recipe's part in the folder `tree`.
    fn install(&self, tools: &Tools, progress: Listener<'_>) -> Result<(), Error> {
        let packages = PACKAGES.iter().copied().chain(self.recipe.packages.iter().map(String::as_str));
        let mut command = tools.command("mmdebstrap", &self.folder);
        command.args(["--mode=root", "--variant=minbase", "--architectures=amd64", "--format=directory"]);
        command.arg(format!("--include={}", packages.collect::<Vec<_>>().join(",")));
        command.args(["--aptopt=apt.conf"]);
        for (rule, path) in script::LEFT_OUT {
            command.arg(format!("--dpkgopt={rule}={path}"));
        }
        command.arg("--essential-hook=cd \"$OSPITE_BUILD\" && sh -eu essential.sh \"$1\"");
        command.arg("--customize-hook=cd \"$OSPITE_BUILD\" && sh -eu customize.sh \"$1\"");
        command.args([&self.recipe.release, "tree", "sources.list"]);
        child::run(command, "install Debian", &self.folder, progress)
    }

    /// The folder on a disk, and what is started taken out of it.
    fn pack(&self, tools: &Tools, progress: Listener<'_>) -> Result<(), Error> {
        let mut command = tools.command("sh", &self.folder);
        let size = self.recipe.size.bytes();
        command.args(["-eu", "pack.sh", &self.uuid, &size.to_string()]);
        child::run(command, "put it on a disk", &self.folder, progress)
    }

    fn convert(&self, draft: &Draft, progress: Listener<'_>) -> Result<(), Error> {
        convert(&self.path("disk.raw"), Some(disk::Format::Raw), &draft.disk(), progress)?;
        // Not twice on the disk for longer than needed.
        let raw = self.path("disk.raw");
        fs::remove_file(&raw).map_err(|source| Error::io("remove", &raw, source))
    }

    fn manifest(&self, draft: &Draft, digest: String) -> Result<Manifest, Error> {
        // A panic that nobody sees would look like a machine that hangs.
        let cmdline = format!("root=UUID={} rw console=ttyS0 quiet panic=1", self.uuid);
        let mut manifest = draft.manifest(&cmdline)?;
        manifest.origin = Origin::Debian { release: self.recipe.release.clone() };
        manifest.kernel_release = Some(self.text("release")?.trim().into());
        manifest.recipe_digest = Some(digest);
        manifest.packages = packages(&self.text("packages")?);
        Ok(manifest)
    }
}

/// Copies a disk into a qcow2 image at `to`.
pub(super) fn convert(
    from: &Path,
    format: Option<disk::Format>,
    to: &Path,
    progress: Listener<'_>,
) -> Result<(), Error> {
    let from = disk::open(from, format, true).map_err(Error::Disk)?;
    let (size, mut stopped) = (from.size(), false);
    go_on(progress(Progress::Step("writing the image")))?;
    let copied = disk::copy(&*from, to, |done| {
        stopped = progress(Progress::Bytes(done, size)).is_break();
        if stopped { Err(std::io::ErrorKind::Interrupted.into()) } else { Ok(()) }
    });
    if stopped { Err(Error::Stopped) } else { copied.map_err(Error::from) }
}

/// `NAME VERSION` lines.
fn packages(text: &str) -> BTreeMap<String, String> {
    let pairs = text.lines().filter_map(|line| line.split_once(' '));
    pairs.map(|(name, version)| (name.into(), version.into())).collect()
}

/// A random UUID (RFC 9562, 5.4).
fn uuid() -> std::io::Result<String> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = super::manifest::hex(&bytes);
    Ok(format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_what_they_should_be() {
        let (one, two) = (uuid().unwrap(), uuid().unwrap());
        assert_ne!(one, two);
        assert_eq!((one.len(), &one[14..15]), (36, "4"));
        assert!("89ab".contains(&one[19..20]), "{one}");
    }

    #[test]
    fn packages_are_read_with_their_versions() {
        let found = packages("adduser 3.134\nlibc6:amd64 2.36-9+deb12u14\n\n");
        assert_eq!(found["libc6:amd64"], "2.36-9+deb12u14");
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn a_recipe_that_is_none_is_refused_before_anything_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::at(folder.path().join("home"));
        let recipe = Recipe { packages: vec!["--foo".into()], ..Recipe::default() };
        let built = build(&home, &"web".parse().unwrap(), &recipe, &mut |_| ControlFlow::Continue(()));
        assert!(matches!(built, Err(Error::Recipe(bad)) if bad.to_string().contains("--foo")));
        assert!(!home.images().exists());
    }

    #[test]
    fn a_conversion_that_is_stopped_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("a.raw"), folder.path().join("a.qcow2"));
        fs::write(&from, vec![1; 8 << 20]).unwrap();
        let mut stop = |progress: Progress<'_>| match progress {
            Progress::Bytes(done, _) if done >= 4 << 20 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        };
        let stopped = convert(&from, None, &to, &mut stop);
        assert!(matches!(stopped, Err(Error::Stopped)) && !to.exists());
    }
}
