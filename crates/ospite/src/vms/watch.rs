//! Whether a VM does its work, tried again and again while it runs: its keeper's ear.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use store::Home;
use store::vm::{Definition, Folder, Health, HealthState, Word};

use super::{Client, health};

/// Between two tries until the first one that passes.
const EAGER: Duration = Duration::from_secs(1);
/// How long the VM's process may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// Watches until it is dropped.
pub struct Watch {
    _end: Sender<()>,
}

/// Watches over a VM whose definition has a health check; `tell` hears what changes.
pub fn watch(
    home: Home,
    folder: Folder,
    definition: &Definition,
    tell: impl Fn(HealthState) + Send + 'static,
) -> Option<Watch> {
    let check = definition.health.clone()?;
    let publish = definition.network.publish.clone();
    let (end, ended) = mpsc::channel::<()>();
    let body = move || {
        let mut judge = Judge::new(&check, Instant::now());
        let mut resets = None;
        loop {
            if ended.recv_timeout(judge.pause()) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            let client = Client::connect(&home, folder.name(), ANSWER);
            let status = client.and_then(|mut client| client.request(vmm::Request::Status));
            // Whoever is paused need not answer; a process that does not answer has yet to start.
            let Ok(status) = status else { continue };
            if status.vm.state == vmm::State::Paused {
                continue;
            }
            if resets.replace(status.vm.resets).is_some_and(|before| before != status.vm.resets) {
                judge = Judge::new(&check, Instant::now());
                tell(judge.state());
            }
            let outcome = health::try_once(&check, &publish, health::in_guest(&folder));
            if let Some(news) = judge.judge(outcome, Instant::now()) {
                tell(news);
            }
        }
    };
    match thread::Builder::new().name("health".into()).spawn(body) {
        Ok(_) => Some(Watch { _end: end }),
        Err(error) => {
            log::warn!("the health check cannot run: {error}");
            None
        }
    }
}

/// What follows from one try after another.
struct Judge<'a> {
    check: &'a Health,
    word: Word,
    /// Why the last try failed.
    reason: Option<String>,
    failures: u32,
    /// Until here a VM that has not been healthy yet still starts.
    grace: Instant,
}

impl Judge<'_> {
    fn new(check: &Health, now: Instant) -> Judge<'_> {
        let grace = now + Duration::from_secs(check.start_period);
        Judge { check, word: Word::Starting, reason: None, failures: 0, grace }
    }

    fn state(&self) -> HealthState {
        HealthState { word: self.word, reason: None }
    }

    fn pause(&self) -> Duration {
        let interval = Duration::from_secs(self.check.interval);
        if self.word == Word::Starting { interval.min(EAGER) } else { interval }
    }

    /// What is new, if anything is.
    fn judge(&mut self, outcome: Result<(), String>, now: Instant) -> Option<HealthState> {
        let before = (self.word, self.reason.take());
        match outcome {
            Ok(()) => (self.word, self.failures) = (Word::Healthy, 0),
            Err(reason) => {
                self.reason = Some(reason);
                if self.word != Word::Starting || now >= self.grace {
                    self.failures = self.failures.saturating_add(1);
                }
                if self.failures >= self.check.retries {
                    self.word = Word::Unhealthy;
                }
            }
        }
        // Who waits for it to come up wants to know what keeps it.
        let told = self.word != before.0 || self.word == Word::Starting && self.reason != before.1;
        told.then(|| HealthState { word: self.word, reason: self.reason.clone() })
    }
}

#[cfg(test)]
mod tests {
    use store::vm::{OnFailure, Probe};

    use super::*;

    #[test]
    fn a_vm_is_ill_after_as_many_failures_in_a_row_as_its_check_says() {
        let check = Health {
            probe: Probe::Tcp(80),
            interval: 5,
            timeout: 1,
            retries: 3,
            start_period: 60,
            on_failure: OnFailure::None,
        };
        let begun = Instant::now();
        let mut judge = Judge::new(&check, begun);
        let mut words = |outcomes: &str, after| -> Vec<(Word, Option<String>)> {
            let now = begun + Duration::from_secs(after);
            let outcome = |c: char| if c == '+' { Ok(()) } else { Err(c.to_string()) };
            let news = outcomes.chars().filter_map(|c| judge.judge(outcome(c), now));
            news.map(|state| (state.word, state.reason)).collect()
        };
        assert_eq!(words("xxxxxx", 59), [(Word::Starting, Some("x".into()))], "it still starts");
        assert_eq!(words("+", 59), [(Word::Healthy, None)]);
        assert_eq!(words("xx+xx+", 59), [], "never three in a row");
        assert_eq!(words("xyzx", 61), [(Word::Unhealthy, Some("z".into()))]);
        assert_eq!(words("+", 61), [(Word::Healthy, None)], "it has come back by itself");
        let mut late = Judge::new(&check, begun);
        assert_eq!(late.pause(), EAGER);
        let now = begun + Duration::from_secs(60);
        let news = [(); 3].map(|()| late.judge(Err("x".into()), now).map(|state| state.word));
        assert_eq!(news, [Some(Word::Starting), None, Some(Word::Unhealthy)], "it has never come up");
        assert_eq!(late.pause(), Duration::from_secs(5));
    }
}
