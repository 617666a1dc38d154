//! ACPI fixed hardware (ACPI 6.5, section 4.8): the PM1a event and control blocks and the power
//! management timer, with the power button and the soft-off state S5.
//!
//! There is no legacy mode to leave: SCI_EN is always on, and the FADT has no SMI command port.
//! The timer counts 32 bits (FADT flag TMR_VAL_EXT).

use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use device::{BadState, Device, IrqLine, Snapshot, Timer, Timers};
use serde::{Deserialize, Serialize};

use crate::part::{Parts, part};
use crate::sync::lock;
use crate::{PowerEvent, PowerSink};

/// Register offsets from the block's first port.
mod reg {
    pub const STATUS: u64 = 0;
    pub const ENABLE: u64 = 2;
    pub const CONTROL: u64 = 4;
    pub const TIMER: u64 = 8;
}

/// PM1 status and enable bits (tables 4.11 and 4.12).
mod event {
    pub const TIMER: u16 = 1 << 0;
    pub const GLOBAL: u16 = 1 << 5;
    pub const POWER_BUTTON: u16 = 1 << 8;
    pub const SLEEP_BUTTON: u16 = 1 << 9;
    pub const RTC: u16 = 1 << 10;
    pub const WAKE: u16 = 1 << 15;
    /// Those that raise the SCI.
    pub const ENABLES: u16 = TIMER | GLOBAL | POWER_BUTTON | SLEEP_BUTTON | RTC;
    pub const STATUS: u16 = ENABLES | 1 << 4 | WAKE;
}

/// PM1 control bits (table 4.13).
mod control {
    pub const SCI_EN: u16 = 1 << 0;
    pub const SLP_TYP_SHIFT: u16 = 10;
    pub const SLP_EN: u16 = 1 << 13;
    /// Bits that keep what was written: BM_RLD and SLP_TYP.
    pub const KEPT: u16 = 1 << 1 | 7 << SLP_TYP_SHIFT;
}

/// What the DSDT's `\_S5` says.
const SLP_TYP_S5: u16 = 5;
/// The timer's clock in Hz.
const FREQUENCY: u128 = 3_579_545;
/// The status bit is set when bit 31 of the timer changes.
const HALF_WRAP: u64 = 1 << 31;

/// Saved state of [`AcpiPm`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiPmState {
    /// PM1 status.
    pub status: u16,
    /// PM1 enable.
    pub enable: u16,
    /// PM1 control, the bits that last.
    pub control: u16,
    /// Ticks of the timer since the machine began.
    pub clock: u64,
    /// How often bit 31 of the timer had changed when the status bit was last brought up to date.
    pub half_wraps: u64,
}

/// The block.
pub struct AcpiPm {
    state: AcpiPmState,
    sci: IrqLine,
    power: PowerSink,
    timer: Timer,
    origin: Instant,
}

fn ticks(time: Duration) -> u64 {
    (time.as_nanos() * FREQUENCY / 1_000_000_000) as u64
}

fn duration(ticks: u64) -> Duration {
    let ns = (u128::from(ticks) * 1_000_000_000).div_ceil(FREQUENCY);
    Duration::new((ns / 1_000_000_000) as u64, (ns % 1_000_000_000) as u32)
}

impl AcpiPm {
    /// A block that raises `sci` and reports to `power`.
    pub fn new(sci: IrqLine, power: PowerSink, timers: &Timers) -> Arc<Mutex<AcpiPm>> {
        Arc::new_cyclic(|pm: &Weak<Mutex<AcpiPm>>| {
            let pm = pm.clone();
            let timer = timers.timer(move || {
                if let Some(pm) = pm.upgrade() {
                    lock(&pm).update(Instant::now());
                }
            });
            Mutex::new(AcpiPm { state: AcpiPmState::default(), sci, power, timer, origin: Instant::now() })
        })
    }

    /// The port ranges for a block whose first port is `base`: events (4 ports), control (2), timer (4).
    pub fn at(pm: &Arc<Mutex<AcpiPm>>, base: u64) -> Parts<3> {
        [(reg::STATUS, 4), (reg::CONTROL, 2), (reg::TIMER, 4)]
            .map(|(first, len)| (base + first..base + first + len, part(pm, first)))
    }

    /// Somebody presses the power button.
    pub fn press_power_button(&mut self) {
        self.state.status |= event::POWER_BUTTON;
        self.update(Instant::now());
    }

    fn clock(&self, now: Instant) -> u64 {
        ticks(now.saturating_duration_since(self.origin))
    }

    /// Brings the timer's status bit and the SCI up to date.
    fn update(&mut self, now: Instant) {
        let half_wraps = self.clock(now) / HALF_WRAP;
        if half_wraps != self.state.half_wraps {
            self.state.half_wraps = half_wraps;
            self.state.status |= event::TIMER;
        }
        self.sci.set(self.state.status & self.state.enable & event::ENABLES != 0);
        if self.state.enable & event::TIMER != 0 {
            let next = self.origin.checked_add(duration((half_wraps + 1) * HALF_WRAP));
            self.timer.arm(next.unwrap_or(now + Duration::from_secs(600)));
        } else {
            self.timer.disarm();
        }
    }

    fn write_control(&mut self, value: u16) {
        self.state.control = value & control::KEPT;
        if value & control::SLP_EN == 0 {
            return;
        }
        match value >> control::SLP_TYP_SHIFT & 7 {
            SLP_TYP_S5 => (self.power)(PowerEvent::PowerOff),
            other => log::debug!("the guest asked for sleep type {other}, which this machine does not have"),
        }
    }

    /// The registers as bytes, so that any width and offset reads right.
    fn byte(&self, offset: u64, clock: u64) -> u8 {
        let (word, shift) = match offset {
            0..2 => (u32::from(self.state.status), offset),
            2..4 => (u32::from(self.state.enable), offset - reg::ENABLE),
            4..6 => (u32::from(self.state.control | control::SCI_EN), offset - reg::CONTROL),
            8..12 => (clock as u32, offset - reg::TIMER),
            _ => return 0xff,
        };
        (word >> (8 * shift)) as u8
    }
}

impl Device for AcpiPm {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let now = Instant::now();
        // Clocks read the timer very often; it has no part in the SCI.
        if offset < reg::TIMER {
            self.update(now);
        }
        let clock = self.clock(now);
        for (offset, byte) in (offset..).zip(data) {
            *byte = self.byte(offset, clock);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let now = Instant::now();
        self.update(now);
        // Words as ACPI accesses them; a byte goes to its half, a double word to both.
        let mut bytes = [None; 6];
        for (offset, &byte) in (offset..).zip(data) {
            if let Some(slot) = bytes.get_mut(offset as usize) {
                *slot = Some(byte);
            }
        }
        let word = |first: u64, old: u16| {
            let [low, high] = [bytes[first as usize], bytes[first as usize + 1]];
            let [old_low, old_high] = old.to_le_bytes();
            let given = low.is_some() || high.is_some();
            given.then(|| u16::from_le_bytes([low.unwrap_or(old_low), high.unwrap_or(old_high)]))
        };
        if let Some(value) = word(reg::STATUS, 0) {
            self.state.status &= !value; // ones clear
        }
        if let Some(value) = word(reg::ENABLE, self.state.enable) {
            self.state.enable = value & event::ENABLES;
        }
        if let Some(value) = word(reg::CONTROL, self.state.control) {
            self.write_control(value);
        }
        self.update(now);
    }

    fn reset(&mut self) {
        let now = Instant::now();
        let clock = self.clock(now);
        self.state = AcpiPmState { half_wraps: clock / HALF_WRAP, ..AcpiPmState::default() };
        self.update(now);
    }
}

impl Snapshot for AcpiPm {
    type State = AcpiPmState;

    fn save(&self) -> AcpiPmState {
        AcpiPmState { clock: self.clock(Instant::now()), ..self.state.clone() }
    }

    fn restore(&mut self, state: AcpiPmState) -> Result<(), BadState> {
        let AcpiPmState { status, enable, control, clock, half_wraps } = &state;
        let bad = |what: String| Err(BadState::new("acpi", what));
        if status & !event::STATUS != 0 || enable & !event::ENABLES != 0 || control & !control::KEPT != 0 {
            return bad(format!("PM1 registers {status:#x}, {enable:#x}, {control:#x}"));
        }
        if *clock > FREQUENCY as u64 * 3_200_000_000 || *half_wraps > clock / HALF_WRAP {
            return bad(format!("timer {clock}"));
        }
        let now = Instant::now();
        let Some(origin) = now.checked_sub(duration(*clock)) else { return bad(format!("timer {clock}")) };
        self.origin = origin;
        self.state = state;
        self.update(now);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::testing;
    use crate::wire::Wire;
    use std::sync::mpsc::Receiver;

    struct Bench {
        pm: Arc<Mutex<AcpiPm>>,
        wire: Arc<Wire>,
        events: Receiver<PowerEvent>,
        _timers: Timers,
    }

    fn bench() -> Bench {
        let timers = Timers::start().unwrap();
        let wire = Arc::new(Wire::default());
        let (power, events) = testing::sink();
        let pm = AcpiPm::new(IrqLine::new(wire.clone(), 9), power, &timers);
        Bench { pm, wire, events, _timers: timers }
    }

    impl Bench {
        fn read16(&self, offset: u64) -> u16 {
            let mut data = [0; 2];
            lock(&self.pm).read(offset, &mut data);
            u16::from_le_bytes(data)
        }
        fn write16(&self, offset: u64, value: u16) {
            lock(&self.pm).write(offset, &value.to_le_bytes());
        }
        fn timer(&self) -> u32 {
            let mut data = [0; 4];
            lock(&self.pm).read(reg::TIMER, &mut data);
            u32::from_le_bytes(data)
        }
        fn is_high(&self) -> bool {
            self.wire.is_high()
        }
    }

    #[test]
    fn a_guest_powers_off_by_s5_and_by_nothing_else() {
        let b = bench();
        assert_eq!(b.read16(reg::CONTROL), control::SCI_EN, "in ACPI mode from the start");
        b.write16(reg::CONTROL, 5 << 10);
        b.write16(reg::CONTROL, 1 << 13 | 1 << 10);
        assert!(b.events.try_recv().is_err());
        b.write16(reg::CONTROL, 1 << 13 | 5 << 10);
        assert_eq!(b.events.try_recv(), Ok(PowerEvent::PowerOff));
    }

    #[test]
    fn the_power_button_raises_the_sci_until_the_guest_clears_it() {
        let b = bench();
        lock(&b.pm).press_power_button();
        assert!(!b.is_high(), "not enabled yet");
        b.write16(reg::ENABLE, event::POWER_BUTTON);
        assert!(b.is_high());
        assert_eq!(b.read16(reg::STATUS), event::POWER_BUTTON);
        b.write16(reg::STATUS, event::POWER_BUTTON);
        assert!(!b.is_high());
        assert_eq!(b.read16(reg::STATUS), 0);
    }

    #[test]
    fn the_timer_runs_at_its_rate_and_reads_in_bytes_too() {
        let b = bench();
        let (t0, start) = (b.timer(), Instant::now());
        std::thread::sleep(Duration::from_millis(50));
        let (t1, passed) = (b.timer(), start.elapsed());
        let expected = ticks(passed);
        assert!(u64::from(t1 - t0).abs_diff(expected) < expected / 5 + 20_000, "{} {expected}", t1 - t0);
        let mut byte = [0];
        lock(&b.pm).read(reg::TIMER + 3, &mut byte);
        assert_eq!(byte[0], 0, "the top byte, less than 4 s after the start");
    }

    #[test]
    fn the_timers_half_wrap_sets_its_status_and_raises_the_sci() {
        let b = bench();
        let near = AcpiPmState { clock: HALF_WRAP - 100_000, enable: event::TIMER, ..AcpiPmState::default() };
        lock(&b.pm).restore(near).unwrap();
        assert!(!b.is_high());
        let start = Instant::now();
        while !b.is_high() {
            assert!(start.elapsed() < Duration::from_secs(5));
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(b.read16(reg::STATUS), event::TIMER);
        assert!(b.timer() >= HALF_WRAP as u32);
    }

    #[test]
    fn a_saved_block_keeps_its_button_and_an_impossible_one_is_refused() {
        let b = bench();
        b.write16(reg::ENABLE, event::POWER_BUTTON);
        lock(&b.pm).press_power_button();
        let saved = lock(&b.pm).save();
        let other = bench();
        lock(&other.pm).restore(saved.clone()).unwrap();
        assert!(other.is_high());
        assert!(lock(&other.pm).restore(AcpiPmState { enable: 2, ..saved.clone() }).is_err());
        assert!(lock(&other.pm).restore(AcpiPmState { clock: u64::MAX, ..saved }).is_err());
    }
}
