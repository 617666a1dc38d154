//! Keeps BARs on the buses where the guest has programmed them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use device::{Bus, BusDevice, Doorbell, DoorbellSink};
use vmm_sys_util::eventfd::EventFd;

use crate::{SharedFunction, Space, lock};

/// A BAR as it sits on a bus.
struct Window {
    function: SharedFunction,
    bar: usize,
    /// Its first address, if it is in memory and somebody wires doorbells.
    wiring: Option<(u64, Arc<dyn DoorbellSink>)>,
    /// What is wired, by offset; gone when the BAR moves.
    doorbells: Mutex<BTreeMap<u64, Option<Doorbell>>>,
}

impl BusDevice for Window {
    fn bus_read(&self, offset: u64, data: &mut [u8]) {
        lock(&self.function).bar_read(self.bar, offset, data);
    }

    fn bus_write(&self, offset: u64, data: &[u8]) {
        let mut function = lock(&self.function);
        function.bar_write(self.bar, offset, data);
        let doorbell = self.wiring.as_ref().and_then(|_| function.doorbell(self.bar, offset));
        drop(function);
        if let Some(event) = doorbell {
            self.wire(offset, event);
        }
    }
}

impl Window {
    /// A doorbell that was used once will be again. Not before: a guest moves BARs while it starts, and most
    /// queues of most devices are never used. One that cannot be had is not asked for again.
    fn wire(&self, offset: u64, event: EventFd) {
        if let Some((start, sink)) = &self.wiring {
            lock(&self.doorbells).entry(offset).or_insert_with(|| sink.wire(start + offset, event));
        }
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
    doorbells: Option<Arc<dyn DoorbellSink>>,
}

impl Decode {
    pub(crate) fn new(mmio: Arc<Bus>, ports: Arc<Bus>) -> Decode {
        Decode { mmio, ports, wanted: BTreeMap::new(), mapped: BTreeMap::new(), doorbells: None }
    }

    /// Who wires the doorbells of what is mapped from now on.
    pub(crate) fn set_doorbells(&mut self, sink: Arc<dyn DoorbellSink>) {
        self.doorbells = Some(sink);
    }

    fn window(&self, function: &SharedFunction, bar: usize, place: &Place) -> Arc<Window> {
        let memory = place.space == Space::Memory;
        let wiring = self.doorbells.clone().filter(|_| memory).map(|sink| (place.range.start, sink));
        Arc::new(Window { function: function.clone(), bar, wiring, doorbells: Mutex::default() })
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
        let (mut before, others): (BTreeMap<_, _>, _) =
            std::mem::take(&mut self.wanted).into_iter().partition(|(key, _)| key.0 == slot);
        self.wanted = others;
        for (bar, space, range) in decoded {
            let place = Place { space, range };
            // What stays where it is keeps its doorbells.
            let wanted = match before.remove(&(slot, bar)).filter(|old| old.place == place) {
                Some(old) => old,
                None => Wanted { window: self.window(function, bar, &place), place },
            };
            self.wanted.insert((slot, bar), wanted);
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
