//! `ospite logs`: what the guest printed.

use std::fs;
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use store::vm::Folder;
use store::vm::log::Reader;

use crate::cli::LogsArgs;
use crate::exit::Code;
use crate::failure::Failure;
use crate::output;
use crate::plain::plain;

/// How often a log that is followed is looked at.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Prints the log.
pub fn logs(folder: &Folder, args: &LogsArgs) -> Result<Code, Failure> {
    let host = |error: std::io::Error| {
        Failure::new(Code::Build, format!("cannot read the log of {}: {error}", folder.name()))
    };
    if args.messages {
        return match fs::read(folder.messages()) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Code::Success),
            text => {
                let text = text.map_err(host)?;
                output::print(plain(&String::from_utf8_lossy(&text)).as_bytes()).map(|()| Code::Success)
            }
        };
    }
    let (mut reader, text) = Reader::open(&folder.log(), args.tail).map_err(host)?;
    output::print(&text)?;
    let mut on = args.follow;
    while on {
        if nobody_reads(&std::io::stdout()) {
            return Ok(Code::Success);
        }
        // Looked at first: what a VM printed last is read after it is off.
        on = folder.is_on()?;
        output::print(&reader.read_new().map_err(host)?)?;
    }
    Ok(Code::Success)
}

/// Whether the pipe's other end goes within a moment: it need not wait for the guest's next word.
fn nobody_reads(output: &impl AsFd) -> bool {
    let mut look = [PollFd::new(output, PollFlags::empty())];
    let _ = poll(&mut look, Some(&LOOK)); // interrupted, it is a shorter moment
    look[0].revents().intersects(PollFlags::ERR | PollFlags::HUP)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_whose_reader_has_gone_ends_it() {
        let (reader, writer) = std::io::pipe().unwrap();
        assert!(!nobody_reads(&writer));
        drop(reader);
        assert!(nobody_reads(&writer));
        assert!(!nobody_reads(&std::fs::File::open("/dev/null").unwrap()));
    }
}
