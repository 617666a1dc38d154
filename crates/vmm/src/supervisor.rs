//! The thread that owns the machine and decides everything.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use engine::{CpuState, Exit, Statistics, Vcpu};
use machine::PowerEvent;

use crate::board::Board;
use crate::chain::chain;
use crate::vcpu::{Outcome, Slot};
use crate::vm::{End, Options, Request, State, Status};

/// How long vCPUs may take to come back when the VM ends. One that is stuck (in a host file that
/// does not answer) is left behind: the process is about to end.
const PARK_AT_END: Duration = Duration::from_secs(5);
/// The same for a pause or a reset, after which the VM is to go on.
const PARK_TO_GO_ON: Duration = Duration::from_secs(120);

/// What arrives at the supervisor.
pub enum Message {
    /// A vCPU came back.
    Back {
        /// Its place among the slots.
        index: usize,
        /// The vCPU itself.
        vcpu: Box<dyn Vcpu>,
        /// Why.
        outcome: Outcome,
    },
    /// The guest wrote a power register.
    Power(PowerEvent),
    /// Somebody asks; the answer goes back when it is done.
    Request(Request, Sender<Status>),
}

/// A message once the vCPU that came with it is in its slot.
enum Event {
    Back(usize, Outcome),
    Power(PowerEvent),
    Request(Request, Sender<Status>),
}

/// See the module.
pub struct Supervisor<B> {
    board: B,
    slots: Vec<Slot>,
    messages: Receiver<Message>,
    /// Came in while the vCPUs were being parked.
    backlog: VecDeque<Event>,
    options: Options,
    state: State,
    resets: u64,
    started: Instant,
}

impl<B: Board> Supervisor<B> {
    /// Takes the board over and starts the vCPUs' threads, all parked.
    pub fn new(
        mut board: B,
        options: Options,
        messages: Receiver<Message>,
        inbox: Sender<Message>,
    ) -> std::io::Result<Supervisor<B>> {
        let vcpus = board.take_vcpus().into_iter().enumerate();
        let slots = vcpus
            .map(|(index, vcpu)| Slot::start(index, vcpu, board.io(), inbox.clone()))
            .collect::<Result<_, _>>()?;
        let (backlog, started) = (VecDeque::new(), Instant::now());
        Ok(Supervisor { board, slots, messages, backlog, options, state: State::Paused, resets: 0, started })
    }

    /// Runs the VM to its end.
    pub fn run(&mut self) -> End {
        self.resume();
        loop {
            let Some(event) = self.next_event() else {
                return self.finish(End::Failed("all hands left the VM".into()));
            };
            if let Some(end) = self.handle(event) {
                return end;
            }
        }
    }

    fn next_event(&mut self) -> Option<Event> {
        if let Some(event) = self.backlog.pop_front() {
            return Some(event);
        }
        let message = self.messages.recv().ok()?;
        Some(self.take_in(message))
    }

    fn take_in(&mut self, message: Message) -> Event {
        match message {
            Message::Back { index, vcpu, outcome } => {
                self.slots[index].parked = Some(vcpu);
                Event::Back(index, outcome)
            }
            Message::Power(event) => Event::Power(event),
            Message::Request(request, answer) => Event::Request(request, answer),
        }
    }

    fn handle(&mut self, event: Event) -> Option<End> {
        match event {
            Event::Back(index, outcome) => self.came_back(index, outcome),
            Event::Power(PowerEvent::PowerOff) => Some(self.finish(End::PoweredOff)),
            Event::Power(PowerEvent::DebugExit(value)) => Some(self.finish(End::DebugExit(value))),
            Event::Power(PowerEvent::Reset) => self.guest_reset(End::Reset),
            Event::Request(request, answer) => self.answer(request, &answer),
        }
    }

    fn came_back(&mut self, index: usize, outcome: Outcome) -> Option<End> {
        match outcome {
            // A stop that came too late for the run it was meant for.
            Outcome::Exit(Exit::Stopped) => {
                if self.state == State::Running {
                    self.slots[index].resume();
                }
                None
            }
            Outcome::Exit(Exit::Shutdown) => self.triple_fault(index),
            Outcome::Failed(error) => self.fail(format!("vCPU {index}: {}", chain(&error))),
            Outcome::Panicked(text) => {
                self.fail(format!("vCPU {index} failed by a defect in ospite: {text}"))
            }
        }
    }

    fn triple_fault(&mut self, index: usize) -> Option<End> {
        let registers = self.slots[index].parked.as_deref().map(registers).unwrap_or_default();
        if !self.options.no_reboot {
            log::warn!("triple fault on vCPU {index} ({registers}): the machine restarts");
        }
        self.guest_reset(End::TripleFault { cpu: index as u32, registers })
    }

    /// The guest restarts, or comes to this `end` where it may not.
    fn guest_reset(&mut self, end: End) -> Option<End> {
        if self.options.no_reboot { Some(self.finish(end)) } else { self.reset() }
    }

    fn answer(&mut self, request: Request, answer: &Sender<Status>) -> Option<End> {
        let end = match request {
            Request::Kill => Some(self.finish(End::Killed)),
            Request::PowerButton => {
                self.board.press_power_button();
                None
            }
            Request::Reset => self.reset(),
            Request::Pause => self.pause(),
            Request::Resume => {
                self.resume();
                None
            }
            Request::Status => None,
        };
        let status = Status { state: self.state, resets: self.resets, uptime: self.started.elapsed() };
        let _ = answer.send(status); // whoever asked may have gone
        end
    }

    fn resume(&mut self) {
        if self.state == State::Paused {
            self.board.resume();
        }
        self.state = State::Running;
        self.slots.iter_mut().for_each(Slot::resume);
    }

    fn pause(&mut self) -> Option<End> {
        self.state = State::Paused;
        if !self.park_all(PARK_TO_GO_ON) {
            return self.fail(self.stuck());
        }
        self.board.pause();
        None
    }

    fn reset(&mut self) -> Option<End> {
        if !self.park_all(PARK_TO_GO_ON) {
            return self.fail(self.stuck());
        }
        // What the guest's old life still had to say is void, the faults of its last moments included.
        self.backlog.retain(|event| matches!(event, Event::Request(..)));
        let mut vcpus: Vec<_> = self.slots.iter_mut().filter_map(|slot| slot.parked.take()).collect();
        let outcome = self.board.reset(&mut vcpus);
        for (slot, vcpu) in self.slots.iter_mut().zip(vcpus) {
            slot.parked = Some(vcpu);
        }
        if let Err(cause) = outcome {
            return self.fail(format!("cannot reset the machine: {}", chain(&*cause)));
        }
        self.resets += 1;
        if self.state == State::Running {
            self.resume();
        }
        None
    }

    /// What the engine did for the vCPUs that are parked, if it keeps statistics.
    pub fn statistics(&self) -> Option<Statistics> {
        let parked = self.slots.iter().filter_map(|slot| slot.parked.as_deref());
        parked.filter_map(Vcpu::statistics).reduce(|mut sum, vcpu| {
            sum.add(vcpu);
            sum
        })
    }

    fn stuck(&self) -> String {
        let missing = self.slots.iter().filter(|slot| slot.parked.is_none()).count();
        format!("{missing} of {} vCPUs do not stop; does a host file not answer?", self.slots.len())
    }

    /// Brings every vCPU home within `limit`; whether all came. What else happens is kept for later.
    fn park_all(&mut self, limit: Duration) -> bool {
        let mut deadline = Instant::now() + limit;
        self.slots.iter().for_each(Slot::stop);
        while self.slots.iter().any(|slot| slot.parked.is_none()) {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(message) = self.messages.recv_timeout(left) else { return false };
            match self.take_in(message) {
                Event::Back(_, Outcome::Exit(Exit::Stopped)) => {}
                kill @ Event::Request(Request::Kill, _) => {
                    deadline = deadline.min(Instant::now() + PARK_AT_END);
                    self.backlog.push_front(kill);
                }
                other => self.backlog.push_back(other),
            }
        }
        true
    }

    fn fail(&mut self, why: String) -> Option<End> {
        Some(self.finish(End::Failed(why)))
    }

    /// The last act: everything stands still, and the disks keep what they were given.
    fn finish(&mut self, end: End) -> End {
        self.state = State::Paused;
        if !self.park_all(PARK_AT_END) {
            log::warn!("{}", self.stuck());
        }
        self.board.pause(); // a request torn in half would tear an image's own tables
        match self.board.flush() {
            Ok(()) => end,
            Err(cause) => End::Failed(format!("cannot write the guest's disks: {}", chain(&*cause))),
        }
    }
}

/// Where a vCPU stands, for a person.
fn registers(vcpu: &dyn Vcpu) -> String {
    match vcpu.save() {
        Ok(CpuState::X86(cpu)) => format!(
            "rip {:#x}, rsp {:#x}, cr0 {:#x}, cr2 {:#x}, cr3 {:#x}, cr4 {:#x}, cs {:#x}",
            cpu.rip, cpu.gpr[4], cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4, cpu.segments[1].selector
        ),
        Ok(_) => "registers of another architecture".into(),
        Err(error) => format!("registers unknown: {}", chain(&error)),
    }
}
