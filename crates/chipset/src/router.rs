//! Where the lines of the board go: a global system interrupt reaches the PIC (0 to 15) and the
//! I/O APIC, the timer's line being pin 2 of the latter, as on every PC and as the MADT says.

use std::sync::{Arc, Mutex};

use device::IrqSink;

use crate::sync::lock;
use crate::{DualPic, IoApic};

const TIMER: u32 = 0;
const TIMER_PIN: u32 = 2;

/// The board's interrupt lines: 0 to 15 are the ISA lines, 16 to 23 pins of the I/O APIC only.
pub struct IrqRouter {
    pic: Arc<Mutex<DualPic>>,
    ioapic: Arc<Mutex<IoApic>>,
}

impl IrqRouter {
    /// Lines to both controllers.
    pub fn new(pic: Arc<Mutex<DualPic>>, ioapic: Arc<Mutex<IoApic>>) -> IrqRouter {
        IrqRouter { pic, ioapic }
    }
}

impl IrqSink for IrqRouter {
    fn set_level(&self, pin: u32, high: bool) {
        if pin < 16 {
            lock(&self.pic).set_line(pin as u8, high);
        }
        match pin {
            TIMER => lock(&self.ioapic).set_pin(TIMER_PIN, high),
            TIMER_PIN => {} // the PIC's cascade, not a line
            _ => lock(&self.ioapic).set_pin(pin, high),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use device::{Device, IrqLine, Msi, MsiSink};

    #[derive(Default)]
    struct Cpus(Mutex<Vec<u32>>);

    impl MsiSink for Cpus {
        fn send(&self, msi: Msi) {
            lock(&self.0).push(msi.data);
        }
    }

    #[test]
    fn a_line_reaches_whichever_controller_listens_and_the_timer_is_pin_2() {
        let cpus = Arc::new(Cpus::default());
        let pic = Arc::new(Mutex::new(DualPic::new(|_| {})));
        let ioapic = Arc::new(Mutex::new(IoApic::new(1, cpus.clone())));
        for (pin, vector) in [(2u32, 0x30u32), (4, 0x34), (16, 0x40)] {
            let mut ioapic = lock(&ioapic);
            ioapic.write(0, &[0x10 + 2 * pin as u8]);
            ioapic.write(0x10, &vector.to_le_bytes());
        }
        for (port, value) in [(0, 0x11), (1, 0x20), (1, 4), (1, 1), (1, 0)] {
            lock(&pic).write(port, &[value]);
        }
        let router: Arc<dyn IrqSink> = Arc::new(IrqRouter::new(pic.clone(), ioapic));
        for line in [0, 2, 4, 16] {
            IrqLine::new(router.clone(), line).pulse();
        }
        assert_eq!(*lock(&cpus.0), [0x30, 0x34, 0x40]);
        assert_eq!(lock(&pic).acknowledge(), Some(0x20));
        lock(&pic).write(0, &[0x20]);
        assert_eq!(lock(&pic).acknowledge(), Some(0x24));
        lock(&pic).write(0, &[0x20]);
        assert_eq!(lock(&pic).acknowledge(), None);
    }
}
