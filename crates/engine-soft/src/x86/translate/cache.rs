//! The code cache: one anonymous file, mapped twice.
//!
//! One mapping is writable and never executable, the other executable and never writable, so that
//! nobody who finds a way to write where guest data goes can write what the host executes.

#![allow(unsafe_code)] // maps memory and writes code into it

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::{self, NonNull};

use engine::Error;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Translated code of one vCPU, at most.
pub const CACHE_SIZE: usize = 64 << 20;

/// Memory for translated code, handed out from its start to its end and then all taken back at once.
pub struct CodeCache {
    write: NonNull<u8>,
    execute: NonNull<u8>,
    used: usize,
    /// What [`CodeCache::reset`] keeps.
    fixed: usize,
}

// SAFETY: the mappings are this object's own.
unsafe impl Send for CodeCache {}

fn host_error(what: &'static str) -> impl Fn(rustix::io::Errno) -> Error {
    move |errno| Error::Host { what, source: errno.into() }
}

fn map(file: &OwnedFd, protection: ProtFlags) -> Result<NonNull<u8>, Error> {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe {
        mmap(ptr::null_mut(), CACHE_SIZE, protection, MapFlags::SHARED, file.as_fd(), 0)
            .map_err(host_error("mapping the code cache"))?
    };
    NonNull::new(at.cast()).ok_or_else(|| host_error("mapping the code cache")(rustix::io::Errno::NOMEM))
}

impl CodeCache {
    /// An empty cache.
    pub fn new() -> Result<CodeCache, Error> {
        let file = memfd_create("ospite-code", MemfdFlags::CLOEXEC).map_err(host_error("memfd_create"))?;
        ftruncate(&file, CACHE_SIZE as u64).map_err(host_error("sizing the code cache"))?;
        let write = map(&file, ProtFlags::READ | ProtFlags::WRITE)?;
        let execute = map(&file, ProtFlags::READ | ProtFlags::EXEC)?;
        Ok(CodeCache { write, execute, used: 0, fixed: 0 })
    }

    /// Executable address of the next byte.
    pub fn cursor(&self) -> u64 {
        self.execute.as_ptr().expose_provenance() as u64 + self.used as u64
    }

    /// Bytes that are still free.
    pub fn room(&self) -> usize {
        CACHE_SIZE - self.used
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Appends code that was assembled for [`CodeCache::cursor`]; `None` if there is no room.
    pub fn append(&mut self, code: &[u8]) -> Option<u64> {
        if code.len() + 64 > self.room() {
            return None;
        }
        let at = self.cursor();
        // SAFETY: `used + code.len()` is within the mapping.
        unsafe { ptr::copy_nonoverlapping(code.as_ptr(), self.write.as_ptr().add(self.used), code.len()) };
        self.used = (self.used + code.len()).next_multiple_of(16);
        Some(at)
    }

    /// Sets the 32-bit offset at executable address `at`, so that the jump it belongs to goes to `target`.
    pub fn patch_jump(&mut self, at: u64, target: u64) {
        self.patch(at, target.wrapping_sub(at + 4) as u32);
    }

    /// Sets 32 bits of code at executable address `at`.
    pub fn patch(&mut self, at: u64, value: u32) {
        let offset = (at - self.execute.as_ptr().expose_provenance() as u64) as usize;
        assert!(offset + 4 <= self.used, "outside of the code");
        // SAFETY: checked above. Only this thread executes the code, and not now.
        unsafe { self.write.as_ptr().add(offset).cast::<u32>().write_unaligned(value) };
    }

    /// Puts a jump to `target` at executable address `at`, five bytes.
    pub fn patch_to_jump(&mut self, at: u64, target: u64) {
        self.patch(at + 1, target.wrapping_sub(at + 5) as u32);
        let offset = (at - self.execute.as_ptr().expose_provenance() as u64) as usize;
        // SAFETY: in front of what was checked just now; as there.
        unsafe { self.write.as_ptr().add(offset).write(0xe9) };
    }

    /// Replaces the first occurrence of some bytes.
    #[cfg(test)]
    pub fn replace(&mut self, from: &[u8], to: &[u8]) {
        // SAFETY: the used part of the mapping, which nobody executes now.
        let code = unsafe { std::slice::from_raw_parts_mut(self.write.as_ptr(), self.used) };
        let at = code.windows(from.len()).position(|window| window == from).expect("bytes to replace");
        code[at..at + to.len()].copy_from_slice(to);
    }

    /// Keeps what is there now for good.
    pub fn fix(&mut self) {
        self.fixed = self.used;
    }

    /// Takes everything back but what is fixed.
    pub fn reset(&mut self) {
        self.used = self.fixed;
    }
}

impl Drop for CodeCache {
    fn drop(&mut self) {
        for at in [self.write, self.execute] {
            // SAFETY: mapped in `new`; nothing executes there any more, the vCPU is gone.
            let _ = unsafe { munmap(at.as_ptr().cast(), CACHE_SIZE) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_through_one_mapping_runs_through_the_other() {
        let mut cache = CodeCache::new().unwrap();
        // mov eax, edi; jmp +0; add eax, 2; ret
        let at = cache.append(&[0x89, 0xf8, 0xe9, 0, 0, 0, 0, 0x83, 0xc0, 0x02, 0xc3]).unwrap();
        // SAFETY: the bytes above are a function of one integer argument.
        let function: extern "sysv64" fn(u32) -> u32 =
            unsafe { std::mem::transmute(ptr::with_exposed_provenance::<()>(at as usize)) };
        assert_eq!(function(40), 42);
        cache.patch_jump(at + 3, at + 10);
        assert_eq!(function(40), 40, "the jump now skips the addition");
    }

    #[test]
    fn a_full_cache_says_so_and_is_empty_after_a_reset() {
        let mut cache = CodeCache::new().unwrap();
        cache.append(&[0x90; 100]).unwrap();
        cache.fix();
        let start = cache.cursor();
        let chunk = vec![0xcc; 1 << 20];
        while cache.append(&chunk).is_some() {}
        assert!(cache.room() <= (1 << 20) + 64);
        cache.reset();
        assert_eq!(cache.cursor(), start);
    }
}
