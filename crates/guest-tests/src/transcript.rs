//! Everything a guest has printed, and who waits for it.

use std::io::{Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
}

/// Fills itself from a stream. Clones are the same transcript.
#[derive(Clone, Default)]
pub struct Transcript(Arc<(Mutex<State>, Condvar)>);

impl Transcript {
    /// Reads `stream` to its end on a thread of its own.
    pub fn of(mut stream: impl Read + Send + 'static, echo: bool) -> (Transcript, JoinHandle<()>) {
        let transcript = Transcript::default();
        let ours = transcript.clone();
        let reader = thread::spawn(move || {
            let mut buffer = [0; 4096];
            // A terminal whose other end is closed reads as an error.
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                if echo {
                    let mut out = std::io::stdout().lock();
                    let _ = out.write_all(&buffer[..count]).and_then(|()| out.flush());
                }
                ours.change(|state| state.bytes.extend_from_slice(&buffer[..count]));
            }
            ours.change(|state| state.ended = true);
        });
        (transcript, reader)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.0.1.notify_all();
    }

    /// Waits until `text` appears at or after `from`; where it ends. `None` if the stream ends or the
    /// deadline passes without it.
    pub fn wait_for(&self, text: &str, from: usize, deadline: Instant) -> Option<usize> {
        let mut state = self.lock();
        let mut seen = from;
        loop {
            if let Some(at) = find(&state.bytes[seen..], text.as_bytes()) {
                return Some(seen + at + text.len());
            }
            seen = from.max(state.bytes.len().saturating_sub(text.len()));
            let left = deadline.checked_duration_since(Instant::now())?;
            if state.ended {
                return None;
            }
            state = self.0.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The text between two places.
    pub fn text(&self, from: usize, to: usize) -> String {
        String::from_utf8_lossy(&self.lock().bytes[from..to]).into_owned()
    }

    /// How long it is.
    pub fn len(&self) -> usize {
        self.lock().bytes.len()
    }

    /// Its last part, for the message of a test that fails.
    pub fn tail(&self) -> String {
        let len = self.len();
        self.text(len.saturating_sub(6000), len)
    }
}

fn find(bytes: &[u8], text: &[u8]) -> Option<usize> {
    bytes.windows(text.len()).position(|window| window == text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::pipe;
    use std::time::Duration;

    #[test]
    fn text_is_found_across_reads_and_only_after_the_place() {
        let (reader, mut writer) = pipe().unwrap();
        let (transcript, thread) = Transcript::of(reader, false);
        let soon = || Instant::now() + Duration::from_secs(10);
        writer.write_all(b"debian lo").unwrap();
        let late = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            writer.write_all(b"gin: root").unwrap();
        });
        assert_eq!(transcript.wait_for("login:", 0, soon()), Some(13));
        late.join().unwrap();
        assert_eq!(transcript.wait_for("login:", 13, soon()), None, "the stream has ended");
        thread.join().unwrap();
        assert_eq!(transcript.tail(), "debian login: root");
    }
}
