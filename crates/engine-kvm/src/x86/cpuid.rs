//! What the guest's CPUs say they are: what KVM supports on this host, without what cannot be saved or
//! would be another product, and with the VM's own topology.
//!
//! Sources: SDM 2A "CPUID", AMD APM 3 appendix E; the hypervisor leaves are KVM's paravirtual
//! interface (Linux' `Documentation/virt/kvm/x86/cpuid.rst`).

use engine::Error;
use engine::x86::{CpuModel, Feature, Identity, Vendor};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::xsave::Layout;
use crate::{NAME, failed};

type Leaf = kvm_cpuid_entry2;

/// Leaf 1 ECX. DTES64, MONITOR, DS-CPL, VMX, SMX, EIST, TM2, PDCM: monitoring and nesting have state that
/// is not saved; MWAIT would halt the host's CPU.
const ECX_1_NOT: u32 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 15;
/// x2APIC and the hypervisor bit.
const ECX_1_OWN: u32 = 1 << 21 | 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 EDX: MCE and MCA. The machine reports no hardware errors.
const EDX_1_NOT: u32 = 1 << 7 | 1 << 14;
const HTT: u32 = 1 << 28;
/// Leaf 7 EBX: SGX, TSX (HLE, RTM), MPX, processor trace.
const EBX_7_NOT: u32 = 1 << 2 | 1 << 4 | 1 << 11 | 1 << 14 | 1 << 25;
/// Leaf 7 ECX: WAITPKG, shadow stacks, 5-level paging, key locker, bus-lock trap, enqueue, SGX launch.
const ECX_7_NOT: u32 = 1 << 5 | 1 << 7 | 1 << 16 | 1 << 23 | 1 << 24 | 1 << 29 | 1 << 30;
/// Leaf 7 EDX: indirect branch tracking, AMX; their registers have no place in the saved state.
const EDX_7_NOT: u32 = 1 << 20 | 1 << 22 | 1 << 24 | 1 << 25;
/// Leaf 0x80000001 ECX: SVM, IBS, SKINIT, LWP, performance counters.
const ECX_EXT_NOT: u32 = 1 << 2 | 1 << 10 | 1 << 12 | 1 << 15 | 1 << 23 | 1 << 24 | 1 << 28;
const CMP_LEGACY: u32 = 1 << 1;

/// KVM's paravirtual features: NOP_IO_DELAY, CLOCKSOURCE2, PV_EOI (an exit less for each interrupt),
/// CLOCKSOURCE_STABLE. Not those that keep more state in guest memory, nor hypercalls. The models are without
/// PV_EOI too: their guests may come to run on another engine.
const KVM_FEATURES: u32 = 1 << 1 | 1 << 3 | 1 << 6 | 1 << 24;
const HYPERVISOR: u32 = 0x4000_0000;
const HYPERVISOR_LAST: u32 = HYPERVISOR + 0x10;

/// Leaves whose contents are of the host alone, or of features that are not offered: performance
/// monitoring, processor trace, AMX, hybrid CPUs, SVM, encryption.
const EMPTY: &[u32] =
    &[5, 0xa, 0xf, 0x10, 0x12, 0x14, 0x1a, 0x1d, 0x1e, 0x8000_000a, 0x8000_001b, 0x8000_001f, 0x8000_0022];

/// The identification of a VM's CPUs.
pub(crate) struct Cpuid {
    model: CpuModel,
    supported: Vec<Leaf>,
    cpus: u32,
    xsave: Layout,
    deadline_timer: bool,
}

impl Cpuid {
    /// For a VM of `cpus` CPUs of this model.
    pub(crate) fn new(kvm: &Kvm, cpus: u32, model: CpuModel) -> Result<Cpuid, Error> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("asking KVM which CPU features it supports"))?;
        let cpuid = Cpuid {
            model,
            xsave: Layout::new(&supported).cut_to(model),
            supported: supported.as_slice().to_vec(),
            cpus,
            deadline_timer: kvm.check_extension(Cap::TscDeadlineTimer),
        };
        model.require(NAME, cpuid.physical_bits(), |feature| cpuid.has(feature))?;
        Ok(cpuid)
    }

    fn register(&self, function: u32, register: usize) -> u32 {
        let leaf = self.supported.iter().find(|leaf| (leaf.function, leaf.index) == (function, 0));
        leaf.map_or(0, |leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx][register])
    }

    fn has(&self, feature: &Feature) -> bool {
        let own = match (feature.leaf, feature.register) {
            (1, 2) if self.deadline_timer => ECX_1_OWN | TSC_DEADLINE,
            (1, 2) => ECX_1_OWN,
            _ => 0,
        };
        (self.register(feature.leaf, feature.register) | own) >> feature.bit & 1 != 0
    }

    /// Width of guest-physical addresses.
    fn physical_bits(&self) -> u32 {
        match self.register(0x8000_0008, 0) & 0xff {
            0 => 36,
            bits => bits,
        }
    }

    fn vendor(&self) -> Vendor {
        if self.intel() { Vendor::Intel } else { Vendor::Amd }
    }

    /// Where extended state is.
    pub(crate) fn xsave(&self) -> &Layout {
        &self.xsave
    }

    /// Family, model and stepping.
    pub(crate) fn signature(&self) -> u32 {
        match self.model {
            CpuModel::Host => self.register(1, 0),
            model => model.signature(self.vendor()),
        }
    }

    /// What vCPU `id` says; `tsc_khz` where the counter's frequency is known.
    pub(crate) fn of_vcpu(&self, id: u32, tsc_khz: Option<u32>) -> Result<CpuId, Error> {
        let leaves = match self.model {
            CpuModel::Host => self.of_host(id, tsc_khz),
            model => self.of_model(model, id, tsc_khz),
        };
        CpuId::from_entries(&leaves)
            .map_err(|_| Error::BadState(format!("{} CPUID leaves are too many", leaves.len())))
    }

    /// The model's table; KVM itself adds what follows the vCPU's state.
    fn of_model(&self, model: CpuModel, id: u32, tsc_khz: Option<u32>) -> Vec<Leaf> {
        let (vendor, tsc_khz) = (self.vendor(), tsc_khz.unwrap_or(0));
        let leaves = model.leaves(&Identity { vendor, id, cpus: self.cpus, tsc_khz });
        let leaf = |(function, index, [eax, ebx, ecx, edx]): (u32, Option<u32>, [u32; 4])| Leaf {
            function,
            index: index.unwrap_or(0),
            flags: if index.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax,
            ebx,
            ecx,
            edx,
            ..Leaf::default()
        };
        leaves.into_iter().map(leaf).collect()
    }

    fn of_host(&self, id: u32, tsc_khz: Option<u32>) -> Vec<Leaf> {
        let topology = [0xb, 0x1f];
        let kept = self.supported.iter().filter(|leaf| {
            !topology.contains(&leaf.function)
                && !EMPTY.contains(&leaf.function)
                && !is_hypervisor(leaf.function)
        });
        let mut leaves: Vec<Leaf> = kept.copied().collect();
        leaves.iter_mut().for_each(|leaf| self.adapt(leaf, id));
        leaves.extend(self.topology(id));
        leaves.extend(self.hypervisor(tsc_khz));
        leaves
    }

    fn adapt(&self, leaf: &mut Leaf, id: u32) {
        match (leaf.function, leaf.index) {
            (1, _) => {
                leaf.ebx = leaf.ebx & 0xffff | self.cpus.min(255) << 16 | id << 24;
                let deadline = if self.deadline_timer { TSC_DEADLINE } else { 0 };
                leaf.ecx = leaf.ecx & !ECX_1_NOT | ECX_1_OWN | deadline;
                leaf.edx = leaf.edx & !EDX_1_NOT & !HTT | if self.cpus > 1 { HTT } else { 0 };
            }
            // Caches: the last level is everybody's, the others are each CPU's own.
            (4 | 0x8000_001d, _) if leaf.eax & 0x1f != 0 => {
                let shared = leaf.eax >> 5 & 7 >= 3;
                let sharing = if shared { (self.cpus - 1).min(0xfff) << 14 } else { 0 };
                let cores = if leaf.function == 4 { (self.cpus - 1).min(63) << 26 } else { 0 };
                leaf.eax = leaf.eax & 0x3fff | sharing | cores;
            }
            (6, _) => [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx] = [1 << 2, 0, 0, 0], // the APIC timer always runs
            (7, 0) => {
                leaf.ebx &= !EBX_7_NOT;
                leaf.ecx &= !ECX_7_NOT;
                leaf.edx &= !EDX_7_NOT;
            }
            (0xd, _) => self.adapt_xsave(leaf),
            (0x8000_0001, _) => {
                leaf.ecx &= !(ECX_EXT_NOT | CMP_LEGACY);
                if self.cpus > 1 && !self.intel() {
                    leaf.ecx |= CMP_LEGACY;
                }
            }
            (0x8000_0008, _) if !self.intel() => {
                leaf.ecx = self.id_bits() << 12 | (self.cpus - 1) & 0xff;
            }
            (0x8000_001e, _) => [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx] = [id, id & 0xff, 0, 0],
            _ => {}
        }
    }

    fn adapt_xsave(&self, leaf: &mut Leaf) {
        let mask = self.xsave.mask();
        match leaf.index {
            0 => {
                (leaf.eax, leaf.edx) = (mask as u32, (mask >> 32) as u32);
                leaf.ecx = self.xsave.size() as u32;
            }
            // No supervisor state.
            1 => (leaf.ecx, leaf.edx) = (0, 0),
            component if component < 63 && mask & 1 << component == 0 => {
                [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx] = [0; 4];
            }
            _ => {}
        }
    }

    /// Whether the host's CPU is Intel's.
    pub(crate) fn intel(&self) -> bool {
        let vendor = self.supported.iter().find(|leaf| leaf.function == 0).map_or(0, |leaf| leaf.ebx);
        vendor == u32::from_le_bytes(*b"Genu")
    }

    /// Bits of the APIC ID within the package.
    fn id_bits(&self) -> u32 {
        self.cpus.next_power_of_two().trailing_zeros()
    }

    /// Leaf 0xB: one package, one thread a core.
    fn topology(&self, id: u32) -> impl Iterator<Item = Leaf> {
        let levels = [[0, 1, 1 << 8, id], [self.id_bits(), self.cpus, 2 << 8 | 1, id], [0, 0, 2, id]];
        let offered = self.supported.iter().any(|leaf| leaf.function == 0 && leaf.eax >= 0xb);
        let level = |(index, [eax, ebx, ecx, edx]): (usize, [u32; 4])| Leaf {
            function: 0xb,
            index: index as u32,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx,
            edx,
            ..Leaf::default()
        };
        levels.into_iter().enumerate().map(level).filter(move |_| offered)
    }

    fn hypervisor(&self, tsc_khz: Option<u32>) -> [Leaf; 3] {
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        let offered =
            self.supported.iter().find(|leaf| leaf.function == HYPERVISOR + 1).map_or(0, |leaf| leaf.eax);
        let leaf = |function, [eax, ebx, ecx, edx]: [u32; 4]| Leaf {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Leaf::default()
        };
        [
            leaf(HYPERVISOR, [HYPERVISOR_LAST, word(b"KVMK"), word(b"VMKV"), word(b"M\0\0\0")]),
            leaf(HYPERVISOR + 1, [offered & KVM_FEATURES, 0, 0, 0]),
            // Frequencies of the TSC and of the APIC's timer, in kHz.
            leaf(HYPERVISOR_LAST, [tsc_khz.unwrap_or(0), 1_000_000, 0, 0]),
        ]
    }
}

fn is_hypervisor(function: u32) -> bool {
    (HYPERVISOR..HYPERVISOR + 0x1_0000).contains(&function)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Leaf {
        Leaf { function, index, eax, ebx, ecx, edx, ..Leaf::default() }
    }

    fn cpuid(cpus: u32) -> Cpuid {
        let supported = vec![
            leaf(0, 0, [0x20, u32::from_le_bytes(*b"Auth"), 0, 0]),
            leaf(1, 0, [0x00a2_0f10, 0x0308_0800, u32::MAX, u32::MAX]),
            leaf(0xa, 0, [0x0730_0404, 0, 0, 0x603]),
            leaf(0xd, 0, [0x207, 832, 2696, 0]),
            leaf(0xd, 2, [256, 576, 0, 0]),
            leaf(0xd, 9, [8, 832, 0, 0]),
            leaf(HYPERVISOR, 0, [HYPERVISOR + 1, 0, 0, 0]),
            leaf(HYPERVISOR + 1, 0, [u32::MAX, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0, 0, u32::MAX, u32::MAX]),
        ];
        let xsave = Layout::new(&CpuId::from_entries(&supported).unwrap());
        Cpuid { model: CpuModel::Host, supported, cpus, xsave, deadline_timer: true }
    }

    fn ask(cpuid: &Cpuid, id: u32, function: u32, index: u32) -> Option<Leaf> {
        let leaves = cpuid.of_vcpu(id, Some(2_000_000)).unwrap();
        leaves.as_slice().iter().find(|leaf| (leaf.function, leaf.index) == (function, index)).copied()
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_everywhere() {
        let cpuid = cpuid(6);
        assert_eq!(ask(&cpuid, 5, 1, 0).unwrap().ebx, 5 << 24 | 6 << 16 | 0x800);
        for level in 0..3 {
            assert_eq!(ask(&cpuid, 5, 0xb, level).unwrap().edx, 5);
        }
        let cores = ask(&cpuid, 5, 0xb, 1).unwrap();
        assert_eq!((cores.eax, cores.ebx), (3, 6), "IDs of 6 cores have 3 bits");
    }

    #[test]
    fn nesting_and_counters_are_not_offered() {
        let cpuid = cpuid(1);
        assert_eq!(ask(&cpuid, 0, 1, 0).unwrap().ecx & (1 << 5 | 1 << 3), 0);
        assert_eq!(ask(&cpuid, 0, 0x8000_0001, 0).unwrap().ecx & (1 << 2 | CMP_LEGACY), 0);
        assert!(ask(&cpuid, 0, 0xa, 0).is_none());
    }

    #[test]
    fn it_is_known_to_guests_as_kvm() {
        let cpuid = cpuid(1);
        let signature = ask(&cpuid, 0, HYPERVISOR, 0).unwrap();
        assert_eq!([signature.ebx, signature.ecx].map(u32::to_le_bytes).concat(), b"KVMKVMKV");
        assert_eq!(ask(&cpuid, 0, HYPERVISOR + 1, 0).unwrap().eax, KVM_FEATURES);
        assert_eq!(ask(&cpuid, 0, HYPERVISOR + 0x10, 0).unwrap().eax, 2_000_000);
    }

    #[test]
    fn the_xsave_area_has_room_for_what_is_offered() {
        let leaf = ask(&cpuid(1), 0, 0xd, 0).unwrap();
        assert_eq!((leaf.eax, leaf.ecx), (0x207, 840));
    }
}
