//! The local APIC, xAPIC and x2APIC (SDM 3A, chapter 11).
//!
//! It has two halves. [`SharedLapic`] is what others reach from their threads: request bits and the
//! registers that decide whether a message is for this APIC. [`Lapic`] is the rest, touched by its own
//! vCPU alone.

use std::sync::atomic::{AtomicU32, Ordering};

use engine::Msi;
use engine::x86::LapicState;

use super::cpu::Cpu;
use super::exception::{Exception, Exec};
use crate::clock::Clock;
use crate::vm::{Shared, attention};

/// Register numbers: offset in the page / 16, and MSR 0x800 + number in x2APIC mode (table 11-6).
mod register {
    pub const ID: usize = 0x02;
    pub const VERSION: usize = 0x03;
    pub const TPR: usize = 0x08;
    pub const PPR: usize = 0x0a;
    pub const EOI: usize = 0x0b;
    pub const LDR: usize = 0x0d;
    pub const DFR: usize = 0x0e;
    pub const SVR: usize = 0x0f;
    pub const ISR: usize = 0x10;
    pub const TMR: usize = 0x18;
    pub const IRR: usize = 0x20;
    pub const ESR: usize = 0x28;
    pub const LVT_CMCI: usize = 0x2f;
    pub const ICR: usize = 0x30;
    pub const ICR_HIGH: usize = 0x31;
    pub const LVT_TIMER: usize = 0x32;
    pub const LVT_LINT0: usize = 0x35;
    pub const LVT_LINT1: usize = 0x36;
    pub const LVT_ERROR: usize = 0x37;
    pub const INITIAL_COUNT: usize = 0x38;
    pub const CURRENT_COUNT: usize = 0x39;
    pub const DIVIDE: usize = 0x3e;
    pub const SELF_IPI: usize = 0x3f;
}
use register::*;

const REGISTERS: usize = 0x40;
/// Version 0x14, six LVT entries, EOI broadcasts can be suppressed: no.
const VERSION_VALUE: u32 = 0x14 | 5 << 16;
const SVR_ENABLE: u32 = 1 << 8;
const LVT_MASKED: u32 = 1 << 16;
const BASE_BSP: u64 = 1 << 8;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ENABLE: u64 = 1 << 11;
const DEFAULT_BASE: u64 = 0xfee0_0000;
const ESR_SEND_ILLEGAL: u32 = 1 << 5;
const ESR_RECEIVE_ILLEGAL: u32 = 1 << 6;
const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;
const BROADCAST: u32 = 0xffff_ffff;

const MODE_DISABLED: u32 = 0;
const MODE_XAPIC: u32 = 1;
const MODE_X2APIC: u32 = 2;

/// What other threads reach.
pub struct SharedLapic {
    /// Interrupt requests, 32 vectors a word.
    irr: [AtomicU32; 8],
    /// Which of them are level-triggered.
    tmr: [AtomicU32; 8],
    mode: AtomicU32,
    /// APIC id: 8 bits in xAPIC mode, 32 in x2APIC mode.
    id: AtomicU32,
    ldr: AtomicU32,
    dfr: AtomicU32,
    svr: AtomicU32,
    lint0: AtomicU32,
}

impl SharedLapic {
    /// The APIC of vCPU `id`.
    pub fn new(id: u32) -> SharedLapic {
        SharedLapic {
            irr: Default::default(),
            tmr: Default::default(),
            mode: AtomicU32::new(MODE_XAPIC),
            id: AtomicU32::new(id),
            ldr: AtomicU32::new(0),
            dfr: AtomicU32::new(u32::MAX),
            svr: AtomicU32::new(0xff),
            lint0: AtomicU32::new(LVT_MASKED),
        }
    }

    /// Whether the PIC's interrupts reach this CPU: LINT0 in ExtINT mode, or the APIC switched off.
    pub fn accepts_extint(&self) -> bool {
        let lint0 = self.lint0.load(Ordering::Acquire);
        self.mode.load(Ordering::Acquire) == MODE_DISABLED
            || (lint0 & LVT_MASKED == 0 && lint0 >> 8 & 7 == DeliveryMode::ExtInt as u32)
    }

    fn software_enabled(&self) -> bool {
        self.svr.load(Ordering::Acquire) & SVR_ENABLE != 0
            && self.mode.load(Ordering::Acquire) != MODE_DISABLED
    }

    /// Whether a message's destination names this APIC (11.6.2).
    fn matches(&self, dest: u32, logical: bool) -> bool {
        let mode = self.mode.load(Ordering::Acquire);
        let broadcast = dest == BROADCAST || (mode != MODE_X2APIC && dest == 0xff);
        if mode == MODE_DISABLED {
            return false;
        }
        if broadcast {
            return true;
        }
        if !logical {
            return dest == self.id.load(Ordering::Acquire);
        }
        let ldr = self.ldr.load(Ordering::Acquire);
        if mode == MODE_X2APIC {
            return ldr >> 16 == dest >> 16 && ldr & dest & 0xffff != 0;
        }
        let mine = ldr >> 24;
        if self.dfr.load(Ordering::Acquire) >> 28 == 0xf {
            return mine & dest & 0xff != 0; // flat model
        }
        mine >> 4 == dest >> 4 & 0xf && mine & dest & 0xf != 0 // cluster model
    }

    fn request(&self, vector: u8, level: bool) {
        let (word, bit) = (usize::from(vector) / 32, 1 << (vector % 32));
        if level {
            self.tmr[word].fetch_or(bit, Ordering::AcqRel);
        } else {
            self.tmr[word].fetch_and(!bit, Ordering::AcqRel);
        }
        self.irr[word].fetch_or(bit, Ordering::AcqRel);
    }

    fn highest_request(&self) -> Option<u8> {
        highest(|word| self.irr[word].load(Ordering::Acquire))
    }
}

fn highest(word: impl Fn(usize) -> u32) -> Option<u8> {
    (0..8).rev().find_map(|i| {
        let bits = word(i);
        (bits != 0).then(|| (i as u32 * 32 + 31 - bits.leading_zeros()) as u8)
    })
}

/// Delivery modes (11.5.1, 11.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum DeliveryMode {
    Fixed = 0,
    LowestPriority = 1,
    Smi = 2,
    Nmi = 4,
    Init = 5,
    StartUp = 6,
    ExtInt = 7,
}

/// An interrupt message on its way to one or more local APICs.
#[derive(Clone, Copy, Debug)]
pub struct Message {
    vector: u8,
    mode: Option<DeliveryMode>,
    logical: bool,
    dest: u32,
    level: bool,
    assert: bool,
}

impl Message {
    fn new(low: u32, dest: u32) -> Message {
        use DeliveryMode::*;
        let mode = match low >> 8 & 7 {
            0 => Some(Fixed),
            1 => Some(LowestPriority),
            2 => Some(Smi),
            4 => Some(Nmi),
            5 => Some(Init),
            6 => Some(StartUp),
            7 => Some(ExtInt),
            _ => None,
        };
        Message {
            vector: low as u8,
            mode,
            logical: low & 1 << 11 != 0,
            dest,
            level: low & 1 << 15 != 0,
            assert: low & 1 << 14 != 0,
        }
    }

    /// A message-signalled interrupt (11.11). Bits 5-11 of the address extend the destination to 15
    /// bits, as hypervisors that say so in CPUID offer it.
    pub fn from_msi(msi: Msi) -> Message {
        let address = msi.address as u32;
        let dest = (address >> 12 & 0xff) | (address >> 5 & 0x7f) << 8;
        let logical = address & 1 << 2 != 0;
        let low = msi.data & !(1 << 11) | u32::from(logical) << 11;
        Message { assert: true, ..Message::new(low, dest) }
    }

    /// Delivers it to every APIC that it names.
    pub fn deliver(&self, shared: &Shared, exclude: Option<u32>) {
        let targets = || {
            let others = shared.vcpus.iter().enumerate().filter(|(i, _)| Some(*i as u32) != exclude);
            others.filter(|(_, v)| v.lapic.matches(self.dest, self.logical)).map(|(i, _)| i)
        };
        if self.mode == Some(DeliveryMode::LowestPriority) {
            // One of the named that is enabled: the one that is asked for the least, else the first.
            let pick = targets()
                .filter(|&i| shared.vcpus[i].lapic.software_enabled())
                .min_by_key(|&i| shared.vcpus[i].lapic.highest_request());
            if let Some(i) = pick {
                self.deliver_to(shared, i);
            }
            return;
        }
        for i in targets() {
            self.deliver_to(shared, i);
        }
    }

    fn deliver_to(&self, shared: &Shared, index: usize) {
        let vcpu = &shared.vcpus[index];
        match self.mode {
            Some(DeliveryMode::Fixed | DeliveryMode::LowestPriority) => {
                if self.vector >= 16 && vcpu.lapic.software_enabled() {
                    vcpu.lapic.request(self.vector, self.level);
                    vcpu.notify(attention::INTERRUPT);
                }
            }
            Some(DeliveryMode::Nmi) => vcpu.notify(attention::NMI),
            Some(DeliveryMode::Init) if self.assert || !self.level => {
                // A start-up IPI from before is void; one that comes behind, even before the vCPU
                // has noticed the INIT, counts.
                vcpu.take(attention::SIPI);
                vcpu.notify(attention::INIT);
            }
            Some(DeliveryMode::StartUp) => {
                vcpu.sipi_vector.store(self.vector.into(), Ordering::Release);
                vcpu.notify(attention::SIPI);
            }
            Some(DeliveryMode::ExtInt) => vcpu.notify(attention::EXTINT),
            // There is no system-management mode, and level de-assert of INIT means nothing today.
            Some(DeliveryMode::Smi | DeliveryMode::Init) | None => {}
        }
    }
}

/// The half of the local APIC that its own vCPU owns.
pub struct Lapic {
    index: usize,
    base: u64,
    tpr: u32,
    isr: [u32; 8],
    esr: u32,
    /// Errors since the last write of ESR.
    errors: u32,
    icr: u64,
    /// LVT entries, at their register number - [`LVT_TIMER`].
    lvt: [u32; 6],
    initial_count: u32,
    divide: u32,
    /// Host counter when the current countdown began.
    timer_start: u64,
    /// IA32_TSC_DEADLINE, in guest ticks.
    tsc_deadline: u64,
    /// Host counter at which the timer next fires.
    deadline: Option<u64>,
}

impl Lapic {
    /// The APIC of vCPU `id` after power-on.
    pub fn new(id: u32, vm: &Shared) -> Lapic {
        let mut lapic = Lapic {
            index: id as usize,
            base: 0,
            tpr: 0,
            isr: [0; 8],
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [LVT_MASKED; 6],
            initial_count: 0,
            divide: 0,
            timer_start: 0,
            tsc_deadline: 0,
            deadline: None,
        };
        lapic.reset(true, vm);
        lapic
    }

    /// Power-on or INIT (11.4.7).
    ///
    /// After power-on the bootstrap processor's LINT0 and LINT1 are as firmware leaves them: virtual
    /// wire mode, the PIC reaching the CPU, and NMI. Kernels that are booted without firmware expect it.
    pub fn reset(&mut self, power_on: bool, vm: &Shared) {
        let shared = &vm.vcpus[self.index].lapic;
        if power_on {
            self.base = DEFAULT_BASE | BASE_ENABLE | if self.index == 0 { BASE_BSP } else { 0 };
        }
        self.tpr = 0;
        self.isr = [0; 8];
        (self.esr, self.errors, self.icr) = (0, 0, 0);
        self.lvt = [LVT_MASKED; 6];
        (self.initial_count, self.divide) = (0, 0);
        self.tsc_deadline = 0;
        self.deadline = None;
        for word in shared.irr.iter().chain(&shared.tmr) {
            word.store(0, Ordering::Release);
        }
        shared.svr.store(0xff, Ordering::Release);
        shared.dfr.store(u32::MAX, Ordering::Release);
        if self.base & BASE_X2APIC == 0 {
            shared.ldr.store(0, Ordering::Release);
            shared.id.store(self.index as u32, Ordering::Release);
        }
        self.publish_mode(shared);
        if power_on && self.index == 0 {
            self.lvt[LVT_LINT0 - LVT_TIMER] = (DeliveryMode::ExtInt as u32) << 8;
            self.lvt[LVT_LINT1 - LVT_TIMER] = (DeliveryMode::Nmi as u32) << 8;
        }
        shared.lint0.store(self.lvt[LVT_LINT0 - LVT_TIMER], Ordering::Release);
    }

    fn publish_mode(&self, shared: &SharedLapic) {
        let mode = match self.base & (BASE_ENABLE | BASE_X2APIC) {
            0 => MODE_DISABLED,
            BASE_ENABLE => MODE_XAPIC,
            _ => MODE_X2APIC,
        };
        shared.mode.store(mode, Ordering::Release);
        if mode == MODE_X2APIC {
            let id = self.index as u32;
            shared.id.store(id, Ordering::Release);
            shared.ldr.store(x2apic_ldr(id), Ordering::Release);
        }
    }

    /// Whether the APIC's register page is at this guest-physical address.
    #[inline(always)]
    pub fn claims(&self, gpa: u64) -> bool {
        gpa & !0xfff == self.base & 0x000f_ffff_ffff_f000
            && self.base & (BASE_ENABLE | BASE_X2APIC) == BASE_ENABLE
    }

    fn x2apic(&self) -> bool {
        self.base & BASE_X2APIC != 0
    }

    /// Processor priority (11.8.3.1).
    fn ppr(&self) -> u32 {
        let in_service = highest(|i| self.isr[i]).map_or(0, u32::from);
        if self.tpr >> 4 >= in_service >> 4 { self.tpr & 0xff } else { in_service & 0xf0 }
    }

    /// The vector that would be delivered now: the highest request above the processor priority.
    pub fn pending(&self, vm: &Shared) -> Option<u8> {
        let shared = &vm.vcpus[self.index].lapic;
        if !shared.software_enabled() {
            return None;
        }
        shared.highest_request().filter(|&v| u32::from(v) >> 4 > self.ppr() >> 4)
    }

    /// The CPU takes `vector`: from request to in service.
    pub fn accept(&mut self, vector: u8, vm: &Shared) {
        let (word, bit) = (usize::from(vector) / 32, 1 << (vector % 32));
        vm.vcpus[self.index].lapic.irr[word].fetch_and(!bit, Ordering::AcqRel);
        self.isr[word] |= bit;
    }

    /// Ends the interrupt in service. Returns its vector if it was level-triggered: the IOAPICs want
    /// to know.
    fn end_of_interrupt(&mut self, vm: &Shared) -> Option<u8> {
        let vector = highest(|i| self.isr[i])?;
        let (word, bit) = (usize::from(vector) / 32, 1 << (vector % 32));
        self.isr[word] &= !bit;
        let level = vm.vcpus[self.index].lapic.tmr[word].load(Ordering::Acquire) & bit != 0;
        level.then_some(vector)
    }

    /// Host counter at which the timer fires, if it runs.
    #[inline(always)]
    pub fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// Task priority as CR8 shows it.
    pub fn cr8(&self) -> u64 {
        u64::from(self.tpr >> 4)
    }

    fn lvt_timer(&self) -> u32 {
        self.lvt[0]
    }

    fn divisor(&self) -> u64 {
        let code = (self.divide & 3) | (self.divide >> 1 & 4);
        if code == 7 { 1 } else { 2 << code }
    }

    /// Countdown length in host ticks. The APIC's timer counts nanoseconds before division.
    fn period(&self, clock: &Clock) -> u64 {
        clock.ticks_in(u64::from(self.initial_count) * self.divisor()).max(1)
    }

    fn timer_mode(&self) -> u32 {
        self.lvt_timer() >> 17 & 3
    }

    fn start_timer(&mut self, clock: &Clock) {
        self.timer_start = Clock::ticks();
        self.deadline = (self.initial_count != 0 && self.timer_mode() != 2)
            .then(|| self.timer_start + self.period(clock));
    }

    fn current_count(&self, clock: &Clock) -> u32 {
        let Some(deadline) = self.deadline.filter(|_| self.timer_mode() != 2) else { return 0 };
        let left = clock.nanos_in(deadline.saturating_sub(Clock::ticks()));
        (left / self.divisor()).min(self.initial_count.into()) as u32
    }

    /// The countdown is over: requests the interrupt and winds up a periodic timer.
    fn timer_expired(&mut self, vm: &Shared, now: u64) {
        let Some(deadline) = self.deadline else { return };
        self.deadline = None;
        if self.timer_mode() == 1 {
            // Missed periods are not made up for: the guest would drown in them.
            let period = self.period(&vm.clock);
            let missed = (now - deadline) / period;
            self.timer_start = deadline + missed * period;
            self.deadline = Some(self.timer_start + period);
        } else {
            self.tsc_deadline = 0;
        }
        self.raise_lvt(vm, self.lvt_timer());
    }

    fn raise_lvt(&self, vm: &Shared, lvt: u32) {
        let me = &vm.vcpus[self.index];
        if lvt & LVT_MASKED == 0 && lvt & 0xff >= 16 && me.lapic.software_enabled() {
            me.lapic.request(lvt as u8, false);
            me.notify(attention::INTERRUPT);
        }
    }

    fn error(&mut self, vm: &Shared, bit: u32) {
        self.errors |= bit;
        self.raise_lvt(vm, self.lvt[LVT_ERROR - LVT_TIMER]);
    }

    fn read(&self, number: usize, vm: &Shared) -> Option<u32> {
        let shared = &vm.vcpus[self.index].lapic;
        let load = |word: &AtomicU32| word.load(Ordering::Acquire);
        Some(match number {
            ID if self.x2apic() => load(&shared.id),
            ID => load(&shared.id) << 24,
            VERSION => VERSION_VALUE,
            TPR => self.tpr,
            PPR => self.ppr(),
            LDR => load(&shared.ldr),
            DFR if !self.x2apic() => load(&shared.dfr),
            SVR => load(&shared.svr),
            ISR..TMR => self.isr[number - ISR],
            TMR..IRR => load(&shared.tmr[number - TMR]),
            IRR..ESR => load(&shared.irr[number - IRR]),
            ESR => self.esr,
            ICR => self.icr as u32,
            ICR_HIGH if !self.x2apic() => (self.icr >> 32) as u32,
            LVT_TIMER..=LVT_ERROR => self.lvt[number - LVT_TIMER],
            INITIAL_COUNT => self.initial_count,
            CURRENT_COUNT => self.current_count(&vm.clock),
            DIVIDE => self.divide,
            EOI | LVT_CMCI | 0x09 | 0x0c if !self.x2apic() => 0,
            _ => return None,
        })
    }

    /// Writes a register; `None` where there is none.
    fn write(&mut self, number: usize, value: u32, vm: &Shared) -> Option<()> {
        let shared = &vm.vcpus[self.index].lapic;
        match number {
            ID if !self.x2apic() => shared.id.store(value >> 24, Ordering::Release),
            TPR => {
                self.tpr = value & 0xff;
                vm.vcpus[self.index].notify(attention::INTERRUPT);
            }
            LDR if !self.x2apic() => shared.ldr.store(value & 0xff00_0000, Ordering::Release),
            DFR if !self.x2apic() => shared.dfr.store(value | 0x0fff_ffff, Ordering::Release),
            SVR => self.write_svr(value & 0x1ff, vm),
            ESR => self.esr = std::mem::take(&mut self.errors),
            ICR if !self.x2apic() => {
                self.icr = self.icr & !0xffff_ffff | u64::from(value & !(1 << 12));
                self.send_ipi(value, (self.icr >> 56) as u32, vm);
            }
            ICR_HIGH if !self.x2apic() => {
                self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32;
            }
            LVT_TIMER..=LVT_ERROR => self.write_lvt(number, value, vm),
            INITIAL_COUNT if self.timer_mode() == 2 => {}
            INITIAL_COUNT => {
                self.initial_count = value;
                self.start_timer(&vm.clock);
            }
            DIVIDE => {
                self.divide = value & 0xb;
                if self.deadline.is_some() && self.timer_mode() != 2 {
                    self.start_timer(&vm.clock);
                }
            }
            SELF_IPI if self.x2apic() => {
                shared.request(value as u8, false);
                vm.vcpus[self.index].notify(attention::INTERRUPT);
            }
            VERSION | PPR | CURRENT_COUNT | LVT_CMCI | 0x09 | 0x0c if !self.x2apic() => {}
            ISR..=0x27 if !self.x2apic() => {}
            _ => return None,
        }
        Some(())
    }

    fn write_svr(&mut self, value: u32, vm: &Shared) {
        vm.vcpus[self.index].lapic.svr.store(value, Ordering::Release);
        if value & SVR_ENABLE == 0 {
            for number in LVT_TIMER..=LVT_ERROR {
                let value = self.lvt[number - LVT_TIMER] | LVT_MASKED;
                self.write_lvt(number, value, vm);
            }
        }
    }

    fn write_lvt(&mut self, number: usize, value: u32, vm: &Shared) {
        let shared = &vm.vcpus[self.index].lapic;
        let writable = match number {
            LVT_TIMER => 0x0007_00ff,
            LVT_LINT0 | LVT_LINT1 => 0x0001_a7ff,
            LVT_ERROR => 0x0001_00ff,
            _ => 0x0001_07ff,
        };
        let mut value = value & writable;
        if shared.svr.load(Ordering::Acquire) & SVR_ENABLE == 0 {
            value |= LVT_MASKED;
        }
        let old = std::mem::replace(&mut self.lvt[number - LVT_TIMER], value);
        if number == LVT_TIMER && (old ^ value) >> 17 & 3 != 0 {
            // A change to or from TSC-deadline mode disarms (11.5.4.1).
            self.deadline = None;
            self.tsc_deadline = 0;
        }
        if number == LVT_LINT0 {
            shared.lint0.store(value, Ordering::Release);
            if vm.extint() {
                vm.vcpus[self.index].notify(attention::EXTINT);
            }
        }
    }

    fn send_ipi(&mut self, low: u32, dest: u32, vm: &Shared) {
        let me = self.index as u32;
        let message = Message::new(low, dest);
        if message.vector < 16
            && matches!(message.mode, Some(DeliveryMode::Fixed | DeliveryMode::LowestPriority))
        {
            self.error(vm, ESR_SEND_ILLEGAL | if low >> 18 & 3 == 1 { ESR_RECEIVE_ILLEGAL } else { 0 });
            return;
        }
        match low >> 18 & 3 {
            0 => vm.send(&message, None),
            1 => message.deliver_to(vm, self.index),
            2 => vm.send(&Message { dest: BROADCAST, logical: false, ..message }, None),
            _ => vm.send(&Message { dest: BROADCAST, logical: false, ..message }, Some(me)),
        }
    }

    /// Copies the state out.
    pub fn save(&self, vm: &Shared) -> LapicState {
        let mut regs: Vec<u32> = (0..REGISTERS).map(|n| self.read(n, vm).unwrap_or(0)).collect();
        regs[ESR + 1] = self.errors; // a reserved slot
        regs[ICR_HIGH] = (self.icr >> 32) as u32;
        let left = self.deadline.filter(|_| self.timer_mode() != 2);
        LapicState {
            regs,
            base: self.base,
            tsc_deadline: self.tsc_deadline,
            timer_left_ns: left.map(|d| vm.clock.nanos_in(d.saturating_sub(Clock::ticks()))),
        }
    }

    /// Takes a state on. `guest_to_host` turns guest ticks into the host's counter.
    pub fn restore(
        &mut self,
        state: &LapicState,
        vm: &Shared,
        guest_to_host: impl Fn(u64) -> u64,
    ) -> Result<(), String> {
        let LapicState { regs, base, tsc_deadline, timer_left_ns } = state;
        let Ok(regs) = <&[u32; REGISTERS]>::try_from(regs.as_slice()) else {
            return Err(format!("the local APIC has {REGISTERS} registers, not {}", regs.len()));
        };
        if !valid_base(*base, vm) {
            return Err(format!("IA32_APIC_BASE {base:#x} is impossible"));
        }
        let shared = &vm.vcpus[self.index].lapic;
        self.base = *base;
        self.publish_mode(shared);
        if !self.x2apic() {
            shared.id.store(regs[ID] >> 24, Ordering::Release);
            shared.ldr.store(regs[LDR], Ordering::Release);
            shared.dfr.store(regs[DFR] | 0x0fff_ffff, Ordering::Release);
        }
        shared.svr.store(regs[SVR] & 0x1ff, Ordering::Release);
        shared.lint0.store(regs[LVT_LINT0], Ordering::Release);
        for i in 0..8 {
            shared.irr[i].store(regs[IRR + i], Ordering::Release);
            shared.tmr[i].store(regs[TMR + i], Ordering::Release);
            self.isr[i] = regs[ISR + i];
        }
        self.tpr = regs[TPR] & 0xff;
        (self.esr, self.errors) = (regs[ESR], regs[ESR + 1]);
        self.icr = u64::from(regs[ICR]) | u64::from(regs[ICR_HIGH]) << 32;
        self.lvt.copy_from_slice(&regs[LVT_TIMER..=LVT_ERROR]);
        (self.initial_count, self.divide) = (regs[INITIAL_COUNT], regs[DIVIDE] & 0xb);
        self.tsc_deadline = *tsc_deadline;
        self.timer_start = Clock::ticks();
        self.deadline = if self.timer_mode() == 2 {
            (*tsc_deadline != 0).then(|| guest_to_host(*tsc_deadline))
        } else {
            timer_left_ns.map(|left| self.timer_start.saturating_add(vm.clock.ticks_in(left)))
        };
        vm.vcpus[self.index].notify(attention::INTERRUPT | attention::EXTINT);
        Ok(())
    }
}

fn x2apic_ldr(id: u32) -> u32 {
    (id >> 4) << 16 | 1 << (id & 15)
}

fn valid_base(base: u64, vm: &Shared) -> bool {
    let known = BASE_BSP | BASE_X2APIC | BASE_ENABLE | 0x000f_ffff_ffff_f000;
    base & !known == 0
        && base >> vm.cpuid.physical_bits() == 0
        && base & (BASE_ENABLE | BASE_X2APIC) != BASE_X2APIC
}

impl Cpu {
    /// Fires the timer if it is due.
    pub fn check_timer(&mut self) {
        let now = Clock::ticks();
        if self.lapic.deadline.is_some_and(|deadline| now >= deadline) {
            let vm = self.vm.clone();
            self.lapic.timer_expired(&vm, now);
        }
    }

    fn end_of_interrupt(&mut self) {
        let vm = self.vm.clone();
        if let Some(vector) = self.lapic.end_of_interrupt(&vm) {
            self.io().end_of_interrupt(vector);
        }
        vm.vcpus[self.id as usize].notify(attention::INTERRUPT);
    }

    pub(super) fn lapic_mmio_read(&mut self, gpa: u64, data: &mut [u8]) {
        let offset = (gpa & 0xfff) as usize;
        let vm = self.vm.clone();
        let value = self.lapic.read(offset >> 4, &vm).filter(|_| offset < REGISTERS * 16);
        if value.is_none() {
            self.lapic.error(&vm, ESR_ILLEGAL_REGISTER);
        }
        let bytes = value.unwrap_or(0).to_le_bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get((offset & 15) + i).copied().unwrap_or(0);
        }
    }

    pub(super) fn lapic_mmio_write(&mut self, gpa: u64, data: &[u8]) {
        let offset = (gpa & 0xfff) as usize;
        // Only aligned 32-bit writes are defined (11.4.1); wider ones carry the register in front.
        let Some(value) = data.first_chunk().filter(|_| offset & 15 == 0) else { return };
        let (vm, number, value) = (self.vm.clone(), offset >> 4, u32::from_le_bytes(*value));
        if number == EOI {
            return self.end_of_interrupt();
        }
        if number >= REGISTERS || self.lapic.write(number, value, &vm).is_none() {
            self.lapic.error(&vm, ESR_ILLEGAL_REGISTER);
        }
    }

    /// `RDMSR` of 0x800-0x8ff (11.12.1).
    pub fn read_x2apic(&self, msr: u32) -> Exec<u64> {
        let number = (msr & 0xff) as usize;
        if !self.lapic.x2apic() || number >= REGISTERS {
            return Err(Exception::GP0);
        }
        match number {
            ICR => Ok(self.lapic.icr),
            EOI | SELF_IPI => Err(Exception::GP0),
            _ => self.lapic.read(number, &self.vm).map(u64::from).ok_or(Exception::GP0),
        }
    }

    /// `WRMSR` of 0x800-0x8ff.
    pub fn write_x2apic(&mut self, msr: u32, value: u64) -> Exec {
        let number = (msr & 0xff) as usize;
        if !self.lapic.x2apic() || number >= REGISTERS || (number != ICR && value >> 32 != 0) {
            return Err(Exception::GP0);
        }
        let vm = self.vm.clone();
        match number {
            ICR => {
                self.lapic.icr = value & !(1 << 12);
                self.lapic.send_ipi(value as u32, (value >> 32) as u32, &vm);
                Ok(())
            }
            EOI | ESR if value != 0 => Err(Exception::GP0),
            EOI => {
                self.end_of_interrupt();
                Ok(())
            }
            _ => self.lapic.write(number, value as u32, &vm).ok_or(Exception::GP0),
        }
    }

    /// IA32_APIC_BASE.
    pub fn apic_base(&self) -> u64 {
        self.lapic.base
    }

    /// Writes IA32_APIC_BASE: moves the page, switches the mode (figure 11-27 has the legal ways).
    pub fn set_apic_base(&mut self, value: u64) -> Exec {
        let vm = self.vm.clone();
        let (old, new) = (self.lapic.base, value & !BASE_BSP | self.lapic.base & BASE_BSP);
        let leaves_x2apic = old & BASE_X2APIC != 0 && new & BASE_X2APIC == 0 && new & BASE_ENABLE != 0;
        let skips_xapic = old & BASE_ENABLE == 0 && new & BASE_X2APIC != 0;
        if !valid_base(value, &vm) || leaves_x2apic || skips_xapic {
            return Err(Exception::GP0);
        }
        self.lapic.base = new;
        if old & BASE_ENABLE != 0 && new & BASE_ENABLE == 0 {
            self.lapic.reset(false, &vm);
        }
        self.lapic.publish_mode(&vm.vcpus[self.id as usize].lapic);
        let pcid = self.pcid();
        self.tlb.flush_all(pcid);
        Ok(())
    }

    /// Task priority through CR8.
    pub fn set_cr8(&mut self, value: u64) -> Exec {
        if value > 15 {
            return Err(Exception::GP0);
        }
        self.lapic.tpr = (value as u32) << 4;
        self.vm.vcpus[self.id as usize].notify(attention::INTERRUPT);
        self.leave_block = true;
        Ok(())
    }

    /// IA32_TSC_DEADLINE; 0 unless the timer is in TSC-deadline mode and armed.
    pub fn tsc_deadline(&self) -> u64 {
        if self.lapic.timer_mode() == 2 { self.lapic.tsc_deadline } else { 0 }
    }

    /// Arms the timer for a guest TSC value, or disarms it with 0 (11.5.4.1).
    pub fn set_tsc_deadline(&mut self, value: u64) {
        if self.lapic.timer_mode() != 2 {
            return;
        }
        self.lapic.tsc_deadline = value;
        self.lapic.deadline = (value != 0).then(|| self.guest_to_host_tsc(value));
        self.leave_block = true;
    }
}
