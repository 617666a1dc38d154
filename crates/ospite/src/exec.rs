//! `ospite exec`: a command in the guest.

use std::io::{self, IsTerminal, Read, Write};
use std::thread;

use agent::{Command, Output, Signal, Signaller, WithInput, WithOutput};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::cli::ExecArgs;
use crate::exit::Code;
use crate::failure::Failure;
use crate::guest;

/// Runs the command; its exit code is ours.
pub fn exec(args: &ExecArgs) -> Result<Code, Failure> {
    let agent = guest::agent(&args.vm, args.wait)?;
    let command = Command {
        words: args.command.clone(),
        env: args.env.clone(),
        user: args.user.clone(),
        dir: args.workdir.clone(),
    };
    let with_input = !args.no_stdin && !io::stdin().is_terminal();
    let running = command.start(&agent, with_input).map_err(|error| guest::failure(&error))?;
    pass_signals(running.signaller())
        .map_err(|error| guest::failed(format!("cannot catch signals: {error}")))?;
    let feed: WithInput = Box::new(|mut guest| {
        // A command that reads no more is none of our business.
        let _ = io::copy(&mut io::stdin().lock(), &mut guest);
    });
    let out: WithOutput = Box::new(|output| pass(output, io::stdout()));
    let err: WithOutput = Box::new(|output| pass(output, io::stderr()));
    let exit = running.attend(Some(feed), out, err).map_err(|error| guest::failure(&error))?;
    Ok(Code::Guest(exit.0))
}

/// Each piece at once: somebody may be watching. A reader that has gone is the guest's broken pipe.
fn pass(mut output: Output, mut to: impl Write) {
    let mut piece = [0; 1 << 16];
    while let Ok(count @ 1..) = output.read(&mut piece) {
        if to.write_all(&piece[..count]).and_then(|()| to.flush()).is_err() {
            return;
        }
    }
}

/// Ours are the guest command's. A second interrupt leaves it no choice, and a third does not wait for the
/// guest.
fn pass_signals(signaller: Signaller) -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    let body = move || {
        let mut interrupts = 0;
        for signal in signals.forever() {
            interrupts += u32::from(signal == SIGINT);
            let told = match (signal, interrupts) {
                (SIGTERM, _) => Signal::Term,
                (SIGHUP, _) => Signal::Hup,
                (_, 1) => Signal::Int,
                (_, 2) => Signal::Kill,
                _ => std::process::exit(Code::Guest(255).number()),
            };
            let signaller = signaller.clone();
            thread::spawn(move || {
                if let Err(error) = signaller.send(told) {
                    log::warn!("the guest's command does not hear of a signal: {error}");
                }
            });
        }
    };
    thread::Builder::new().name("signals".into()).spawn(body).map(drop)
}
