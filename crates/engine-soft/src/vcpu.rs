//! One vCPU of the software engine, as the `engine` traits see it.

#![allow(unsafe_code)] // enters the translator

use std::sync::Arc;

use engine::{CpuIo, CpuState, Error, Exit, StopHandle};

use crate::Tier;
use crate::vm::{Shared, attention};
use crate::x86::block::Blocks;
use crate::x86::cpu::Cpu;
use crate::x86::run;
use crate::x86::translate::frame::CpuBox;
use crate::x86::translate::translator::Translator;

/// A vCPU and its decoded and translated code.
pub struct SoftVcpu {
    cpu: CpuBox,
    blocks: Blocks,
    translator: Option<Box<Translator>>,
}

impl SoftVcpu {
    pub(crate) fn new(id: u32, shared: Arc<Shared>, tier: Tier) -> Result<SoftVcpu, Error> {
        let translator = match tier {
            Tier::Interpreter => None,
            tier => Some(Box::new(Translator::new(tier == Tier::Lockstep)?)),
        };
        Ok(SoftVcpu { cpu: CpuBox::new(Cpu::new(id, shared))?, blocks: Blocks::default(), translator })
    }
}

struct Stop {
    shared: Arc<Shared>,
    id: u32,
}

impl StopHandle for Stop {
    fn stop(&self) {
        self.shared.vcpus[self.id as usize].notify(attention::STOP);
    }
}

impl engine::Vcpu for SoftVcpu {
    fn id(&self) -> u32 {
        self.cpu.id
    }

    fn run(&mut self, io: &dyn CpuIo) -> Result<Exit, Error> {
        let blocks = &mut self.blocks;
        Ok(match &mut self.translator {
            None => self.cpu.with_io(io, |cpu| run::run(cpu, blocks)),
            Some(translator) => self.cpu.with_io(io, |cpu| {
                run::run_by(cpu, |cpu| {
                    // SAFETY: the vCPU is in a box of that kind.
                    unsafe { translator.step(cpu, blocks) }
                })
            }),
        })
    }

    fn stop_handle(&self) -> Arc<dyn StopHandle> {
        Arc::new(Stop { shared: self.cpu.vm.clone(), id: self.cpu.id })
    }

    fn save(&self) -> Result<CpuState, Error> {
        self.cpu.save().map(|state| CpuState::X86(Box::new(state)))
    }

    fn restore(&mut self, state: &CpuState) -> Result<(), Error> {
        match state {
            CpuState::X86(state) => self.cpu.restore(state),
            _ => Err(Error::BadState("it is of another guest architecture".into())),
        }
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.cpu.vm.vcpus[self.cpu.id as usize].take(!attention::STOP);
        self.cpu.init(true);
        self.blocks.clear();
        if let Some(translator) = &mut self.translator {
            translator.clear(&mut self.cpu);
        }
        Ok(())
    }
}
