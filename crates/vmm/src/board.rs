//! What the supervisor needs of a machine; tests put a smaller one in its place.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use engine::{CpuIo, Vcpu};
use machine::{Machine, PowerEvent};

/// Any error with its cause chain.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// The machine as its supervisor sees it.
pub trait Board: Send + 'static {
    /// Its vCPUs, once.
    fn take_vcpus(&mut self) -> Vec<Box<dyn Vcpu>>;
    /// What the guest asks of its power supply, once.
    fn take_events(&mut self) -> Receiver<PowerEvent>;
    /// Where the vCPUs' accesses go.
    fn io(&self) -> Arc<dyn CpuIo>;
    /// The ACPI power button.
    fn press_power_button(&mut self);
    /// Lets the devices finish what is under way and do nothing more.
    fn pause(&mut self);
    /// Lets them go on.
    fn resume(&mut self);
    /// Everything back to its state at power-on, the kernel loaded again.
    fn reset(&mut self, vcpus: &mut [Box<dyn Vcpu>]) -> Result<(), Cause>;
    /// Makes what the guest wrote durable.
    fn flush(&mut self) -> Result<(), Cause>;
}

impl Board for Machine {
    fn take_vcpus(&mut self) -> Vec<Box<dyn Vcpu>> {
        Machine::take_vcpus(self)
    }

    fn take_events(&mut self) -> Receiver<PowerEvent> {
        Machine::take_events(self)
    }

    fn io(&self) -> Arc<dyn CpuIo> {
        Machine::io(self)
    }

    fn press_power_button(&mut self) {
        Machine::press_power_button(self);
    }

    fn pause(&mut self) {
        Machine::pause(self);
    }

    fn resume(&mut self) {
        Machine::resume(self);
    }

    fn reset(&mut self, vcpus: &mut [Box<dyn Vcpu>]) -> Result<(), Cause> {
        Ok(Machine::reset(self, vcpus)?)
    }

    fn flush(&mut self) -> Result<(), Cause> {
        Ok(Machine::flush(self)?)
    }
}
