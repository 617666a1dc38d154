//! Port 0x61 (IBM PC/AT Technical Reference, "system control port B"): gate and output of the PIT's
//! channel 2, and the memory refresh bit by whose toggling old software measures 15 µs.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use device::Device;

use super::Pit;
use crate::sync::lock;

const GATE: u8 = 1 << 0;
const SPEAKER: u8 = 1 << 1;
const REFRESH: u8 = 1 << 4;
const OUT: u8 = 1 << 5;
/// A refresh every 18 ticks of the PIT's clock, 15.085 µs.
const REFRESH_TICKS: u64 = 18;

/// The port. Its state is part of the PIT's.
pub struct Port61 {
    pit: Arc<Mutex<Pit>>,
}

impl Port61 {
    /// The port beside this PIT.
    pub fn new(pit: Arc<Mutex<Pit>>) -> Port61 {
        Port61 { pit }
    }
}

impl Device for Port61 {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        let [first, ..] = data else { return };
        let mut pit = lock(&self.pit);
        let now = Instant::now();
        pit.expire_channels(now);
        let clock = pit.clock(now);
        let channel = &pit.state.channels[2];
        let bits = [
            (channel.gate(), GATE),
            (pit.state.speaker, SPEAKER),
            (clock / REFRESH_TICKS % 2 == 1, REFRESH),
            (channel.out(clock), OUT),
        ];
        *first = bits.iter().filter(|(set, _)| *set).fold(0, |value, (_, bit)| value | bit);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let [value, ..] = *data else { return };
        let mut pit = lock(&self.pit);
        let now = Instant::now();
        pit.expire_channels(now);
        let clock = pit.clock(now);
        pit.state.speaker = value & SPEAKER != 0;
        pit.state.channels[2].set_gate(value & GATE != 0, clock);
    }

    fn reset(&mut self) {
        // The PIT's reset closes the gate.
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::bench;
    use super::*;
    use std::time::Duration;

    #[test]
    fn old_software_waits_by_counting_refreshes() {
        let b = bench();
        let mut port = Port61::new(b.pit.clone());
        let start = Instant::now();
        let (mut last, mut toggles) = (0, 0);
        while toggles < 200 {
            let mut byte = [0];
            port.read(0, &mut byte);
            toggles += u32::from(byte[0] & REFRESH != last);
            last = byte[0] & REFRESH;
            assert!(start.elapsed() < Duration::from_secs(5));
        }
        assert!(start.elapsed() >= Duration::from_millis(3), "200 × 15 µs");
    }

    #[test]
    fn gate_and_speaker_read_back() {
        let b = bench();
        let mut port = Port61::new(b.pit.clone());
        let mut byte = [0];
        port.write(0, &[GATE | SPEAKER]);
        port.read(0, &mut byte);
        assert_eq!(byte[0] & 0xcf, GATE | SPEAKER);
        port.write(0, &[0]);
        port.read(0, &mut byte);
        assert_eq!(byte[0] & 0xcf, 0);
    }
}
