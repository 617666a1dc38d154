//! Messages to the person at the terminal, on standard error.

use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::console::terminal;
use crate::plain::plain;

/// Warnings that are said one after the other, and how long it takes until one more may be. A guest can cause as
/// many as it likes, and a VM that lasts has them written to a file.
const WARNINGS: u64 = 100;
const ANOTHER: Duration = Duration::from_secs(10);

/// Prints `ospite: text` on a line of its own, also while the terminal is in raw mode.
pub fn say(text: &str) {
    let end = if terminal::is_raw() { "\r\n" } else { "\n" };
    // Standard error may be closed, and there is nobody left to tell.
    let _ = write!(std::io::stderr(), "ospite: {}{end}", plain(text));
}

/// How many warnings may still be said.
struct Budget {
    left: u64,
    /// Until when what has been earned is in `left`.
    until: Instant,
    unsaid: u64,
}

impl Budget {
    fn new(now: Instant) -> Budget {
        Budget { left: WARNINGS, until: now, unsaid: 0 }
    }

    /// Whether one may be said now; if so, how many were not since the last.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let earned = now.saturating_duration_since(self.until).as_secs() / ANOTHER.as_secs();
        self.until += ANOTHER * u32::try_from(earned).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(earned).min(WARNINGS);
        if self.left == 0 {
            self.unsaid += 1;
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.unsaid))
    }
}

fn warn(text: &str) {
    static BUDGET: Mutex<Option<Budget>> = Mutex::new(None);
    let now = Instant::now();
    let mut budget = BUDGET.lock().unwrap_or_else(PoisonError::into_inner);
    let taken = budget.get_or_insert_with(|| Budget::new(now)).take(now);
    drop(budget);
    match taken {
        None => {}
        Some(0) => say(text),
        Some(unsaid) => say(&format!("{text} (and {unsaid} more messages before it)")),
    }
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
            Level::Error => warn(&record.args().to_string()),
            Level::Warn => warn(&format!("warning: {}", record.args())),
            _ => say(&format!("{}: {}", record.target(), record.args())),
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_without_end_are_said_now_and_then_and_counted() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        let said = (0..1000).filter(|_| budget.take(start).is_some()).count();
        assert_eq!(said as u64, WARNINGS);
        assert_eq!(budget.take(start + ANOTHER / 2), None);
        assert_eq!(budget.take(start + ANOTHER), Some(901));
        assert_eq!(budget.take(start + ANOTHER), None);
        let day = start + Duration::from_secs(86400);
        assert_eq!((0..1000).filter(|_| budget.take(day).is_some()).count() as u64, WARNINGS);
    }
}
