//! `ospite logs`: what the guest printed.

use std::fs;
use std::thread;
use std::time::Duration;

use store::vm::Folder;
use store::vm::log::Reader;

use crate::cli::LogsArgs;
use crate::exit::Code;
use crate::failure::Failure;
use crate::output;

/// How often a log that is followed is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Prints the log.
pub fn logs(folder: &Folder, args: &LogsArgs) -> Result<Code, Failure> {
    let host = |error: std::io::Error| {
        Failure::new(Code::Build, format!("cannot read the log of {}: {error}", folder.name()))
    };
    if args.messages {
        return match fs::read(folder.messages()) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Code::Success),
            text => output::print(&text.map_err(host)?).map(|()| Code::Success),
        };
    }
    let (mut reader, text) = Reader::open(folder.path(), args.tail).map_err(host)?;
    output::print(&text)?;
    let mut on = args.follow;
    while on {
        thread::sleep(LOOK);
        // Looked at first: what a VM printed last is read after it is off.
        on = folder.is_on()?;
        output::print(&reader.read_new().map_err(host)?)?;
    }
    Ok(Code::Success)
}
