//! Plain and atomic accesses to memory that the guest changes under our feet.
//!
//! Rust has no words for "a load that may race with anything, at any alignment, and is as atomic as
//! the CPU makes it". One instruction of inline assembly is exactly that, and keeps the guest's
//! memory ordering: an x86 host is TSO, as an x86 guest expects.

#![allow(unsafe_code)] // the one place where guest memory is touched without vm-memory's checks

use std::arch::asm;

/// An integer the host loads, stores and exchanges in one instruction.
pub trait HostInt: Copy + Eq {
    /// Reads the value at `ptr`, at any alignment.
    ///
    /// # Safety
    /// `ptr` is valid for reads of the type's size.
    unsafe fn load(ptr: *const u8) -> Self;

    /// Writes `value` to `ptr`, at any alignment.
    ///
    /// # Safety
    /// `ptr` is valid for writes of the type's size.
    unsafe fn store(ptr: *mut u8, value: Self);

    /// Stores `new` if the value at `ptr` is `old`; the value found otherwise. A full barrier.
    ///
    /// # Safety
    /// `ptr` is valid for reads and writes of the type's size.
    unsafe fn compare_exchange(ptr: *mut u8, old: Self, new: Self) -> Result<Self, Self>;
}

macro_rules! host_int {
    ($ty:ty, $class:ident, $acc:tt, $mod:literal) => {
        impl HostInt for $ty {
            #[inline(always)]
            unsafe fn load(ptr: *const u8) -> Self {
                let value: $ty;
                // SAFETY: the caller vouches for `ptr`; one mov reads exactly the type's size.
                unsafe {
                    asm!(concat!("mov {v", $mod, "}, [{p}]"), v = out($class) value, p = in(reg) ptr,
                         options(nostack, preserves_flags, readonly));
                }
                value
            }

            #[inline(always)]
            unsafe fn store(ptr: *mut u8, value: Self) {
                // SAFETY: the caller vouches for `ptr`; one mov writes exactly the type's size.
                unsafe {
                    asm!(concat!("mov [{p}], {v", $mod, "}"), v = in($class) value, p = in(reg) ptr,
                         options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            unsafe fn compare_exchange(ptr: *mut u8, old: Self, new: Self) -> Result<Self, Self> {
                let found: $ty;
                let done: u8;
                // SAFETY: the caller vouches for `ptr`.
                unsafe {
                    asm!(concat!("lock cmpxchg [{p}], {n", $mod, "}"), "sete {d}",
                         p = in(reg) ptr, n = in($class) new, d = lateout(reg_byte) done,
                         inlateout($acc) old => found, options(nostack));
                }
                if done != 0 { Ok(found) } else { Err(found) }
            }
        }
    };
}

host_int!(u8, reg_byte, "al", "");
host_int!(u16, reg, "ax", ":x");
host_int!(u32, reg, "eax", ":e");
host_int!(u64, reg, "rax", ":r");

impl HostInt for u128 {
    #[inline(always)]
    unsafe fn load(ptr: *const u8) -> Self {
        // SAFETY: the caller vouches for 16 readable bytes.
        let (lo, hi) = unsafe { (u64::load(ptr), u64::load(ptr.add(8))) };
        u128::from(lo) | u128::from(hi) << 64
    }

    #[inline(always)]
    unsafe fn store(ptr: *mut u8, value: Self) {
        // SAFETY: the caller vouches for 16 writable bytes.
        unsafe {
            u64::store(ptr, value as u64);
            u64::store(ptr.add(8), (value >> 64) as u64);
        }
    }

    /// As `CMPXCHG16B`: `ptr` must be 16-byte aligned, or the host CPU faults.
    unsafe fn compare_exchange(ptr: *mut u8, old: Self, new: Self) -> Result<Self, Self> {
        assert!(ptr.addr().is_multiple_of(16), "CMPXCHG16B operand must be aligned");
        let (lo, hi): (u64, u64);
        let done: u8;
        // SAFETY: the caller vouches for `ptr`; alignment is checked above; rbx is restored.
        unsafe {
            // Registers by name: the compiler may pick rbx for a `reg`, and rbx is swapped here.
            asm!("xchg rsi, rbx", "lock cmpxchg16b [rdi]", "sete r8b", "mov rbx, rsi",
                 in("rdi") ptr, inout("rsi") new as u64 => _, out("r8b") done,
                 in("rcx") (new >> 64) as u64,
                 inout("rax") old as u64 => lo, inout("rdx") (old >> 64) as u64 => hi, options(nostack));
        }
        let found = u128::from(lo) | u128::from(hi) << 64;
        if done != 0 { Ok(found) } else { Err(found) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip<T: HostInt + std::fmt::Debug>(a: T, b: T) {
        let mut cell = [0u128; 2];
        let ptr = cell.as_mut_ptr().cast::<u8>();
        // SAFETY: `cell` is 32 bytes, 16-byte aligned.
        unsafe {
            T::store(ptr, a);
            assert_eq!(T::load(ptr), a);
            assert_eq!(T::compare_exchange(ptr, b, b), Err(a));
            assert_eq!(T::compare_exchange(ptr, a, b), Ok(a));
            assert_eq!(T::load(ptr), b);
        }
    }

    #[test]
    fn every_width_loads_stores_and_exchanges() {
        round_trip(1u8, 0xfe);
        round_trip(1u16, 0xfedc);
        round_trip(1u32, 0xfedc_ba98);
        round_trip(1u64, 0xfedc_ba98_7654_3210);
        round_trip(1u128, 0xfedc_ba98_7654_3210_0123_4567_89ab_cdef);
    }
}
