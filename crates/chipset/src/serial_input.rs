//! Keystrokes on their way to a UART: a bounded queue. Whoever sends too much waits; nothing is lost.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use device::Timer;

use crate::sync::lock;

/// How many bytes wait in the queue before a sender waits too.
const CAPACITY: usize = 64 * 1024;

#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    room: Condvar,
    kick: Arc<Timer>,
}

/// The sending end of a UART's input. Clones feed the same queue.
#[derive(Clone)]
pub struct SerialInput(Arc<Shared>);

impl SerialInput {
    /// A queue that arms `kick` when there is something new.
    pub(crate) fn new(kick: Arc<Timer>) -> SerialInput {
        SerialInput(Arc::new(Shared { queue: Mutex::default(), room: Condvar::new(), kick }))
    }

    /// Queues all of `bytes`, in order, waiting for the guest to take what came before as needed. Gives
    /// up when the UART goes away.
    pub fn send(&self, mut bytes: &[u8]) {
        let mut queue = lock(&self.0.queue);
        while !bytes.is_empty() {
            while queue.bytes.len() >= CAPACITY && !queue.closed {
                queue = self.0.room.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            if queue.closed {
                return;
            }
            let (now, later) = bytes.split_at(bytes.len().min(CAPACITY - queue.bytes.len()));
            queue.bytes.extend(now);
            bytes = later;
            self.0.kick.arm(Instant::now());
        }
    }

    /// Queues as much as fits without waiting; how many bytes that was.
    pub fn try_send(&self, bytes: &[u8]) -> usize {
        let mut queue = lock(&self.0.queue);
        if queue.closed {
            return 0;
        }
        let fits = bytes.len().min(CAPACITY.saturating_sub(queue.bytes.len()));
        queue.bytes.extend(&bytes[..fits]);
        if fits > 0 {
            self.0.kick.arm(Instant::now());
        }
        fits
    }

    /// Wakes all senders and takes no more from them.
    pub fn close(&self) {
        lock(&self.0.queue).closed = true;
        self.0.room.notify_all();
    }

    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.0.queue).bytes.is_empty()
    }

    /// Moves up to `max` bytes to `to`.
    pub(crate) fn take(&self, max: usize, to: &mut VecDeque<u8>) -> usize {
        let mut queue = lock(&self.0.queue);
        let count = max.min(queue.bytes.len());
        to.extend(queue.bytes.drain(..count));
        if count > 0 {
            self.0.room.notify_all();
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use device::Timers;
    use std::thread;

    #[test]
    fn a_paste_larger_than_the_queue_waits_and_arrives_whole() {
        let timers = Timers::start().unwrap();
        let input = SerialInput::new(Arc::new(timers.timer(|| {})));
        let paste: Vec<u8> = (0..3 * CAPACITY + 7).map(|i| (i * 31) as u8).collect();
        let (sender, sent) = (input.clone(), paste.clone());
        let typist = thread::spawn(move || sender.send(&sent));
        let mut arrived = VecDeque::new();
        while arrived.len() < paste.len() {
            if input.take(16, &mut arrived) == 0 {
                thread::yield_now();
            }
        }
        typist.join().unwrap();
        assert!(arrived == paste);
    }

    #[test]
    fn a_waiting_sender_is_released_when_the_line_closes() {
        let timers = Timers::start().unwrap();
        let input = SerialInput::new(Arc::new(timers.timer(|| {})));
        assert_eq!(input.try_send(&[0; 2 * CAPACITY]), CAPACITY);
        let sender = input.clone();
        let typist = thread::spawn(move || sender.send(b"more"));
        input.close();
        typist.join().unwrap();
        assert_eq!(input.try_send(b"x"), 0);
    }
}
