//! What the kernels of CPU test suites (kvm-unit-tests) drive a machine with: a port that keeps what is
//! written, ports that pull the board's interrupt lines, and memory behind MMIO. Only on machines that were
//! asked for it. Modelled after the tests' own use of it (their `x86/realmode.c`, `x86/emulator.c`,
//! `lib/x86/apic.c`).

use std::ops::Range;
use std::sync::{Arc, Mutex};

use device::{BadState, BusDevice, Device, IrqLine, Snapshot};
use serde::{Deserialize, Serialize};

use crate::part::part;

/// Lines, one port each.
const LINES: usize = 24;
/// Bytes of memory behind MMIO.
const MEMORY: usize = 64 << 10;

/// Where the registers of [`TestDevice`] begin.
mod reg {
    pub const LATCH: u64 = 0;
    pub const LINES: u64 = 0x100;
    pub const MEMORY: u64 = 0x1_0000;
}

/// Saved state of [`TestDevice`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestDeviceState {
    /// What was last written to each byte of the latch.
    pub latch: [u8; 4],
    /// Level of each line, by bit.
    pub lines: u32,
    /// The memory, 64 KiB.
    pub memory: Vec<u8>,
}

impl Default for TestDeviceState {
    fn default() -> TestDeviceState {
        TestDeviceState { latch: [0; 4], lines: 0, memory: vec![0; MEMORY] }
    }
}

/// The device.
pub struct TestDevice {
    state: TestDeviceState,
    irqs: Vec<IrqLine>,
}

impl TestDevice {
    /// A device that pulls the lines that `line` gives for the numbers 0 to 23.
    pub fn new(line: impl Fn(u32) -> IrqLine) -> TestDevice {
        TestDevice { state: TestDeviceState::default(), irqs: (0..LINES as u32).map(line).collect() }
    }

    /// What is at 4 ports from `latch` on, and at 24 from `lines` on.
    pub fn ports(this: &Arc<Mutex<TestDevice>>, latch: u64, lines: u64) -> crate::Parts<2> {
        [(latch..latch + 4, part(this, reg::LATCH)), (lines..lines + LINES as u64, part(this, reg::LINES))]
    }

    /// What is at 64 KiB of memory space.
    pub fn memory(this: &Arc<Mutex<TestDevice>>, at: u64) -> (Range<u64>, Arc<dyn BusDevice>) {
        (at..at + MEMORY as u64, part(this, reg::MEMORY))
    }

    fn set_line(&mut self, line: usize, high: bool) {
        let Some(irq) = self.irqs.get(line) else { return };
        self.state.lines = self.state.lines & !(1 << line) | u32::from(high) << line;
        irq.set(high);
    }

    /// The bytes that an access from `offset` on is about, of those that there are.
    fn bytes(&mut self, offset: u64) -> &mut [u8] {
        let (bytes, at) = match offset {
            reg::MEMORY.. => (&mut self.state.memory[..], offset - reg::MEMORY),
            _ => (&mut self.state.latch[..], offset - reg::LATCH),
        };
        let at = bytes.len().min(at as usize);
        &mut bytes[at..]
    }
}

impl Device for TestDevice {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !(reg::LINES..reg::MEMORY).contains(&offset) {
            data.iter_mut().zip(self.bytes(offset)).for_each(|(to, from)| *to = *from);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if (reg::LINES..reg::MEMORY).contains(&offset) {
            // One port is one line, however wide the access to it is.
            let high = data.iter().any(|&byte| byte != 0);
            self.set_line((offset - reg::LINES) as usize, high);
        } else {
            self.bytes(offset).iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        }
    }

    fn reset(&mut self) {
        for line in 0..LINES {
            if self.state.lines >> line & 1 != 0 {
                self.set_line(line, false);
            }
        }
        self.state = TestDeviceState::default();
    }
}

impl Snapshot for TestDevice {
    type State = TestDeviceState;

    fn save(&self) -> TestDeviceState {
        self.state.clone()
    }

    fn restore(&mut self, state: TestDeviceState) -> Result<(), BadState> {
        let TestDeviceState { latch: _, lines, memory } = &state;
        if lines >> LINES != 0 || memory.len() != MEMORY {
            return Err(BadState::new("test device", format!("lines {lines:#x}, {} bytes", memory.len())));
        }
        for line in 0..LINES {
            if lines >> line & 1 != 0 {
                self.set_line(line, true);
            }
        }
        self.state = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Changes;

    struct Bench {
        device: Arc<Mutex<TestDevice>>,
        board: Arc<Changes>,
    }

    fn bench() -> Bench {
        let board = Arc::new(Changes::default());
        let device = TestDevice::new(|line| IrqLine::new(board.clone(), line));
        Bench { device: Arc::new(Mutex::new(device)), board: board.clone() }
    }

    #[test]
    fn a_test_reads_back_what_it_wrote_to_the_port_and_the_memory() {
        let b = bench();
        let [(_, latch), _] = TestDevice::ports(&b.device, 0xe0, 0x2000);
        latch.bus_write(0, &[0x78, 0x56, 0x34, 0x12]);
        latch.bus_write(0, &[0x99, 0x98]);
        let mut word = [0; 4];
        latch.bus_read(0, &mut word);
        assert_eq!(word, [0x99, 0x98, 0x34, 0x12]);
        let (range, memory) = TestDevice::memory(&b.device, 0xff00_0000);
        assert_eq!(range, 0xff00_0000..0xff01_0000);
        memory.bus_write(0xfffc, &[1, 2, 3, 4, 5, 6, 7, 8]);
        let mut quad = [0xff; 8];
        memory.bus_read(0xfffe, &mut quad);
        assert_eq!(quad, [3, 4, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_test_pulls_the_line_of_the_port_and_reset_lets_go() {
        let b = bench();
        let [_, (range, lines)] = TestDevice::ports(&b.device, 0xe0, 0x2000);
        assert_eq!(range, 0x2000..0x2018);
        lines.bus_write(11, &[1, 0, 0, 0]);
        lines.bus_write(14, &[1]);
        lines.bus_write(14, &[0]);
        let saved = b.device.lock().unwrap().save();
        b.device.lock().unwrap().reset();
        assert_eq!(b.board.take(), [(11, true), (14, true), (14, false), (11, false)]);
        let other = bench();
        other.device.lock().unwrap().restore(saved.clone()).unwrap();
        assert_eq!(other.board.take(), [(11, true)]);
        assert!(other.device.lock().unwrap().restore(TestDeviceState { lines: 1 << 24, ..saved }).is_err());
    }
}
