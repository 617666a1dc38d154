//! A cable from a tap interface to a user-mode network, so that programs in a network namespace are its
//! guest: one as fast as the host, which no VM is.
//!
//! Usage: cable TAP OSPITE|self [HOST:GUEST...]; prints the process number of the network, and ends with its
//! standard input. `self` is this program's own network, without a sandbox.

use std::error::Error;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

use net::{Attachment, Introduction, Link, MAX_PACKET, Mac, Offloads, Publish, TapLink};
use rustix::event::{PollFd, PollFlags, poll};

/// What Linux's own cards have.
const CARD: Mac = Mac([0x52, 0x54, 0, 0, 0, 7]);

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args == ["network-process"] {
        return Ok(net::user::run(net::user::Door::Private(std::io::stdin().as_fd().try_clone_to_owned()?))?);
    }
    let [tap, ospite, publish @ ..] = &args[..] else {
        return Err("usage: cable TAP OSPITE|self [HOST:GUEST...]".into());
    };
    let publish = publish.iter().map(|port| port.parse()).collect::<Result<Vec<Publish>, _>>()?;
    let allow = vec!["0.0.0.0/0".parse()?, "::/0".parse()?];
    let introduction = Introduction { name: "guest".into(), mac: CARD, publish, allow, bandwidth: None };
    let tap: Arc<dyn Link> = Arc::new(TapLink::new(tap, None)?);
    let ospite = if ospite == "self" { "/proc/self/exe".into() } else { ospite.clone() };
    let dial = move || {
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = Command::new(&ospite);
        command.arg("network-process").stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
        println!("{}", command.spawn()?.id());
        introduction.say(&ours)?;
        Ok(ours.into())
    };
    let network = Attachment::new(None, Box::new(dial))?;
    let network: Arc<dyn Link> = Arc::new(network);
    let all = Offloads { checksum: true, tso4: true, tso6: true };
    network.set_offloads(all);
    tap.set_offloads(all);
    for (from, to) in [(tap.clone(), network.clone()), (network, tap)] {
        thread::spawn(move || copy(&*from, &*to));
    }
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn copy(from: &dyn Link, to: &dyn Link) {
    let mut packet = vec![0; MAX_PACKET];
    loop {
        match from.receive(&mut packet) {
            Some(length) => {
                while !to.send(&packet[..length]) {
                    wait(to, PollFlags::OUT);
                }
            }
            None => wait(from, PollFlags::IN),
        }
    }
}

fn wait(link: &dyn Link, flags: PollFlags) {
    if let Ok(Some(fd)) = link.readiness() {
        let _ = poll(&mut [PollFd::new(&fd, flags)], None);
    }
}
