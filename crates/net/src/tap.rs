//! A tap interface of the host as a link.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::{Errno, read, write};

use crate::{Link, Offloads};

/// A tap interface, held until it is dropped.
pub struct TapLink {
    tap: OwnedFd,
}

impl TapLink {
    /// Takes the interface `name`, and sees that it is in `bridge`, as [`tap::attach`] does.
    ///
    /// # Errors
    /// It cannot be had: why, and what to type.
    pub fn new(name: &str, bridge: Option<&str>) -> Result<TapLink, tap::Error> {
        Ok(TapLink { tap: tap::attach(name, bridge)? })
    }
}

impl Link for TapLink {
    fn send(&self, packet: &[u8]) -> bool {
        loop {
            match write(&self.tap, packet) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return false,
                // What the host does not take, as from a card that is down, is lost.
                _ => return true,
            }
        }
    }

    fn receive(&self, buffer: &mut [u8]) -> Option<usize> {
        loop {
            match read(&self.tap, &mut *buffer) {
                Ok(length) if length > 0 => return Some(length),
                Err(Errno::INTR) => {}
                _ => return None,
            }
        }
    }

    fn readiness(&self) -> io::Result<Option<OwnedFd>> {
        self.tap.try_clone().map(Some)
    }

    fn set_offloads(&self, offloads: Offloads) {
        let Offloads { checksum, tso4, tso6 } = offloads;
        if let Err(error) = tap::set_offloads(&self.tap, tap::Offloads { checksum, tso4, tso6 }) {
            log::error!("the tap interface keeps its offloads: {error}");
        }
    }
}
