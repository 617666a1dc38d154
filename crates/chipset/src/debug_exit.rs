//! The debug-exit port of kernel test suites: a write of *v* ends the machine, and the process's
//! exit code is `(v << 1) | 1`.

use device::Device;

use crate::{PowerEvent, PowerSink};

/// The port. It has no state.
pub struct DebugExit {
    power: PowerSink,
}

impl DebugExit {
    /// A port that reports to `power`.
    pub fn new(power: PowerSink) -> DebugExit {
        DebugExit { power }
    }
}

impl Device for DebugExit {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == 0 {
            let value = data.iter().take(4).rev().fold(0, |value, &byte| value << 8 | u32::from(byte));
            (self.power)(PowerEvent::DebugExit(value));
        }
    }

    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::testing;

    #[test]
    fn a_test_kernel_reports_its_result() {
        let (power, events) = testing::sink();
        let mut port = DebugExit::new(power);
        port.write(0, &[0x10, 0, 0, 0]);
        port.write(0, &[1]);
        port.write(1, &[1]);
        assert_eq!(
            events.try_iter().collect::<Vec<_>>(),
            [PowerEvent::DebugExit(16), PowerEvent::DebugExit(1)]
        );
    }
}
