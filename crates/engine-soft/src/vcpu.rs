//! One vCPU of the software engine, as the `engine` traits see it.

#![allow(unsafe_code)] // enters the translator

use std::sync::Arc;
use std::sync::atomic::Ordering;

use engine::{CpuIo, CpuState, Error, Exit, Statistics, StopHandle};

use crate::Tier;
use crate::clock::Clock;
use crate::profile::{Profile, TimedIo};
use crate::vm::{Shared, attention};
use crate::x86::block::Blocks;
use crate::x86::cpu::Cpu;
use crate::x86::native::Native;
use crate::x86::run;
use crate::x86::translate::frame::CpuBox;
use crate::x86::translate::translator::Translator;

/// A vCPU and its decoded and translated code.
pub struct SoftVcpu {
    cpu: CpuBox,
    blocks: Blocks,
    translator: Option<Box<Translator>>,
    native: Option<Box<Native>>,
    profile: Option<Arc<Profile>>,
}

impl SoftVcpu {
    pub(crate) fn new(id: u32, shared: Arc<Shared>, tier: Tier, statistics: bool) -> Result<SoftVcpu, Error> {
        let profile = statistics.then(Arc::<Profile>::default);
        let translator = match tier {
            Tier::Interpreter => None,
            tier => Some(Box::new(Translator::new(tier == Tier::Lockstep, profile.clone())?)),
        };
        let native = (tier == Tier::Native).then(|| Box::new(Native::start(&shared)));
        let cpu = CpuBox::new(Cpu::new(id, shared))?;
        Ok(SoftVcpu { cpu, blocks: Blocks::default(), translator, native, profile })
    }

    fn go(&mut self, io: &dyn CpuIo) -> Exit {
        let blocks = &mut self.blocks;
        let Some(translator) = &mut self.translator else {
            return self.cpu.with_io(io, |cpu| run::run(cpu, blocks));
        };
        if let Some(native) = &mut self.native {
            native.prepare();
        }
        let (native, profile) = (&mut self.native, self.profile.as_deref());
        self.cpu.with_io(io, |cpu| {
            run::run_by(cpu, |cpu| {
                if let Some(result) = native.as_mut().and_then(|native| native.step(cpu, blocks, profile)) {
                    return result;
                }
                // SAFETY: the vCPU is in a box of that kind.
                unsafe { translator.step(cpu, blocks) }
            })
        })
    }
}

impl SoftVcpu {
    fn go_timed(&mut self, io: &dyn CpuIo) -> Exit {
        let Some(profile) = self.profile.clone() else { return self.go(io) };
        let start = Clock::ticks();
        let exit = self.go(&TimedIo { profile: &profile, io });
        profile.run.fetch_add(Clock::ticks().wrapping_sub(start), Ordering::Relaxed);
        exit
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
        let exit = self.go_timed(io);
        self.native.as_ref().map_or(Ok(()), |native| native.check())?;
        Ok(exit)
    }

    fn processes(&self) -> Vec<u32> {
        self.native.as_ref().map_or(Vec::new(), |native| native.processes())
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
        if let Some(native) = &mut self.native {
            native.clear(&mut self.cpu);
        }
        Ok(())
    }

    fn statistics(&self) -> Option<Statistics> {
        let profile = self.profile.as_ref()?;
        let stats = self.translator.as_ref().map(|translator| &translator.stats);
        let mut report = Statistics::default();
        profile.report(&self.cpu.vm.clock, self.cpu.idle_ticks, stats, &mut report);
        if let Some(stats) = stats {
            stats.report(&mut report);
        }
        if let Some(native) = &self.native {
            native.stats.report(&mut report);
        }
        report.count("blocks_decoded", self.blocks.decoded);
        Some(report)
    }
}
