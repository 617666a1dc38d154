//! Split queues, checked: what leaves [`VirtQueue::pop`] is a whole chain within guest memory.
//!
//! The library's iterator over a chain ends alike after the last descriptor and after a bad one
//! (a loop, an index or address out of range); it has ended well only if the last descriptor says
//! that it is the last.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use mem::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRam, PageLog};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::Bytes;

use crate::Slice;

/// Available ring flag: the driver wants no interrupts (2.7.6).
const AVAIL_NO_INTERRUPT: u16 = 1;

/// Why a queue cannot be used any further.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The rings contradict themselves or are not in guest memory.
    #[error("its rings are bad: {0}")]
    Rings(virtio_queue::Error),
    /// A ring was set up where there is no memory.
    #[error("a ring is not in guest memory")]
    Place,
    /// A chain has a loop, an index out of range, or is longer than the queue.
    #[error("descriptor chain {0} does not end")]
    Endless(u16),
    /// A buffer is not in guest memory.
    #[error("descriptor chain {0} leaves guest memory")]
    Address(u16),
    /// A readable buffer follows a writable one (2.7.4.2).
    #[error("descriptor chain {0} has its readable buffers last")]
    Order(u16),
    /// The chain has no room for an answer.
    #[error("descriptor chain {0} is too short for a request")]
    Short(u16),
}

/// Pieces of guest memory, one after the other.
#[derive(Debug, Default)]
pub struct Slices<'m>(Vec<Slice<'m>>);

impl<'m> Slices<'m> {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.iter().map(Slice::len).sum()
    }

    /// Whether there is not a byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The pieces.
    pub fn as_slice(&self) -> &[Slice<'m>] {
        &self.0
    }

    /// Cuts off everything from byte `at` on; nothing if that is past the end.
    #[must_use]
    pub fn split_off(&mut self, at: usize) -> Slices<'m> {
        let (mut head, mut tail) = (Vec::with_capacity(self.0.len()), Vec::new());
        let mut left = at;
        for slice in self.0.drain(..) {
            let here = left.min(slice.len());
            left -= here;
            if here == slice.len() {
                head.push(slice);
            } else {
                // Within the slice, so that neither can fail.
                head.extend(slice.subslice(0, here).ok().filter(|_| here > 0));
                tail.extend(slice.offset(here));
            }
        }
        self.0 = head;
        Slices(tail)
    }

    /// Copies the first bytes out; how many there were.
    pub fn read(&self, data: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.0 {
            let here = slice.len().min(data.len() - done);
            slice.copy_to(&mut data[done..done + here]);
            done += here;
        }
        done
    }

    /// Copies to the first bytes; how many there was room for.
    pub fn write(&self, data: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.0 {
            let here = slice.len().min(data.len() - done);
            slice.copy_from(&data[done..done + here]);
            done += here;
        }
        done
    }
}

impl<'m> From<Vec<Slice<'m>>> for Slices<'m> {
    fn from(slices: Vec<Slice<'m>>) -> Slices<'m> {
        Slices(slices)
    }
}

/// A chain of buffers. It goes back to the driver by [`VirtQueue::push`].
#[derive(Debug)]
pub struct Chain<'m> {
    /// Index of its first descriptor, its name in the used ring.
    pub head: u16,
    /// What the device may read.
    pub readable: Slices<'m>,
    /// What the device may write.
    pub writable: Slices<'m>,
}

impl<'m> Chain<'m> {
    fn collect(
        mut chain: DescriptorChain<&'m GuestMemoryMmap<PageLog>>,
        ram: &'m GuestMemoryMmap<PageLog>,
        limit: usize,
    ) -> Result<Chain<'m>, Broken> {
        let head = chain.head_index();
        let mut collected = Chain { head, readable: Slices::default(), writable: Slices::default() };
        for _ in 0..limit {
            let Some(descriptor) = chain.next() else { break };
            let into = match descriptor.is_write_only() {
                true => &mut collected.writable,
                false if collected.writable.0.is_empty() => &mut collected.readable,
                false => return Err(Broken::Order(head)),
            };
            if descriptor.len() > 0 {
                for slice in GuestMemoryBackend::get_slices(ram, descriptor.addr(), descriptor.len() as usize)
                {
                    into.0.push(slice.map_err(|_| Broken::Address(head))?);
                }
            }
            if !descriptor.has_next() {
                return Ok(collected);
            }
        }
        Err(Broken::Endless(head))
    }
}

/// One queue while the device runs.
pub struct VirtQueue {
    queue: Queue,
    /// How many chains may still be taken in this round.
    left: u16,
    /// How many chains were given back since the driver was last considered for an interrupt.
    added: u16,
    /// The worker is to stop: a round ends with the chain that it is at.
    stopping: Arc<AtomicBool>,
}

impl VirtQueue {
    /// A queue as its driver has set it up.
    pub fn new(state: QueueState, ram: &GuestRam) -> Result<VirtQueue, Broken> {
        let queue = Queue::try_from(state).map_err(Broken::Rings)?;
        if !queue.is_valid(&**ram) {
            return Err(Broken::Place);
        }
        Ok(VirtQueue { queue, left: 0, added: 0, stopping: Arc::default() })
    }

    /// From now on nothing is taken once `stopping` is set.
    pub(crate) fn stop_with(&mut self, stopping: Arc<AtomicBool>) {
        self.stopping = stopping;
    }

    /// Whether nothing more is taken, whatever is there: a round may have up to a TiB to read or write, for
    /// which nobody who wants the device to stand still can wait.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Positions in the available and used rings.
    pub(crate) fn position(&self) -> (u16, u16) {
        (self.queue.next_avail(), self.queue.next_used())
    }

    /// A round begins, of as many chains as the queue has room for: a driver that adds chains
    /// without end must still get its interrupts.
    pub(crate) fn begin(&mut self, ram: &GuestRam) -> Result<(), Broken> {
        self.left = self.queue.size();
        self.queue.disable_notification(&**ram).map_err(Broken::Rings)
    }

    /// The driver is to notify from now on; whether it has added something meanwhile.
    pub(crate) fn end(&mut self, ram: &GuestRam) -> Result<bool, Broken> {
        self.queue.enable_notification(&**ram).map_err(Broken::Rings)
    }

    /// Whether the driver wants an interrupt for what was given back in this round.
    pub(crate) fn wants_interrupt(&mut self, ram: &GuestRam) -> Result<bool, Broken> {
        let added = std::mem::take(&mut self.added);
        if added == 0 {
            return Ok(false);
        }
        // The driver writes what it wants, then looks at the used ring; we the other way around.
        fence(Ordering::SeqCst);
        let used_event = 4 + 2 * u64::from(self.queue.size());
        let at = if self.queue.event_idx_enabled() { used_event } else { 0 };
        let word = ram.load::<u16>(GuestAddress(self.queue.avail_ring() + at), Ordering::Relaxed);
        let word = u16::from_le(word.map_err(|_| Broken::Place)?);
        if !self.queue.event_idx_enabled() {
            return Ok(word & AVAIL_NO_INTERRUPT == 0);
        }
        // Whether the index has passed the one that the driver asked for (2.7.10).
        Ok(self.queue.next_used().wrapping_sub(word).wrapping_sub(1) < added)
    }

    /// The next chain that the driver has made available, unless it is to stop.
    pub fn pop<'m>(&mut self, ram: &'m GuestRam) -> Result<Option<Chain<'m>>, Broken> {
        if self.left == 0 || self.is_stopping() {
            return Ok(None);
        }
        let limit = self.queue.max_size().into();
        let mut available = self.queue.iter(&**ram).map_err(Broken::Rings)?;
        let Some(chain) = available.next() else { return Ok(None) };
        self.left -= 1;
        Chain::collect(chain, ram, limit).map(Some)
    }

    /// Puts the last chain that was popped back.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
        self.left += 1;
    }

    /// How many chains it has room for.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Gives a chain back with `written` bytes in it.
    pub fn push(&mut self, ram: &GuestRam, head: u16, written: usize) -> Result<(), Broken> {
        self.push_all(ram, &[(head, written)])
    }

    /// Gives chains back that the driver must see all at once, each with its bytes; no more than the queue
    /// has room for. The library knows only one after the other.
    pub fn push_all(&mut self, ram: &GuestRam, chains: &[(u16, usize)]) -> Result<(), Broken> {
        let (ring, size) = (self.queue.used_ring(), self.queue.size());
        let mut next = self.queue.next_used();
        for &(head, written) in chains {
            let written = u32::try_from(written).unwrap_or(u32::MAX);
            let element = u64::from(head) | u64::from(written) << 32;
            let at = ring + 4 + 8 * u64::from(next % size);
            ram.write_obj(element.to_le(), GuestAddress(at)).map_err(|_| Broken::Place)?;
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        self.added = self.added.saturating_add(chains.len() as u16);
        ram.store(next.to_le(), GuestAddress(ring + 2), Ordering::Release).map_err(|_| Broken::Place)
    }
}
