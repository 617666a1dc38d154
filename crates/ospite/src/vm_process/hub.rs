//! What the guest prints, for its log and for everybody who is attached.
//!
//! Readers are given what they have not yet seen from a queue each. A reader that is a little slow makes the
//! guest wait and loses nothing; one that takes nothing for a while is stuck, and from then on loses what
//! does not fit, is told how much, and makes nobody wait.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that are kept for who attaches later.
const RECENT: usize = 256 << 10;
/// Bytes that wait for a reader.
const QUEUE: usize = 256 << 10;
/// How long the guest waits for a reader that takes nothing, until the reader counts as stuck.
const PATIENCE: Duration = Duration::from_secs(1);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the guest's consoles print. Clones are the same hub.
#[derive(Clone)]
pub struct Hub(Arc<Mutex<State>>);

struct State {
    log: Box<dyn Write + Send>,
    /// The log cannot be written, and this has been said.
    log_fails: bool,
    recent: VecDeque<u8>,
    readers: Vec<Arc<Shared>>,
    ended: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    /// How many bytes did not fit.
    lost: u64,
    stuck: bool,
    ended: bool,
}

impl Shared {
    fn push(&self, bytes: &[u8]) {
        let deadline = Instant::now() + PATIENCE;
        let mut queue = lock(&self.queue);
        while queue.bytes.len() >= QUEUE && !queue.stuck && !queue.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            queue.stuck = left.is_zero();
            queue = self.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        if queue.stuck || queue.ended {
            queue.lost += bytes.len() as u64;
        } else {
            queue.bytes.extend(bytes);
        }
        drop(queue);
        self.changed.notify_all();
    }

    fn end(&self) {
        lock(&self.queue).ended = true;
        self.changed.notify_all();
    }
}

/// Who is attached.
pub struct Reader {
    hub: Hub,
    shared: Arc<Shared>,
}

impl Reader {
    /// Waits for what comes next; `None` at the VM's end.
    pub fn next(&self) -> Option<Vec<u8>> {
        let mut queue = lock(&self.shared.queue);
        while queue.bytes.is_empty() && queue.lost == 0 && !queue.ended {
            queue = self.shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        if queue.bytes.is_empty() && queue.ended {
            return None;
        }
        let mut bytes: Vec<u8> = queue.bytes.drain(..).collect();
        queue.stuck = false;
        let lost = std::mem::take(&mut queue.lost);
        if lost > 0 {
            bytes.extend(format!("\r\n[ospite: {lost} bytes left out here: too slow a reader]\r\n").bytes());
        }
        drop(queue);
        self.shared.changed.notify_all();
        Some(bytes)
    }

    /// Ends [`Reader::next`] of this reader.
    pub fn end(&self) {
        self.shared.end();
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.shared.end(); // who waits for its room need not wait any more
        lock(&self.hub.0).readers.retain(|reader| !Arc::ptr_eq(reader, &self.shared));
    }
}

impl Hub {
    /// A hub that writes to `log`.
    pub fn new(log: impl Write + Send + 'static) -> Hub {
        let log = Box::new(log);
        let state =
            State { log, log_fails: false, recent: VecDeque::new(), readers: Vec::new(), ended: false };
        Hub(Arc::new(Mutex::new(state)))
    }

    /// A reader that begins with the last `lines` lines, as far as they are known.
    pub fn attach(&self, lines: usize) -> Reader {
        let mut state = lock(&self.0);
        let shared = Arc::new(Shared::default());
        let from = last_lines(&state.recent, lines);
        let queue = Queue {
            bytes: state.recent.range(from..).copied().collect(),
            ended: state.ended,
            ..Queue::default()
        };
        *lock(&shared.queue) = queue;
        state.readers.push(shared.clone());
        Reader { hub: self.clone(), shared }
    }

    /// There will be no more.
    pub fn end(&self) {
        let mut state = lock(&self.0);
        state.ended = true;
        state.readers.iter().for_each(|reader| reader.end());
    }
}

/// Where the last `lines` lines begin. The line that has not ended, such as a prompt, counts as one.
fn last_lines(text: &VecDeque<u8>, lines: usize) -> usize {
    if lines == 0 {
        return text.len();
    }
    let ends = text.iter().enumerate().rev().filter(|&(_, &byte)| byte == b'\n');
    ends.map(|(at, _)| at + 1).nth(lines - 1).unwrap_or(0)
}

impl State {
    /// The guest goes on if its log cannot be written, as on a full disk.
    fn write_log(&mut self, bytes: &[u8]) {
        let written = self.log.write_all(bytes);
        if let Err(error) = &written
            && !self.log_fails
        {
            log::warn!("what the guest prints cannot be kept: {error}");
        }
        self.log_fails = written.is_err();
    }
}

impl Write for Hub {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = lock(&self.0);
        state.write_log(bytes);
        state.recent.extend(bytes);
        let surplus = state.recent.len().saturating_sub(RECENT);
        state.recent.drain(..surplus);
        // The guest waits for readers without the hub's lock: they come and go meanwhile.
        let readers = state.readers.clone();
        drop(state);
        readers.iter().for_each(|reader| reader.push(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            lock(&self.0).write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn all(reader: &Reader) -> Vec<u8> {
        std::iter::from_fn(|| reader.next()).flatten().collect()
    }

    #[test]
    fn everybody_sees_what_comes_and_as_much_of_the_past_as_they_like() {
        let log = Log::default();
        let mut hub = Hub::new(log.clone());
        hub.write_all(b"one\ntwo\nlogin: ").unwrap();
        let readers = [0, 1, 2, 99].map(|lines| hub.attach(lines));
        hub.write_all(b"root\n").unwrap();
        hub.end();
        let seen = readers.map(|reader| String::from_utf8(all(&reader)).unwrap());
        assert_eq!(seen, ["root\n", "login: root\n", "two\nlogin: root\n", "one\ntwo\nlogin: root\n"]);
        assert_eq!(*lock(&log.0), b"one\ntwo\nlogin: root\n");
        assert!(hub.attach(0).next().is_none(), "the VM has ended");
    }

    #[test]
    fn a_reader_that_keeps_up_misses_nothing_however_much_comes() {
        let mut hub = Hub::new(io::sink());
        let reader = hub.attach(0);
        let text: Vec<u8> = (0..8 * QUEUE).map(|i| (i * 7) as u8).collect();
        let printed = text.clone();
        let guest = thread::spawn(move || {
            printed.chunks(1000).for_each(|piece| hub.write_all(piece).unwrap());
            hub.end();
        });
        assert!(all(&reader) == text);
        guest.join().unwrap();
    }

    #[test]
    fn a_stuck_reader_delays_the_guest_once_and_is_told_what_it_missed() {
        let mut hub = Hub::new(io::sink());
        let (stuck, other) = (hub.attach(0), hub.attach(0));
        let begun = Instant::now();
        let reading = thread::spawn(move || all(&other).len());
        for _ in 0..100 {
            hub.write_all(&[b'x'; QUEUE / 10]).unwrap();
        }
        assert!(begun.elapsed() < 5 * PATIENCE, "{:?}", begun.elapsed());
        let first = stuck.next().unwrap();
        assert!(first.len() < 2 * QUEUE && String::from_utf8_lossy(&first).contains("too slow"));
        hub.write_all(b"again").unwrap();
        assert_eq!(stuck.next().unwrap(), b"again");
        hub.end();
        assert_eq!(reading.join().unwrap(), 100 * (QUEUE / 10) + 5);
    }

    #[test]
    fn a_reader_that_goes_away_is_waited_for_no_longer() {
        let mut hub = Hub::new(io::sink());
        let reader = hub.attach(0);
        hub.write_all(&[b'x'; QUEUE]).unwrap();
        drop(reader);
        let begun = Instant::now();
        hub.write_all(&[b'x'; QUEUE]).unwrap();
        assert!(begun.elapsed() < PATIENCE && lock(&hub.0).readers.is_empty());
    }

    #[test]
    fn a_log_that_cannot_be_written_ends_nothing() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut hub = Hub::new(Full);
        let reader = hub.attach(0);
        hub.write_all(b"still here").unwrap();
        assert_eq!(reader.next().unwrap(), b"still here");
    }
}
