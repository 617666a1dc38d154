//! Timers: one thread that calls back at the asked-for moments.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

/// How many stale entries the heap may hold for each timer.
const STALE: usize = 16;

type Callback = Arc<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct State {
    heap: BinaryHeap<Reverse<(Instant, u64)>>,
    /// Armed deadline and callback of each timer. A heap entry whose deadline differs is stale.
    timers: HashMap<u64, (Option<Instant>, Callback)>,
    next_id: u64,
    stop: bool,
}

impl State {
    /// A guest that re-arms its timers for ever fills no memory: stale entries go when they are due, or here.
    fn push(&mut self, deadline: Instant, id: u64) {
        if self.heap.len() >= self.timers.len() * STALE {
            let timers = &self.timers;
            let is_armed = |at: &Instant, id: &u64| timers.get(id).is_some_and(|timer| timer.0 == Some(*at));
            let mut seen = HashSet::new();
            self.heap.retain(|Reverse((at, id))| is_armed(at, id) && seen.insert(*id));
        }
        self.heap.push(Reverse((deadline, id)));
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The timer thread of a machine. Ends when dropped.
pub struct Timers {
    shared: Arc<Shared>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Timers {
    /// Starts the thread.
    pub fn start() -> std::io::Result<Timers> {
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        let thread = crate::spawn("timers", move || run(&theirs))?;
        Ok(Timers { shared, thread: Some(thread) })
    }

    /// A disarmed timer that calls `callback` on the timer thread, with no lock of ours held.
    ///
    /// A callback may come once more just after [`Timer::disarm`] or a re-arm: it looks at its device's
    /// state to see what is due.
    pub fn timer(&self, callback: impl Fn() + Send + Sync + 'static) -> Timer {
        let mut state = self.shared.lock();
        let id = state.next_id;
        state.next_id += 1;
        state.timers.insert(id, (None, Arc::new(callback)));
        Timer { shared: self.shared.clone(), id }
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A one-shot timer; re-arm it from its callback for a periodic one. Gone when dropped.
pub struct Timer {
    shared: Arc<Shared>,
    id: u64,
}

impl Timer {
    /// Calls back at `deadline` (at once if that is past), instead of any earlier arming.
    pub fn arm(&self, deadline: Instant) {
        let mut state = self.shared.lock();
        if let Some(timer) = state.timers.get_mut(&self.id) {
            timer.0 = Some(deadline);
            state.push(deadline, self.id);
            self.shared.wake.notify_one();
        }
    }

    /// No call until armed again.
    pub fn disarm(&self) {
        if let Some(timer) = self.shared.lock().timers.get_mut(&self.id) {
            timer.0 = None;
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        let gone = self.shared.lock().timers.remove(&self.id);
        drop(gone); // after the lock is released: the callback may own a timer itself
    }
}

fn run(shared: &Shared) {
    let mut state = shared.lock();
    while !state.stop {
        let Some(&Reverse((deadline, id))) = state.heap.peek() else {
            state = shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        let now = Instant::now();
        if deadline > now {
            let timed = shared.wake.wait_timeout(state, deadline - now);
            state = timed.unwrap_or_else(PoisonError::into_inner).0;
            continue;
        }
        state.heap.pop();
        let Some(timer) = state.timers.get_mut(&id).filter(|t| t.0 == Some(deadline)) else { continue };
        timer.0 = None;
        let callback = timer.1.clone();
        drop(state);
        callback();
        drop(callback);
        state = shared.lock();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn timers_fire_in_order_of_their_deadlines_and_a_disarmed_one_does_not() {
        let timers = Timers::start().unwrap();
        let (tx, rx) = mpsc::channel();
        let make = |name: u32| {
            let tx = tx.clone();
            timers.timer(move || tx.send(name).unwrap())
        };
        let (late, early, never) = (make(2), make(1), make(3));
        let now = Instant::now();
        late.arm(now + Duration::from_millis(40));
        never.arm(now + Duration::from_millis(20));
        early.arm(now + Duration::from_millis(10));
        never.disarm();
        assert_eq!(rx.recv_timeout(Duration::from_secs(5)), Ok(1));
        assert_eq!(rx.recv_timeout(Duration::from_secs(5)), Ok(2));
        assert!(rx.try_recv().is_err());
    }

    #[test]
    fn who_re_arms_for_ever_fills_no_memory_and_is_still_called() {
        let timers = Timers::start().unwrap();
        let (tx, rx) = mpsc::channel();
        let make = |name: u32| {
            let tx = tx.clone();
            timers.timer(move || tx.send(name).unwrap())
        };
        let (busy, quiet) = (make(1), make(2));
        let now = Instant::now();
        quiet.arm(now + Duration::from_millis(200));
        for turn in 0..100_000 {
            busy.arm(now + Duration::from_secs(3600 + turn % 2));
        }
        assert!(timers.shared.lock().heap.len() <= 2 * STALE);
        busy.arm(now + Duration::from_millis(100));
        assert_eq!(rx.recv_timeout(Duration::from_secs(5)), Ok(1));
        assert_eq!(rx.recv_timeout(Duration::from_secs(5)), Ok(2));
    }
}
