//! Files read into and written from guest memory without a copy in between.
//!
//! The kernel is handed pointers, never Rust references: the guest may change the memory meanwhile,
//! and may have named the same bytes twice.

#![allow(unsafe_code)] // preadv and pwritev on guest memory

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Linux takes this many pieces in one call.
const IOV_MAX: usize = 1024;

/// Reads from `offset` of `file` until `slices` are full or the file ends; how many bytes that were.
pub fn read_vectored_at<B: BitmapSlice>(
    file: &File,
    slices: &[VolatileSlice<'_, B>],
    offset: u64,
) -> Result<u64> {
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let iovecs = guards.iter().map(|g| libc::iovec { iov_base: g.as_ptr().cast(), iov_len: g.len() });
    let done = transfer(iovecs.collect(), offset, |iovecs, offset| {
        // SAFETY: every iovec lies within a slice that `guards` keep mapped and writable; `iovecs`
        // has at most IOV_MAX entries.
        unsafe { libc::preadv(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int, offset) }
    });
    for slice in slices {
        slice.bitmap().mark_dirty(0, slice.len());
    }
    done
}

/// Writes all of `slices` to `file` from `offset` on.
pub fn write_vectored_at<B: BitmapSlice>(
    file: &File,
    slices: &[VolatileSlice<'_, B>],
    offset: u64,
) -> Result<()> {
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard).collect();
    let iovec = |base: *const u8, len| libc::iovec { iov_base: base.cast_mut().cast(), iov_len: len };
    let iovecs = guards.iter().map(|g| iovec(g.as_ptr(), g.len()));
    let done = transfer(iovecs.collect(), offset, |iovecs, offset| {
        // SAFETY: every iovec lies within a slice that `guards` keep mapped; the kernel only reads
        // from them; `iovecs` has at most IOV_MAX entries.
        unsafe { libc::pwritev(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int, offset) }
    })?;
    let wanted: u64 = slices.iter().map(|s| s.len() as u64).sum();
    if done == wanted { Ok(()) } else { Err(ErrorKind::WriteZero.into()) }
}

/// Calls `call` until everything is done or it does nothing more.
fn transfer(
    mut iovecs: Vec<libc::iovec>,
    offset: u64,
    call: impl Fn(&[libc::iovec], libc::off_t) -> isize,
) -> Result<u64> {
    let mut rest = &mut iovecs[..];
    let mut done = 0;
    loop {
        rest = skip(rest, 0);
        if rest.is_empty() {
            return Ok(done);
        }
        let at = offset.checked_add(done).and_then(|at| at.try_into().ok());
        let at = at.ok_or(ErrorKind::InvalidInput)?;
        match call(&rest[..rest.len().min(IOV_MAX)], at) {
            0 => return Ok(done),
            count if count > 0 => {
                done += count as u64;
                rest = skip(rest, count as usize);
            }
            _ => match Error::last_os_error() {
                interrupted if interrupted.kind() == ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

/// What is left after `count` bytes, without empty pieces at its start.
fn skip(iovecs: &mut [libc::iovec], mut count: usize) -> &mut [libc::iovec] {
    let mut whole = 0;
    while let Some(iovec) = iovecs.get_mut(whole) {
        if iovec.iov_len > count {
            iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(count).cast();
            iovec.iov_len -= count;
            break;
        }
        count -= iovec.iov_len;
        whole += 1;
    }
    &mut iovecs[whole..]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bytes, GuestAddress, GuestMemoryBackend, GuestRam};
    use std::io::Write;

    fn slice(ram: &GuestRam, gpa: u64, len: usize) -> VolatileSlice<'_, crate::PageLog> {
        GuestMemoryBackend::get_slice(&**ram, GuestAddress(gpa), len).unwrap()
    }

    #[test]
    fn scattered_memory_goes_out_and_comes_back_and_is_marked() {
        let ram = GuestRam::new(&[0..0x10_0000]).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 100]).unwrap();
        // More pieces than one call takes, one of them empty.
        let pieces: Vec<_> = (0..3000).map(|i| slice(&ram, i * 16, if i == 5 { 0 } else { 9 })).collect();
        for i in 0..3000u64 {
            ram.write_slice(&i.to_le_bytes(), GuestAddress(i * 16)).unwrap();
        }
        write_vectored_at(&file, &pieces, 50).unwrap();
        ram.take_dirty();
        let back: Vec<_> =
            (0..3000).map(|i| slice(&ram, 0x8_0000 + i * 16, pieces[i as usize].len())).collect();
        assert_eq!(read_vectored_at(&file, &back, 50).unwrap(), 2999 * 9);
        assert_eq!(ram.read_obj::<u64>(GuestAddress(0x8_0000 + 2999 * 16)).unwrap(), 2999);
        assert_eq!(ram.take_dirty(), (0x80..0x8c).map(|page| page * 4096).collect::<Vec<_>>());
        assert_eq!(read_vectored_at(&file, &[slice(&ram, 0, 4096)], 50 + 2999 * 9 - 10).unwrap(), 10);
        assert!(read_vectored_at(&file, &[slice(&ram, 0, 16)], u64::MAX - 4).is_err());
    }
}
