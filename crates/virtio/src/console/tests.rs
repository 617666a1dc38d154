use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use device::Snapshot;

use super::layout::*;
use super::ports::MAX_BUFFERED;
use super::*;
use crate::testing::{Board, Buf, Driver, eventually};

const RX: usize = 0;
const TX: usize = 1;
/// Behind the rings of so many queues.
const DATA: u64 = 3 << 20;

#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn console() -> (Console, ConsoleInput) {
    let console = Console::new(Some(Box::new(io::sink()))).unwrap();
    let input = console.input();
    (console, input)
}

#[test]
fn what_the_guest_prints_appears_and_what_is_typed_arrives() {
    let screen = Screen::default();
    let console = Console::new(Some(Box::new(screen.clone()))).unwrap();
    let input = console.input();
    let mut driver = Driver::start(console);
    driver.fill(DATA, b"login: ");
    assert_eq!(driver.run(TX, &[Buf::Out(DATA, 3), Buf::Out(DATA + 3, 4)]), 0);
    assert_eq!(*lock(&screen.0), b"login: ");
    driver.board.interrupts.wait(0x42);

    driver.add(RX, &[Buf::In(DATA, 4), Buf::In(DATA + 100, 4)]);
    driver.kick(RX);
    input.send(b"root\n");
    assert_eq!(driver.wait_used(RX), (0, 5));
    driver.board.interrupts.wait(0x41);
    assert_eq!((driver.bytes(DATA, 4), driver.bytes(DATA + 100, 2)), (b"root".to_vec(), b"\n\0".to_vec()));

    input.send(b"typed ahead");
    driver.initialize(u64::MAX);
    assert_eq!(driver.run(RX, &[Buf::In(DATA, 64)]), 11, "a reset loses no keystroke");
}

#[test]
fn a_long_paste_waits_for_the_guest_and_arrives_whole() {
    let (console, input) = console();
    let mut driver = Driver::start(console);
    let text: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    let sender = std::thread::spawn({
        let (input, text) = (input.clone(), text.clone());
        move || input.send(&text)
    });
    eventually("the buffer does not fill", || lock(&input.0.input).bytes.len() == MAX_INPUT);
    assert_eq!(input.try_send(b"x"), 0);
    let mut arrived = Vec::new();
    while arrived.len() < text.len() {
        let written = driver.run(RX, &[Buf::In(DATA, 4096)]);
        arrived.extend(driver.bytes(DATA, written as usize));
    }
    sender.join().unwrap();
    assert!(arrived == text);
}

#[test]
fn a_sender_is_let_go_when_the_console_goes_away() {
    let (console, input) = console();
    let driver = Driver::start(console);
    let sender = std::thread::spawn(move || input.send(&vec![0; 2 * MAX_INPUT]));
    drop(driver);
    sender.join().unwrap();
}

/// A driver that knows of several ports, and the host's ends of them.
struct Guest {
    driver: Driver,
    ports: ConsolePorts,
}

impl Guest {
    fn new() -> Guest {
        let console = Console::new(None).unwrap();
        let ports = console.ports();
        Guest { driver: Driver::start(console), ports }
    }

    fn says(&mut self, port: usize, event: u16, value: u16) {
        self.driver.fill(DATA, &Control { port: port as u32, event, value }.with_name(""));
        assert_eq!(self.driver.run(CONTROL_TRANSMIT, &[Buf::Out(DATA, 8)]), 0);
    }

    /// The next control message and the name behind it.
    fn hears(&mut self) -> (Control, String) {
        let written = self.driver.run(CONTROL_RECEIVE, &[Buf::In(DATA, 64)]) as usize;
        let bytes = self.driver.bytes(DATA, written);
        let control = Control::parse(bytes[..8].try_into().unwrap());
        (control, String::from_utf8(bytes[8..].to_vec()).unwrap())
    }

    fn hears_of(&mut self, port: usize, event: u16, value: u16) -> String {
        let (control, name) = self.hears();
        assert_eq!(control, Control { port: port as u32, event, value });
        name
    }

    /// Its ports are announced up to and including the agent's, which its agent opens.
    fn boots(&mut self) {
        self.says(0, event::DEVICE_READY, 1);
        self.hears_of(AGENT, event::PORT_ADD, 1);
        self.accepts(AGENT, "org.qemu.guest_agent.0");
    }

    fn accepts(&mut self, port: usize, name: &str) {
        self.says(port, event::PORT_READY, 1);
        assert_eq!(self.hears_of(port, event::PORT_NAME, 1), name);
        self.hears_of(port, event::PORT_OPEN, 1);
        self.says(port, event::PORT_OPEN, 1);
    }

    fn sends(&mut self, port: usize, text: &[u8]) {
        self.driver.fill(DATA, text);
        self.driver.run(transmit_queue(port), &[Buf::Out(DATA, text.len() as u32)]);
    }

    fn reads(&mut self, port: usize) -> Vec<u8> {
        let written = self.driver.run(receive_queue(port), &[Buf::In(DATA, 4096)]);
        self.driver.bytes(DATA, written as usize)
    }
}

fn receive(stream: &PortStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let mut count = 0;
    eventually("the bytes do not arrive", || {
        count += stream.receive(&mut bytes[count..]);
        count == length
    });
    bytes
}

#[test]
fn the_agents_port_has_its_name_and_carries_bytes_both_ways() {
    let mut guest = Guest::new();
    assert_eq!(guest.driver.device_config(4), (PORTS as u32).to_le_bytes());
    let agent = guest.ports.agent().unwrap().unwrap();
    guest.driver.initialize(u64::MAX);
    guest.boots();
    assert!(!agent.has_ended(), "it was there before the guest");
    assert!(guest.ports.agent().unwrap().is_none(), "one at a time");
    assert_eq!(agent.send(b"ping"), 4);
    assert_eq!(guest.reads(AGENT), b"ping");
    guest.sends(AGENT, b"pong");
    assert_eq!(receive(&agent, 4), b"pong");
    drop(agent);
    guest.sends(AGENT, b"nobody listens");
    let agent = guest.ports.agent().unwrap().unwrap();
    guest.sends(AGENT, b"again");
    assert_eq!(receive(&agent, 5), b"again");
}

#[test]
fn a_guest_that_floods_its_host_waits_and_nothing_is_lost() {
    let mut guest = Guest::new();
    guest.boots();
    let agent = guest.ports.agent().unwrap().unwrap();
    let length = MAX_BUFFERED as u32 * 2 + 5;
    let text: Vec<u8> = (0..length).map(|i| (i % 249) as u8).collect();
    guest.driver.fill(DATA, &text);
    guest.driver.add(transmit_queue(AGENT), &[Buf::Out(DATA, length)]);
    guest.driver.kick(transmit_queue(AGENT));
    let buffered =
        || lock(&agent_shared(&guest.ports).ports).ports[AGENT].attached.as_ref().unwrap().from_guest.len();
    eventually("the buffer does not fill", || buffered() == MAX_BUFFERED);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!((buffered(), guest.driver.used_index(transmit_queue(AGENT))), (MAX_BUFFERED, 0));
    assert!(receive(&agent, text.len()) == text);
    guest.driver.wait_used(transmit_queue(AGENT));
    // A program in the guest that does not read makes the host wait.
    let flood = vec![0; 2 * MAX_BUFFERED];
    assert_eq!(agent.send(&flood), MAX_BUFFERED);
    assert!(!agent.has_room());
}

fn agent_shared(ports: &ConsolePorts) -> &Arc<super::ports::Shared> {
    &ports.0
}

#[test]
fn a_stream_appears_when_it_is_needed_and_ends_where_either_side_says_so() {
    let mut guest = Guest::new();
    guest.boots();
    let stream = guest.ports.stream().unwrap().unwrap();
    assert_eq!(stream.number(), FIRST_STREAM);
    guest.hears_of(FIRST_STREAM, event::PORT_ADD, 1);
    stream.send(b"input");
    guest.accepts(FIRST_STREAM, &stream.name());
    stream.close_input();
    assert_eq!(guest.reads(FIRST_STREAM), b"input");
    guest.hears_of(FIRST_STREAM, event::PORT_OPEN, 0);

    guest.sends(FIRST_STREAM, b"output");
    guest.says(FIRST_STREAM, event::PORT_OPEN, 0);
    assert!(!stream.has_ended(), "there is something to read");
    assert_eq!(receive(&stream, 6), b"output");
    eventually("it does not end", || stream.has_ended());
    drop(stream);

    let stream = guest.ports.stream().unwrap().unwrap();
    assert_eq!(stream.number(), FIRST_STREAM, "it is used again");
    guest.hears_of(FIRST_STREAM, event::PORT_OPEN, 1);
    guest.says(FIRST_STREAM, event::PORT_OPEN, 1);
    guest.sends(FIRST_STREAM, b"x");
    drop(stream);
    guest.hears_of(FIRST_STREAM, event::PORT_REMOVE, 1);
    let stream = guest.ports.stream().unwrap().unwrap();
    guest.hears_of(FIRST_STREAM, event::PORT_ADD, 1);
    drop(stream);
}

#[test]
fn streams_are_as_many_as_there_are_and_end_with_the_driver() {
    let mut guest = Guest::new();
    guest.boots();
    let streams: Vec<_> = std::iter::from_fn(|| guest.ports.stream().unwrap()).collect();
    assert_eq!(streams.len(), PORTS - FIRST_STREAM);
    assert!(streams.iter().all(|stream| !stream.has_ended()));
    guest.driver.initialize(u64::MAX);
    assert!(streams.iter().all(PortStream::has_ended));
    drop(streams);
    guest.boots();
}

#[test]
fn a_guest_that_talks_nonsense_is_ignored() {
    let mut guest = Guest::new();
    for port in [1, FIRST_STREAM, PORTS, u32::MAX as usize] {
        for event in 0..9 {
            guest.says(port, event, 1);
        }
    }
    for _ in 0..1000 {
        guest.says(0, event::DEVICE_READY, 1);
    }
    guest.driver.fill(DATA, &[1; 64]);
    guest.driver.run(CONTROL_TRANSMIT, &[Buf::Out(DATA, 3)]);
    guest.says(FIRST_STREAM, event::PORT_OPEN, 1);
    guest.sends(FIRST_STREAM, b"to nobody");
    guest.driver.initialize(u64::MAX);
    guest.boots();
}

#[test]
fn what_was_typed_and_the_ports_are_saved() {
    let mut guest = Guest::new();
    guest.boots();
    let stream = guest.ports.stream().unwrap().unwrap();
    guest.hears_of(FIRST_STREAM, event::PORT_ADD, 1);
    guest.accepts(FIRST_STREAM, &stream.name());
    let agent = guest.ports.agent().unwrap().unwrap();
    // Half of a chain is taken when the machine is saved.
    guest.driver.fill(DATA, &[7; MAX_BUFFERED + 3]);
    guest.driver.add(transmit_queue(AGENT), &[Buf::Out(DATA, MAX_BUFFERED as u32 + 3)]);
    guest.driver.kick(transmit_queue(AGENT));
    let taken = || lock(&guest.ports.0.ports).ports[AGENT].state.taken;
    eventually("it is not taken", || taken() == MAX_BUFFERED as u64);
    ConsoleInput(guest.ports.0.clone()).send(b"ls");
    lock(&guest.driver.board.function).pause();
    let state = lock(&guest.driver.board.function).save();

    let console = Console::new(None).unwrap();
    let ports = console.ports();
    let board = Board::with_ram(console, guest.driver.board.ram.clone());
    let mut other = state.clone();
    let crate::DeviceState::Console(console) = &mut other.device else { unreachable!() };
    console.ports.pop();
    assert!(lock(&board.function).restore(other).is_err());
    lock(&board.function).restore(state).unwrap();
    board.root.refresh();
    let mut guest = Guest { driver: guest.driver.move_to(board), ports };
    assert_eq!(guest.driver.run(RX, &[Buf::In(DATA, 64)]), 2);
    assert_eq!(guest.driver.bytes(DATA, 2), b"ls");
    guest.hears_of(FIRST_STREAM, event::PORT_REMOVE, 1);
    drop((agent, stream));
    let agent = guest.ports.agent().unwrap().unwrap();
    guest.driver.wait_used(transmit_queue(AGENT));
    agent.send(b"hello");
    assert_eq!(guest.reads(AGENT), b"hello");
}
