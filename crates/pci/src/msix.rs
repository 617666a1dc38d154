//! MSI-X (PCI Local Bus 3.0, 6.8.2): the table of messages and the pending bits.

use std::sync::{Arc, Mutex};

use device::{BadState, Msi, MsiSink};
use serde::{Deserialize, Serialize};

use crate::lock;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;
const ENTRY_SIZE: usize = 16;
/// Vector control: masked (6.8.2.9).
const MASKED: u32 = 1;
/// 6.8.2.3: the table size field has 11 bits.
const MAX_VECTORS: u16 = 2048;

/// One message of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixEntry {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// Masked by the guest.
    pub masked: bool,
}

impl MsixEntry {
    const POWER_ON: MsixEntry = MsixEntry { address: 0, data: 0, masked: true };

    fn to_bytes(self) -> [u8; ENTRY_SIZE] {
        let mut bytes = [0; ENTRY_SIZE];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.data.to_le_bytes());
        bytes[12..].copy_from_slice(&u32::from(self.masked).to_le_bytes());
        bytes
    }

    fn from_bytes(b: [u8; ENTRY_SIZE]) -> MsixEntry {
        let address = u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
        let data = u32::from_le_bytes([b[8], b[9], b[10], b[11]]);
        MsixEntry { address: address & !3, data, masked: u32::from(b[12]) & MASKED != 0 }
    }
}

/// Table and pending bits. The message control register is in the configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    /// The table.
    pub entries: Vec<MsixEntry>,
    /// Vectors whose message waits until it is unmasked.
    pub pending: Vec<u16>,
}

struct Inner {
    entries: Vec<MsixEntry>,
    pending: Vec<bool>,
    enabled: bool,
    mask_all: bool,
    bus_master: bool,
}

impl Inner {
    fn power_on(vectors: u16) -> Inner {
        Inner {
            entries: vec![MsixEntry::POWER_ON; vectors.into()],
            pending: vec![false; vectors.into()],
            enabled: false,
            mask_all: false,
            bus_master: false,
        }
    }

    /// Sends what is pending and may be sent.
    fn deliver(&mut self, sink: &dyn MsiSink) {
        if !self.enabled || self.mask_all || !self.bus_master {
            return;
        }
        for (entry, pending) in self.entries.iter().zip(&mut self.pending) {
            if *pending && !entry.masked {
                *pending = false;
                sink.send(Msi { address: entry.address, data: entry.data });
            }
        }
    }
}

/// A function's MSI-X vectors. Clones are the same vectors.
///
/// The BAR that holds them has the table at 0 and the pending bits at [`Msix::pba_offset`].
#[derive(Clone)]
pub struct Msix {
    vectors: u16,
    sink: Arc<dyn MsiSink>,
    inner: Arc<Mutex<Inner>>,
}

impl Msix {
    /// `vectors` messages (1 to 2048) that go to `sink`.
    ///
    /// # Panics
    /// If the function's author asks for none or too many.
    pub fn new(vectors: u16, sink: Arc<dyn MsiSink>) -> Msix {
        assert!((1..=MAX_VECTORS).contains(&vectors), "{vectors} MSI-X vectors");
        Msix { vectors, sink, inner: Arc::new(Mutex::new(Inner::power_on(vectors))) }
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        self.vectors
    }

    /// Offset of the pending bits in the BAR: a page of their own is not needed, half of one is.
    pub fn pba_offset(&self) -> u64 {
        (u64::from(self.vectors) * ENTRY_SIZE as u64).next_multiple_of(2048)
    }

    /// The size of a BAR that holds both.
    pub fn bar_size(&self) -> u64 {
        (self.pba_offset() + u64::from(self.vectors).div_ceil(64) * 8).next_power_of_two().max(4096)
    }

    /// Whether the guest uses MSI-X rather than a pin.
    pub fn enabled(&self) -> bool {
        lock(&self.inner).enabled
    }

    /// Sends the message of `vector`, or notes it as pending while it is masked. Without effect
    /// while MSI-X is off, and for vectors that do not exist.
    pub fn trigger(&self, vector: u16) {
        let mut inner = lock(&self.inner);
        if !inner.enabled {
            return;
        }
        if let Some(pending) = inner.pending.get_mut(usize::from(vector)) {
            *pending = true;
            // Under the lock: once a guest's write to a mask bit is done, no message comes.
            inner.deliver(&*self.sink);
        }
    }

    /// The message control register and the bus master bit changed.
    pub(crate) fn set_control(&self, control: u16, bus_master: bool) {
        let mut inner = lock(&self.inner);
        inner.enabled = control & CONTROL_ENABLE != 0;
        inner.mask_all = control & CONTROL_MASK_ALL != 0;
        inner.bus_master = bus_master;
        inner.deliver(&*self.sink);
    }

    pub(crate) fn reset(&self) {
        *lock(&self.inner) = Inner::power_on(self.vectors);
    }

    /// A guest's read in the BAR.
    pub fn bar_read(&self, offset: u64, data: &mut [u8]) {
        let inner = lock(&self.inner);
        for (at, byte) in (offset..).zip(data) {
            *byte = self.byte_at(&inner, at);
        }
    }

    fn byte_at(&self, inner: &Inner, at: u64) -> u8 {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        if let Some(entry) = inner.entries.get(at / ENTRY_SIZE) {
            return entry.to_bytes()[at % ENTRY_SIZE];
        }
        let Some(bit) = at.checked_sub(self.pba_offset() as usize).and_then(|byte| byte.checked_mul(8))
        else {
            return 0;
        };
        let bits = inner.pending.iter().skip(bit).take(8).enumerate();
        bits.fold(0, |byte, (i, &pending)| byte | u8::from(pending) << i)
    }

    /// A guest's write in the BAR; the pending bits are read-only.
    pub fn bar_write(&self, offset: u64, data: &[u8]) {
        let mut inner = lock(&self.inner);
        for (at, byte) in (offset..).zip(data) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            if let Some(entry) = inner.entries.get_mut(at / ENTRY_SIZE) {
                let mut bytes = entry.to_bytes();
                bytes[at % ENTRY_SIZE] = *byte;
                *entry = MsixEntry::from_bytes(bytes);
            }
        }
        inner.deliver(&*self.sink);
    }

    /// Copies the table and the pending bits out.
    pub fn save(&self) -> MsixState {
        let inner = lock(&self.inner);
        let pending = (0..self.vectors).filter(|&v| inner.pending[usize::from(v)]).collect();
        MsixState { entries: inner.entries.clone(), pending }
    }

    /// Takes a state on; the configuration space with the control register is restored after it.
    pub fn restore(&self, state: MsixState) -> Result<(), BadState> {
        let MsixState { entries, pending } = state;
        let bad = |what| BadState::new("MSI-X", what);
        if entries.len() != usize::from(self.vectors) {
            return Err(bad(format!("{} vectors instead of {}", entries.len(), self.vectors)));
        }
        if let Some(vector) = pending.iter().find(|&&v| v >= self.vectors) {
            return Err(bad(format!("vector {vector} of {} is pending", self.vectors)));
        }
        let mut inner = Inner::power_on(self.vectors);
        inner.entries = entries.into_iter().map(|e| MsixEntry { address: e.address & !3, ..e }).collect();
        for vector in pending {
            inner.pending[usize::from(vector)] = true;
        }
        *lock(&self.inner) = inner;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Messages(Mutex<Vec<Msi>>);

    impl MsiSink for Messages {
        fn send(&self, msi: Msi) {
            lock(&self.0).push(msi);
        }
    }

    impl Messages {
        fn take(&self) -> Vec<u32> {
            lock(&self.0).drain(..).map(|msi| msi.data).collect()
        }
    }

    fn unmasked(messages: &Arc<Messages>) -> Msix {
        let msix = Msix::new(3, messages.clone());
        for vector in 0..3u64 {
            msix.bar_write(vector * 16, &0xfee0_1003u64.to_le_bytes());
            msix.bar_write(vector * 16 + 8, &(0x40 + vector as u32).to_le_bytes());
            msix.bar_write(vector * 16 + 12, &[0; 4]);
        }
        msix
    }

    #[test]
    fn messages_wait_while_masked_and_show_in_the_pending_bits() {
        let messages = Arc::new(Messages::default());
        let msix = unmasked(&messages);
        msix.trigger(0);
        assert!(messages.take().is_empty(), "MSI-X is off");
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL, true);
        msix.bar_write(16 + 12, &[1]);
        msix.trigger(2);
        msix.trigger(1);
        msix.trigger(1);
        msix.trigger(9);
        let mut pba = [0; 8];
        msix.bar_read(msix.pba_offset(), &mut pba);
        assert_eq!(u64::from_le_bytes(pba), 0b110);
        msix.set_control(CONTROL_ENABLE, true);
        assert_eq!(messages.take(), [0x42]);
        msix.bar_write(16 + 8, &0x77u32.to_le_bytes());
        msix.bar_write(16 + 12, &[0]);
        assert_eq!(messages.take(), [0x77], "the message as it is when unmasked, once");
    }

    #[test]
    fn nothing_is_sent_while_the_function_is_no_bus_master() {
        let messages = Arc::new(Messages::default());
        let msix = unmasked(&messages);
        msix.set_control(CONTROL_ENABLE, false);
        msix.trigger(0);
        assert!(messages.take().is_empty());
        msix.set_control(CONTROL_ENABLE, true);
        assert_eq!(messages.take(), [0x40]);
        assert_eq!(lock(&msix.inner).entries[0].address, 0xfee0_1000, "aligned to 4");
    }

    #[test]
    fn state_goes_round_and_a_bad_one_is_refused() {
        let messages = Arc::new(Messages::default());
        let msix = unmasked(&messages);
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL, true);
        msix.trigger(2);
        let state = msix.save();
        let other = Msix::new(3, messages.clone());
        other.restore(state.clone()).unwrap();
        assert_eq!(other.save(), state);
        other.set_control(CONTROL_ENABLE, true);
        assert_eq!(messages.take(), [0x42]);
        assert!(Msix::new(2, messages.clone()).restore(state.clone()).is_err());
        assert!(other.restore(MsixState { pending: vec![3], ..state }).is_err());
    }
}
