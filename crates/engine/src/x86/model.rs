//! CPU models: what a guest's CPUs say they are, and which model-specific registers they have.
//!
//! `host` is whatever host and engine offer, and differs from engine to engine. The other models are a
//! whole table of CPUID leaves of their own, by the levels of the x86-64 psABI (section 3.1.1,
//! "Micro-Architecture Levels"), so that a machine can move between engines, and between hosts of the same
//! maker. A model claims no immunity to speculative execution attacks and offers no controls against
//! them: guests protect themselves as they do on a CPU without new microcode.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::bits::msr;
use crate::Error;

mod features;
mod leaves;

pub use features::Feature;
pub use leaves::{Identity, Registers, Vendor};

/// What a guest's CPUs say they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum CpuModel {
    /// What host and engine offer.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// x86-64-v2: up to SSE4.2 and POPCNT, without XSAVE.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// x86-64-v3: AVX2, BMI, FMA and the like.
    #[serde(rename = "x86-64-v3")]
    V3,
}

/// Bits of guest-physical addresses that the models have; CPUs for desktops have no more.
pub const PHYSICAL_BITS: u32 = 39;

/// The registers that the saved state of a model carries, as ranges, ascending; the same on every engine.
const MSRS: &[(u32, u32)] = &[
    (msr::IA32_SYSENTER_CS, msr::IA32_SYSENTER_EIP),
    (msr::IA32_MTRR_PHYSBASE0, 0x20f),
    (msr::IA32_MTRR_FIX64K_00000, msr::IA32_MTRR_FIX64K_00000),
    (0x258, 0x259),
    (0x268, 0x26f),
    (msr::IA32_PAT, msr::IA32_PAT),
    (msr::IA32_MTRR_DEF_TYPE, msr::IA32_MTRR_DEF_TYPE),
    (0x4b56_4d00, 0x4b56_4d01), // KVM's wall clock and system time
    (msr::EFER, msr::FMASK),
    (msr::KERNEL_GS_BASE, msr::TSC_AUX),
];

impl CpuModel {
    /// All of them, in the order of what they offer.
    pub const ALL: [CpuModel; 3] = [CpuModel::Host, CpuModel::V2, CpuModel::V3];

    /// What users type after `--cpu`.
    pub fn name(self) -> &'static str {
        match self {
            CpuModel::Host => "host",
            CpuModel::V2 => "x86-64-v2",
            CpuModel::V3 => "x86-64-v3",
        }
    }

    /// Whether its table is the engine's own, and not from here.
    pub fn is_host(self) -> bool {
        self == CpuModel::Host
    }

    /// Whether a saved state has this model-specific register; for `host` the engine decides.
    pub fn carries(self, index: u32) -> bool {
        self.is_host() || MSRS.iter().any(|&(first, last)| (first..=last).contains(&index))
    }

    /// State components that may be enabled in XCR0; 1 where there is no XSAVE.
    pub fn xcr0(self) -> u64 {
        if self == CpuModel::V3 { 7 } else { 1 }
    }

    /// Refuses unless everything that the model has is there: `has` is asked for each of its features,
    /// `physical_bits` is the width of guest-physical addresses.
    pub fn require(
        self,
        engine: &'static str,
        physical_bits: u32,
        has: impl Fn(&Feature) -> bool,
    ) -> Result<(), Error> {
        let lacking = |model: CpuModel| -> Vec<&'static str> {
            model.features().filter(|feature| !has(feature)).map(|feature| feature.name).collect()
        };
        let mut missing: Vec<String> = lacking(self).into_iter().map(str::to_owned).collect();
        if !self.is_host() && physical_bits < PHYSICAL_BITS {
            missing.push(format!("{PHYSICAL_BITS} bits of physical address (there are {physical_bits})"));
        }
        if missing.is_empty() {
            return Ok(());
        }
        let instead = match self {
            CpuModel::V3 if lacking(CpuModel::V2).is_empty() && physical_bits >= PHYSICAL_BITS => "x86-64-v2",
            _ => "host",
        };
        let what =
            format!("CPU model {self}: this host lacks {}; --cpu {instead} works here", missing.join(", "));
        Err(Error::Unsupported { engine, what })
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// No model has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no CPU model `{0}`; known are: host, x86-64-v2, x86-64-v3")]
pub struct UnknownModel(String);

impl FromStr for CpuModel {
    type Err = UnknownModel;

    fn from_str(name: &str) -> Result<CpuModel, UnknownModel> {
        CpuModel::ALL.into_iter().find(|model| model.name() == name).ok_or_else(|| UnknownModel(name.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_known_by_its_name_everywhere() {
        for model in CpuModel::ALL {
            assert_eq!(model.name().parse(), Ok(model));
        }
        let error = "486".parse::<CpuModel>().unwrap_err().to_string();
        assert!(error.contains("x86-64-v3"), "{error}");
    }

    #[test]
    fn a_refusal_names_what_is_missing_and_what_works() {
        let no_avx2 = |feature: &Feature| feature.name != "avx2" && feature.name != "fma";
        let error = CpuModel::V3.require("soft", 48, no_avx2).unwrap_err().to_string();
        assert!(error.contains("lacks fma, avx2; --cpu x86-64-v2 works"), "{error}");
        CpuModel::V2.require("soft", 48, no_avx2).unwrap();
        CpuModel::Host.require("soft", 32, |_| false).unwrap();
        let error = CpuModel::V2.require("kvm", 36, |_| true).unwrap_err().to_string();
        assert!(error.contains("39 bits of physical address (there are 36); --cpu host"), "{error}");
    }

    #[test]
    fn a_models_registers_are_in_order_and_host_has_any() {
        let all: Vec<u32> = MSRS.iter().flat_map(|&(first, last)| first..=last).collect();
        assert!(all.is_sorted_by(|a, b| a < b), "{all:x?}");
        assert!(CpuModel::Host.carries(msr::IA32_SPEC_CTRL) && !CpuModel::V3.carries(msr::IA32_SPEC_CTRL));
    }
}
