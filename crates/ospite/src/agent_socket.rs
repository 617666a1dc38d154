//! `ospite run --agent-socket`: the way of `ospite exec` and `ospite cp` to this VM's guest.

use std::fs;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use machine::ConsolePorts;
use rustix::fs::Mode;
use rustix::process::umask;

use crate::exit::Code;
use crate::failure::Failure;

/// The socket's file, gone once this is dropped.
pub struct AgentSocket {
    path: PathBuf,
    listener: Option<UnixListener>,
    remover: Child,
}

impl AgentSocket {
    /// Makes the socket; only this user can connect.
    pub fn bind(path: &Path) -> Result<AgentSocket, Failure> {
        let path = std::path::absolute(path).map_err(|error| failed(path, error))?;
        let listener = bind(&path).map_err(|error| failed(&path, error))?;
        let remover = remover(&path).map_err(|error| failed(&path, error))?;
        Ok(AgentSocket { path, listener: Some(listener), remover })
    }

    /// Opens the guest's ports to whoever connects.
    pub fn serve(&mut self, ports: ConsolePorts) -> Result<(), Failure> {
        let Some(listener) = self.listener.take() else { return Ok(()) };
        vmm::guest_ports::listen(ports, listener).map_err(|error| failed(&self.path, error))
    }
}

/// Removes the file when we have ended: by then we may not, as the folder is not ours alone.
fn remover(path: &Path) -> io::Result<Child> {
    let mut command = Command::new("sh");
    command.args(["-c", "read -r _; rm -f -- \"$0\""]).arg(path).process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
}

fn failed(path: &Path, error: io::Error) -> Failure {
    Failure::new(Code::Build, format!("cannot open the socket {}: {error}", path.display()))
        .hint("--agent-socket takes the path of a file that does not exist, of at most 107 bytes")
}

/// What a VM that was killed left behind is no obstacle.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let abandoned = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    if UnixStream::connect(path).err().is_some_and(abandoned) {
        fs::remove_file(path)?;
    }
    let before = umask(Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    umask(before);
    listener
}

impl Drop for AgentSocket {
    fn drop(&mut self) {
        drop(self.remover.stdin.take());
        let _ = self.remover.wait();
    }
}
