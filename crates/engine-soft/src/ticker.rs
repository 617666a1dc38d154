//! Tells vCPUs in translated code that their APIC timer is due.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::clock::Clock;
use crate::vm::{Shared, attention};

/// The longest a timer is late in translated code.
const PERIOD: Duration = Duration::from_micros(500);

/// Starts the ticker of a VM. It ends with the VM.
pub fn start(shared: &Arc<Shared>) {
    let shared = Arc::downgrade(shared);
    std::thread::Builder::new().name("ospite-ticker".into()).spawn(move || tick(&shared)).ok();
}

fn tick(shared: &Weak<Shared>) {
    loop {
        std::thread::sleep(PERIOD);
        let Some(shared) = shared.upgrade() else { return };
        let now = Clock::ticks();
        for vcpu in shared.vcpus.iter().filter(|vcpu| vcpu.deadline.load(Ordering::Relaxed) <= now) {
            vcpu.deadline.store(u64::MAX, Ordering::Relaxed);
            vcpu.notify(attention::TIMER);
        }
    }
}
