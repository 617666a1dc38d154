//! Keeps BARs on the buses where the guest has programmed them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use device::{Bus, BusDevice};

use crate::{SharedFunction, Space, lock};

/// A BAR as it sits on a bus.
struct Window {
    function: SharedFunction,
    bar: usize,
}

impl BusDevice for Window {
    fn bus_read(&self, offset: u64, data: &mut [u8]) {
        lock(&self.function).bar_read(self.bar, offset, data);
    }

    fn bus_write(&self, offset: u64, data: &[u8]) {
        lock(&self.function).bar_write(self.bar, offset, data);
    }
}

/// Slot and BAR number.
type Key = (u8, usize);

#[derive(Clone, PartialEq, Eq)]
struct Place {
    space: Space,
    range: Range<u64>,
}

struct Wanted {
    place: Place,
    window: Arc<Window>,
}

/// What the guest wants where, and what of it is there.
///
/// A BAR that the guest has put on top of something else is not mapped until either moves away: the
/// transient states of a guest that sizes BARs with decoding on, or a guest's mistake.
pub(crate) struct Decode {
    mmio: Arc<Bus>,
    ports: Arc<Bus>,
    wanted: BTreeMap<Key, Wanted>,
    mapped: BTreeMap<Key, Place>,
}

impl Decode {
    pub(crate) fn new(mmio: Arc<Bus>, ports: Arc<Bus>) -> Decode {
        Decode { mmio, ports, wanted: BTreeMap::new(), mapped: BTreeMap::new() }
    }

    fn bus(&self, space: Space) -> &Bus {
        match space {
            Space::Io => &self.ports,
            Space::Memory => &self.mmio,
        }
    }

    /// The function in `slot` now answers where its registers say.
    pub(crate) fn update(&mut self, slot: u8, function: &SharedFunction) {
        let decoded = lock(function).config().decoded();
        self.wanted.retain(|key, _| key.0 != slot);
        for (bar, space, range) in decoded {
            let window = Arc::new(Window { function: function.clone(), bar });
            self.wanted.insert((slot, bar), Wanted { place: Place { space, range }, window });
        }
        self.unmap();
        self.map();
    }

    /// Takes away what is no longer wanted where it is.
    fn unmap(&mut self) {
        let gone = |key: &Key, place: &Place| self.wanted.get(key).is_none_or(|w| w.place != *place);
        let gone: Vec<_> = self.mapped.iter().filter(|(k, p)| gone(k, p)).map(|(k, _)| *k).collect();
        for key in gone {
            if let Some(place) = self.mapped.remove(&key) {
                self.bus(place.space).remove(place.range.start);
            }
        }
    }

    fn map(&mut self) {
        for (key, Wanted { place, window }) in &self.wanted {
            if self.mapped.contains_key(key) {
                continue;
            }
            let bus = self.bus(place.space);
            if bus.insert(place.range.clone(), window.clone()).is_ok() {
                self.mapped.insert(*key, place.clone());
            }
        }
    }

    #[cfg(test)]
    pub(crate) fn is_mapped(&self, slot: u8, bar: usize) -> bool {
        self.mapped.contains_key(&(slot, bar))
    }
}
