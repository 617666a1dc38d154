//! How a long step is getting on: a line that changes on a terminal, lines without one. Ctrl-C ends it in
//! order.

use std::io::{self, IsTerminal};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::emulate_default_handler;
use store::image::{Error, Progress};

use super::failure;
use crate::exit::Code;
use crate::failure::Failure;
use crate::logger::say;

/// What the person at the terminal sees of it.
pub struct Watched {
    bar: Option<ProgressBar>,
    signal: Arc<AtomicUsize>,
    step: Option<(String, Instant)>,
}

/// A step that took less is not worth a line on a terminal.
const WORTH_A_LINE: Duration = Duration::from_secs(2);

impl Watched {
    /// Takes SIGINT, SIGTERM and SIGHUP over.
    pub fn new() -> Result<Watched, Failure> {
        let signal = Arc::new(AtomicUsize::new(0));
        for number in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register_usize(number, signal.clone(), number as usize)
                .map_err(|error| Failure::from_error(Code::Internal, &error))?;
        }
        let bar = io::stderr().is_terminal().then(ProgressBar::new_spinner);
        Ok(Watched { bar, signal, step: None })
    }

    /// Hears what is told.
    pub fn hear(&mut self, progress: Progress<'_>) -> ControlFlow<()> {
        match progress {
            Progress::Step(step) => self.step(step),
            Progress::Line(line) => log::info!("{line}"),
            Progress::Bytes(done, all) => self.bytes(done, all),
            Progress::Alive => self.bar.iter().for_each(ProgressBar::tick),
        }
        if self.signal.load(Ordering::SeqCst) == 0 {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    }

    fn step(&mut self, step: &str) {
        self.end_step();
        self.step = Some((step.into(), Instant::now()));
        match &self.bar {
            None => say(step),
            Some(bar) => {
                bar.set_style(style("{spinner} {msg} {elapsed}"));
                bar.reset_elapsed();
                bar.set_message(step.to_owned());
                bar.tick();
            }
        }
    }

    fn bytes(&self, done: u64, all: u64) {
        let Some(bar) = &self.bar else { return };
        bar.set_style(style("{spinner} {msg} {wide_bar} {percent}%"));
        bar.set_length(all);
        bar.set_position(done);
    }

    fn end_step(&mut self) {
        let Some((step, began)) = self.step.take() else { return };
        if let Some(bar) = &self.bar
            && began.elapsed() >= WORTH_A_LINE
        {
            bar.println(format!("  {step}: {} s", began.elapsed().as_secs()));
        }
    }

    /// Turns the outcome into ours. Where a signal has ended it, so it ends us.
    pub fn end<T>(mut self, outcome: Result<T, Error>) -> Result<T, Failure> {
        self.end_step();
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        let signal = self.signal.load(Ordering::SeqCst);
        if let Err(Error::Stopped) = &outcome
            && signal != 0
        {
            say("stopped; nothing has changed");
            let _ = emulate_default_handler(signal as i32);
        }
        outcome.map_err(failure)
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}
