//! `ospite network-dialer`: connects a VM to its network's process, and starts that where it is not there.
//!
//! A VM's process may neither start programs nor connect to anything. This one does it on its behalf, knows
//! by itself what to, introduces the VM there as it was declared, and takes nothing from it but the wish.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use net::Introduction;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use store::Home;

use super::{NetworkDialerArgs, Process, Shared};
use crate::exit::Code;
use crate::failure::Failure;

/// The longest reason of a failure, in bytes.
const LONGEST: usize = 1024;

/// Starts one, which ends when the socket that this returns is closed.
pub fn start(shared: Option<&str>, introduction: &Introduction) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new("/proc/self/exe");
    command.args(["network-dialer", "--introduction", &serde_json::to_string(introduction)?]);
    command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
    if let Some(name) = shared {
        command.args(["--shared", name]);
    }
    command.spawn()?;
    Ok(ours.into())
}

/// A new connection to the network's process.
pub fn dial(dialer: &OwnedFd) -> io::Result<OwnedFd> {
    rustix::io::retry_on_intr(|| rustix::net::send(dialer, b"!", SendFlags::NOSIGNAL))?;
    let mut words = [0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut words)];
    let heard =
        rustix::io::retry_on_intr(|| recvmsg(dialer, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC))?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message
            && let Some(fd) = fds.next()
        {
            return Ok(fd);
        }
    }
    match heard.bytes {
        0 => Err(io::Error::new(io::ErrorKind::ConnectionAborted, "its process has gone")),
        bytes => Err(io::Error::other(String::from_utf8_lossy(&words[..bytes]).into_owned())),
    }
}

/// The process.
///
/// # Errors
/// The host would not give what it needs.
pub fn process(args: &NetworkDialerArgs) -> Result<Code, Failure> {
    let failed = |error: io::Error| Failure::from_error(Code::Internal, &error);
    // Signals to the terminal's processes are the VM's.
    let _ = rustix::process::setsid();
    let vm = io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
    let null = std::fs::File::open("/dev/null").map_err(failed)?;
    rustix::stdio::dup2_stdin(null).map_err(|error| failed(error.into()))?;
    let introduction: Introduction = serde_json::from_str(&args.introduction)
        .map_err(|error| Failure::new(Code::Usage, format!("--introduction: {error}")))?;
    let home = Home::find().map_err(|why| Failure::new(Code::Build, why))?;
    let mut dial: Box<dyn FnMut() -> io::Result<OwnedFd>> = match &args.shared {
        None => {
            let mut process = Process::default();
            Box::new(move || process.private())
        }
        Some(name) => {
            home.prepare().map_err(failed)?;
            let mut shared = Shared::new(home.runtime(), name);
            Box::new(move || shared.dial())
        }
    };
    let mut introduce = || {
        let connection = dial()?;
        introduction.say(&connection)?;
        Ok(connection)
    };
    serve(&vm, &mut introduce).map_err(failed)?;
    Ok(Code::Success)
}

/// Dials for every byte that comes, until the VM has gone.
fn serve(vm: &OwnedFd, dial: &mut dyn FnMut() -> io::Result<OwnedFd>) -> io::Result<()> {
    loop {
        let mut wish = [0];
        let (heard, _) = rustix::io::retry_on_intr(|| rustix::net::recv(vm, &mut wish, RecvFlags::empty()))?;
        if heard == 0 {
            return Ok(());
        }
        let (words, fd) = match dial() {
            Ok(fd) => ("done".into(), Some(fd)),
            Err(error) => (error.to_string(), None),
        };
        let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let words = &words.as_bytes()[..words.len().min(LONGEST)];
        sendmsg(vm, &[IoSlice::new(words)], &mut control, SendFlags::NOSIGNAL)?;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::thread;

    use super::*;

    #[test]
    fn a_wish_is_answered_by_a_connection_or_a_reason() {
        let (vm, theirs) = UnixStream::pair().unwrap();
        let (mut far, near) = UnixStream::pair().unwrap();
        let mut answers = vec![Err(io::Error::other("no more")), Ok(OwnedFd::from(near))];
        let serving = thread::spawn(move || serve(&theirs.into(), &mut || answers.pop().unwrap()).unwrap());
        let vm = OwnedFd::from(vm);
        UnixStream::from(dial(&vm).unwrap()).write_all(b"hello").unwrap();
        let mut heard = [0; 5];
        far.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"hello");
        assert_eq!(dial(&vm).unwrap_err().to_string(), "no more");
        drop(vm);
        serving.join().unwrap();
    }
}
