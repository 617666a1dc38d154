//! Bytes on their way out: a thread writes them in large pieces, so that the guest never waits for a
//! terminal, and a buffer with a limit tells the device when to hold its guest back.

use std::io::Write;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use device::Timer;

use crate::sync::lock;

/// From here on the device reports "busy" to the guest.
const SOFT_LIMIT: usize = 256 * 1024;
/// A guest that writes on nevertheless loses bytes from here on, as on a real line.
const HARD_LIMIT: usize = 2 * SOFT_LIMIT;
/// How long the end of a machine waits for a reader that does not read.
const LAST_WORDS: Duration = Duration::from_secs(2);

#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    /// The thread is writing bytes it took.
    writing: bool,
    /// The device was told "busy" and waits for room.
    held: bool,
    stop: bool,
    /// The writer failed; everything is dropped from now on.
    broken: bool,
}

impl Buffer {
    fn is_idle(&self) -> bool {
        self.broken || (self.bytes.is_empty() && !self.writing)
    }
}

#[derive(Default)]
struct Shared {
    buffer: Mutex<Buffer>,
    /// The thread waits here for bytes.
    work: Condvar,
    /// [`Output::flush`] waits here.
    idle: Condvar,
}

/// The sending end.
pub(crate) struct Output {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Output {
    /// Starts the thread that feeds `writer`; it arms `room` when a full buffer has drained.
    pub(crate) fn start(writer: Box<dyn Write + Send>, room: Arc<Timer>) -> std::io::Result<Output> {
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        let thread = device::spawn("serial-out", move || run(&theirs, writer, &room))?;
        Ok(Output { shared, thread: Some(thread) })
    }

    /// Queues a byte; `false` if it had to be dropped.
    pub(crate) fn push(&self, byte: u8) -> bool {
        let mut buffer = lock(&self.shared.buffer);
        if buffer.broken || buffer.bytes.len() >= HARD_LIMIT {
            return false;
        }
        buffer.bytes.push(byte);
        if buffer.bytes.len() == 1 && !buffer.writing {
            self.shared.work.notify_one();
        }
        true
    }

    /// Whether the device should take more; if not, its timer is armed once it should.
    pub(crate) fn has_room(&self) -> bool {
        let mut buffer = lock(&self.shared.buffer);
        buffer.held = buffer.bytes.len() >= SOFT_LIMIT;
        !buffer.held
    }

    /// Waits until everything is written, the writer failed, or `patience` is over.
    pub(crate) fn flush(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut buffer = lock(&self.shared.buffer);
        while !buffer.is_idle() {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return };
            let waited = self.shared.idle.wait_timeout(buffer, left);
            buffer = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.flush(LAST_WORDS);
        let mut buffer = lock(&self.shared.buffer);
        buffer.stop = true;
        self.shared.work.notify_one();
        let idle = buffer.is_idle();
        drop(buffer);
        // A thread that is stuck in a write is left behind: it holds nothing but its writer.
        if let Some(thread) = self.thread.take().filter(|_| idle) {
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared, mut writer: Box<dyn Write + Send>, room: &Timer) {
    let mut piece = Vec::new();
    while take(shared, &mut piece) {
        let result = writer.write_all(&piece).and_then(|()| writer.flush());
        piece.clear();
        let mut buffer = lock(&shared.buffer);
        buffer.writing = false;
        if let Err(error) = result {
            log::warn!("serial output is lost from here on: {error}");
            buffer.broken = true;
            buffer.bytes = Vec::new();
        }
        if std::mem::take(&mut buffer.held) {
            room.arm(Instant::now());
        }
        if buffer.is_idle() {
            shared.idle.notify_all();
        }
    }
}

/// Waits for bytes and moves them to `piece`; `false` at the end.
fn take(shared: &Shared, piece: &mut Vec<u8>) -> bool {
    let mut buffer = lock(&shared.buffer);
    while buffer.bytes.is_empty() {
        if buffer.stop {
            return false;
        }
        buffer = shared.work.wait(buffer).unwrap_or_else(std::sync::PoisonError::into_inner);
    }
    std::mem::swap(&mut buffer.bytes, piece);
    buffer.writing = true;
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use device::Timers;
    use std::io;
    use std::sync::mpsc;

    struct Gate {
        opened: mpsc::Receiver<()>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.opened.recv();
            lock(&self.written).extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stuck_terminal_holds_the_guest_back_and_nothing_is_lost_below_the_limit() {
        let timers = Timers::start().unwrap();
        let (room_tx, room) = mpsc::channel();
        let timer = Arc::new(timers.timer(move || room_tx.send(()).unwrap()));
        let (open, opened) = mpsc::channel();
        let written = Arc::new(Mutex::new(Vec::new()));
        let out = Output::start(Box::new(Gate { opened, written: written.clone() }), timer).unwrap();
        let mut sent = 0;
        while out.has_room() {
            assert!(out.push(sent as u8));
            sent += 1;
        }
        assert!(room.try_recv().is_err());
        drop(open);
        room.recv_timeout(Duration::from_secs(5)).expect("the device hears of the room");
        assert!(out.has_room());
        drop(out);
        let written = lock(&written);
        assert_eq!(written.len(), sent);
        assert!(written.iter().enumerate().all(|(i, &byte)| byte == i as u8));
    }

    #[test]
    fn a_broken_pipe_swallows_output_and_ends_nothing() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let timers = Timers::start().unwrap();
        let out = Output::start(Box::new(Broken), Arc::new(timers.timer(|| {}))).unwrap();
        out.push(b'x');
        out.flush(Duration::from_secs(5));
        assert!(!out.push(b'y'));
        assert!(out.has_room(), "the guest is not held back by a reader who left");
    }
}
