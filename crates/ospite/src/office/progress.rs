//! What is going on with several VMs at the same time: a line for each on a terminal, otherwise a line
//! for each change.

use std::collections::BTreeMap;
use std::io::{IsTerminal, stderr};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use store::Name;

use crate::logger::say;

/// The lines.
pub struct Progress {
    all: MultiProgress,
    lines: BTreeMap<Name, ProgressBar>,
    /// No terminal: what is said is printed once.
    plain: bool,
    quiet: bool,
}

impl Progress {
    /// Lines for these VMs; none where a program reads.
    pub fn new<'a>(names: impl Iterator<Item = &'a Name>, quiet: bool) -> Progress {
        let plain = !stderr().is_terminal();
        let all = MultiProgress::new();
        let names: Vec<&Name> = names.collect();
        let width = names.iter().map(|name| name.as_str().len()).max().unwrap_or(0);
        let mut lines = BTreeMap::new();
        if !plain && !quiet {
            let style = ProgressStyle::with_template("{spinner} {prefix}  {wide_msg} {elapsed}");
            let style = style.unwrap_or_else(|_| ProgressStyle::default_spinner());
            for name in names {
                let line = all.add(ProgressBar::new_spinner().with_style(style.clone()));
                line.set_prefix(format!("{name:width$}"));
                line.enable_steady_tick(Duration::from_millis(100));
                lines.insert(name.clone(), line);
            }
        }
        Progress { all, lines, plain, quiet }
    }

    /// What is going on with a VM.
    pub fn say(&self, name: &Name, what: &str) {
        if let Some(line) = self.lines.get(name) {
            line.set_message(what.to_owned());
        } else if self.plain && !self.quiet {
            say(&format!("{name}: {what}"));
        }
    }

    /// For what changes so often that it is worth a line on a terminal only.
    pub fn murmur(&self, name: &Name, what: &str) {
        if let Some(line) = self.lines.get(name) {
            line.set_message(what.to_owned());
        }
    }

    /// The lines go; what is printed next takes their place.
    pub fn end(&self) {
        self.lines.values().for_each(ProgressBar::finish_and_clear);
        let _ = self.all.clear(); // a terminal that has gone away shows nothing anyway
    }
}
