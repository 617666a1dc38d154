//! FXSAVE and XSAVE areas (SDM 1, 10.5 and 13.4): from registers to bytes and back.

use engine::Error;
use engine::x86::XSAVE_AREA_SIZE;

use super::{Fpu, Pointers, component, control};

/// Bytes of the legacy region, and of an FXSAVE area.
pub const LEGACY_SIZE: usize = 512;
/// Where the upper halves of the YMM registers are in the standard format.
pub const AVX_OFFSET: usize = 576;
/// Bytes of the standard format with all components that are offered.
pub const AREA_SIZE: usize = AVX_OFFSET + 256;
/// Where the XSAVE header is: XSTATE_BV, XCOMP_BV.
const HEADER: usize = 512;
const HEADER_SIZE: usize = 64;
const X87_REGISTERS: usize = 32;
const XMM_REGISTERS: usize = 160;
const MXCSR: usize = 24;

/// How an area holds the x87 pointers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 32-bit offset and selector.
    Narrow,
    /// 64-bit offset (REX.W).
    Wide,
}

fn get<const N: usize>(area: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&area[at..at + N]);
    bytes
}

fn get16(area: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(get(area, at))
}

fn get64(area: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(get(area, at))
}

fn put64(area: &mut [u8], at: usize, value: u64) {
    area[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// MXCSR in a legacy region.
pub fn mxcsr_of(area: &[u8]) -> u32 {
    u32::from_le_bytes(get(area, MXCSR))
}

/// XSTATE_BV and XCOMP_BV of an area, and whether the next 8 bytes are zero.
pub fn header_of(area: &[u8]) -> (u64, u64, bool) {
    (get64(area, HEADER), get64(area, HEADER + 8), get64(area, HEADER + 16) == 0)
}

impl Fpu {
    /// Writes the x87 part of a legacy region: bytes 0-23 and 32-159.
    pub fn write_x87(&self, area: &mut [u8], width: Width) {
        area[0..2].copy_from_slice(&self.x87.fcw.to_le_bytes());
        area[2..4].copy_from_slice(&self.x87.fsw.to_le_bytes());
        area[4] = self.x87.ftw;
        area[5] = 0;
        area[6..8].copy_from_slice(&self.pointers.fop.to_le_bytes());
        let cut = if width == Width::Wide { u64::MAX } else { 0xffff_ffff };
        put64(area, 8, self.pointers.fip & cut);
        put64(area, 16, self.pointers.fdp & cut);
        for (i, [low, high]) in self.x87.st.into_iter().enumerate() {
            put64(area, X87_REGISTERS + 16 * i, low);
            put64(area, X87_REGISTERS + 16 * i + 8, high & 0xffff);
        }
    }

    /// Writes MXCSR and its mask: bytes 24-31.
    pub fn write_mxcsr(&self, area: &mut [u8]) {
        area[MXCSR..MXCSR + 4].copy_from_slice(&self.mxcsr.to_le_bytes());
        area[MXCSR + 4..MXCSR + 8].copy_from_slice(&Fpu::mxcsr_mask().to_le_bytes());
    }

    /// Writes the first `count` XMM registers.
    pub fn write_xmm(&self, area: &mut [u8], count: usize) {
        for (i, ymm) in self.ymm.iter().enumerate().take(count) {
            put64(area, XMM_REGISTERS + 16 * i, ymm[0]);
            put64(area, XMM_REGISTERS + 16 * i + 8, ymm[1]);
        }
    }

    /// Writes the upper halves of the first `count` YMM registers.
    pub fn write_avx(&self, area: &mut [u8], count: usize) {
        for (i, ymm) in self.ymm.iter().enumerate().take(count) {
            put64(area, AVX_OFFSET + 16 * i, ymm[2]);
            put64(area, AVX_OFFSET + 16 * i + 8, ymm[3]);
        }
    }

    /// Takes over the x87 part of a legacy region.
    pub fn read_x87(&mut self, area: &[u8], width: Width) {
        (self.x87.fcw, self.x87.fsw, self.x87.ftw) = (control(get16(area, 0)), get16(area, 2), area[4]);
        let cut = if width == Width::Wide { u64::MAX } else { 0xffff_ffff };
        self.pointers =
            Pointers { fop: get16(area, 6) & 0x7ff, fip: get64(area, 8) & cut, fdp: get64(area, 16) & cut };
        for (i, st) in self.x87.st.iter_mut().enumerate() {
            let at = X87_REGISTERS + 16 * i;
            *st = [get64(area, at), get16(area, at + 8).into()];
        }
        self.x87.summarize();
    }

    /// Takes over the first `count` XMM registers.
    pub fn read_xmm(&mut self, area: &[u8], count: usize) {
        for (i, ymm) in self.ymm.iter_mut().enumerate().take(count) {
            let at = XMM_REGISTERS + 16 * i;
            (ymm[0], ymm[1]) = (get64(area, at), get64(area, at + 8));
        }
    }

    /// Takes over the upper halves of the first `count` YMM registers.
    pub fn read_avx(&mut self, area: &[u8], count: usize) {
        for (i, ymm) in self.ymm.iter_mut().enumerate().take(count) {
            let at = AVX_OFFSET + 16 * i;
            (ymm[2], ymm[3]) = (get64(area, at), get64(area, at + 8));
        }
    }

    /// The x87 component in its initial configuration.
    pub fn init_x87(&mut self) {
        self.x87.reset();
        self.x87.st = [[0; 2]; 8];
        self.pointers = Pointers::default();
    }

    /// Clears the first `count` XMM registers.
    pub fn init_xmm(&mut self, count: usize) {
        self.ymm[..count].iter_mut().for_each(|ymm| ymm[..2].fill(0));
    }

    /// Clears the upper halves of the first `count` YMM registers.
    pub fn init_avx(&mut self, count: usize) {
        self.ymm[..count].iter_mut().for_each(|ymm| ymm[2..].fill(0));
    }

    /// Writes an area in the standard format, whole: the components that are offered are present, no others.
    pub fn write_components(&self, area: &mut [u8]) {
        self.write_x87(area, Width::Wide);
        self.write_mxcsr(area);
        self.write_xmm(area, 16);
        self.write_avx(area, 16);
        area[HEADER..HEADER + HEADER_SIZE].fill(0);
        put64(area, HEADER, component::X87 | component::SSE | component::AVX);
    }

    /// Takes over MXCSR and the components that are offered: those that are not present become initial.
    pub fn read_components(&mut self, area: &[u8]) {
        let (present, ..) = header_of(area);
        self.mxcsr = mxcsr_of(area);
        match present & component::X87 {
            0 => self.init_x87(),
            _ => self.read_x87(area, Width::Wide),
        }
        match present & component::SSE {
            0 => self.init_xmm(16),
            _ => self.read_xmm(area, 16),
        }
        match present & component::AVX {
            0 => self.init_avx(16),
            _ => self.read_avx(area, 16),
        }
    }

    /// XINUSE: components that differ from their initial configuration (SDM 1, 13.6).
    pub fn in_use(&self) -> u64 {
        let x87 = &self.x87;
        let idle = (x87.fcw, x87.fsw, x87.ftw) == (super::FCW_INIT, 0, 0)
            && self.pointers == Pointers::default()
            && x87.st.iter().all(|st| *st == [0; 2]);
        let mut in_use = if idle { 0 } else { component::X87 };
        if self.ymm.iter().any(|ymm| ymm[0] | ymm[1] != 0) {
            in_use |= component::SSE;
        }
        if self.ymm.iter().any(|ymm| ymm[2] | ymm[3] != 0) {
            in_use |= component::AVX;
        }
        in_use
    }

    /// Everything, as in [`engine::x86::CpuState::xsave`]. XCR0 is not part of it.
    pub fn save(&self) -> Vec<u8> {
        let mut area = vec![0; XSAVE_AREA_SIZE];
        self.write_components(&mut area);
        area
    }

    /// Takes over a saved area; XCR0 stays.
    pub fn restore(&mut self, area: &[u8]) -> Result<(), Error> {
        let bad = |what: String| Err(Error::BadState(what));
        if area.len() != XSAVE_AREA_SIZE {
            return bad(format!("its XSAVE area has {} bytes instead of {XSAVE_AREA_SIZE}", area.len()));
        }
        let (present, compaction, _) = header_of(area);
        let known = component::X87 | component::SSE | component::AVX;
        if present & !known != 0 || compaction != 0 {
            return bad(format!("XSAVE components {:#x} are not offered here", present & !known));
        }
        if mxcsr_of(area) & !Fpu::mxcsr_mask() != 0 {
            return bad(format!("MXCSR {:#x} has reserved bits set", mxcsr_of(area)));
        }
        let mut new = Fpu { xcr0: self.xcr0, ..Fpu::default() };
        new.read_components(area);
        *self = new;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_state_comes_back_whole() {
        let mut fpu = Fpu { xcr0: 7, mxcsr: 0x1fa0, ..Fpu::default() };
        for (i, ymm) in fpu.ymm.iter_mut().enumerate() {
            *ymm = [1, 2, 3, 4].map(|n| n * 1000 + i as u64);
        }
        for (i, st) in fpu.x87.st.iter_mut().enumerate() {
            *st = [i as u64, 0x4000 + i as u64];
        }
        (fpu.x87.fcw, fpu.x87.fsw, fpu.x87.ftw) = (0x27f, 0x1820, 0x5a);
        fpu.pointers = Pointers { fip: 0x7fff_1234_5678, fdp: 0xffff_8000_0000_0000, fop: 0x7ff };
        let area = fpu.save();
        assert_eq!(area.len(), XSAVE_AREA_SIZE);
        let mut copy = Fpu { xcr0: 7, ..Fpu::default() };
        copy.restore(&area).unwrap();
        assert_eq!(copy.save(), area);
        assert_eq!((copy.ymm, copy.x87.st, copy.pointers), (fpu.ymm, fpu.x87.st, fpu.pointers));
    }

    #[test]
    fn areas_that_cannot_be_taken_over_are_refused_and_change_nothing() {
        let mut fpu = Fpu::default();
        fpu.ymm[3] = [7; 4];
        let good = fpu.save();
        assert!(fpu.restore(&good[..1000]).is_err());
        let mut zmm = good.clone();
        zmm[512] |= 1 << 6;
        assert!(fpu.restore(&zmm).unwrap_err().to_string().contains("components"));
        let mut reserved = good.clone();
        reserved[27] = 0x80;
        assert!(fpu.restore(&reserved).unwrap_err().to_string().contains("MXCSR"));
        assert_eq!(fpu.save(), good);
    }
}
