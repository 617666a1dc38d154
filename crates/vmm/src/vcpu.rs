//! The thread of a vCPU.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use engine::{CpuIo, Exit, StopHandle, Vcpu};

use crate::supervisor::Message;

/// Why a vCPU came back.
pub enum Outcome {
    /// It said so itself.
    Exit(Exit),
    /// The engine failed, in words.
    Failed(engine::Error),
    /// A defect in ospite: the panic's text.
    Panicked(String),
}

/// A vCPU as the supervisor holds it.
pub struct Slot {
    stop: Arc<dyn StopHandle>,
    run: Sender<Box<dyn Vcpu>>,
    /// Here while it does not run.
    pub parked: Option<Box<dyn Vcpu>>,
}

impl Slot {
    /// Starts the thread of `vcpu`, which stays parked until [`Slot::resume`]. Whenever it comes back,
    /// `inbox` gets it with the reason. The thread ends with the slot.
    pub fn start(
        index: usize,
        vcpu: Box<dyn Vcpu>,
        io: Arc<dyn CpuIo>,
        inbox: Sender<Message>,
    ) -> std::io::Result<Slot> {
        let (run, jobs) = mpsc::channel();
        let name = format!("vcpu{}", vcpu.id());
        machine::spawn(name, move || serve(index, &jobs, &*io, &inbox))?;
        Ok(Slot { stop: vcpu.stop_handle(), run, parked: Some(vcpu) })
    }

    /// Lets it run, if it is parked.
    pub fn resume(&mut self) {
        if let Some(vcpu) = self.parked.take()
            && let Err(mpsc::SendError(vcpu)) = self.run.send(vcpu)
        {
            self.parked = Some(vcpu); // its thread is gone, and has said why
        }
    }

    /// Asks it to come back, if it runs.
    pub fn stop(&self) {
        if self.parked.is_none() {
            self.stop.stop();
        }
    }
}

fn serve(index: usize, jobs: &Receiver<Box<dyn Vcpu>>, io: &dyn CpuIo, inbox: &Sender<Message>) {
    while let Ok(mut vcpu) = jobs.recv() {
        // The vCPU is not used again after a panic: the supervisor ends the VM.
        let outcome = match catch_unwind(AssertUnwindSafe(|| vcpu.run(io))) {
            Ok(Ok(exit)) => Outcome::Exit(exit),
            Ok(Err(error)) => Outcome::Failed(error),
            Err(panic) => Outcome::Panicked(panic_text(&*panic)),
        };
        if inbox.send(Message::Back { index, vcpu, outcome }).is_err() {
            return;
        }
    }
}

/// What a panic said.
pub fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}
