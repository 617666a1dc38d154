//! Entropy device (5.4): the host's random numbers.

use std::io;

use device::BadState;
use mem::GuestRam;
use pci::Class;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

use crate::{Broken, DeviceState, Handler, Kind, Progress, VirtQueue, VirtioDevice};

const QUEUE_SIZES: [u16; 1] = [64];
/// No request gets more than this; the driver asks again.
const MAX_BYTES: usize = 1 << 16;
/// getrandom does not stop in the middle of so many bytes.
const CHUNK: usize = 256;

/// It has no state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {}

/// An entropy source.
#[derive(Default)]
pub struct Rng;

impl Rng {
    /// A new one.
    pub fn new() -> Rng {
        Rng
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> Kind {
        Kind { id: 4, class: Class { base: 0xff, sub: 0, interface: 0 }, name: "rng" }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn handler(&self, _features: u64) -> io::Result<Box<dyn Handler>> {
        Ok(Box::new(Filler))
    }

    fn reset(&mut self) {}

    fn save(&self) -> DeviceState {
        DeviceState::Rng(RngState {})
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), BadState> {
        match state {
            DeviceState::Rng(RngState {}) => Ok(()),
            _ => Err(BadState::new("virtio-rng", "it is another device's")),
        }
    }
}

struct Filler;

impl Handler for Filler {
    fn process(&mut self, _index: usize, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken> {
        while let Some(chain) = queue.pop(ram)? {
            let mut left = chain.writable;
            let mut written = 0;
            while written < MAX_BYTES && !left.is_empty() {
                let mut bytes = [0; CHUNK];
                let rest = left.split_off(CHUNK);
                let Ok(count) = getrandom(&mut bytes[..], GetRandomFlags::empty()) else { break };
                written += left.write(&bytes[..count]);
                left = rest;
            }
            queue.push(ram, chain.head, written)?;
        }
        Ok(Progress::Drained)
    }
}
