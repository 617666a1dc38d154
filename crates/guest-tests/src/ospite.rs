//! The program and its command line.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::artefacts::{self, Kernel};
use crate::disk_log;
use crate::session::Session;

/// A command line in the making.
#[derive(Clone, Debug, Default)]
pub struct Ospite {
    args: Vec<OsString>,
    append: Vec<String>,
    uid: Option<u32>,
    home: Option<PathBuf>,
    log: Option<PathBuf>,
    echo: bool,
}

/// What `ospite` said when it would not start a guest.
#[derive(Debug)]
pub struct Refusal {
    /// Its exit code.
    pub code: i32,
    /// Its standard error.
    pub text: String,
}

impl Ospite {
    /// `ospite COMMAND`
    pub fn command(name: &str) -> Ospite {
        Ospite { args: vec![name.into()], ..Ospite::default() }
    }

    /// `ospite run`; the guest's console is its serial line.
    pub fn run() -> Ospite {
        Ospite::command("run")
    }

    /// Runs the guest on another tier of the software engine: `interpreter` or `lockstep`.
    pub fn tier(self, name: &str) -> Ospite {
        self.option("--engine", format!("soft,tier={name}"))
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Ospite {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds an option with its value.
    pub fn option(self, name: &str, value: impl AsRef<OsStr>) -> Ospite {
        self.arg(name).arg(value)
    }

    /// `--cpus`
    pub fn cpus(self, count: u32) -> Ospite {
        self.option("--cpus", count.to_string())
    }

    /// `--memory`
    pub fn memory(self, size: &str) -> Ospite {
        self.option("--memory", size)
    }

    /// `--disk`
    pub fn disk(self, disk: impl AsRef<OsStr>) -> Ospite {
        self.option("--disk", disk)
    }

    /// `--kernel` and `--initrd`
    pub fn kernel(self, kernel: &Kernel) -> Ospite {
        let with_console = self.append("console=ttyS0");
        with_console.option("--kernel", &kernel.vmlinuz).option("--initrd", &kernel.initrd)
    }

    /// Adds words to the kernel's command line.
    pub fn append(mut self, words: &str) -> Ospite {
        self.append.push(words.into());
        self
    }

    /// Has the initramfs run a shell command and power off.
    pub fn guest_command(self, command: &str) -> Ospite {
        self.append(&format!("ospite.run=\"{command}\""))
    }

    /// Keeps what it keeps in a folder of the test's.
    pub fn home(mut self, home: &Path) -> Ospite {
        self.home = Some(home.into());
        self
    }

    /// Has strace write to `log` what [`crate::disk_log`] reads. A signal then goes to strace.
    pub fn recorded(mut self, log: &Path) -> Ospite {
        self.log = Some(log.into());
        self
    }

    /// Runs as another user.
    pub fn as_user(mut self, uid: u32) -> Ospite {
        self.uid = Some(uid);
        self
    }

    /// Shows on our standard output what the guest prints.
    pub fn echo(mut self) -> Ospite {
        self.echo = true;
        self
    }

    fn args(&self) -> Vec<OsString> {
        let mut args = self.args.clone();
        if !self.append.is_empty() {
            args.extend(["--append".into(), self.append.join(" ").into()]);
        }
        args
    }

    fn program(&self, program: &Path) -> Command {
        let mut words: Vec<OsString> = Vec::new();
        words.extend(self.log.iter().flat_map(|log| disk_log::recorder(log)).map(OsString::from));
        words.push(program.into());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(self.args());
        if let Some(home) = &self.home {
            command.env("OSPITE_HOME", home);
        }
        if let Some(uid) = self.uid {
            command.uid(uid).gid(uid);
        }
        command
    }

    /// Starts a guest with its serial line on pipes.
    pub fn start(&self) -> Session {
        let mut command = self.program(artefacts::ospite());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let (keys, output) = (child.stdin.take(), child.stdout.take());
        let (Some(keys), Some(output)) = (keys, output) else { unreachable!("both were asked for") };
        Session::new(child, keys, output, self.echo)
    }

    /// Starts a guest on a terminal of its own, which the caller gets to look at, too.
    pub fn start_on_terminal(&self) -> io::Result<(Session, File)> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let terminal =
            File::options().read(true).write(true).open(OsStr::new(name.to_str().unwrap_or_default()))?;
        // A session whose terminal this is, as a login would make it. setsid becomes ospite.
        let mut command = Command::new("setsid");
        command.args(["--ctty"]).arg(artefacts::ospite()).args(self.args());
        command.stdin(terminal.try_clone()?).stdout(terminal.try_clone()?).stderr(terminal.try_clone()?);
        let child = command.spawn()?;
        let keys = File::from(master.as_fd().try_clone_to_owned()?);
        Ok((Session::new(child, keys, File::from(master), self.echo), terminal))
    }

    /// Runs a command to its end.
    pub fn output(&self) -> Output {
        let mut command = self.program(artefacts::ospite());
        command.stdin(Stdio::null());
        command.output().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"))
    }

    /// Runs what cannot work. Panics where it works, takes more than one line to say why not, or panics
    /// itself.
    pub fn refused(&self) -> Refusal {
        let output = self.output();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let code = output.status.code().unwrap_or_else(|| panic!("{:?}: {}", self.args, output.status));
        let lines = text.lines().filter(|line| line.starts_with("ospite: ")).count();
        assert!(code != 0 && lines == 1 && !text.contains("panicked"), "{:?}: {code}, {text}", self.args);
        Refusal { code, text }
    }
}
