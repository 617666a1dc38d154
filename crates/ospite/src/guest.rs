//! The way to a VM's guest, for the commands that need its agent.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use agent::{Agent, Error};
use store::{Home, Name};

use crate::exit::Code;
use crate::failure::Failure;
use crate::vms::protocol::Request;
use crate::vms::{self, Client};

/// How long the VM's process may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// The agent of the VM that is called `vm`: by its name, or by the path of the socket that `ospite run
/// --agent-socket` has made.
pub fn agent(vm: &str, wait: u64) -> Result<Agent, Failure> {
    let patience = Duration::from_secs(wait);
    if vm.contains('/') {
        let socket = Path::new(vm).to_owned();
        return Ok(Agent::new(move || UnixStream::connect(&socket), patience));
    }
    let home = vms::home()?;
    let name: Name = vm.parse().map_err(|error| Failure::new(Code::Usage, format!("{vm:?}: {error}")))?;
    vms::find(&home, &name)?;
    Ok(Agent::new(move || control(&home, &name), patience))
}

/// A VM's control socket, become a way to its guest's ports. Nothing comes from there before it is asked
/// for, so that nothing is lost in the reader.
fn control(home: &Home, name: &Name) -> io::Result<UnixStream> {
    Ok(Client::connect(home, name, ANSWER)?.stream(Request::Agent)?.into_inner())
}

/// What is ours to say, where every smaller code may be the guest command's.
pub fn failed(message: impl Into<String>) -> Failure {
    Failure::new(Code::Guest(255), message)
}

/// An error with its causes, for `ospite exec`.
pub fn failure(error: &Error) -> Failure {
    Failure::from_error(Code::Guest(255), error)
}
