//! The features of each model, by their names in `/proc/cpuinfo` and their bits in CPUID (SDM 2A, "CPUID";
//! APM 3, appendix E).

use super::CpuModel;

/// A feature and where CPUID tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Its name in `/proc/cpuinfo`.
    pub name: &'static str,
    /// Leaf; subleaf 0.
    pub leaf: u32,
    /// 0 to 3: EAX, EBX, ECX, EDX.
    pub register: usize,
    /// Bit in that register.
    pub bit: u32,
    /// The lowest model that has it.
    since: CpuModel,
}

const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;
const EXTENDED: u32 = 0x8000_0001;

const fn v2(name: &'static str, leaf: u32, register: usize, bit: u32) -> Feature {
    Feature { name, leaf, register, bit, since: CpuModel::V2 }
}

const fn v3(name: &'static str, leaf: u32, register: usize, bit: u32) -> Feature {
    Feature { name, leaf, register, bit, since: CpuModel::V3 }
}

/// The psABI's, and those of a system that go with them: all that a kernel of our days wants.
const FEATURES: &[Feature] = &[
    v2("fpu", 1, EDX, 0),
    v2("de", 1, EDX, 2),
    v2("pse", 1, EDX, 3),
    v2("tsc", 1, EDX, 4),
    v2("msr", 1, EDX, 5),
    v2("pae", 1, EDX, 6),
    v2("cx8", 1, EDX, 8),
    v2("apic", 1, EDX, 9),
    v2("sep", 1, EDX, 11),
    v2("mtrr", 1, EDX, 12),
    v2("pge", 1, EDX, 13),
    v2("cmov", 1, EDX, 15),
    v2("pat", 1, EDX, 16),
    v2("pse36", 1, EDX, 17),
    v2("clflush", 1, EDX, 19),
    v2("mmx", 1, EDX, 23),
    v2("fxsr", 1, EDX, 24),
    v2("sse", 1, EDX, 25),
    v2("sse2", 1, EDX, 26),
    v2("pni", 1, ECX, 0),
    v3("pclmulqdq", 1, ECX, 1),
    v2("ssse3", 1, ECX, 9),
    v3("fma", 1, ECX, 12),
    v2("cx16", 1, ECX, 13),
    v2("sse4_1", 1, ECX, 19),
    v2("sse4_2", 1, ECX, 20),
    v2("x2apic", 1, ECX, 21),
    v3("movbe", 1, ECX, 22),
    v2("popcnt", 1, ECX, 23),
    v2("tsc_deadline_timer", 1, ECX, 24),
    v3("aes", 1, ECX, 25),
    v3("xsave", 1, ECX, 26),
    v3("avx", 1, ECX, 28),
    v3("f16c", 1, ECX, 29),
    v3("rdrand", 1, ECX, 30),
    v3("fsgsbase", 7, EBX, 0),
    v3("bmi1", 7, EBX, 3),
    v3("avx2", 7, EBX, 5),
    v3("smep", 7, EBX, 7),
    v3("bmi2", 7, EBX, 8),
    v3("erms", 7, EBX, 9),
    v2("lahf_lm", EXTENDED, ECX, 0),
    v3("abm", EXTENDED, ECX, 5),
    v2("syscall", EXTENDED, EDX, 11),
    v2("nx", EXTENDED, EDX, 20),
    v3("pdpe1gb", EXTENDED, EDX, 26),
    v2("rdtscp", EXTENDED, EDX, 27),
    v2("lm", EXTENDED, EDX, 29),
];

impl CpuModel {
    /// What this model's CPUs have; nothing of `host` is known here.
    pub fn features(self) -> impl Iterator<Item = &'static Feature> {
        FEATURES.iter().filter(move |feature| feature.since <= self)
    }

    /// The bits of one register.
    pub(super) fn feature_bits(self, leaf: u32, register: usize) -> u32 {
        let here = self.features().filter(|feature| (feature.leaf, feature.register) == (leaf, register));
        here.fold(0, |bits, feature| bits | 1 << feature.bit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_model_has_what_the_lower_ones_have() {
        let names = |model: CpuModel| model.features().map(|f| f.name).collect::<Vec<_>>();
        let (v2, v3) = (names(CpuModel::V2), names(CpuModel::V3));
        assert!(names(CpuModel::Host).is_empty() && v2.iter().all(|name| v3.contains(name)));
        assert!(v2.contains(&"popcnt") && !v2.contains(&"xsave") && v3.contains(&"avx2"));
    }

    #[test]
    fn no_bit_has_two_names() {
        for (n, feature) in FEATURES.iter().enumerate() {
            let place = |f: &Feature| (f.leaf, f.register, f.bit);
            assert!(FEATURES[..n].iter().all(|other| place(other) != place(feature)), "{}", feature.name);
        }
    }
}
