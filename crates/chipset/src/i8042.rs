//! The PC's keyboard controller with nothing plugged in (IBM PS/2 Technical Reference, "Keyboard and
//! Auxiliary Device Controller").
//!
//! It is here for what else hangs on it: the reset line (command 0xfe, the oldest way to reboot) and
//! the A20 gate. Self-tests pass and commands for a keyboard are answered at once with the
//! controller's time-out, so that software looking for a keyboard learns fast that there is none. It raises no
//! interrupt.

use std::sync::{Arc, Mutex};

use device::{BadState, Device, Snapshot};
use serde::{Deserialize, Serialize};

use crate::part::{Parts, part};
use crate::{PowerEvent, PowerSink};

/// Offsets in the port range that starts at 0x60.
const DATA: u64 = 0;
const COMMAND_STATUS: u64 = 4;

mod status {
    pub const OUTPUT_FULL: u8 = 1 << 0;
    pub const SYSTEM: u8 = 1 << 2;
    pub const COMMAND: u8 = 1 << 3;
    pub const UNLOCKED: u8 = 1 << 4;
    pub const TIMEOUT: u8 = 1 << 6;
}

mod command {
    pub const READ_RAM: std::ops::RangeInclusive<u8> = 0x20..=0x3f;
    pub const WRITE_RAM: std::ops::RangeInclusive<u8> = 0x60..=0x7f;
    pub const DISABLE_AUX: u8 = 0xa7;
    pub const ENABLE_AUX: u8 = 0xa8;
    pub const TEST_AUX: u8 = 0xa9;
    pub const SELF_TEST: u8 = 0xaa;
    pub const TEST_KEYBOARD: u8 = 0xab;
    pub const DISABLE_KEYBOARD: u8 = 0xad;
    pub const ENABLE_KEYBOARD: u8 = 0xae;
    pub const READ_OUTPUT_PORT: u8 = 0xd0;
    pub const WRITE_OUTPUT_PORT: u8 = 0xd1;
    pub const WRITE_AUX: u8 = 0xd4;
    pub const PULSE: std::ops::RangeInclusive<u8> = 0xf0..=0xff;
}

/// Bits of the controller's command byte (RAM byte 0).
const CONFIG_SYSTEM: u8 = 1 << 2;
const CONFIG_KEYBOARD_OFF: u8 = 1 << 4;
const CONFIG_AUX_OFF: u8 = 1 << 5;

/// Bit 0 of the output port is the processor's reset line, active low; bit 1 is A20.
const OUT_NOT_RESET: u8 = 1 << 0;
const OUT_A20: u8 = 1 << 1;

const SELF_TEST_PASSED: u8 = 0x55;
/// Nobody answers on that line.
const RESEND: u8 = 0xfe;
/// Test result: the clock line is stuck low.
const CLOCK_LOW: u8 = 0x01;

/// Saved state of [`I8042`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    /// Command byte.
    pub config: u8,
    /// Output port.
    pub out_port: u8,
    /// Byte waiting in the output buffer.
    pub output: Option<u8>,
    /// The byte waiting is the controller's time-out, not an answer.
    pub timeout: bool,
    /// Command that waits for its data byte.
    pub command: Option<u8>,
    /// Last write was to the command port.
    pub last_was_command: bool,
}

impl Default for I8042State {
    fn default() -> I8042State {
        I8042State {
            config: CONFIG_KEYBOARD_OFF | CONFIG_AUX_OFF,
            out_port: OUT_NOT_RESET | OUT_A20,
            output: None,
            timeout: false,
            command: None,
            last_was_command: false,
        }
    }
}

/// The controller.
pub struct I8042 {
    state: I8042State,
    power: PowerSink,
}

impl I8042 {
    /// A controller whose reset line reports to `power`.
    pub fn new(power: PowerSink) -> I8042 {
        I8042 { state: I8042State::default(), power }
    }

    /// The two ports; 0x61 to 0x63 between them are others'.
    pub fn at(controller: &Arc<Mutex<I8042>>) -> Parts<2> {
        [(0x60..0x61, part(controller, DATA)), (0x64..0x65, part(controller, COMMAND_STATUS))]
    }

    fn answer(&mut self, byte: u8) {
        self.state.output = Some(byte);
        self.state.timeout = false;
    }

    fn nobody_answers(&mut self) {
        self.state.output = Some(RESEND);
        self.state.timeout = true;
    }

    fn status(&self) -> u8 {
        let s = &self.state;
        let mut value = status::UNLOCKED;
        if s.output.is_some() {
            value |= status::OUTPUT_FULL;
        }
        if s.output.is_some() && s.timeout {
            value |= status::TIMEOUT;
        }
        if s.config & CONFIG_SYSTEM != 0 {
            value |= status::SYSTEM;
        }
        if s.last_was_command {
            value |= status::COMMAND;
        }
        value
    }

    fn command(&mut self, value: u8) {
        self.state.last_was_command = true;
        self.state.command = None;
        match value {
            v if command::READ_RAM.contains(&v) => {
                self.answer(if v == 0x20 { self.state.config } else { 0 });
            }
            command::WRITE_OUTPUT_PORT | command::WRITE_AUX => self.state.command = Some(value),
            v if command::WRITE_RAM.contains(&v) => self.state.command = Some(v),
            command::DISABLE_AUX => self.state.config |= CONFIG_AUX_OFF,
            command::ENABLE_AUX => self.state.config &= !CONFIG_AUX_OFF,
            command::DISABLE_KEYBOARD => self.state.config |= CONFIG_KEYBOARD_OFF,
            command::ENABLE_KEYBOARD => self.state.config &= !CONFIG_KEYBOARD_OFF,
            command::TEST_AUX | command::TEST_KEYBOARD => self.answer(CLOCK_LOW),
            command::SELF_TEST => {
                self.state.config |= CONFIG_SYSTEM;
                self.answer(SELF_TEST_PASSED);
            }
            command::READ_OUTPUT_PORT => self.answer(self.state.out_port),
            // Pulses the output port's low bits that are 0 in the command; bit 0 is the reset line.
            v if command::PULSE.contains(&v) && v & OUT_NOT_RESET == 0 => (self.power)(PowerEvent::Reset),
            _ => {}
        }
    }

    fn data(&mut self, value: u8) {
        self.state.last_was_command = false;
        match self.state.command.take() {
            Some(0x60) => self.state.config = value,
            Some(command::WRITE_OUTPUT_PORT) => {
                self.state.out_port = value | OUT_NOT_RESET;
                if value & OUT_NOT_RESET == 0 {
                    (self.power)(PowerEvent::Reset);
                }
            }
            Some(command::WRITE_AUX) | None => self.nobody_answers(),
            Some(_) => {}
        }
    }
}

impl Device for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let [first, ..] = data else { return };
        match offset {
            DATA => *first = self.state.output.take().unwrap_or(0),
            COMMAND_STATUS => *first = self.status(),
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let [value, ..] = *data else { return };
        match offset {
            DATA => self.data(value),
            COMMAND_STATUS => self.command(value),
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.state = I8042State::default();
    }
}

impl Snapshot for I8042 {
    type State = I8042State;

    fn save(&self) -> I8042State {
        self.state.clone()
    }

    fn restore(&mut self, state: I8042State) -> Result<(), BadState> {
        let I8042State { out_port, command, .. } = &state;
        if out_port & OUT_NOT_RESET == 0 {
            return Err(BadState::new("i8042", "the reset line is held"));
        }
        let waits = |c: u8| {
            command::WRITE_RAM.contains(&c) || c == command::WRITE_OUTPUT_PORT || c == command::WRITE_AUX
        };
        if let Some(bad) = command.filter(|&c| !waits(c)) {
            return Err(BadState::new("i8042", format!("command {bad:#x} takes no data")));
        }
        self.state = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::testing;
    use std::sync::mpsc::Receiver;

    fn controller() -> (I8042, Receiver<PowerEvent>) {
        let (power, events) = testing::sink();
        (I8042::new(power), events)
    }

    fn read(c: &mut I8042, offset: u64) -> u8 {
        let mut byte = [0xff];
        c.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn a_kernel_waits_until_the_controller_is_idle_and_pulses_reset() {
        let (mut c, events) = controller();
        assert_eq!(read(&mut c, COMMAND_STATUS) & 2, 0, "the input buffer is never full");
        c.write(COMMAND_STATUS, &[0xfe]);
        assert_eq!(events.try_recv(), Ok(PowerEvent::Reset));
        c.write(COMMAND_STATUS, &[0xff]);
        assert!(events.try_recv().is_err(), "0xff pulses nothing");
    }

    #[test]
    fn the_self_test_passes_and_a_keyboard_is_missed_at_once() {
        let (mut c, _events) = controller();
        c.write(COMMAND_STATUS, &[0xaa]);
        assert_eq!(read(&mut c, COMMAND_STATUS) & 1, 1);
        assert_eq!(read(&mut c, DATA), 0x55);
        assert_eq!(read(&mut c, COMMAND_STATUS) & 1, 0);
        c.write(DATA, &[0xf2]);
        assert_eq!(read(&mut c, COMMAND_STATUS) & 0x41, 0x41, "time-out");
        assert_eq!(read(&mut c, DATA), 0xfe);
    }

    #[test]
    fn the_command_byte_and_the_a20_gate_keep_what_was_written() {
        let (mut c, events) = controller();
        c.write(COMMAND_STATUS, &[0x60]);
        c.write(DATA, &[0x47]);
        c.write(COMMAND_STATUS, &[0x20]);
        assert_eq!(read(&mut c, DATA), 0x47);
        c.write(COMMAND_STATUS, &[0xd1]);
        c.write(DATA, &[0xdd]);
        c.write(COMMAND_STATUS, &[0xd0]);
        assert_eq!(read(&mut c, DATA), 0xdd);
        assert!(events.try_recv().is_err());
    }

    #[test]
    fn restore_takes_a_saved_state_and_refuses_an_impossible_one() {
        let (mut c, _events) = controller();
        c.write(COMMAND_STATUS, &[0xd4]);
        let saved = c.save();
        c.reset();
        c.restore(saved.clone()).unwrap();
        assert_eq!(c.save(), saved);
        assert!(c.restore(I8042State { command: Some(0xaa), ..I8042State::default() }).is_err());
        assert!(c.restore(I8042State { out_port: 0, ..I8042State::default() }).is_err());
    }
}
