//! The thread that works off a device's queues.
//!
//! Kicks are event file descriptors, so that KVM can write them without leaving the kernel. The
//! worker is stopped for a reset, a save, or when the driver takes away bus mastering; it finishes
//! the request it is at, so that none is half done afterwards. Requests that have to wait for their
//! time ([`Progress::Until`]) wait in the driver's ring, and nobody waits for them.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use mem::GuestRam;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{Broken, Handler, Interrupt, Progress, VirtQueue, WakeOn, lock};

/// A new event for kicks and wake-ups.
pub(crate) fn event() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// A queue that the driver has enabled.
pub(crate) struct Live {
    pub(crate) index: usize,
    pub(crate) queue: Arc<Mutex<VirtQueue>>,
    pub(crate) kick: EventFd,
}

/// A running worker. Stops when dropped.
pub(crate) struct Worker {
    stop: EventFd,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts working off `queues`, first what is in them already.
    pub(crate) fn start(
        name: &str,
        handler: Box<dyn Handler>,
        queues: Vec<Live>,
        ram: GuestRam,
        interrupt: Arc<Interrupt>,
    ) -> io::Result<Worker> {
        let (stop, epoll, stopping) = (event()?, Epoll::new()?, Arc::new(AtomicBool::new(false)));
        watch(&epoll, &stop, STOP)?;
        for (at, live) in queues.iter().enumerate() {
            watch(&epoll, &live.kick, at as u64)?;
            lock(&live.queue).stop_with(stopping.clone());
            live.kick.write(1)?; // what is in the queue already
        }
        let wake = handler.wake();
        if let Some((event, _)) = &wake {
            watch(&epoll, event, WAKE)?;
        }
        let mut descriptors = Vec::new();
        for wake in handler.wakes() {
            if let Some(at) = queues.iter().position(|queue| queue.index == wake.queue) {
                watch_descriptor(&epoll, &wake.on, DESCRIPTOR + descriptors.len() as u64)?;
                descriptors.push((wake.on, at));
            }
        }
        let (name, held) = (name.to_owned(), vec![None; queues.len()]);
        let mut work = Work { name, epoll, handler, wake, descriptors, queues, held, ram, interrupt };
        let thread = device::spawn(work.name.clone(), move || work.run())?;
        Ok(Worker { stop, stopping, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        // A full counter cannot be: this is its only write.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What an event means: a queue by its place, or these.
const STOP: u64 = u64::MAX;
const WAKE: u64 = u64::MAX - 1;
/// And from here on the handler's descriptors.
const DESCRIPTOR: u64 = 1 << 32;

fn watch(epoll: &Epoll, event: &EventFd, token: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(EventSet::IN, token))
}

fn watch_descriptor(epoll: &Epoll, on: &WakeOn, token: u64) -> io::Result<()> {
    let (fd, events) = match on {
        WakeOn::Readable(fd) => (fd, EventSet::IN | EventSet::EDGE_TRIGGERED),
        // Off until the handler is full.
        WakeOn::Writable(fd) => (fd, EventSet::ONE_SHOT),
    };
    epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(events, token))
}

/// Clears an event's counter; that it may be 0 already is no error.
fn clear(event: &EventFd) {
    let _ = event.read();
}

struct Work {
    name: String,
    epoll: Epoll,
    handler: Box<dyn Handler>,
    /// The handler's own event and the queue that it is for.
    wake: Option<(EventFd, usize)>,
    /// The handler's descriptors, and the places of the queues that they are for.
    descriptors: Vec<(WakeOn, usize)>,
    queues: Vec<Live>,
    /// Until when each of them is left alone, by its place.
    held: Vec<Option<Instant>>,
    ram: GuestRam,
    interrupt: Arc<Interrupt>,
}

impl Work {
    fn run(&mut self) {
        let mut broken = false;
        while let Some(due) = self.wait() {
            for at in due {
                // Once broken, only a stop is of interest.
                if broken {
                    continue;
                }
                if let Err(error) = self.round(at) {
                    log::warn!("{}: the guest broke a queue: {error}; waiting for a reset", self.name);
                    self.interrupt.break_device();
                    broken = true;
                }
            }
        }
    }

    /// Waits for events; the places of the queues to process, each once, or `None` to stop.
    fn wait(&mut self) -> Option<Vec<usize>> {
        let mut events = [EpollEvent::default(); 16];
        let count = match self.epoll.wait(self.patience(), &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => {
                log::error!("{}: waiting for events failed: {error}", self.name);
                return None;
            }
        };
        let mut due = Vec::with_capacity(count);
        for event in &events[..count] {
            let places = match event.data() {
                STOP => return None,
                WAKE => self.woken()?,
                token @ DESCRIPTOR.. => vec![self.descriptors.get((token - DESCRIPTOR) as usize)?.1],
                at => {
                    clear(&self.queues.get(at as usize)?.kick);
                    vec![at as usize]
                }
            };
            for at in places {
                if !due.contains(&at) {
                    due.push(at);
                }
            }
        }
        self.keep_to_time(&mut due);
        Some(due)
    }

    /// How long to wait for events, in milliseconds, as epoll takes it: without end where no queue is held.
    fn patience(&self) -> i32 {
        let Some(next) = self.held.iter().flatten().min() else { return -1 };
        let left = next.saturating_duration_since(Instant::now());
        i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
    }

    /// Leaves out the queues whose time has not come, and adds those whose has. Whatever happened to the
    /// former is seen then.
    fn keep_to_time(&mut self, due: &mut Vec<usize>) {
        if self.held.iter().all(Option::is_none) {
            return;
        }
        let now = Instant::now();
        for (at, held) in self.held.iter_mut().enumerate() {
            match *held {
                Some(until) if until > now => due.retain(|&other| other != at),
                Some(_) => {
                    *held = None;
                    if !due.contains(&at) {
                        due.push(at);
                    }
                }
                None => {}
            }
        }
    }

    /// The places of the queues that the handler's own event is for, as far as the driver uses them.
    fn woken(&mut self) -> Option<Vec<usize>> {
        let (event, index) = self.wake.as_ref()?;
        clear(event);
        let indices = self.handler.woken(*index).into_iter();
        let place = |index| self.queues.iter().position(|queue| queue.index == index);
        Some(indices.filter_map(place).collect())
    }

    /// Works off what is in a queue, with at most one interrupt. If there is more by then, it is
    /// for another round, so that a busy driver cannot keep the worker from stopping.
    fn round(&mut self, at: usize) -> Result<(), Broken> {
        let Live { index, queue, kick } = &self.queues[at];
        let mut queue = lock(queue);
        queue.begin(&self.ram)?;
        let progress = self.handler.process(*index, &mut queue, &self.ram);
        // Where buffers wait for something else, more of them are no news.
        let more = matches!(progress, Ok(Progress::Drained)) && queue.end(&self.ram)?;
        // What was done before a driver's mistake counts.
        if queue.wants_interrupt(&self.ram)? {
            self.interrupt.queue_used(*index);
        }
        match progress {
            Ok(Progress::Full) => self.wait_for_room(at),
            Ok(Progress::Until(time)) => self.held[at] = Some(time),
            Ok(Progress::Drained | Progress::Waiting) | Err(_) => {}
        }
        if more {
            let _ = kick.write(1); // fails only if the counter is full, which is as good
        }
        progress.map(|_| ())
    }

    /// The queue at `at` is to be processed when there is room behind the device, once.
    fn wait_for_room(&self, at: usize) {
        for (token, (on, _)) in (DESCRIPTOR..).zip(&self.descriptors).filter(|(_, (_, queue))| *queue == at) {
            if let WakeOn::Writable(fd) = on {
                let event = EpollEvent::new(EventSet::OUT | EventSet::ONE_SHOT, token);
                if let Err(error) = self.epoll.ctl(ControlOperation::Modify, fd.as_raw_fd(), event) {
                    log::error!("{}: waiting for room failed: {error}", self.name);
                }
            }
        }
    }
}
