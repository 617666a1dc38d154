//! Doing what requests ask for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use disk::Disk;
use mem::GuestRam;
use throttle::Throttle;

use super::request::{ID_LEN, Limits, Operation, Reply, Request, Status};
use super::{Count, Counters};
use crate::{Broken, Handler, Progress, VirtQueue, lock};

/// The disk's side of its queue.
pub(super) struct Work {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) limits: Limits,
    pub(super) serial: [u8; ID_LEN],
    pub(super) writeback: Arc<AtomicBool>,
    pub(super) counters: Counters,
    pub(super) throttle: Option<Arc<Mutex<Throttle>>>,
}

impl Handler for Work {
    fn process(&mut self, _index: usize, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken> {
        while let Some(chain) = queue.pop(ram)? {
            let Request { reply, operation } = Request::parse(chain, &self.limits)?;
            if let Err(later) = self.pass(&operation) {
                queue.unpop();
                return Ok(Progress::Until(later));
            }
            let done = operation.and_then(|operation| self.perform(&operation));
            self.finish(queue, ram, &reply, done)?;
        }
        Ok(Progress::Drained)
    }
}

impl Work {
    /// Whether the disk's limits let it be done now, or when. What is not done costs nothing.
    fn pass(&self, operation: &Result<Operation<'_>, Status>) -> Result<(), Instant> {
        match (&self.throttle, operation) {
            (Some(throttle), Ok(operation)) => {
                let (requests, bytes) = cost(operation);
                lock(throttle).pass(requests, bytes, Instant::now())
            }
            _ => Ok(()),
        }
    }

    /// Does it; how many bytes of the driver's buffers were written.
    fn perform(&self, operation: &Operation<'_>) -> Result<usize, Status> {
        let done = match operation {
            Operation::Read { offset, data } => self.disk.read_vectored_at(data.as_slice(), *offset),
            Operation::Write { offset, data } => self.disk.write_vectored_at(data.as_slice(), *offset),
            Operation::Flush => self.disk.flush(),
            Operation::GetId { data } => return Ok(data.write(&self.serial)),
            Operation::Discard(ranges) => {
                ranges.iter().try_for_each(|range| self.disk.discard(range.offset, range.length))
            }
            Operation::WriteZeroes(ranges) => ranges
                .iter()
                .try_for_each(|range| self.disk.write_zeroes(range.offset, range.length, range.may_free)),
        };
        done.and_then(|()| self.write_through(operation)).map_err(|error| self.failed(operation, &error))?;
        Ok(self.count(operation))
    }

    /// With the write cache off, a write is done when it is durable.
    fn write_through(&self, operation: &Operation<'_>) -> std::io::Result<()> {
        match operation {
            Operation::Write { .. } | Operation::WriteZeroes(_)
                if !self.writeback.load(Ordering::Relaxed) =>
            {
                self.disk.flush()
            }
            _ => Ok(()),
        }
    }

    fn failed(&self, operation: &Operation<'_>, error: &std::io::Error) -> Status {
        // A guest can cause as many as it likes: the first ones tell the story.
        if self.counters.get(Count::Errors) < 10 {
            let what = match operation {
                Operation::Read { .. } => "read",
                Operation::Write { .. } => "write",
                Operation::Flush => "flush",
                Operation::GetId { .. } => "identification",
                Operation::Discard(_) => "discard",
                Operation::WriteZeroes(_) => "writing of zeroes",
            };
            log::warn!("virtio-blk: a {what} failed: {error}; the guest sees an I/O error");
        }
        Status::IoError
    }

    fn count(&self, operation: &Operation<'_>) -> usize {
        match operation {
            Operation::Read { data, .. } => {
                self.counters.add(Count::BytesRead, data.len() as u64);
                data.len()
            }
            Operation::Write { data, .. } => {
                self.counters.add(Count::BytesWritten, data.len() as u64);
                0
            }
            Operation::Flush => {
                self.counters.add(Count::Flushes, 1);
                0
            }
            Operation::GetId { .. } | Operation::Discard(_) | Operation::WriteZeroes(_) => 0,
        }
    }

    /// The only place where a request ends: status, counters, used ring.
    fn finish(
        &self,
        queue: &mut VirtQueue,
        ram: &GuestRam,
        reply: &Reply<'_>,
        done: Result<usize, Status>,
    ) -> Result<(), Broken> {
        let (status, written) = match done {
            Ok(written) => (Status::Ok, written),
            Err(status) => (status, 0),
        };
        self.counters.add(if status == Status::Ok { Count::Requests } else { Count::Errors }, 1);
        reply.status.write(&[status as u8]);
        queue.push(ram, reply.head, written + 1)
    }
}

/// Requests and bytes that count.
fn cost(operation: &Operation<'_>) -> (u64, u64) {
    match operation {
        Operation::Read { data, .. } | Operation::Write { data, .. } => (1, data.len() as u64),
        Operation::Flush => (1, 0),
        Operation::GetId { .. } => (0, 0),
        Operation::Discard(ranges) => (ranges.len() as u64, 0),
        Operation::WriteZeroes(ranges) => {
            (ranges.len() as u64, ranges.iter().map(|range| range.length).sum())
        }
    }
}
