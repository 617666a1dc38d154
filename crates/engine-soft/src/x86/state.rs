//! Saving and restoring a vCPU.
//!
//! A saved state may come from a file or another host: whatever it says is checked as the guest's own
//! writes are, and refused with the reason before anything of the CPU changes – but the parts that
//! check themselves while they load (local APIC, MSRs), whose refusal leaves a CPU to be reset.

use engine::Error;
use engine::x86::bits::{access, cr0, cr4, efer, msr, rflags};
use engine::x86::{CpuState, Segment, other_frequency, same_frequency};

use super::access::canonical;
use super::cpu::Cpu;
use super::event::{Event, Shutdown};
use super::exception::{Exception, vector};
use super::msr::{KVM_WALL_CLOCK, Msrs, SAVED};
use super::op::{RIP, seg};
use super::pvclock;
use crate::vm::attention;

const RFLAGS_KNOWN: u64 = 0x3f_7fd7;
const EFER_KNOWN: u64 = efer::SCE | efer::LME | efer::LMA | efer::NXE | efer::FFXSR;
const CR0_KNOWN: u64 = 0xe005_003f;
const NAMES: [&str; 6] = ["ES", "CS", "SS", "DS", "FS", "GS"];

fn bad<T>(what: String) -> Result<T, Error> {
    Err(Error::BadState(what))
}

/// `what` unless `holds`.
fn require(holds: bool, what: impl FnOnce() -> String) -> Result<(), Error> {
    if holds { Ok(()) } else { bad(what()) }
}

impl Cpu {
    /// Copies out everything that the guest can observe.
    pub fn save(&self) -> Result<CpuState, Error> {
        let mailbox = &self.vm.vcpus[self.id as usize];
        Ok(CpuState {
            gpr: std::array::from_fn(|n| self.regs[n]),
            rip: self.regs[RIP as usize],
            rflags: self.rflags,
            segments: self.segs,
            ldtr: self.ldtr,
            tr: self.tr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            pdptes: self.pae(self.cr4).then_some(self.pdptes),
            cr8: self.lapic.cr8(),
            dr: self.dr,
            xcr0: self.fpu.xcr0,
            xsave: self.fpu.save(),
            msrs: self.saved_msrs().filter_map(|index| Some((index, self.read_msr(index).ok()?))).collect(),
            tsc: self.tsc(),
            tsc_khz: self.vm.clock.khz(),
            lapic: self.lapic.save(&self.vm),
            activity: self.activity,
            pending: self.pending, // one that was restored; delivery itself is never interrupted
            nmi_pending: mailbox.attention() & attention::NMI != 0,
            nmi_blocked: self.nmi_blocked,
            interrupt_shadow: self.interrupt_shadow,
            kvm_clock_ns: pvclock::uptime(self),
        })
    }

    /// Whether it has PAE paging with this CR4.
    fn pae(&self, cr4: u64) -> bool {
        self.mode.paging && !self.mode.long && cr4 & cr4::PAE != 0
    }

    /// The model-specific registers that travel.
    fn saved_msrs(&self) -> impl Iterator<Item = u32> {
        let model = self.vm.cpuid.model();
        SAVED.iter().copied().filter(move |&index| model.carries(index))
    }

    /// Takes a state on.
    pub fn restore(&mut self, state: &CpuState) -> Result<(), Error> {
        self.check_state(state)?;
        let mut fpu = std::mem::take(&mut self.fpu);
        fpu.xcr0 = state.xcr0;
        let restored = fpu.restore(&state.xsave);
        self.fpu = fpu;
        restored?;
        self.restore_registers(state);
        self.msrs = Msrs::default();
        self.restore_frequency(state.tsc_khz);
        self.set_tsc(state.tsc);
        if self.id == 0 {
            pvclock::set_uptime(self, state.kvm_clock_ns);
        }
        self.restore_msrs(&state.msrs)?;
        let pae = self.pae(state.cr4);
        self.pdptes = match (state.pdptes, pae && self.vm.ram.page(state.cr3).is_some()) {
            (Some(pdptes), _) if pae => pdptes,
            // The guest may have spoiled them in memory after they were loaded: no reason to refuse.
            (None, true) => self.read_pdptes(state.cr3).unwrap_or([0; 4]),
            _ => [0; 4],
        };
        let pcid = self.pcid();
        self.tlb.flush_all(pcid);
        self.restore_interrupts(state)
    }

    /// The counter is the host's, and the guest's own programs read it as it is.
    fn restore_frequency(&self, khz: u32) {
        let here = self.vm.clock.khz();
        if same_frequency(khz, here) {
            self.vm.clock.adopt(khz);
        } else if self.id == 0 {
            log::warn!("{}", other_frequency(khz, here));
        }
    }

    fn restore_registers(&mut self, state: &CpuState) {
        self.regs = [0; 32];
        self.regs[..16].copy_from_slice(&state.gpr);
        self.regs[RIP as usize] = state.rip;
        self.next_rip = state.rip;
        self.rflags = state.rflags | rflags::FIXED;
        (self.segs, self.ldtr, self.tr) = (state.segments, state.ldtr, state.tr);
        (self.gdtr, self.idtr) = (state.gdtr, state.idtr);
        (self.cr0, self.cr2) = (state.cr0 | cr0::ET, state.cr2);
        (self.cr3, self.cr4) = (state.cr3, state.cr4);
        self.dr = state.dr;
        self.efer = saved_efer(state);
        self.cpl = privilege(state);
        self.activity = state.activity;
        (self.nmi_blocked, self.interrupt_shadow) = (state.nmi_blocked, state.interrupt_shadow);
        (self.debug_shadow, self.debug_trap) = (false, 0);
        self.update_mode();
    }

    /// Writes the model-specific registers as the guest would. EFER went with the control registers.
    fn restore_msrs(&mut self, msrs: &[(u32, u64)]) -> Result<(), Error> {
        for &(index, value) in msrs {
            let done = match index {
                msr::EFER => Ok(()),
                // Another engine may have more registers; what is as it was never set is not missed.
                _ if self.read_msr(index).unwrap_or(0) == value => Ok(()),
                _ if !SAVED.contains(&index) => {
                    return bad(format!("MSR {index:#x} is not one that is saved"));
                }
                // Writing it moves the TSC, which is restored on its own.
                msr::IA32_TSC_ADJUST => {
                    self.msrs.tsc_adjust = value;
                    Ok(())
                }
                // The guest's memory has the page already.
                KVM_WALL_CLOCK => {
                    self.msrs.kvm_clock[0] = value;
                    Ok(())
                }
                _ => self.write_msr(index, value),
            };
            if done.is_err() {
                return bad(format!("MSR {index:#x} cannot be {value:#x} on this CPU"));
            }
        }
        Ok(())
    }

    fn restore_interrupts(&mut self, state: &CpuState) -> Result<(), Error> {
        let vm = self.vm.clone();
        let mut lapic = std::mem::replace(&mut self.lapic, super::lapic::Lapic::new(self.id, &vm));
        let restored = lapic.restore(&state.lapic, &vm, |tsc| self.guest_to_host_tsc(tsc));
        self.lapic = lapic;
        restored.map_err(|why| Error::BadState(format!("local APIC: {why}")))?;
        if self.set_cr8(state.cr8).is_err() {
            return bad(format!("CR8 is {:#x}, and 15 is its highest value", state.cr8));
        }
        let mailbox = &vm.vcpus[self.id as usize];
        mailbox.drop_nmis();
        mailbox.take(attention::INIT | attention::SIPI);
        if state.nmi_pending {
            mailbox.send_nmi();
        }
        self.pending = state.pending;
        Ok(())
    }

    /// Delivers the event that a restored state was caught in the delivery of.
    pub(super) fn deliver_pending(&mut self) -> Result<(), Shutdown> {
        let Some(pending) = self.pending.take() else { return Ok(()) };
        self.deliver(match (pending.software, pending.error_code) {
            (true, _) => Event::Software(pending.vector),
            (false, Some(code)) => Event::Exception(Exception::with_code(pending.vector, code)),
            (false, None) if pending.vector == vector::NMI => Event::Nmi,
            (false, None) if pending.vector < 32 => Event::Exception(Exception::new(pending.vector)),
            (false, None) => Event::External(pending.vector),
        })
    }

    fn check_state(&self, state: &CpuState) -> Result<(), Error> {
        self.check_control(state)?;
        check_modes(state)?;
        check_tables(state)?;
        for (segment, name) in state.segments.iter().zip(NAMES) {
            check_segment(segment, name)?;
        }
        require(state.rflags & !RFLAGS_KNOWN == 0, || {
            format!("RFLAGS {:#x} has reserved bits set", state.rflags)
        })?;
        require((state.dr[6] | state.dr[7]) >> 32 == 0, || {
            format!("DR6 {:#x} or DR7 {:#x} has bits above 31 set", state.dr[6], state.dr[7])
        })?;
        let offered = self.vm.cpuid.xcr0_mask();
        let avx_alone = state.xcr0 & 6 == 4;
        require(state.xcr0 & !offered == 0 && state.xcr0 & 1 != 0 && !avx_alone, || {
            format!("XCR0 {:#x} is not within {offered:#x}, which this host offers", state.xcr0)
        })
    }

    fn check_control(&self, state: &CpuState) -> Result<(), Error> {
        let cpuid = &self.vm.cpuid;
        let efer = saved_efer(state);
        require(state.cr0 & !CR0_KNOWN == 0, || format!("CR0 {:#x} has reserved bits set", state.cr0))?;
        require(state.cr4 & !cpuid.cr4_mask() == 0, || {
            format!("CR4 {:#x} has bits set that this CPU lacks", state.cr4)
        })?;
        require(efer & !EFER_KNOWN == 0, || format!("EFER {efer:#x} has reserved bits set"))?;
        require(state.cr3 >> cpuid.physical_bits() == 0, || {
            format!("CR3 {:#x} is beyond {} address bits", state.cr3, cpuid.physical_bits())
        })
    }
}

fn saved_efer(state: &CpuState) -> u64 {
    state.msrs.iter().find(|(index, _)| *index == msr::EFER).map_or(0, |(_, value)| *value)
}

/// The privilege level: SS's, but in real and virtual-8086 mode.
fn privilege(state: &CpuState) -> u8 {
    match (state.cr0 & cr0::PE != 0, state.rflags & rflags::VM != 0) {
        (false, _) => 0,
        (true, true) => 3,
        (true, false) => (state.segments[seg::SS as usize].access >> access::DPL_SHIFT & 3) as u8,
    }
}

/// What the mode bits say of each other (SDM 3A, 2.5, 4.1.2 and 9.8.5).
fn check_modes(state: &CpuState) -> Result<(), Error> {
    let (control0, control4, efer) = (state.cr0, state.cr4, saved_efer(state));
    let has = |value: u64, bit: u64| value & bit != 0;
    let paging = has(control0, cr0::PG);
    let long = has(efer, efer::LMA);
    require(!paging || has(control0, cr0::PE), || "CR0 has PG without PE".into())?;
    require(!has(control0, cr0::NW) || has(control0, cr0::CD), || "CR0 has NW without CD".into())?;
    require(long == (paging && has(efer, efer::LME)), || {
        format!("EFER.LMA is not what EFER.LME and CR0.PG make it (EFER {efer:#x}, CR0 {control0:#x})")
    })?;
    require(!long || has(control4, cr4::PAE), || "long mode without CR4.PAE".into())?;
    require(!has(control4, cr4::PCIDE) || long, || "CR4.PCIDE outside of long mode".into())?;
    let v86 = has(state.rflags, rflags::VM);
    require(!v86 || (has(control0, cr0::PE) && !long), || {
        "RFLAGS.VM outside of protected mode, or in long mode".into()
    })?;
    let cs = &state.segments[seg::CS as usize];
    let both = access::L | access::DB;
    require(!long || cs.access & both != both, || "CS has both L and D set".into())?;
    let long64 = long && cs.access & access::L != 0;
    let rip_fits = if long64 { canonical(state.rip) } else { state.rip >> 32 == 0 };
    require(rip_fits, || format!("RIP {:#x} is no address of the current mode", state.rip))
}

fn check_tables(state: &CpuState) -> Result<(), Error> {
    let bases = [
        ("GDTR", state.gdtr.base),
        ("IDTR", state.idtr.base),
        ("LDTR", state.ldtr.base),
        ("TR", state.tr.base),
    ];
    for (name, base) in bases {
        require(canonical(base), || format!("{name} has the base {base:#x}, which is not canonical"))?;
    }
    Ok(())
}

fn check_segment(segment: &Segment, name: &str) -> Result<(), Error> {
    require(canonical(segment.base), || {
        format!("{name} has the base {:#x}, which is not canonical", segment.base)
    })?;
    require(segment.access & 0x0f00 == 0, || {
        format!("{name} has the access rights {:#x}, with reserved bits set", segment.access)
    })
}

#[cfg(test)]
mod tests {
    use super::super::systest::*;
    use super::super::testing::{CODE, Guest, NoIo};
    use super::*;
    use engine::x86::Activity;

    #[test]
    fn page_directory_pointers_travel_as_they_were_loaded() {
        let mut here = System::protected(&[]);
        here.put64(0x6000, &[0x9001, 0, 0, 0x9001]);
        let cpu = &mut here.guest.cpu;
        cpu.write_cr4(cpu.cr4 | cr4::PAE).unwrap();
        cpu.write_cr3(0x6000).unwrap();
        cpu.write_cr0(cpu.cr0 | cr0::PG).unwrap();
        here.put64(0x6000, &[0, 0, 0, 0]);
        let state = here.cpu.save().unwrap();
        assert_eq!(state.pdptes, Some([0x9001, 0, 0, 0x9001]));
        let mut there = System::protected(&[]);
        there.guest.cpu.restore(&state).unwrap();
        assert_eq!(there.cpu.pdptes, [0x9001, 0, 0, 0x9001]);
        there.put64(0x6000, &[0xa001, 0, 0, 0]);
        there.guest.cpu.restore(&CpuState { pdptes: None, ..state }).unwrap();
        assert_eq!(there.cpu.pdptes, [0xa001, 0, 0, 0]);
    }

    #[test]
    fn a_vcpu_goes_on_elsewhere_from_where_it_was_saved() {
        let mut here = System::long(&[0x0f, 0x05, 0x0f, 0x01, 0xf8]); // syscall; swapgs
        here.enter_ring3();
        here.cpu.msrs.lstar = CODE + 2;
        here.cpu.msrs.kernel_gs_base = 0xffff_8000_0000_1000;
        here.cpu.msrs.star = 0x23_0008 << 32;
        here.cpu.fpu.ymm[3] = [1, 2, 3, 4];
        here.go().unwrap();
        let state = here.cpu.save().unwrap();

        let mut there = System::long(&[0x0f, 0x05, 0x0f, 0x01, 0xf8]);
        there.guest.cpu.init(true);
        there.guest.cpu.restore(&state).unwrap();
        let again = there.cpu.save().unwrap();
        assert!(again.tsc >= state.tsc);
        assert!(again.kvm_clock_ns >= state.kvm_clock_ns);
        assert_eq!(CpuState { tsc: state.tsc, kvm_clock_ns: state.kvm_clock_ns, ..again }, state);
        there.go().unwrap();
        assert_eq!(there.cpu.segs[seg::GS as usize].base, 0xffff_8000_0000_1000);
        assert_eq!((there.rip(), there.cpu.cpl, there.cpu.fpu.ymm[3]), (CODE + 5, 0, [1, 2, 3, 4]));
    }

    #[test]
    fn a_frequency_that_was_measured_elsewhere_is_kept_and_another_cpus_is_not() {
        let mut guest = System::long(&[]).guest;
        let state = guest.cpu.save().unwrap();
        let here = state.tsc_khz;
        assert!(here > 100_000, "{here} kHz");
        for (khz, after) in [(here + here / 5000, here + here / 5000), (0, here + here / 5000)] {
            guest.cpu.restore(&CpuState { tsc_khz: khz, ..state.clone() }).unwrap();
            assert_eq!(guest.cpu.save().unwrap().tsc_khz, after);
        }
        guest.cpu.restore(&CpuState { tsc_khz: here / 2, ..state }).unwrap();
        assert_eq!(guest.cpu.save().unwrap().tsc_khz, here + here / 5000);
    }

    #[test]
    fn states_that_no_cpu_can_be_in_are_refused_with_the_reason() {
        let mut guest = System::long(&[]).guest;
        let good = guest.cpu.save().unwrap();
        let mut refused = |spoil: &dyn Fn(&mut CpuState), word: &str| {
            let mut state = good.clone();
            spoil(&mut state);
            let error = guest.cpu.restore(&state).err().map(|e| e.to_string());
            assert!(error.as_ref().is_some_and(|e| e.contains(word)), "{word}: {error:?}");
        };
        refused(&|s| s.cr0 &= !cr0::PE, "PG without PE");
        refused(&|s| s.cr4 &= !cr4::PAE, "PAE");
        refused(&|s| s.cr4 |= 1 << 31, "CR4");
        refused(&|s| s.cr3 = 1 << 60, "CR3");
        refused(&|s| s.rip = 1 << 60, "RIP");
        refused(&|s| s.rflags |= 1 << 40, "RFLAGS");
        refused(&|s| s.segments[4].base = 1 << 60, "FS");
        refused(&|s| s.gdtr.base = 1 << 60, "GDTR");
        refused(&|s| s.xcr0 = 0, "XCR0");
        refused(&|s| s.xsave.truncate(100), "XSAVE");
        refused(&|s| s.msrs.iter_mut().for_each(|m| m.1 &= !efer::LME), "LMA");
        refused(&|s| s.msrs.push((msr::IA32_APIC_BASE, 1)), "0x1b");
        refused(&|s| s.msrs.push((msr::LSTAR, 1 << 60)), "0xc0000082");
        refused(&|s| s.lapic.regs.truncate(3), "APIC");
        refused(&|s| s.cr8 = 16, "CR8");
        guest.cpu.restore(&good).unwrap();
    }

    #[test]
    fn an_event_caught_in_delivery_is_delivered_on_arrival() {
        let mut system = System::long(&[]);
        let mut state = system.cpu.save().unwrap();
        state.activity = Activity::Halted;
        state.pending = Some(engine::x86::PendingEvent { vector: 14, error_code: Some(2), software: false });
        system.guest.cpu.restore(&state).unwrap();
        assert_eq!(system.cpu.save().unwrap().pending, state.pending);
        system.guest.cpu.deliver_pending().unwrap();
        assert_eq!(system.rip(), HANDLERS + 14 * 16);
        assert_eq!(system.get64::<2>(system.rsp()), [2, CODE]);
    }

    #[test]
    fn power_on_state_can_be_restored_and_runs() {
        let mut guest = Guest::new(16, &[]);
        guest.cpu.init(true);
        let state = guest.cpu.save().unwrap();
        guest.cpu.with_io(&NoIo, |cpu| cpu.restore(&state)).unwrap();
        assert_eq!(guest.cpu.segs[seg::CS as usize].base, 0xffff_0000);
    }
}
