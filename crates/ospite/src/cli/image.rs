//! `ospite image`

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use clap_complete::ArgValueCompleter;
use store::{Name, Size};

use crate::completions::image_names;
use crate::output::OutputArgs;

const BUILD_EXAMPLES: &str = "\
Examples:
  Debian, minimal, with the guest agent; for `ospite exec` that is all it takes
    ospite image build debian

  A web server, with a page of yours
    ospite image build web --package nginx \\
        --file index.html:/var/www/html/index.html

  Commands that root runs in the image, and a user who logs in over SSH
    ospite image build dev --package openssh-server --package git \\
        --run 'git config --system init.defaultBranch main' \\
        --ssh-key ~/.ssh/id_ed25519.pub --size 20G

  The same from a file; options add to it
    ospite image build web --recipe web.toml

A recipe, as TOML; all of it may be left out:
  release = \"bookworm\"           # Debian's release
  packages = [\"nginx\"]
  run = [\"systemctl enable foo\"] # commands of root's, in order, at the end
  size = \"8G\"                    # the disk's; a VM may ask for more
  hostname = \"web\"               # else the VM's name
  password = \"secret\"            # root's; without one root has none to log in by
  ssh-keys = [\"ssh-ed25519 ...\"] # who may log in as root over SSH
  autologin = false              # root is at the console without a password
  [[files]]
  to = \"/etc/motd\"
  content = \"hello\\n\"            # or: from = \"motd\", beside the recipe
  mode = \"0644\"
  owner = \"root:root\"
  [[users]]
  name = \"ada\"
  groups = [\"sudo\"]
  ssh-keys = [\"ssh-ed25519 ...\"]

Nobody can log in at the console unless --password or --autologin says so: who
reaches it need not be who owns the guest. Packages come from the mirror of the
host's apt; OSPITE_SOURCES names a sources.list to use instead. No root is
needed where user namespaces work; with root, none of it is mounted outside.
";

const IMPORT_EXAMPLES: &str = "\
Examples:
  What `ospite image export` has made
    ospite image import web web.ospite.tar

  A cloud image: its kernel is found on the disk in it
    ospite image import cloud debian-12-generic-amd64.qcow2

  Any disk, with the kernel beside it
    ospite image import old disk.vmdk --kernel vmlinuz --initrd initrd.img \\
        --append 'root=/dev/vda1 console=ttyS0'
";

/// `ospite image`
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Build an image from Debian's packages
    Build(Box<BuildArgs>),
    /// List the images
    List(ListArgs),
    /// Tell all about an image
    Info(InfoArgs),
    /// Make an image of a disk image, or of an exported one
    #[command(after_help = IMPORT_EXAMPLES)]
    Import(ImportArgs),
    /// Write an image into one file
    Export(ExportArgs),
    /// Remove images
    Rm(RmArgs),
}

/// `ospite image build`
#[derive(Args, Debug)]
#[command(after_help = BUILD_EXAMPLES)]
pub struct BuildArgs {
    /// The image's name; one that is there is replaced, unless a VM is on it
    #[arg(add = ArgValueCompleter::new(image_names))]
    pub name: Name,

    /// A file that says what the image is made of (TOML, see below)
    #[arg(long, value_name = "FILE")]
    pub recipe: Option<PathBuf>,

    /// A Debian package to install; may be repeated
    #[arg(long = "package", value_name = "NAME")]
    pub packages: Vec<String>,

    /// A shell command that root runs in the image, last; may be repeated
    #[arg(long, value_name = "COMMAND")]
    pub run: Vec<String>,

    /// A file of the host's and its place in the image: SRC:DST; may be repeated
    #[arg(long = "file", value_name = "SRC:DST", value_parser = parse_file)]
    pub files: Vec<(PathBuf, PathBuf)>,

    /// The disk's size: 4G [default: 8G]. It takes room on the host as it is filled
    #[arg(long, value_name = "SIZE")]
    pub size: Option<Size>,

    /// The guest's own name [default: the VM's]
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,

    /// root's password. Others on this host can see it while the command runs: a recipe can hold it, too
    #[arg(long, value_name = "PASSWORD")]
    pub password: Option<String>,

    /// Who may log in as root over SSH: a public key's file; may be repeated
    #[arg(long = "ssh-key", value_name = "FILE")]
    pub ssh_keys: Vec<PathBuf>,

    /// root is logged in on the console without being asked for a password
    #[arg(long)]
    pub autologin: bool,

    /// Build it only if there is none that this recipe makes
    #[arg(long)]
    pub if_changed: bool,

    /// How to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// `ospite image list`
#[derive(Args, Debug)]
pub struct ListArgs {
    /// How to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// `ospite image info`
#[derive(Args, Debug)]
pub struct InfoArgs {
    /// The image
    #[arg(add = ArgValueCompleter::new(image_names))]
    pub name: Name,

    /// Read all of it, and see whether it is what it was
    #[arg(long)]
    pub verify: bool,

    /// List its packages
    #[arg(long)]
    pub packages: bool,

    /// How to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// `ospite image import`
#[derive(Args, Debug)]
pub struct ImportArgs {
    /// The image's name
    pub name: Name,

    /// An exported image, or a disk image: raw, qcow2, vmdk; told by content
    pub file: PathBuf,

    /// The kernel [default: found on the disk, where its file system is ext4]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,

    /// The initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,

    /// The kernel's command line [default: names the file system on which the kernel was found]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub append: Option<String>,

    /// How to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// What an image is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    /// All of it, for `ospite image import`
    Tar,
    /// Its disk as qcow2
    Qcow2,
    /// Its disk as it is
    Raw,
}

/// `ospite image export`
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  ospite image export web web.ospite.tar\n  ospite image export web web.raw --format raw"
)]
pub struct ExportArgs {
    /// The image
    #[arg(add = ArgValueCompleter::new(image_names))]
    pub name: Name,

    /// The file to write; one that is there is not touched
    pub file: PathBuf,

    /// What to write
    #[arg(long, value_enum, default_value_t = ExportFormat::Tar)]
    pub format: ExportFormat,
}

/// `ospite image rm`
#[derive(Args, Debug)]
pub struct RmArgs {
    /// The images
    #[arg(required = true, add = ArgValueCompleter::new(image_names))]
    pub names: Vec<Name>,
}

fn parse_file(text: &str) -> Result<(PathBuf, PathBuf), String> {
    match text.rsplit_once(':') {
        Some((from, to)) if !from.is_empty() && to.starts_with('/') => Ok((from.into(), to.into())),
        _ => Err("write SRC:DST, where DST is an absolute path in the image".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_a_source_and_an_absolute_place() {
        assert_eq!(parse_file("a:b:/etc/c").unwrap(), ("a:b".into(), "/etc/c".into()));
        for bad in ["a", "a:b", ":/b", "/etc/c"] {
            assert!(parse_file(bad).unwrap_err().contains("SRC:DST"), "{bad}");
        }
    }
}
