//! Memory for code that is made at run time: one memory file, mapped twice. What is written can never
//! be executed at the same address, and what is executed can never be written.

#![allow(unsafe_code)] // maps memory

use std::io;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};

/// Room for all stubs there can be: some 80,000 combinations of an instruction and its immediate, of
/// some 100 bytes. Only what is used takes up memory.
const SIZE: usize = 32 << 20;
/// Code is placed in lines of the instruction cache's fetch width.
const ALIGN: usize = 16;

/// A code cache that only grows.
pub struct CodeMemory {
    write: usize,
    exec: usize,
    used: usize,
}

impl CodeMemory {
    /// Maps the memory; nothing is in it yet.
    pub fn new() -> io::Result<CodeMemory> {
        let file = memfd_create("ospite-stubs", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, SIZE as u64)?;
        let map = |protection| {
            // SAFETY: a new mapping at an address of the kernel's choice.
            let address = unsafe { mmap(std::ptr::null_mut(), SIZE, protection, MapFlags::SHARED, &file, 0) };
            address.map(|address| address.expose_provenance())
        };
        Ok(CodeMemory {
            write: map(ProtFlags::READ | ProtFlags::WRITE)?,
            exec: map(ProtFlags::READ | ProtFlags::EXEC)?,
            used: 0,
        })
    }

    /// Address of the executable mapping.
    pub fn base(&self) -> usize {
        self.exec
    }

    /// Adds code and returns its offset from [`CodeMemory::base`]; `None` if the memory is full.
    pub fn add(&mut self, code: &[u8]) -> Option<u32> {
        let at = self.used;
        let end = at.checked_add(code.len())?;
        if end > SIZE {
            return None;
        }
        let target: *mut u8 = std::ptr::with_exposed_provenance_mut(self.write + at);
        // SAFETY: within the writable mapping (checked above), which nothing else writes to: `self` is
        // borrowed mutably. Nobody executes these bytes before their offset is handed out.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), target, code.len()) };
        self.used = end.next_multiple_of(ALIGN);
        u32::try_from(at).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_runs_at_the_other_address() {
        let mut memory = CodeMemory::new().unwrap();
        memory.add(&[0xcc; 3]).unwrap();
        let at = memory.add(&[0xb8, 42, 0, 0, 0, 0xc3]).unwrap(); // mov eax, 42; ret
        assert_eq!(at, 16);
        let entry = std::ptr::with_exposed_provenance::<()>(memory.base() + at as usize);
        // SAFETY: the bytes above are such a function.
        let answer = unsafe { std::mem::transmute::<*const (), extern "sysv64" fn() -> u32>(entry)() };
        assert_eq!(answer, 42);
    }

    #[test]
    fn a_full_memory_takes_no_more() {
        let mut memory = CodeMemory::new().unwrap();
        memory.used = SIZE - 16;
        assert!(memory.add(&[0; 17]).is_none());
        assert!(memory.add(&[0; 16]).is_some());
        assert!(memory.add(&[0; 1]).is_none());
    }
}
