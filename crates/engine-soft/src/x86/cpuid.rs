//! What the CPU says it is: the host's own identification, cut to what the engine can do.
//!
//! Sources: SDM 2A "CPUID", AMD APM 3 appendix E; the hypervisor leaves are KVM's paravirtual
//! interface.

use std::sync::OnceLock;

use super::cpu::Cpu;
use engine::Error;
use engine::x86::bits::cr4;
use engine::x86::{CpuModel, Feature, Identity, PHYSICAL_BITS, Vendor};

/// EAX, EBX, ECX, EDX.
pub type Leaf = [u32; 4];

/// Leaf 1 ECX: SSE3, PCLMULQDQ, SSSE3, FMA, CX16, PCID, SSE4.1, SSE4.2, x2APIC, MOVBE, POPCNT,
/// TSC-deadline, AES, XSAVE, AVX, F16C, RDRAND.
const ECX_1: u32 = 1
    | 1 << 1
    | 1 << 9
    | 1 << 12
    | 1 << 13
    | 1 << 17
    | 1 << 19
    | 1 << 20
    | 1 << 22
    | 1 << 23
    | 1 << 25
    | 1 << 26
    | 1 << 28
    | 1 << 29
    | 1 << 30;
/// What the engine has even where the host's CPU lacks it or hides it: x2APIC, TSC-deadline, and the
/// hypervisor bit.
const ECX_1_OWN: u32 = 1 << 21 | 1 << 24 | 1 << 31;
/// Leaf 1 EDX: FPU, VME off, DE, PSE, TSC, MSR, PAE, CX8, APIC, SEP, MTRR, PGE, CMOV, PAT, PSE-36,
/// CLFLUSH, MMX, FXSR, SSE, SSE2.
const EDX_1: u32 = 1
    | 1 << 2
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 9
    | 1 << 11
    | 1 << 12
    | 1 << 13
    | 1 << 15
    | 1 << 16
    | 1 << 17
    | 1 << 19
    | 1 << 23
    | 1 << 24
    | 1 << 25
    | 1 << 26;
/// Leaf 7 EBX: FSGSBASE, BMI1, AVX2, BMI2, ERMS, ADX, CLFLUSHOPT, CLWB, SHA.
const EBX_7: u32 = 1 | 1 << 3 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 18 | 1 << 19 | 1 << 23 | 1 << 24 | 1 << 29;
/// TSC_ADJUST, SMEP, INVPCID, no FPU CS and DS, SMAP: the engine's own.
const EBX_7_OWN: u32 = 1 << 1 | 1 << 7 | 1 << 10 | 1 << 13 | 1 << 20;
/// Leaf 7 ECX: VAES, VPCLMULQDQ, GFNI; RDPID.
const ECX_7: u32 = 1 << 8 | 1 << 9 | 1 << 10 | 1 << 22;
/// UMIP.
const ECX_7_OWN: u32 = 1 << 2;
/// Leaf 7 EDX: FSRM; SPEC_CTRL is not offered, nothing here needs it.
const EDX_7: u32 = 1 << 4;
/// Leaf 0x80000001 ECX: LAHF, ABM, SSE4A, MISALIGNSSE, 3DNOWPREFETCH.
const ECX_EXT: u32 = 1 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8;
/// Leaf 0x80000001 EDX: SYSCALL, NX, page1GB, RDTSCP, LM.
const EDX_EXT: u32 = 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29;

/// Leaf 0x80000008 EBX: XSAVE keeps the x87 pointers, as on the host; not open to speculative store bypass.
const XSAVE_ERR_PTR: u32 = 1 << 2;
const SSB_NO: u32 = 1 << 26;
/// Leaf 0x80000021 EAX: LFENCE serializes, null selectors clear the base, automatic IBRS, no SRSO. Guest
/// branches go through the engine, not through the host's predictor as the guest trained it, so
/// the guest may do without its costlier defences.
const EAX_EXT_21: u32 = 1 << 2 | 1 << 6 | 1 << 8 | 1 << 29;

const HYPERVISOR: u32 = 0x4000_0000;
/// CLOCKSOURCE2, NOP_IO_DELAY, PV_UNHALT off, CLOCKSOURCE_STABLE, MSI_EXT_DEST_ID.
const KVM_FEATURES: u32 = 1 << 1 | 1 << 3 | 1 << 15 | 1 << 24;

/// State components that the engine can save: x87, SSE, AVX.
const XCR0: u64 = 7;

/// The identification of a VM's CPUs.
pub struct Cpuid {
    model: CpuModel,
    cpus: u32,
    signature: u32,
    physical_bits: u32,
    intel: bool,
    cr4_mask: u64,
}

/// The CR4 bits that come with what leaf 1 (ECX, EDX) and leaf 7 (EBX, ECX) offer. PCE is always there.
fn cr4_mask(ecx_1: u32, edx_1: u32, ebx_7: u32, ecx_7: u32) -> u64 {
    let offers = [
        (edx_1, 4, cr4::TSD),
        (edx_1, 2, cr4::DE),
        (edx_1, 3, cr4::PSE),
        (edx_1, 6, cr4::PAE),
        (edx_1, 7, cr4::MCE),
        (edx_1, 13, cr4::PGE),
        (edx_1, 24, cr4::OSFXSR),
        (edx_1, 25, cr4::OSXMMEXCPT),
        (ecx_7, 2, cr4::UMIP),
        (ebx_7, 0, cr4::FSGSBASE),
        (ecx_1, 17, cr4::PCIDE),
        (ecx_1, 26, cr4::OSXSAVE),
        (ebx_7, 7, cr4::SMEP),
        (ebx_7, 20, cr4::SMAP),
    ];
    offers.iter().filter(|(leaf, bit, _)| leaf >> bit & 1 != 0).fold(cr4::PCE, |mask, (.., bit)| mask | bit)
}

/// The APIC bit of leaf 1 EDX while IA32_APIC_BASE has the APIC switched off (SDM 3A, 11.4.3).
fn hidden_apic(cpu: &Cpu) -> u32 {
    if cpu.lapic.enabled() { 0 } else { 1 << 9 }
}

/// Bytes of the XSAVE area for these components.
fn area(components: u64) -> u32 {
    if components & 4 != 0 { 576 + 256 } else { 576 }
}
/// The host's answers to the leaves below 0x20 and to the extended ones up to 0x80000021, asked for once:
/// where the host is itself a guest, each `CPUID` is an exit that takes microseconds.
static BASIC: [[OnceLock<Leaf>; 8]; 0x20] = [const { [const { OnceLock::new() }; 8] }; 0x20];
static EXTENDED: [OnceLock<Leaf>; 0x22] = [const { OnceLock::new() }; 0x22];

fn host(leaf: u32, subleaf: u32) -> Leaf {
    let known = match leaf {
        0x8000_0000.. => EXTENDED.get((leaf - 0x8000_0000) as usize).filter(|_| subleaf == 0),
        _ => BASIC.get(leaf as usize).and_then(|leaf| leaf.get(subleaf as usize)),
    };
    let ask = || {
        let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
        [r.eax, r.ebx, r.ecx, r.edx]
    };
    known.map_or_else(ask, |known| *known.get_or_init(ask))
}

impl Cpuid {
    /// For a VM of `cpus` CPUs of this model.
    pub fn new(cpus: u32, model: CpuModel) -> Result<Cpuid, Error> {
        let host = Cpuid::of_host(cpus);
        let has =
            |feature: &Feature| host.feature_bits(feature.leaf, feature.register) >> feature.bit & 1 != 0;
        model.require("soft", PHYSICAL_BITS, has)?; // any width will do: it is the engine's own
        if model.is_host() {
            return Ok(host);
        }
        let bits = |leaf, register| {
            let of = |f: &&Feature| (f.leaf, f.register) == (leaf, register);
            model.features().filter(of).fold(0, |bits, f| bits | 1 << f.bit)
        };
        Ok(Cpuid {
            model,
            signature: model.signature(host.vendor()),
            physical_bits: PHYSICAL_BITS,
            cr4_mask: cr4_mask(bits(1, 2), bits(1, 3), bits(7, 1), bits(7, 2)),
            ..host
        })
    }

    /// What the host has and the engine can do.
    fn of_host(cpus: u32) -> Cpuid {
        let physical_bits =
            if host(0x8000_0000, 0)[0] >= 0x8000_0008 { host(0x8000_0008, 0)[0] & 0xff } else { 36 };
        let (h1, h7) = (host(1, 0), host(7, 0));
        let seven = if host(0, 0)[0] >= 7 { h7 } else { [0; 4] };
        let (ebx_7, ecx_7) = (seven[1] & EBX_7 | EBX_7_OWN, seven[2] & ECX_7 | ECX_7_OWN);
        Cpuid {
            model: CpuModel::Host,
            cr4_mask: cr4_mask(h1[2] & ECX_1, h1[3] & EDX_1, ebx_7, ecx_7),
            cpus,
            signature: host(1, 0)[0],
            physical_bits: physical_bits.clamp(36, 48),
            intel: host(0, 0)[1] == u32::from_le_bytes(*b"Genu"),
        }
    }

    /// One register of the leaves that list features, as the host's CPU and the engine together have it.
    fn feature_bits(&self, leaf: u32, register: usize) -> u32 {
        let there = match leaf {
            7 => host(0, 0)[0] >= 7,
            0x8000_0001 => host(0x8000_0000, 0)[0] >= leaf,
            _ => true,
        };
        let host = if there { host(leaf, 0)[register] } else { 0 };
        match (leaf, register) {
            (1, 2) => host & ECX_1 | ECX_1_OWN,
            (1, 3) => host & EDX_1,
            (7, 1) => host & EBX_7 | EBX_7_OWN,
            (7, 2) => host & ECX_7 | ECX_7_OWN,
            (0x8000_0001, 2) => host & ECX_EXT,
            (0x8000_0001, 3) => host & EDX_EXT | 1 << 11,
            _ => 0,
        }
    }

    /// What the CPUs say they are.
    pub fn model(&self) -> CpuModel {
        self.model
    }

    fn vendor(&self) -> Vendor {
        if self.intel { Vendor::Intel } else { Vendor::Amd }
    }

    /// Family, model and stepping, as EDX shows them after a reset.
    pub fn signature(&self) -> u32 {
        self.signature
    }

    /// Width of guest-physical addresses in bits.
    #[inline(always)]
    pub fn physical_bits(&self) -> u32 {
        self.physical_bits
    }

    /// Whether the CPUs say that they are Intel's; else they follow AMD's manuals where the two differ.
    pub fn is_intel(&self) -> bool {
        self.intel
    }

    /// The bits that may be set in CR4.
    pub fn cr4_mask(&self) -> u64 {
        self.cr4_mask
    }

    /// Whether IA32_SPEC_CTRL exists.
    pub fn spec_ctrl(&self) -> bool {
        false
    }

    /// Whether XSAVES and IA32_XSS exist.
    pub fn xsaves(&self) -> bool {
        false
    }

    /// IA32_ARCH_CAPABILITIES, where it exists: immune to Meltdown, L1TF, MDS, TAA and their kin, for
    /// guest code never runs speculatively as the guest wrote it.
    pub fn arch_capabilities(&self) -> Option<u64> {
        (self.intel && self.model.is_host())
            .then_some(1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 13 | 1 << 14 | 1 << 15)
    }

    /// Microcode revision that is shown.
    pub fn patch_level(&self) -> u64 {
        if self.intel { 0xffff_ffff_0000_0000 } else { 0xffff_ffff }
    }

    /// XCR0 bits that may be set on this host.
    pub fn xcr0_mask(&self) -> u64 {
        if host(1, 0)[2] & 1 << 26 == 0 {
            return 1;
        }
        let supported = host(0xd, 0);
        let wanted = if self.model.is_host() { XCR0 } else { self.model.xcr0() };
        wanted & (u64::from(supported[0]) | u64::from(supported[3]) << 32)
    }

    fn max_basic(&self) -> u32 {
        if self.intel { 0x16 } else { 0x10 }
    }

    /// Executes `CPUID` on a vCPU.
    pub fn query(&self, cpu: &Cpu, leaf: u32, subleaf: u32) -> Leaf {
        if !self.model.is_host() {
            return self.of_model(cpu, leaf, subleaf);
        }
        match leaf {
            HYPERVISOR..=0x4000_00ff => self.hypervisor(cpu, leaf),
            0x8000_0000.. => self.extended(cpu, leaf),
            _ => self.basic(cpu, leaf.min(self.max_basic()), subleaf),
        }
    }

    /// The model's table, with what follows the vCPU's state.
    fn of_model(&self, cpu: &Cpu, leaf: u32, subleaf: u32) -> Leaf {
        let tsc_khz = (cpu.vm.clock.hz() / 1000) as u32;
        let who = Identity { vendor: self.vendor(), id: cpu.id, cpus: self.cpus, tsc_khz };
        let mut regs = self.model.leaf(&who, leaf, subleaf);
        match (leaf, subleaf) {
            (1, _) => {
                regs[2] |= if cpu.cr4 & cr4::OSXSAVE != 0 { 1 << 27 } else { 0 };
                regs[3] &= !hidden_apic(cpu);
            }
            (0xd, 0) if regs[1] != 0 => regs[1] = area(cpu.fpu.xcr0),
            (0x8000_0001, _) => regs[3] &= !hidden_apic(cpu),
            _ => {}
        }
        regs
    }

    fn basic(&self, cpu: &Cpu, leaf: u32, subleaf: u32) -> Leaf {
        let h = host(leaf.min(host(0, 0)[0]), subleaf);
        match leaf {
            0 => [self.max_basic(), h[1], h[2], h[3]],
            1 => {
                let osxsave = if cpu.cr4 & cr4::OSXSAVE != 0 { 1 << 27 } else { 0 };
                let htt = if self.cpus > 1 { 1 << 28 } else { 0 };
                let ebx = h[1] & 0xff00 | self.cpus.min(255) << 16 | cpu.id << 24 | h[1] & 0xff;
                [h[0], ebx, h[2] & ECX_1 | ECX_1_OWN | osxsave, (h[3] & EDX_1 | htt) & !hidden_apic(cpu)]
            }
            4 if self.intel => {
                let cores = self.cpus.saturating_sub(1).min(63) << 26;
                if h[0] & 0x1f == 0 { [0; 4] } else { [h[0] & 0x3ff | cores, h[1], h[2], h[3]] }
            }
            6 => [1 << 2, 0, 0, 0], // the APIC timer always runs
            7 if subleaf == 0 => {
                let immunity = if self.intel { 1 << 29 } else { 0 };
                [0, h[1] & EBX_7 | EBX_7_OWN, h[2] & ECX_7 | ECX_7_OWN, h[3] & EDX_7 | immunity]
            }
            0xb => self.topology(cpu, subleaf),
            0xd => self.xsave(cpu, subleaf),
            0x15 if self.intel => {
                // TSC = crystal * 1, in Hz.
                [1, 1, u32::try_from(cpu.vm.clock.hz()).unwrap_or(0), 0]
            }
            0x16 if self.intel => {
                let mhz = (cpu.vm.clock.hz() / 1_000_000) as u32;
                [mhz, mhz, 100, 0]
            }
            _ => [0; 4],
        }
    }

    /// Leaf 0xB: one package, one thread a core.
    fn topology(&self, cpu: &Cpu, subleaf: u32) -> Leaf {
        let core_bits = self.cpus.next_power_of_two().trailing_zeros();
        match subleaf {
            0 => [0, 1, 1 << 8, cpu.id],
            1 => [core_bits, self.cpus, 2 << 8 | 1, cpu.id],
            _ => [0, 0, subleaf & 0xff, cpu.id],
        }
    }

    /// Leaf 0xD: sizes and offsets of the XSAVE area.
    fn xsave(&self, cpu: &Cpu, subleaf: u32) -> Leaf {
        let mask = self.xcr0_mask();
        match subleaf {
            0 => [mask as u32, area(cpu.fpu.xcr0), area(mask), (mask >> 32) as u32],
            1 => [host(0xd, 1)[0] & 0b101, 0, 0, 0], // XSAVEOPT, XGETBV with ECX=1
            2 if mask & 4 != 0 => [256, 576, 0, 0],
            _ => [0; 4],
        }
    }

    fn hypervisor(&self, cpu: &Cpu, leaf: u32) -> Leaf {
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        match leaf - HYPERVISOR {
            0 => [HYPERVISOR + 0x10, word(b"KVMK"), word(b"VMKV"), word(b"M\0\0\0")],
            1 => [KVM_FEATURES, 0, 0, 0],
            0x10 => [(cpu.vm.clock.hz() / 1000) as u32, 1_000_000, 0, 0],
            _ => [0; 4],
        }
    }

    fn extended(&self, cpu: &Cpu, leaf: u32) -> Leaf {
        let last = if self.intel { 0x8000_0008 } else { 0x8000_0021 };
        if leaf > last {
            return self.basic(cpu, self.max_basic(), 0);
        }
        let h = host(leaf, 0);
        match leaf {
            0x8000_0000 => [last, h[1], h[2], h[3]],
            0x8000_0001 => {
                let topology = if !self.intel && self.cpus > 1 { 1 << 1 } else { 0 }; // CmpLegacy
                [
                    h[0],
                    h[1],
                    h[2] & ECX_EXT | topology,
                    h[3] & EDX_EXT
                        | 1 << 11
                        | (if self.intel {
                            0
                        } else {
                            host(1, 0)[3] & EDX_1 & 0x0183_f3ff & !hidden_apic(cpu)
                        }),
                ]
            }
            0x8000_0002..=0x8000_0006 => h,
            0x8000_0007 => [0, 0, 0, 1 << 8], // invariant TSC
            0x8000_0008 => {
                let ids = self.cpus.next_power_of_two().trailing_zeros() << 12 | (self.cpus - 1) & 0xff;
                if self.intel {
                    return [self.physical_bits | 48 << 8, 0, 0, 0];
                }
                [self.physical_bits | 48 << 8, h[1] & XSAVE_ERR_PTR | SSB_NO, ids, 0]
            }
            0x8000_001e if !self.intel => [cpu.id, cpu.id & 0xff, 0, 0],
            0x8000_0021.. if !self.intel => [if leaf == 0x8000_0021 { EAX_EXT_21 } else { 0 }, 0, 0, 0],
            _ => [0; 4],
        }
    }
}
