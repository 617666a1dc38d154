//! What translated code finds at the stack pointer.
//!
//! While translated code runs, the host's RSP points at the [`Cpu`] itself: guest state is addressed as
//! `[rsp + offset]` without spending a register, and calls from translated code use the stack that lies
//! below it ([`CpuBox`]).

#![allow(unsafe_code)] // places a Cpu in a mapping of its own

use std::mem::{align_of, offset_of, size_of};
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};

use engine::Error;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

use super::super::cpu::{Cpu, Mode};
use super::super::fast::{FastEntry, FastTlb, JumpCache, JumpEntry, LatestJumps};
use super::super::fpu::{Fpu, X87 as Unit};
use super::super::msr::Msrs;
use super::super::tlb::{Tlb, View};
use super::groups::MAX_GROUPS;

/// Slots that belong to translated code. All of them are dead while Rust code of other modules runs.
#[derive(Clone, Debug, Default)]
#[repr(C)]
pub struct Frame {
    /// Arithmetic flags as `LAHF` and `SETO AL` leave them in AX.
    pub flags: u64,
    /// Linear address of the page that is being executed.
    pub page: u64,
    /// Address of the vCPU's attention word.
    pub attention: u64,
    /// Bits of the attention word that matter now.
    pub attention_mask: u64,
    /// Where a stub jumps to when its registers are restored.
    pub target: u64,
    /// Scratch registers at a TLB miss.
    pub scratch: [u64; 2],
    /// Holds RAX while flags move through it.
    pub rax: u64,
    /// For one instruction's use.
    pub temp: u64,
    /// The host's stack pointer outside of translated code.
    pub host_rsp: u64,
    /// Why translated code was left: a site's number.
    pub site: u64,
    /// The current address space and mode, as the jump cache tags its entries.
    pub context: u64,
    /// Whether the guest's vector registers are in the host's.
    pub simd: u64,
    /// Whether the guest's x87 unit is in the host's ([`x87`](super::x87)).
    pub x87: u64,
    /// Page of the latest x87 instruction.
    pub x87_page: u64,
    /// Its opcode and its offset in the page.
    pub x87_at: u32,
    /// MXCSR of Rust code.
    pub host_mxcsr: u64,
    /// Site of the jump to another page that looks into the jump cache.
    pub far_site: u64,
    /// Address of the translator, for the helpers.
    pub translator: u64,
    /// How many jumps to other pages may be linked anew for the current context.
    pub relinks: u64,
    /// What to add to the addresses of each group of accesses ([`groups`](super::groups)).
    pub groups: [u64; MAX_GROUPS],
}

/// Offsets from RSP.
pub mod at {
    use super::*;

    const FRAME: usize = offset_of!(Cpu, frame);

    /// A general register's slot.
    pub const fn reg(number: u8) -> i32 {
        (offset_of!(Cpu, regs) + 8 * number as usize) as i32
    }
    /// RFLAGS.
    pub const RFLAGS: i32 = offset_of!(Cpu, rflags) as i32;
    /// [`Frame::flags`].
    pub const FLAGS: i32 = (FRAME + offset_of!(Frame, flags)) as i32;
    /// [`Frame::page`].
    pub const PAGE: i32 = (FRAME + offset_of!(Frame, page)) as i32;
    /// [`Frame::attention`].
    pub const ATTENTION: i32 = (FRAME + offset_of!(Frame, attention)) as i32;
    /// [`Frame::attention_mask`].
    pub const ATTENTION_MASK: i32 = (FRAME + offset_of!(Frame, attention_mask)) as i32;
    /// [`Frame::target`].
    pub const TARGET: i32 = (FRAME + offset_of!(Frame, target)) as i32;
    /// [`Frame::scratch`].
    pub const SCRATCH: i32 = (FRAME + offset_of!(Frame, scratch)) as i32;
    /// [`Frame::rax`].
    pub const RAX: i32 = (FRAME + offset_of!(Frame, rax)) as i32;
    /// [`Frame::temp`].
    pub const TEMP: i32 = (FRAME + offset_of!(Frame, temp)) as i32;
    /// [`Frame::host_rsp`].
    pub const HOST_RSP: i32 = (FRAME + offset_of!(Frame, host_rsp)) as i32;
    /// [`Frame::site`].
    pub const SITE: i32 = (FRAME + offset_of!(Frame, site)) as i32;
    /// [`Frame::context`].
    pub const CONTEXT: i32 = (FRAME + offset_of!(Frame, context)) as i32;
    /// [`Frame::simd`].
    pub const SIMD: i32 = (FRAME + offset_of!(Frame, simd)) as i32;
    /// [`Frame::x87`].
    pub const X87: i32 = (FRAME + offset_of!(Frame, x87)) as i32;
    /// [`Frame::x87_page`].
    pub const X87_PAGE: i32 = (FRAME + offset_of!(Frame, x87_page)) as i32;
    /// [`Frame::x87_at`].
    pub const X87_AT: i32 = (FRAME + offset_of!(Frame, x87_at)) as i32;
    /// The guest's x87 unit.
    pub const X87_AREA: i32 = (offset_of!(Cpu, fpu) + offset_of!(Fpu, x87)) as i32;
    /// Which components are in it.
    pub const X87_COMPONENTS: i32 = X87_AREA + offset_of!(Unit, components) as i32;
    /// [`Frame::host_mxcsr`].
    pub const HOST_MXCSR: i32 = (FRAME + offset_of!(Frame, host_mxcsr)) as i32;

    /// One of [`Frame::groups`].
    pub const fn group(number: u8) -> i32 {
        (FRAME + offset_of!(Frame, groups) + 8 * number as usize) as i32
    }

    const TLB: usize = offset_of!(Cpu, tlb);
    const DATA: usize = TLB + offset_of!(Tlb, fast) + offset_of!(FastTlb, entries);

    /// The tag for reads or writes in slot 0 of a view's fast TLB.
    pub fn tag(view: View, write: bool) -> i32 {
        let field = if write { offset_of!(FastEntry, write) } else { offset_of!(FastEntry, read) };
        (DATA + view as usize * size_of::<[FastEntry; super::super::super::fast::FAST_ENTRIES]>() + field)
            as i32
    }
    /// The host address in slot 0 of a view's fast TLB.
    pub fn host(view: View) -> i32 {
        tag(view, false) + (offset_of!(FastEntry, host) - offset_of!(FastEntry, read)) as i32
    }
    /// What to add to linear addresses of the page in slot 0 of a view's fast TLB.
    pub fn addend(view: View) -> i32 {
        tag(view, false) + (offset_of!(FastEntry, addend) - offset_of!(FastEntry, read)) as i32
    }
    const JUMPS: usize = TLB + offset_of!(Tlb, jumps) + offset_of!(JumpCache, entries);
    /// [`JumpEntry::linear`] in slot 0.
    pub const JUMP_LINEAR: i32 = (JUMPS + offset_of!(JumpEntry, linear)) as i32;
    /// [`JumpEntry::context`] in slot 0.
    pub const JUMP_CONTEXT: i32 = (JUMPS + offset_of!(JumpEntry, context)) as i32;
    /// [`JumpEntry::page`] in slot 0.
    pub const JUMP_PAGE: i32 = (JUMPS + offset_of!(JumpEntry, page)) as i32;
    /// [`JumpEntry::code`] in slot 0.
    pub const JUMP_CODE: i32 = (JUMPS + offset_of!(JumpEntry, code)) as i32;

    /// The latest jumps of a view.
    const fn latest(view: View) -> usize {
        TLB + offset_of!(Tlb, jumps)
            + offset_of!(JumpCache, latest)
            + view as usize * size_of::<LatestJumps>()
    }
    /// [`LatestJumps::linear`] of a view.
    pub const fn latest_linear(view: View) -> i32 {
        (latest(view) + offset_of!(LatestJumps, linear)) as i32
    }
    /// [`LatestJumps::code`] of a view.
    pub const fn latest_code(view: View) -> i32 {
        (latest(view) + offset_of!(LatestJumps, code)) as i32
    }

    /// [`JumpCache::link_id`].
    pub const LINK_ID: i32 = (TLB + offset_of!(Tlb, jumps) + offset_of!(JumpCache, link_id)) as i32;
    /// [`Frame::relinks`].
    pub const RELINKS: i32 = (FRAME + offset_of!(Frame, relinks)) as i32;
    /// [`Frame::far_site`].
    pub const FAR_SITE: i32 = (FRAME + offset_of!(Frame, far_site)) as i32;

    /// Base of a segment.
    pub fn segment_base(number: u8) -> i32 {
        let size = size_of::<engine::x86::Segment>();
        (offset_of!(Cpu, segs) + number as usize * size + offset_of!(engine::x86::Segment, base)) as i32
    }
    /// Base that `SWAPGS` swaps in.
    pub const KERNEL_GS_BASE: i32 = (offset_of!(Cpu, msrs) + offset_of!(Msrs, kernel_gs_base)) as i32;
    /// [`Mode::view`](crate::x86::cpu::Mode::view)
    pub const VIEW: i32 = (offset_of!(Cpu, mode) + offset_of!(Mode, view)) as i32;
    // `Some(view)` is stored as the view's number.
    const _: () = assert!(size_of::<Option<View>>() == 1);

    /// The SSE control and status register.
    pub const MXCSR: i32 = (offset_of!(Cpu, fpu) + offset_of!(Fpu, mxcsr)) as i32;
    /// A vector register.
    pub const fn ymm(number: u8) -> i32 {
        (offset_of!(Cpu, fpu) + offset_of!(Fpu, ymm) + 32 * number as usize) as i32
    }
}

/// Stack for Rust code that translated code calls.
const STACK: usize = 1 << 20;
const GUARD: usize = 64 << 10;

/// A [`Cpu`] with a stack below it.
pub struct CpuBox {
    cpu: NonNull<Cpu>,
    mapping: NonNull<u8>,
}

const _: () = assert!(align_of::<Cpu>() <= 4096 && (GUARD + STACK).is_multiple_of(4096));
const MAPPING: usize = GUARD + STACK + size_of::<Cpu>();

// SAFETY: the box owns its mapping, and Cpu is Send.
unsafe impl Send for CpuBox {}

impl CpuBox {
    /// Moves a vCPU to its place.
    pub fn new(cpu: Cpu) -> Result<CpuBox, Error> {
        let failed = |errno: rustix::io::Errno| Error::Host { what: "mapping a vCPU", source: errno.into() };
        // SAFETY: a new mapping at an address of the kernel's choice; its first bytes become the guard.
        let base = unsafe {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            let base = mmap_anonymous(ptr::null_mut(), MAPPING, ProtFlags::READ | ProtFlags::WRITE, flags)
                .map_err(failed)?;
            mprotect(base, GUARD, MprotectFlags::empty()).map_err(failed)?;
            base.cast::<u8>()
        };
        let mapping = NonNull::new(base).ok_or_else(|| failed(rustix::io::Errno::NOMEM))?;
        // SAFETY: the Cpu's place is within the mapping and page-aligned.
        let place = unsafe {
            let place = base.add(GUARD + STACK).cast::<Cpu>();
            place.write(cpu);
            NonNull::new_unchecked(place)
        };
        Ok(CpuBox { cpu: place, mapping })
    }

    /// Its address, for code that runs on it.
    pub fn as_ptr(&mut self) -> *mut Cpu {
        self.cpu.as_ptr()
    }
}

impl Deref for CpuBox {
    type Target = Cpu;
    fn deref(&self) -> &Cpu {
        // SAFETY: initialised in `new`, owned.
        unsafe { self.cpu.as_ref() }
    }
}

impl DerefMut for CpuBox {
    fn deref_mut(&mut self) -> &mut Cpu {
        // SAFETY: initialised in `new`, owned.
        unsafe { self.cpu.as_mut() }
    }
}

impl Drop for CpuBox {
    fn drop(&mut self) {
        // SAFETY: as above; the mapping goes after what lives in it.
        unsafe {
            self.cpu.drop_in_place();
            let _ = munmap(self.mapping.as_ptr().cast(), MAPPING);
        }
    }
}
