//! How a device tells its driver (4.1.5.3, 4.1.5.4).

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};

use pci::{Intx, Msix};

use crate::lock;

/// No vector: the driver does not want to be told (4.1.4.3).
pub(crate) const NO_VECTOR: u16 = 0xffff;
/// ISR status: a queue was used.
const ISR_QUEUE: u8 = 1 << 0;
/// ISR status: the configuration or the status changed.
const ISR_CONFIG: u8 = 1 << 1;

/// A device's interrupts, shared between the transport and the worker.
pub struct Interrupt {
    msix: Msix,
    intx: Option<Intx>,
    /// ISR status; the pin is high while it is not 0.
    isr: Mutex<u8>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    broken: AtomicBool,
}

impl Interrupt {
    pub(crate) fn new(msix: Msix, intx: Option<Intx>, queues: usize) -> Interrupt {
        let queue_vectors = (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect();
        let config_vector = AtomicU16::new(NO_VECTOR);
        let (isr, broken) = (Mutex::default(), AtomicBool::default());
        Interrupt { msix, intx, isr, config_vector, queue_vectors, broken }
    }

    fn vector(&self, queue: Option<usize>) -> Option<&AtomicU16> {
        queue.map_or(Some(&self.config_vector), |index| self.queue_vectors.get(index))
    }

    /// The vector of a queue, or of configuration changes.
    pub(crate) fn get_vector(&self, queue: Option<usize>) -> u16 {
        self.vector(queue).map_or(NO_VECTOR, |vector| vector.load(Ordering::Relaxed))
    }

    /// Sets a vector; one that does not exist becomes "none" (4.1.5.1.2.1).
    pub(crate) fn set_vector(&self, queue: Option<usize>, value: u16) {
        let value = if self.is_vector(value) { value } else { NO_VECTOR };
        if let Some(vector) = self.vector(queue) {
            vector.store(value, Ordering::Relaxed);
        }
    }

    pub(crate) fn is_vector(&self, value: u16) -> bool {
        value == NO_VECTOR || value < self.msix.vectors()
    }

    fn raise_isr(&self, bits: u8, pin: bool) {
        let mut isr = lock(&self.isr);
        *isr |= bits;
        if let Some(intx) = self.intx.as_ref().filter(|_| pin) {
            intx.set(true);
        }
    }

    /// A queue has used buffers that the driver wants to hear of.
    pub fn queue_used(&self, index: usize) {
        if self.msix.enabled() {
            self.msix.trigger(self.get_vector(Some(index)));
        } else {
            self.raise_isr(ISR_QUEUE, true);
        }
    }

    /// The device's configuration or status has changed.
    pub fn config_changed(&self) {
        let msix = self.msix.enabled();
        self.raise_isr(ISR_CONFIG, !msix);
        if msix {
            self.msix.trigger(self.get_vector(None));
        }
    }

    /// The device cannot go on until it is reset (2.1.2).
    pub fn break_device(&self) {
        self.broken.store(true, Ordering::Release);
        self.config_changed();
    }

    /// Whether the device waits for a reset.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    pub(crate) fn set_broken(&self, broken: bool) {
        self.broken.store(broken, Ordering::Release);
    }

    /// The driver reads ISR status, which acknowledges it.
    pub(crate) fn take_isr(&self) -> u8 {
        let mut isr = lock(&self.isr);
        if let Some(intx) = &self.intx {
            intx.set(false);
        }
        std::mem::take(&mut *isr)
    }

    pub(crate) fn isr(&self) -> u8 {
        *lock(&self.isr)
    }

    pub(crate) fn set_isr(&self, value: u8) {
        let mut isr = lock(&self.isr);
        *isr = value & (ISR_QUEUE | ISR_CONFIG);
        if let Some(intx) = &self.intx {
            intx.set(*isr != 0 && !self.msix.enabled());
        }
    }

    pub(crate) fn reset(&self) {
        self.take_isr();
        self.set_broken(false);
        for vector in self.queue_vectors.iter().chain([&self.config_vector]) {
            vector.store(NO_VECTOR, Ordering::Relaxed);
        }
    }
}
