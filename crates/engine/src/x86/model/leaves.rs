//! A model's table of CPUID leaves.
//!
//! What follows the state of a vCPU is left to the engine: OSXSAVE (leaf 1 ECX bit 27), the APIC bit while
//! the APIC is off, and the size of the area for the current XCR0 (leaf 0xd EBX), all of which are here as
//! they are after power-on.

use super::{CpuModel, PHYSICAL_BITS};

/// EAX, EBX, ECX, EDX.
pub type Registers = [u32; 4];

/// Whose CPU it says it is: that of the host, for some instructions differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// "GenuineIntel".
    Intel,
    /// "AuthenticAMD", and all others that follow AMD's manuals.
    Amd,
}

/// The vCPU that executes the instruction.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// The maker.
    pub vendor: Vendor,
    /// Its number.
    pub id: u32,
    /// How many there are.
    pub cpus: u32,
    /// Frequency of the time-stamp counter in kHz, 0 where it is not known.
    pub tsc_khz: u32,
}

/// Leaf 1 ECX: the hypervisor bit.
const HYPERVISOR_BIT: u32 = 1 << 31;
const HTT: u32 = 1 << 28;
const CMP_LEGACY: u32 = 1 << 1;
const HYPERVISOR: u32 = 0x4000_0000;
const EXTENDED: u32 = 0x8000_0000;
/// KVM's paravirtual features: NOP_IO_DELAY, CLOCKSOURCE2, CLOCKSOURCE_STABLE.
pub(crate) const KVM_FEATURES: u32 = 1 << 1 | 1 << 3 | 1 << 24;
/// The bits of leaf 1 EDX that AMD's CPUs repeat in leaf 0x80000001.
const REPEATED: u32 = 0x0183_f3ff;
/// Caches of 64-byte lines: 32 KiB for code, 32 KiB for data, 512 KiB for both, each CPU's own.
const L1_SETS: u32 = 64;
const L2_SETS: u32 = 1024;

impl Identity {
    fn intel(&self) -> bool {
        self.vendor == Vendor::Intel
    }

    /// Bits of the APIC ID within the package.
    fn id_bits(&self) -> u32 {
        self.cpus.next_power_of_two().trailing_zeros()
    }
}

impl CpuModel {
    /// Family, model and stepping: a Westmere or Haswell, or the first Zen.
    pub fn signature(self, vendor: Vendor) -> u32 {
        match (vendor, self) {
            (Vendor::Intel, CpuModel::V3) => 0x0003_06c3,
            (Vendor::Intel, _) => 0x0002_06c1,
            (Vendor::Amd, _) => 0x0080_0f12,
        }
    }

    fn max_basic(self) -> u32 {
        if self.xcr0() & 4 != 0 { 0xd } else { 0xb }
    }

    /// Every leaf and subleaf that holds something; the subleaf is `None` where it does not matter.
    pub fn leaves(self, who: &Identity) -> Vec<(u32, Option<u32>, Registers)> {
        let plain = [0, 1, 2, 6, HYPERVISOR, HYPERVISOR + 1, HYPERVISOR + 0x10];
        let plain = plain.into_iter().chain(EXTENDED..=EXTENDED + 8).map(|leaf| (leaf, None));
        let indexed = [(4, 0..4), (7, 0..1), (0xb, 0..3), (0xd, 0..3)];
        let indexed = indexed.into_iter().filter(|(leaf, _)| *leaf <= self.max_basic());
        let indexed = indexed.flat_map(|(leaf, range)| range.map(move |index| (leaf, Some(index))));
        let all = plain.chain(indexed);
        all.map(|(leaf, index)| (leaf, index, self.leaf(who, leaf, index.unwrap_or(0)))).collect()
    }

    /// One leaf. Beyond the last basic one Intel's CPUs repeat that, AMD's show zeros.
    pub fn leaf(self, who: &Identity, leaf: u32, subleaf: u32) -> Registers {
        match leaf {
            HYPERVISOR..=0x4000_00ff => hypervisor(who, leaf),
            EXTENDED..=0x8000_0008 => self.extended(who, leaf),
            _ if leaf > self.max_basic() && who.intel() => self.basic(who, self.max_basic(), subleaf),
            _ => self.basic(who, leaf, subleaf),
        }
    }

    fn basic(self, who: &Identity, leaf: u32, subleaf: u32) -> Registers {
        match (leaf, subleaf) {
            (0, _) => {
                let [b, d, c] = words(if who.intel() { b"GenuineIntel" } else { b"AuthenticAMD" });
                [self.max_basic(), b, c, d]
            }
            (1, _) => {
                let htt = if who.cpus > 1 { HTT } else { 0 };
                let ebx = 8 << 8 | who.cpus.min(255) << 16 | who.id << 24;
                let ecx = self.feature_bits(1, 2) | HYPERVISOR_BIT;
                [self.signature(who.vendor), ebx, ecx, self.feature_bits(1, 3) | htt]
            }
            (2, _) if who.intel() => [1, 0, 0, 0],
            (4, _) if who.intel() => caches(who, subleaf),
            (6, _) => [1 << 2, 0, 0, 0], // the APIC timer always runs
            (7, 0) => [0, self.feature_bits(7, 1), 0, 0],
            (0xb, _) => topology(who, subleaf),
            // x87 and SSE are in the first 576 bytes, AVX behind them.
            (0xd, 0) if self.xcr0() & 4 != 0 => [self.xcr0() as u32, 576, 832, 0],
            (0xd, 2) if self.xcr0() & 4 != 0 => [256, 576, 0, 0],
            _ => [0; 4],
        }
    }

    fn extended(self, who: &Identity, leaf: u32) -> Registers {
        match leaf - EXTENDED {
            0 => match who.intel() {
                true => [EXTENDED + 8, 0, 0, 0],
                false => {
                    let [b, d, c] = words(b"AuthenticAMD");
                    [EXTENDED + 8, b, c, d]
                }
            },
            1 => {
                let (ecx, edx) = (self.feature_bits(leaf, 2), self.feature_bits(leaf, 3));
                if who.intel() {
                    return [0, 0, ecx, edx];
                }
                let topology = if who.cpus > 1 { CMP_LEGACY } else { 0 };
                [self.signature(who.vendor), 0, ecx | topology, edx | self.feature_bits(1, 3) & REPEATED]
            }
            part @ 2..=4 => self.brand(part as usize - 2),
            5 if !who.intel() => [0, 0, 32 << 24 | 8 << 16 | 1 << 8 | 64, 32 << 24 | 8 << 16 | 1 << 8 | 64],
            6 => [0, 0, 512 << 16 | 6 << 12 | 1 << 8 | 64, 0],
            8 => {
                let ids = who.id_bits() << 12 | who.cpus.saturating_sub(1) & 0xff;
                [PHYSICAL_BITS | 48 << 8, 0, if who.intel() { 0 } else { ids }, 0]
            }
            _ => [0; 4],
        }
    }

    /// 16 bytes of the name for people.
    fn brand(self, part: usize) -> Registers {
        let mut text = [0; 48];
        let name = self.name().bytes().chain(*b" virtual CPU");
        text.iter_mut().zip(name).for_each(|(to, from)| *to = from);
        let word = |n: usize| {
            let at = part * 16 + n * 4;
            u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]])
        };
        std::array::from_fn(word)
    }
}

fn words(text: &[u8; 12]) -> [u32; 3] {
    std::array::from_fn(|n| {
        u32::from_le_bytes([text[n * 4], text[n * 4 + 1], text[n * 4 + 2], text[n * 4 + 3]])
    })
}

/// Leaf 4: type, level, self-initializing; 8 ways of 64-byte lines.
fn caches(who: &Identity, subleaf: u32) -> Registers {
    let (kind, level, sets) = match subleaf {
        0 => (1, 1, L1_SETS),
        1 => (2, 1, L1_SETS),
        2 => (3, 2, L2_SETS),
        _ => return [0; 4],
    };
    let cores = who.cpus.saturating_sub(1).min(63) << 26;
    [kind | level << 5 | 1 << 8 | cores, 7 << 22 | 63, sets - 1, 0]
}

/// Leaf 0xB: one package, one thread a core.
fn topology(who: &Identity, subleaf: u32) -> Registers {
    match subleaf {
        0 => [0, 1, 1 << 8, who.id],
        1 => [who.id_bits(), who.cpus, 2 << 8 | 1, who.id],
        _ => [0, 0, subleaf & 0xff, who.id],
    }
}

fn hypervisor(who: &Identity, leaf: u32) -> Registers {
    match leaf - HYPERVISOR {
        0 => {
            let [b, c, d] = words(b"KVMKVMKVM\0\0\0");
            [HYPERVISOR + 0x10, b, c, d]
        }
        1 => [KVM_FEATURES, 0, 0, 0],
        // Frequencies of the TSC and of the APIC's timer, in kHz.
        0x10 => [who.tsc_khz, 1_000_000, 0, 0],
        _ => [0; 4],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AMD: Identity = Identity { vendor: Vendor::Amd, id: 5, cpus: 6, tsc_khz: 2_000_000 };
    const INTEL: Identity = Identity { vendor: Vendor::Intel, ..AMD };

    #[test]
    fn each_vcpu_has_its_own_apic_id_everywhere() {
        for who in [AMD, INTEL] {
            assert_eq!(CpuModel::V2.leaf(&who, 1, 0)[1], 5 << 24 | 6 << 16 | 0x800);
            for level in 0..3 {
                assert_eq!(CpuModel::V2.leaf(&who, 0xb, level)[3], 5);
            }
            assert_eq!(CpuModel::V2.leaf(&who, 0xb, 1)[..2], [3, 6], "IDs of 6 cores have 3 bits");
        }
    }

    #[test]
    fn makers_are_told_by_the_usual_words() {
        let name = |who| {
            let [_, b, c, d] = CpuModel::V2.leaf(&who, 0, 0);
            String::from_utf8([b, d, c].map(u32::to_le_bytes).concat()).unwrap()
        };
        assert_eq!((name(INTEL), name(AMD)), ("GenuineIntel".into(), "AuthenticAMD".into()));
        let brand: Vec<u8> = (2..5)
            .flat_map(|n| CpuModel::V3.leaf(&AMD, EXTENDED + n, 0))
            .flat_map(u32::to_le_bytes)
            .collect();
        assert_eq!(String::from_utf8(brand).unwrap().trim_end_matches('\0'), "x86-64-v3 virtual CPU");
    }

    #[test]
    fn beyond_the_last_leaf_is_what_the_maker_says() {
        assert_eq!(CpuModel::V3.leaf(&AMD, 0x20, 0), [0; 4]);
        assert_eq!(CpuModel::V3.leaf(&INTEL, 0x20, 0), CpuModel::V3.leaf(&INTEL, 0xd, 0));
    }

    #[test]
    fn state_that_is_not_offered_has_no_leaf() {
        assert!(CpuModel::V2.leaves(&AMD).iter().all(|(leaf, ..)| *leaf != 0xd));
        assert_eq!(CpuModel::V2.leaf(&AMD, 1, 0)[2] & (1 << 26 | 1 << 28), 0);
        assert_eq!(CpuModel::V3.leaf(&AMD, 0xd, 0), [7, 576, 832, 0]);
    }
}
