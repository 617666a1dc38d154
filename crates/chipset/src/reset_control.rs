//! Reset control register, port 0xcf9 (Intel ICH and PCH datasheets, "RST_CNT"); also the FADT's
//! RESET_REG.

use device::{BadState, Device, Snapshot};
use serde::{Deserialize, Serialize};

use crate::{PowerEvent, PowerSink};

const SYS_RST: u8 = 1 << 1;
const RST_CPU: u8 = 1 << 2;
const FULL_RST: u8 = 1 << 3;

/// Saved state of [`ResetControl`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetControlState {
    /// The register.
    pub value: u8,
}

/// The register. Every kind of reset it can ask for (soft, hard, full) resets the whole machine.
pub struct ResetControl {
    state: ResetControlState,
    power: PowerSink,
}

impl ResetControl {
    /// A register that reports to `power`.
    pub fn new(power: PowerSink) -> ResetControl {
        ResetControl { state: ResetControlState::default(), power }
    }
}

impl Device for ResetControl {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        if let [first, ..] = data {
            *first = self.state.value;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let [value, ..] = *data else { return };
        let rises = !self.state.value & value & RST_CPU != 0;
        // RST_CPU clears itself with the reset it starts.
        self.state.value = value & (SYS_RST | FULL_RST);
        if rises {
            (self.power)(PowerEvent::Reset);
        }
    }

    fn reset(&mut self) {
        self.state = ResetControlState::default();
    }
}

impl Snapshot for ResetControl {
    type State = ResetControlState;

    fn save(&self) -> ResetControlState {
        self.state.clone()
    }

    fn restore(&mut self, state: ResetControlState) -> Result<(), BadState> {
        if state.value & !(SYS_RST | FULL_RST) != 0 {
            return Err(BadState::new("reset control", format!("value {:#x}", state.value)));
        }
        self.state = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::testing;

    #[test]
    fn a_kernel_reboots_by_choosing_the_kind_and_then_pulling_the_trigger() {
        let (power, events) = testing::sink();
        let mut reg = ResetControl::new(power);
        reg.write(0, &[SYS_RST]);
        assert!(events.try_recv().is_err());
        let mut byte = [0];
        reg.read(0, &mut byte);
        assert_eq!(byte, [SYS_RST]);
        reg.write(0, &[SYS_RST | RST_CPU]);
        assert_eq!(events.try_recv(), Ok(PowerEvent::Reset));
    }

    #[test]
    fn a_saved_register_with_impossible_bits_is_refused() {
        let mut reg = ResetControl::new(testing::sink().0);
        assert!(reg.restore(ResetControlState { value: 0x80 }).is_err());
        assert_eq!(reg.save().value, 0);
    }
}
