//! A VM as its users hold it: start, ask, wait.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use engine::{Engine, Statistics};
use machine::{ConsoleInput, ConsolePorts, Description, HostIo, Machine, SerialInput, VmSpec};
use serde::{Deserialize, Serialize};

use crate::board::Board;
use crate::supervisor::{Message, Supervisor};
use crate::vcpu::panic_text;

/// Why a VM could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine could not be built as asked.
    #[error("cannot build the machine")]
    Build(#[source] machine::Error),
    /// The host refused a thread.
    #[error("cannot start a thread for the VM; is a limit on processes (ulimit -u) in the way?")]
    Thread(#[source] std::io::Error),
}

/// How a VM lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// A reset by the guest, or a triple fault, ends the VM instead of restarting it.
    pub no_reboot: bool,
}

/// What can be asked of a VM while it lives. One enum for the console's menu, signals and every later
/// remote control.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Press the power button: the guest is told and shuts down in order, if it listens.
    PowerButton,
    /// Press the reset button. The guest is not asked.
    Reset,
    /// Cut the power. The guest is not asked; what it has flushed to its disks is kept.
    Kill,
    /// Stop all vCPUs where they are.
    Pause,
    /// Let them go on.
    Resume,
    /// Nothing but the answer.
    Status,
}

/// What a VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Its vCPUs run.
    Running,
    /// Its vCPUs are parked.
    Paused,
}

/// The answer to every [`Request`]: how things stand after it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Running or paused.
    pub state: State,
    /// How often the guest was reset since its start.
    pub resets: u64,
    /// Time since the start.
    pub uptime: Duration,
}

/// How a VM's life ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest powered itself off.
    PoweredOff,
    /// The guest reset itself, and [`Options::no_reboot`] was set.
    Reset,
    /// The guest wrote this value to the debug-exit port.
    DebugExit(u32),
    /// A vCPU gave up and [`Options::no_reboot`] was set. Its number, and where it was.
    TripleFault {
        /// The vCPU.
        cpu: u32,
        /// Its instruction pointer and control registers, for a person to read.
        registers: String,
    },
    /// [`Request::Kill`].
    Killed,
    /// Something failed on our side; the whole cause chain in one line.
    Failed(String),
}

/// The VM has ended; [`Vm::wait`] says how.
#[derive(Debug, thiserror::Error)]
#[error("the VM has ended")]
pub struct Gone;

#[derive(Default)]
struct Ending {
    end: Mutex<Option<(End, Option<Statistics>)>>,
    told: Condvar,
}

impl Ending {
    fn lock(&self) -> MutexGuard<'_, Option<(End, Option<Statistics>)>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, end: End, statistics: Option<Statistics>) {
        self.lock().get_or_insert((end, statistics));
        self.told.notify_all();
    }
}

/// A running VM. Dropping it cuts its power.
pub struct Vm {
    control: Control,
    ending: Arc<Ending>,
    serial: SerialInput,
    console: Option<ConsoleInput>,
    ports: Option<ConsolePorts>,
    processes: Vec<u32>,
}

/// The means to ask things of a VM from any thread.
#[derive(Clone)]
pub struct Control(Sender<Message>);

impl Control {
    /// Has `request` carried out and returns how things stand after it.
    pub fn request(&self, request: Request) -> Result<Status, Gone> {
        let (answer, answered) = mpsc::channel();
        self.0.send(Message::Request(request, answer)).map_err(|_| Gone)?;
        answered.recv().map_err(|_| Gone)
    }
}

impl Vm {
    /// Builds the machine and lets it run.
    pub fn start(spec: &VmSpec, engine: &dyn Engine, io: HostIo, options: Options) -> Result<Vm, Error> {
        let machine = Machine::build(spec, engine, io).map_err(Error::Build)?;
        let (serial, console, ports) = (machine.serial(), machine.console(), machine.ports());
        let processes = machine.processes();
        let (control, ending) = launch(machine, options)?;
        Ok(Vm { control, ending, serial, console, ports, processes })
    }

    /// The processes, beside this one, that run the guest's code.
    pub fn processes(&self) -> &[u32] {
        &self.processes
    }

    /// The keyboard end of the guest's serial line.
    pub fn serial(&self) -> SerialInput {
        self.serial.clone()
    }

    /// The keyboard end of the guest's virtio console, if it has one.
    pub fn console(&self) -> Option<ConsoleInput> {
        self.console.clone()
    }

    /// The ways to programs in the guest, if they were asked for; [`crate::guest_ports::serve`] opens them to
    /// others.
    pub fn ports(&self) -> Option<ConsolePorts> {
        self.ports.clone()
    }

    /// The means to ask things of this VM from another thread.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// See [`Control::request`].
    pub fn request(&self, request: Request) -> Result<Status, Gone> {
        self.control.request(request)
    }

    /// Waits for the end. The guest's disks are durable by then.
    pub fn wait(&self) -> End {
        wait(&self.ending)
    }

    /// What the engine did for all vCPUs, once the VM has ended, if it was asked to keep statistics.
    pub fn statistics(&self) -> Option<Statistics> {
        self.ending.lock().as_ref()?.1.clone()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.request(Request::Kill);
    }
}

fn wait(ending: &Ending) -> End {
    let mut end = ending.lock();
    loop {
        if let Some((end, _)) = &*end {
            return end.clone();
        }
        end = ending.told.wait(end).unwrap_or_else(PoisonError::into_inner);
    }
}

/// Starts the threads of a board.
fn launch(mut board: impl Board, options: Options) -> Result<(Control, Arc<Ending>), Error> {
    let (inbox, messages) = mpsc::channel();
    forward_events(board.take_events(), inbox.clone())?;
    let supervisor = Supervisor::new(board, options, messages, inbox.clone()).map_err(Error::Thread)?;
    let ending = Arc::new(Ending::default());
    let theirs = ending.clone();
    let body = move || supervise(supervisor, &theirs);
    machine::spawn("supervisor", body).map_err(Error::Thread)?;
    Ok((Control(inbox), ending))
}

/// Ends are announced even if the supervisor itself fails: nobody may wait for ever.
fn supervise<B: Board>(mut supervisor: Supervisor<B>, ending: &Ending) {
    let end = catch_unwind(AssertUnwindSafe(|| supervisor.run()));
    ending.set(end.unwrap_or_else(|panic| End::Failed(panic_text(&*panic))), supervisor.statistics());
}

fn forward_events(events: Receiver<machine::PowerEvent>, inbox: Sender<Message>) -> Result<(), Error> {
    let body = move || {
        for event in events {
            if inbox.send(Message::Power(event)).is_err() {
                return;
            }
        }
    };
    machine::spawn("power", body).map(drop).map_err(Error::Thread)
}

/// What the machine would be made of. Opens its files and starts nothing.
pub fn describe(spec: &VmSpec, engine: &dyn Engine, io: HostIo) -> Result<Description, Error> {
    let machine = Machine::build(spec, engine, io).map_err(Error::Build)?;
    Ok(machine.describe())
}
#[cfg(test)]
mod tests;
