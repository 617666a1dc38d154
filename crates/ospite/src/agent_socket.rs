//! `ospite run --agent-socket`: the way of `ospite exec` and `ospite cp` to this VM's guest.

use std::fs;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use machine::ConsolePorts;
use rustix::fs::Mode;
use rustix::process::umask;

use crate::exit::Code;
use crate::failure::Failure;

/// The socket's file, gone once this is dropped.
pub struct AgentSocket(PathBuf);

impl AgentSocket {
    /// Opens the guest's ports to whoever connects to `path`, which is this user only.
    pub fn open(path: &Path, ports: ConsolePorts) -> Result<AgentSocket, Failure> {
        let failed = |error: io::Error| {
            Failure::new(Code::Build, format!("cannot open the socket {}: {error}", path.display()))
                .hint("--agent-socket takes the path of a file that does not exist, of at most 107 bytes")
        };
        let listener = bind(path).map_err(failed)?;
        vmm::guest_ports::listen(ports, listener).map_err(failed)?;
        Ok(AgentSocket(path.to_owned()))
    }
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
        let _ = fs::remove_file(&self.0);
    }
}
