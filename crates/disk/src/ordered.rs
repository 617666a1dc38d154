//! The order in which a qcow2 image's structures reach the disk.
//!
//! `imago` makes its calls in the right order: a cluster's data, its reference count, the table that points
//! to it. Were the power of the *host* cut between two flushes, the host might have written them in any other:
//! a table might point to a cluster that counts as free, and will be given away once more, or that its data has
//! never reached. So what was written before is synchronized before each change of the structures, which are
//! few: they are kept in memory between flushes.
//!
//! One thing comes too early: the entry of the first-level table that points to a new table of the second
//! level is written at once, the count of that table's cluster with the next flush. Such entries wait here
//! until everything else is on the disk. Nobody misses them: `imago` reads the table once, when it opens.
#![allow(unsafe_code)] // methods of imago's trait are declared unsafe; none of them needs to be

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageExt, StorageOpenOptions};

/// Fields of the header, big-endian (QEMU's docs/interop/qcow2.txt).
const L1_ENTRIES: usize = 36;
const L1_OFFSET: usize = 40;

/// The file of an image, for its data or for its structures.
#[derive(Debug)]
pub(crate) struct Ordered {
    shared: Arc<Shared>,
    role: Role,
    helper: CommonStorageHelper,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Data,
    Structure,
}

#[derive(Debug)]
struct Shared {
    file: File,
    /// The same file.
    synced: fs::File,
    /// Something was written since it was last synchronized. Set after each write, and not before: what is
    /// still being written is not yet pointed to.
    written: AtomicBool,
    order: Mutex<Order>,
}

#[derive(Debug, Default)]
struct Order {
    /// Where the first-level table is.
    l1: Range<u64>,
    /// Its entries that wait, by offset.
    waiting: BTreeMap<u64, Vec<u8>>,
}

impl Ordered {
    /// A file for the structures of an image, or for all of an image that is only read.
    pub(crate) fn new(file: fs::File, options: StorageOpenOptions) -> io::Result<Ordered> {
        let mut header = [0; L1_OFFSET + 8];
        let length = crate::file::read_up_to(&file, 0, header.len())?;
        header[..length.len()].copy_from_slice(&length);
        let order = Mutex::new(Order { l1: l1(&header), waiting: BTreeMap::new() });
        let (synced, file) = (file.try_clone()?, File::from_open_file(file, options)?);
        let shared = Shared { file, synced, written: AtomicBool::new(true), order };
        Ok(Ordered {
            shared: Arc::new(shared),
            role: Role::Structure,
            helper: CommonStorageHelper::default(),
        })
    }

    /// The same file for the image's data.
    pub(crate) fn data(&self) -> Ordered {
        let helper = CommonStorageHelper::default();
        Ordered { shared: self.shared.clone(), role: Role::Data, helper }
    }

    fn write_structure(&self, data: IoVector<'_>, offset: u64) -> io::Result<()> {
        let mut order = self.shared.order();
        let length = data.len();
        if order.l1.start <= offset && offset + length <= order.l1.end {
            order.waiting.insert(offset, bytes(&data));
            return Ok(());
        }
        self.shared.barrier()?;
        let header = (offset == 0 && length >= (L1_OFFSET + 8) as u64).then(|| bytes(&data));
        self.shared.write(data, offset)?;
        // Where the table was moved, the new one has had all entries from the start.
        if let Some(l1) = header.map(|header| l1(&header))
            && l1 != order.l1
        {
            *order = Order { l1, waiting: BTreeMap::new() };
        }
        Ok(())
    }
}

fn bytes(data: &IoVector<'_>) -> Vec<u8> {
    let mut bytes = vec![0; data.len() as usize];
    data.copy_into_slice(&mut bytes);
    bytes
}

fn l1(header: &[u8]) -> Range<u64> {
    let number = |at: Range<usize>| header[at].iter().fold(0, |sum: u64, byte| sum << 8 | u64::from(*byte));
    let (entries, offset) = (number(L1_ENTRIES..L1_OFFSET), number(L1_OFFSET..L1_OFFSET + 8));
    offset..offset.saturating_add(entries * 8)
}

impl Shared {
    fn order(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, data: IoVector<'_>, offset: u64) -> io::Result<()> {
        let done = self.file.writev(data, offset);
        self.written.store(true, Ordering::Release);
        done
    }

    /// Returns when all that was written is on stable storage.
    fn barrier(&self) -> io::Result<()> {
        if !self.written.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let done = self.synced.sync_data();
        if done.is_err() {
            self.written.store(true, Ordering::Release);
        }
        done
    }

    /// The same, and what has waited for it, too.
    fn sync(&self) -> io::Result<()> {
        let mut order = self.order();
        self.barrier()?;
        for (offset, entry) in &order.waiting {
            self.write(IoVector::from(entry.as_slice()), *offset)?;
        }
        order.waiting.clear();
        self.barrier()
    }
}

impl Display for Ordered {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.shared.file.fmt(f)
    }
}

impl Storage for Ordered {
    fn size(&self) -> io::Result<u64> {
        self.shared.file.size()
    }

    fn mem_align(&self) -> usize {
        self.shared.file.mem_align()
    }

    fn req_align(&self) -> usize {
        self.shared.file.req_align()
    }

    fn zero_align(&self) -> usize {
        self.shared.file.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.shared.file.discard_align()
    }

    fn resolve_relative_path<P: AsRef<Path>>(&self, relative: P) -> io::Result<PathBuf> {
        self.shared.file.resolve_relative_path(relative)
    }

    fn get_filename(&self) -> Option<PathBuf> {
        self.shared.file.get_filename()
    }

    unsafe fn pure_readv(&self, data: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        self.shared.file.readv(data, offset)
    }

    unsafe fn pure_writev(&self, data: IoVector<'_>, offset: u64) -> io::Result<()> {
        match self.role {
            Role::Data => self.shared.write(data, offset),
            Role::Structure => self.write_structure(data, offset),
        }
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let done = self.shared.file.write_zeroes(offset, length);
        self.shared.written.store(true, Ordering::Release);
        done
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let done = self.shared.file.write_allocated_zeroes(offset, length);
        self.shared.written.store(true, Ordering::Release);
        done
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        let done = self.shared.file.discard(offset, length);
        self.shared.written.store(true, Ordering::Release);
        done
    }

    /// What `imago` does last when it writes back all that it remembers, also when an image is closed.
    fn flush(&self) -> io::Result<()> {
        let none = self.shared.order().waiting.is_empty();
        if none { Ok(()) } else { self.shared.sync() }
    }

    fn sync(&self) -> io::Result<()> {
        self.shared.sync()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, size: u64, preallocate: PreallocateMode) -> io::Result<()> {
        self.shared.file.resize(size, preallocate)
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{Guest, qemu_img};
    use crate::{Disk, open};

    const LARGE: u64 = 4 << 30;

    fn write(disk: &dyn Disk, guest: &Guest, offset: u64) {
        guest.fill(0, &[7; 4096]);
        disk.write_vectored_at(&[guest.slice(0, 4096)], offset).unwrap();
    }

    /// Each table of the second level, of which there are eight, is new.
    #[test]
    fn a_kill_between_two_flushes_leaves_no_table_that_counts_as_free() {
        let dir = tempfile::tempdir().unwrap();
        let (path, copy) = (dir.path().join("a.qcow2"), dir.path().join("b.qcow2"));
        crate::create(&path, LARGE).unwrap();
        let (disk, guest) = (open(&path, None, false).unwrap(), Guest::new());
        for at in (0..LARGE).step_by(512 << 20) {
            write(&*disk, &guest, at);
            std::fs::copy(&path, &copy).unwrap();
            // The tables are of no use yet, so that there may be leaks.
            if !qemu_img(dir.path(), &["check", "-q", "-r", "leaks", "b.qcow2"]) {
                return;
            }
        }
        disk.flush().unwrap();
        std::fs::copy(&path, &copy).unwrap();
        qemu_img(dir.path(), &["check", "-q", "b.qcow2"]);
        // Closed with no flush, it is whole all the same.
        write(&*disk, &guest, 1 << 20);
        drop(disk);
        qemu_img(dir.path(), &["check", "-q", "a.qcow2"]);
        let copy = open(&path, None, false).unwrap();
        for at in (0..LARGE).step_by(512 << 20) {
            copy.read_vectored_at(&[guest.slice(0x1000, 4096)], at).unwrap();
            assert_eq!(guest.bytes(0x1000, 4096), [7; 4096], "at {at:#x}");
        }
    }
}
