//! Messages to the person at the terminal, on standard error.

use std::io::Write;

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::console::terminal;

/// Prints `ospite: text` on a line of its own, also while the terminal is in raw mode.
pub fn say(text: &str) {
    let end = if terminal::is_raw() { "\r\n" } else { "\n" };
    // Standard error may be closed, and there is nobody left to tell.
    let _ = write!(std::io::stderr(), "ospite: {text}{end}");
}

struct Logger;

/// Warnings by default; `-v` adds what is done, `-vv` and `-vvv` how.
pub fn start(verbose: u8) {
    let level = match verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    if log::set_logger(&Logger).is_ok() {
        log::set_max_level(level);
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        match record.level() {
            Level::Error => say(&record.args().to_string()),
            Level::Warn => say(&format!("warning: {}", record.args())),
            _ => say(&format!("{}: {}", record.target(), record.args())),
        }
    }

    fn flush(&self) {}
}
