//! x87, SSE and AVX state.
//!
//! The saved state has the layout of Intel's CPUs up to AVX-512 and PKRU (SDM 1, 13.4); AMD's place some
//! components elsewhere. CPUID leaf 0xD says where.

#![allow(unsafe_code)] // KVM_SET_XSAVE reads as much as the host's CPU has state

use engine::Error;
use engine::x86::{CpuModel, XSAVE_AREA_SIZE};
use kvm_bindings::{CpuId, kvm_xcr, kvm_xcrs, kvm_xsave};
use kvm_ioctls::VcpuFd;

use crate::failed;

/// A component: its bit in XCR0, offset and size in the saved state.
struct Component {
    bit: u32,
    offset: usize,
    size: usize,
}

/// AVX, AVX-512's three, and PKRU.
const COMPONENTS: &[Component] = &[
    Component { bit: 2, offset: 576, size: 256 },
    Component { bit: 5, offset: 1088, size: 64 },
    Component { bit: 6, offset: 1152, size: 512 },
    Component { bit: 7, offset: 1664, size: 1024 },
    Component { bit: 9, offset: 2688, size: 8 },
];

/// XCR0 bits that the saved state has room for; x87 and SSE are in the legacy area.
pub(crate) const XCR0_KNOWN: u64 = 1 << 9 | 7 << 5 | 7;

/// Legacy area and header.
const HEAD: usize = 576;
/// Place of XSTATE_BV, the components that are not in their initial state.
const XSTATE_BV: std::ops::Range<usize> = 512..520;

/// Where this host's CPU keeps the components.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    /// (offset here, offset in the saved state, size)
    moves: Vec<(usize, usize, usize)>,
    mask: u64,
}

impl Layout {
    /// From what KVM supports.
    pub(crate) fn new(supported: &CpuId) -> Layout {
        let leaf = |index| supported.as_slice().iter().find(|e| e.function == 0xd && e.index == index);
        let mask = leaf(0).map_or(3, |e| u64::from(e.eax) | u64::from(e.edx) << 32) & XCR0_KNOWN;
        let here = |c: &Component| {
            let e = leaf(c.bit)?;
            let fits = e.eax as usize == c.size && e.ebx as usize + c.size <= 4096;
            (mask & 1 << c.bit != 0 && fits).then_some((e.ebx as usize, c.offset, c.size))
        };
        Layout { moves: COMPONENTS.iter().filter_map(here).collect(), mask }
    }

    /// Without the components that the model lacks.
    pub(crate) fn cut_to(mut self, model: CpuModel) -> Layout {
        if !model.is_host() {
            let kept =
                |offset| COMPONENTS.iter().any(|c| c.offset == offset && model.xcr0() & 1 << c.bit != 0);
            self.moves.retain(|&(_, there, _)| kept(there));
            // SSE has state without XSAVE too.
            self.mask &= model.xcr0() | 3;
        }
        self
    }

    /// XCR0 bits that a guest may set here.
    pub(crate) fn mask(&self) -> u64 {
        self.mask
    }

    /// Bytes of the standard format for the components in `mask`.
    pub(crate) fn size(&self) -> usize {
        self.moves.iter().map(|(here, _, size)| here + size).max().unwrap_or(HEAD)
    }

    fn to_saved(&self, area: &[u8; 4096]) -> Vec<u8> {
        let mut saved = vec![0; XSAVE_AREA_SIZE];
        saved[..HEAD].copy_from_slice(&area[..HEAD]);
        for &(here, there, size) in &self.moves {
            saved[there..there + size].copy_from_slice(&area[here..here + size]);
        }
        mark_initial(&mut saved);
        saved
    }

    fn to_host(&self, saved: &[u8; XSAVE_AREA_SIZE]) -> Result<[u8; 4096], Error> {
        let mut saved = *saved;
        mark_initial(&mut saved);
        let in_use = u64::from_le_bytes(saved[XSTATE_BV].try_into().unwrap_or_default());
        if in_use & !self.mask != 0 {
            return Err(Error::BadState(format!(
                "it has extended registers (XSTATE_BV {in_use:#x}) that this host's CPU lacks (it has {:#x})",
                self.mask
            )));
        }
        let mut area = [0; 4096];
        area[..HEAD].copy_from_slice(&saved[..HEAD]);
        for &(here, there, size) in &self.moves {
            area[here..here + size].copy_from_slice(&saved[there..there + size]);
        }
        Ok(area)
    }
}

/// Components that hold zeros are in their initial state. KVM does not always say so (of PKRU, never),
/// and a host without the component could then not take the state on.
fn mark_initial(saved: &mut [u8]) {
    let zero = |c: &&Component| saved[c.offset..c.offset + c.size].iter().all(|&byte| byte == 0);
    let initial = COMPONENTS.iter().filter(zero).fold(0, |bits, c| bits | 1u64 << c.bit);
    let mut in_use = [0; 8];
    in_use.copy_from_slice(&saved[XSTATE_BV]);
    let in_use = u64::from_le_bytes(in_use) & !initial;
    saved[XSTATE_BV].copy_from_slice(&in_use.to_le_bytes());
}

/// The XSAVE area and XCR0.
pub(super) fn save(fd: &VcpuFd, layout: &Layout) -> Result<(Vec<u8>, u64), Error> {
    let xsave = fd.get_xsave().map_err(failed("reading a vCPU's extended state"))?;
    let mut area = [0; 4096];
    for (bytes, word) in area.chunks_exact_mut(4).zip(xsave.region) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    let xcrs = fd.get_xcrs().map_err(failed("reading a vCPU's XCR0"))?;
    let known = &xcrs.xcrs[..(xcrs.nr_xcrs as usize).min(xcrs.xcrs.len())];
    let xcr0 = known.iter().find(|xcr| xcr.xcr == 0).map_or(1, |xcr| xcr.value);
    Ok((layout.to_saved(&area), xcr0))
}

/// Sets the XSAVE area and XCR0.
pub(super) fn restore(fd: &VcpuFd, layout: &Layout, saved: &[u8], xcr0: u64) -> Result<(), Error> {
    let saved = saved.try_into().map_err(|_| {
        Error::BadState(format!("the XSAVE area has {XSAVE_AREA_SIZE} bytes, not {}", saved.len()))
    })?;
    let area = layout.to_host(saved)?;
    let mut xsave = kvm_xsave::default();
    for (word, bytes) in xsave.region.iter_mut().zip(area.chunks_exact(4)) {
        *word = u32::from_le_bytes(bytes.try_into().unwrap_or_default());
    }
    // SAFETY: the kernel reads 4096 bytes unless this process asked for larger state (AMX) by
    // arch_prctl, which nobody here does.
    unsafe { fd.set_xsave(&xsave) }
        .map_err(|errno| Error::BadState(format!("the host's CPU refuses the extended state: {errno}")))?;
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: xcr0, ..Default::default() };
    fd.set_xcrs(&xcrs)
        .map_err(|errno| Error::BadState(format!("the host's CPU refuses XCR0 {xcr0:#x}: {errno}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_cpuid_entry2;

    /// AVX and PKRU, the latter right behind the former as on AMD's CPUs.
    fn amd() -> Layout {
        let leaf =
            |index, eax, ebx| kvm_cpuid_entry2 { function: 0xd, index, eax, ebx, ..Default::default() };
        let leaves = [leaf(0, 0x207, 0), leaf(2, 256, 576), leaf(9, 8, 832)];
        Layout::new(&CpuId::from_entries(&leaves).unwrap())
    }

    #[test]
    fn components_move_between_layouts_and_back() {
        let layout = amd();
        assert_eq!((layout.mask(), layout.size()), (0x207, 840));
        let mut area = [0; 4096];
        for (i, byte) in area[..840].iter_mut().enumerate() {
            *byte = i as u8;
        }
        area[XSTATE_BV].copy_from_slice(&0x207u64.to_le_bytes());
        let saved = layout.to_saved(&area);
        assert_eq!(saved[2688..2696], area[832..840]);
        assert_eq!(layout.to_host(saved.as_slice().try_into().unwrap()).unwrap(), area);
    }

    #[test]
    fn a_component_of_zeros_is_one_that_was_never_used() {
        let mut area = [0; 4096];
        area[XSTATE_BV].copy_from_slice(&0x207u64.to_le_bytes());
        area[576] = 1;
        assert_eq!(amd().to_saved(&area)[XSTATE_BV], 7u64.to_le_bytes());
    }

    #[test]
    fn registers_that_the_host_lacks_are_refused() {
        let mut saved = [0; XSAVE_AREA_SIZE];
        saved[512] = 1 << 6;
        amd().to_host(&saved).expect("registers of zeros are not in use");
        saved[1152] = 1;
        let error = amd().to_host(&saved).unwrap_err().to_string();
        assert!(error.contains("XSTATE_BV 0x40"), "{error}");
    }
}
