//! `ospite console`: this terminal is the VM's.

use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::Duration;

use store::vm::Folder;
use store::{Home, Name};

use super::protocol::Request;
use super::{Client, stop};
use crate::cli::EscapeKey;
use crate::console::output::Output;
use crate::console::{Attached, Console, Keyboard};
use crate::exit::Code;
use crate::failure::Failure;
use crate::{logger, signals};

/// How long an answer is waited for: a pause may have to wait for a slow disk.
const ANSWER: Duration = Duration::from_secs(30);

/// Why a console is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// The VM's process ended.
    Ended,
    /// The person left, and the VM goes on.
    Left,
}

/// Attaches this terminal, or standard input and output, to a VM that is on.
pub fn console(home: &Home, folder: &Folder, escape: EscapeKey, lines: usize) -> Result<Over, Failure> {
    let name = folder.name();
    if !folder.is_on()? {
        return Err(stop::not_running(folder));
    }
    let host = |error: io::Error| {
        Failure::new(Code::WrongState, format!("cannot attach to the console of {name}: {error}"))
            .hint(format!("how it is: ospite info {name}"))
    };
    let client = Client::connect(home, name, ANSWER).map_err(host)?;
    let stream = client.stream(Request::Console { lines }).map_err(host)?;
    let keys = stream.get_ref().try_clone().map_err(host)?;
    signals::leave_terminal_in_order().map_err(host)?;
    let output = Output::start(io::stdout()).map_err(host)?;
    let (over, why) = mpsc::channel();
    follow(stream, output.clone(), over.clone()).map_err(host)?;
    let attached = Attached {
        name: name.to_string(),
        escape,
        keyboard: Keyboard::Remote(keys),
        ask: ask(home.clone(), name.clone()),
        detach: Some(Box::new(move || over.send(Over::Left).unwrap_or_default())),
    };
    let console = Console::attach(attached, &output);
    let why = why.recv().unwrap_or(Over::Ended);
    if why == Over::Left {
        output.never_wait();
    }
    output.drain();
    drop(console);
    match why {
        Over::Ended => logger::say(&format!("{name} has ended")),
        Over::Left => logger::say(&format!("{name} goes on; ospite console {name} comes back to it")),
    }
    Ok(why)
}

fn ask(home: Home, name: Name) -> Box<dyn Fn(vmm::Request) -> Option<vmm::Status> + Send> {
    Box::new(move |request| {
        let mut client = Client::connect(&home, &name, ANSWER).ok()?;
        Some(client.request(request).ok()?.vm)
    })
}

/// Prints what comes, until the VM ends.
fn follow(mut stream: BufReader<UnixStream>, output: Output, over: Sender<Over>) -> io::Result<()> {
    let body = move || {
        let (mut printer, mut buffer) = (output.guest_end(), [0; 16 << 10]);
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            if printer.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = stream.get_ref().shutdown(Shutdown::Both);
        let _ = over.send(Over::Ended); // whoever waits may have left
    };
    thread::Builder::new().name("console".into()).spawn(body).map(drop)
}
