//! The code in a [jail](super::jail) that changes its mappings: a loop over a list of system calls.

#![allow(unsafe_code)] // maps the list, and writes what the jail reads

use std::fs::File;
use std::io::Error;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::ptr::{self, NonNull};

use mem::PAGE_SIZE;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::rand::{GetRandomFlags, getrandom};

/// Where guests' programs rarely have anything, not even those with the compilers' sanitizers: the stub lies at
/// a random page of this range.
const FROM: u64 = 0x6800_0000_0000;
const SPAN: u64 = 0x0800_0000_0000;
/// The stub's code and its list.
pub const STUB_LEN: u64 = 2 * PAGE_SIZE;
/// Bytes of an entry of the list.
const CALL: usize = 7 * 8;
/// System calls that one list has room for.
pub const MOST_CALLS: usize = PAGE_SIZE as usize / CALL;
/// Takes the list at RBX with RBP entries; RBP is 0 if all of them went well.
const CODE: [u8; 52] = [
    0x48, 0x8b, 0x03, // again: mov rax, [rbx]
    0x48, 0x8b, 0x7b, 0x08, // mov rdi, [rbx + 8]
    0x48, 0x8b, 0x73, 0x10, // mov rsi, [rbx + 16]
    0x48, 0x8b, 0x53, 0x18, // mov rdx, [rbx + 24]
    0x4c, 0x8b, 0x53, 0x20, // mov r10, [rbx + 32]
    0x4c, 0x8b, 0x43, 0x28, // mov r8, [rbx + 40]
    0x4c, 0x8b, 0x4b, 0x30, // mov r9, [rbx + 48]
    0x0f, 0x05, // syscall
    0x48, 0x3d, 0x00, 0xf0, 0xff, 0xff, // cmp rax, -4096
    0x77, 0x09, // ja done
    0x48, 0x83, 0xc3, CALL as u8, // add rbx, 56
    0x48, 0xff, 0xcd, // dec rbp
    0x75, 0xd2, // jnz again
    0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, // done: int3
];
/// Where its one `SYSCALL` is.
#[cfg(test)]
pub const SYSCALL: u64 = 27;

/// A system call: its number and its arguments.
pub type Call = [u64; 7];

/// The stub, as its jail's parent has it.
pub struct Stub {
    address: u64,
    file: File,
    list: NonNull<u64>,
}

impl Stub {
    /// At a random address, not yet mapped in any jail.
    pub fn new() -> Result<Stub, Error> {
        let file = File::from(memfd_create(c"stub", MemfdFlags::CLOEXEC)?);
        file.set_len(STUB_LEN)?;
        file.write_all_at(&CODE, 0)?;
        let list = map_list(&file)?;
        Ok(Stub { address: random_address()?, file, list })
    }

    /// Where it is in the jail: its code, and a page later its list.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// What the jail maps.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The list, for the child between its start and its end as a copy of its parent.
    pub fn list(&self) -> NonNull<u64> {
        self.list
    }

    /// The list's first word.
    pub fn first(&self) -> u64 {
        // SAFETY: within the list, which lives as long as `self`.
        unsafe { self.list.read_volatile() }
    }

    /// Writes at most [`MOST_CALLS`] calls to the list.
    pub fn write(&mut self, calls: &[Call]) {
        for (i, word) in calls.iter().take(MOST_CALLS).flatten().enumerate() {
            // SAFETY: within the list's page.
            unsafe { self.list.add(i).write_volatile(*word) };
        }
    }

    /// Clears as many calls: guest code can read the list, and would learn where its pages are in the
    /// guest's memory, which is its kernel's secret.
    pub fn wipe(&mut self, calls: usize) {
        self.write(&[[0; 7]; MOST_CALLS][..calls.min(MOST_CALLS)]);
    }
}

/// Maps the list for us to write.
fn map_list(file: &File) -> Result<NonNull<u64>, Error> {
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let list = unsafe { mmap(ptr::null_mut(), PAGE_SIZE as usize, prot, MapFlags::SHARED, file, PAGE_SIZE)? };
    NonNull::new(list.cast()).ok_or_else(|| Error::from_raw_os_error(libc::ENOMEM))
}

fn random_address() -> Result<u64, Error> {
    let mut bytes = [0; 8];
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    // The filter compares the low half of addresses: no carry out of it within the stub.
    Ok(FROM + (u64::from_le_bytes(bytes) % SPAN) / 0x1_0000 * 0x1_0000)
}

impl Drop for Stub {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody else has.
        let unmapped = unsafe { munmap(self.list.as_ptr().cast(), PAGE_SIZE as usize) };
        debug_assert!(unmapped.is_ok());
    }
}

// SAFETY: the list is a mapping of its own, of which nobody else has the address.
unsafe impl Send for Stub {}
