//! System control port A (0x92, PS/2 and ISA successors): fast reset and the A20 gate.
//!
//! The address line A20 is always on, as on processors since 2013; the bit only remembers what was
//! written, so that software which waits for its change goes on.

use device::{BadState, Device, Snapshot};
use serde::{Deserialize, Serialize};

use crate::{PowerEvent, PowerSink};

const FAST_RESET: u8 = 1 << 0;
const A20: u8 = 1 << 1;

/// Saved state of [`Port92`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port92State {
    /// The register.
    pub value: u8,
}

impl Default for Port92State {
    fn default() -> Port92State {
        Port92State { value: A20 }
    }
}

/// The port.
pub struct Port92 {
    state: Port92State,
    power: PowerSink,
}

impl Port92 {
    /// A port that reports to `power`.
    pub fn new(power: PowerSink) -> Port92 {
        Port92 { state: Port92State::default(), power }
    }
}

impl Device for Port92 {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        if let [first, ..] = data {
            *first = self.state.value;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let [value, ..] = *data else { return };
        let rises = !self.state.value & value & FAST_RESET != 0;
        self.state.value = value;
        if rises {
            (self.power)(PowerEvent::Reset);
        }
    }

    fn reset(&mut self) {
        self.state = Port92State::default();
    }
}

impl Snapshot for Port92 {
    type State = Port92State;

    fn save(&self) -> Port92State {
        self.state.clone()
    }

    fn restore(&mut self, state: Port92State) -> Result<(), BadState> {
        self.state = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::testing;

    #[test]
    fn a_boot_loader_sees_a20_on_and_a_reset_bit_resets_once() {
        let (power, events) = testing::sink();
        let mut port = Port92::new(power);
        let mut byte = [0];
        port.read(0, &mut byte);
        assert_eq!(byte, [A20]);
        port.write(0, &[A20 | FAST_RESET]);
        port.write(0, &[A20 | FAST_RESET]);
        assert_eq!(events.try_iter().collect::<Vec<_>>(), [PowerEvent::Reset]);
    }
}
