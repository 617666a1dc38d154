//! A machine specification becomes a wired machine

mod spec;
pub use spec::{BootSpec, DiskSpec, HostIo, PowerEvent, VmSpec};

#[derive(Debug, thiserror::Error)]
#[error("not built yet")]
pub struct Error;

pub struct Machine {}

#[derive(Clone)]
pub struct SerialInput {}
impl SerialInput {
    pub fn send(&self, _bytes: &[u8]) {}
}

use std::sync::Arc;
use std::sync::mpsc::Receiver;

impl Machine {
    pub fn build(_: &VmSpec, _: &dyn engine::Engine, _: HostIo) -> Result<Machine, Error> {
        Err(Error)
    }
    pub fn take_vcpus(&mut self) -> Vec<Box<dyn engine::Vcpu>> {
        vec![]
    }
    pub fn take_events(&mut self) -> Receiver<PowerEvent> {
        std::sync::mpsc::channel().1
    }
    pub fn serial(&self) -> SerialInput {
        SerialInput {}
    }
    pub fn io(&self) -> Arc<dyn engine::CpuIo> {
        unimplemented!()
    }
    pub fn press_power_button(&self) {}
    pub fn reset(&mut self, _: &mut [Box<dyn engine::Vcpu>]) -> Result<(), Error> {
        Ok(())
    }
    pub fn flush(&self) -> Result<(), Error> {
        Ok(())
    }
    pub fn describe(&self) -> Description {
        Description {}
    }
}
#[derive(serde::Serialize)]
pub struct Description {}
impl std::fmt::Display for Description {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("machine\n")
    }
}
