//! What the guest prints: a queue between the vCPU that writes to the UART and the host's standard
//! output, so that a byte does not cost a system call and a slow reader slows the guest down instead
//! of losing its output.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes the queue holds before the guest has to wait.
const LIMIT: usize = 64 << 10;

#[derive(Default)]
struct State {
    queue: VecDeque<u8>,
    /// Output may leave; until then it gathers.
    flowing: bool,
    /// The writer has taken bytes and not yet written them.
    busy: bool,
    /// A full queue drops bytes instead of making the guest wait.
    never_wait: bool,
    /// Nobody reads any more: everything is dropped.
    gone: bool,
}

/// The host's end of the queue. Clones are the same queue.
#[derive(Clone, Default)]
pub struct Output {
    state: Arc<(Mutex<State>, Condvar)>,
}

/// The guest's end.
pub struct GuestEnd(Output);

impl Output {
    /// A queue whose bytes go to `sink` on a thread of their own, once [`Output::flow`] says so.
    pub fn start(sink: impl Write + Send + 'static) -> io::Result<Output> {
        let output = Output::default();
        let theirs = output.clone();
        machine::spawn("output", move || theirs.serve(sink))?;
        Ok(output)
    }

    /// What the machine writes to.
    pub fn guest_end(&self) -> GuestEnd {
        GuestEnd(self.clone())
    }

    /// Lets the bytes out.
    pub fn flow(&self) {
        self.change(|state| state.flowing = true);
    }

    /// From now on a vCPU never waits for a slow reader: it has to come home.
    pub fn never_wait(&self) {
        self.change(|state| state.never_wait = true);
    }

    /// Waits until everything has been written. A reader that takes its time gets it, as long as
    /// [`Output::never_wait`] has not been called.
    pub fn drain(&self) {
        let mut state = self.lock();
        while !state.gone && state.flowing && (state.busy || !state.queue.is_empty()) {
            let patience = Duration::from_millis(if state.never_wait { 500 } else { 60_000 });
            let (next, waited) =
                self.state.1.wait_timeout(state, patience).unwrap_or_else(PoisonError::into_inner);
            state = next;
            if waited.timed_out() && state.never_wait {
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.state.1.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.state.1.notify_all();
    }

    fn serve(&self, mut sink: impl Write) {
        loop {
            let bytes = self.take();
            if let Err(error) = sink.write_all(&bytes).and_then(|()| sink.flush()) {
                if error.kind() != io::ErrorKind::BrokenPipe {
                    log::warn!("what the guest prints is lost from here on: {error}");
                }
                return self.change(|state| state.gone = true);
            }
            self.change(|state| state.busy = false);
        }
    }

    fn take(&self) -> Vec<u8> {
        let mut state = self.lock();
        while !state.flowing || state.queue.is_empty() {
            state = self.wait(state);
        }
        state.busy = true;
        let bytes = state.queue.drain(..).collect();
        drop(state);
        self.state.1.notify_all();
        bytes
    }

    fn push(&self, bytes: &[u8]) -> usize {
        let mut state = self.lock();
        while state.queue.len() >= LIMIT && !state.never_wait && !state.gone {
            state = self.wait(state);
        }
        let room = if state.gone { 0 } else { LIMIT.saturating_sub(state.queue.len()) };
        let taken = bytes.len().min(room);
        state.queue.extend(&bytes[..taken]);
        let all = state.gone || state.never_wait;
        drop(state);
        self.state.1.notify_all();
        if all { bytes.len() } else { taken }
    }
}

impl Write for GuestEnd {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(self.0.push(bytes))
    }

    /// The queue flushes itself.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
    use std::thread;

    /// A reader that takes a piece whenever the test asks for one.
    struct Slow(SyncSender<Vec<u8>>);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn slow() -> (Output, Receiver<Vec<u8>>) {
        let (sender, reader) = sync_channel(0);
        (Output::start(Slow(sender)).unwrap(), reader)
    }

    #[test]
    fn output_gathers_until_it_may_flow_and_arrives_in_order() {
        let (output, reader) = slow();
        let mut guest = output.guest_end();
        guest.write_all(b"Linux ").unwrap();
        guest.write_all(b"version").unwrap();
        assert!(reader.recv_timeout(Duration::from_millis(20)).is_err());
        output.flow();
        assert_eq!(reader.recv().unwrap(), b"Linux version");
        output.drain();
    }

    #[test]
    fn a_slow_reader_makes_the_guest_wait_and_loses_nothing() {
        let (output, reader) = slow();
        output.flow();
        let text: Vec<u8> = (0..LIMIT * 3).map(|i| i as u8).collect();
        let (theirs, mut guest) = (text.clone(), output.guest_end());
        let writer = thread::spawn(move || guest.write_all(&theirs).unwrap());
        thread::sleep(Duration::from_millis(20));
        assert!(!writer.is_finished(), "there is no room for so much");
        let mut seen = Vec::new();
        while seen.len() < text.len() {
            seen.extend(reader.recv().unwrap());
        }
        writer.join().unwrap();
        assert!(seen == text);
    }

    #[test]
    fn a_vcpu_that_waits_for_a_reader_comes_home_when_the_power_is_cut() {
        let (output, _reader) = slow();
        output.flow();
        let mut guest = output.guest_end();
        let writer = thread::spawn(move || guest.write_all(&[b'x'; LIMIT * 3]).unwrap());
        thread::sleep(Duration::from_millis(20));
        output.never_wait();
        writer.join().unwrap();
        output.drain();
    }

    #[test]
    fn a_reader_that_has_gone_stops_nobody() {
        let (output, reader) = slow();
        drop(reader);
        output.flow();
        output.guest_end().write_all(&[b'x'; LIMIT * 3]).unwrap();
        output.drain();
    }
}
