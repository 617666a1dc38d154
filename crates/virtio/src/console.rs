//! Console device (5.3), one port.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use device::BadState;
use mem::GuestRam;
use pci::Class;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::worker::event;
use crate::{Broken, DeviceState, Handler, Kind, Progress, VirtQueue, VirtioDevice, lock};

const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 2] = [64, 64];
/// Keystrokes that wait for the guest; a sender waits past that.
const MAX_INPUT: usize = 1 << 16;
/// Output goes out in pieces of at most this.
const CHUNK: usize = 4096;

/// What was typed and not yet read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// The bytes, oldest first.
    pub input: Vec<u8>,
}

#[derive(Default)]
struct Input {
    bytes: VecDeque<u8>,
    /// The console is gone: senders need not wait.
    closed: bool,
}

struct Shared {
    input: Mutex<Input>,
    room: Condvar,
    arrived: EventFd,
}

/// The keyboard of a console. Clones are the same keyboard.
#[derive(Clone)]
pub struct ConsoleInput(Arc<Shared>);

impl ConsoleInput {
    /// Types `bytes`, all of them: waits while the guest does not read. Gives up when the console
    /// goes away.
    pub fn send(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let input = lock(&self.0.input);
            let full = |input: &mut Input| input.bytes.len() >= MAX_INPUT && !input.closed;
            let waited = self.0.room.wait_while(input, full);
            let mut input = waited.unwrap_or_else(PoisonError::into_inner);
            if input.closed {
                return;
            }
            bytes = &bytes[self.append(&mut input, bytes)..];
        }
    }

    /// Types as much of `bytes` as there is room for at once; how much that was.
    pub fn try_send(&self, bytes: &[u8]) -> usize {
        self.append(&mut lock(&self.0.input), bytes)
    }

    fn append(&self, input: &mut Input, bytes: &[u8]) -> usize {
        let count = bytes.len().min(MAX_INPUT.saturating_sub(input.bytes.len()));
        input.bytes.extend(&bytes[..count]);
        let _ = self.0.arrived.write(1); // fails only if the counter is full, which is as good
        count
    }
}

/// A console.
pub struct Console {
    shared: Arc<Shared>,
    out: Arc<Mutex<Box<dyn Write + Send>>>,
}

impl Console {
    /// A console that writes to `out`, and its keyboard.
    pub fn new(out: Box<dyn Write + Send>) -> io::Result<(Console, ConsoleInput)> {
        let shared = Shared { input: Mutex::default(), room: Condvar::new(), arrived: event()? };
        let shared = Arc::new(shared);
        let console = Console { shared: shared.clone(), out: Arc::new(Mutex::new(out)) };
        Ok((console, ConsoleInput(shared)))
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        lock(&self.shared.input).closed = true;
        self.shared.room.notify_all();
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> Kind {
        Kind { id: 3, class: Class { base: 0x07, sub: 0x80, interface: 0 }, name: "console" }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    /// The fields of features that are not offered, all 0 (5.3.4).
    fn config(&self) -> Vec<u8> {
        vec![0; 12]
    }

    fn handler(&self, _features: u64) -> io::Result<Box<dyn Handler>> {
        let wake = self.shared.arrived.try_clone()?;
        Ok(Box::new(Port { shared: self.shared.clone(), out: self.out.clone(), wake }))
    }

    /// What was typed stays typed: a guest that boots shall not miss it.
    fn reset(&mut self) {}

    fn flush(&self) -> io::Result<()> {
        lock(&self.out).flush()
    }

    fn save(&self) -> DeviceState {
        DeviceState::Console(ConsoleState { input: lock(&self.shared.input).bytes.iter().copied().collect() })
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), BadState> {
        let bad = |what| BadState::new("virtio-console", what);
        let DeviceState::Console(ConsoleState { input }) = state else {
            return Err(bad("it is another device's"));
        };
        if input.len() > MAX_INPUT {
            return Err(bad("more was typed than there is room for"));
        }
        lock(&self.shared.input).bytes = input.into();
        self.shared.room.notify_all();
        Ok(())
    }
}

struct Port {
    shared: Arc<Shared>,
    out: Arc<Mutex<Box<dyn Write + Send>>>,
    wake: EventFd,
}

impl Port {
    fn receive(&self, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken> {
        loop {
            let mut input = lock(&self.shared.input);
            if input.bytes.is_empty() {
                return Ok(Progress::Waiting);
            }
            let Some(chain) = queue.pop(ram)? else { return Ok(Progress::Drained) };
            let written = chain.writable.write(input.bytes.make_contiguous());
            input.bytes.drain(..written);
            drop(input);
            self.shared.room.notify_all();
            queue.push(ram, chain.head, written)?;
        }
    }

    fn transmit(&self, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken> {
        let mut out = lock(&self.out);
        while let Some(chain) = queue.pop(ram)? {
            let mut left = chain.readable;
            while !left.is_empty() {
                let mut bytes = [0; CHUNK];
                let rest = left.split_off(CHUNK);
                let count = left.read(&mut bytes);
                // Nobody may be looking any more; the guest must not stop for that.
                if let Err(error) = out.write_all(&bytes[..count]) {
                    log::debug!("console output is lost: {error}");
                }
                left = rest;
            }
            queue.push(ram, chain.head, 0)?;
        }
        if let Err(error) = out.flush() {
            log::debug!("console output is lost: {error}");
        }
        Ok(Progress::Drained)
    }
}

impl Handler for Port {
    fn process(&mut self, index: usize, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken> {
        match index {
            RX => self.receive(queue, ram),
            TX => self.transmit(queue, ram),
            _ => Ok(Progress::Waiting),
        }
    }

    fn wake(&self) -> Option<(EventFd, usize)> {
        Some((self.wake.try_clone().ok()?, RX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use device::Snapshot;

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

    #[test]
    fn what_the_guest_prints_appears_and_what_is_typed_arrives() {
        let screen = Screen::default();
        let (console, input) = Console::new(Box::new(screen.clone())).unwrap();
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
        assert_eq!(
            (driver.bytes(DATA, 4), driver.bytes(DATA + 100, 2)),
            (b"root".to_vec(), b"\n\0".to_vec())
        );

        input.send(b"typed ahead");
        driver.initialize(u64::MAX);
        assert_eq!(driver.run(RX, &[Buf::In(DATA, 64)]), 11, "a reset loses no keystroke");
    }

    #[test]
    fn a_long_paste_waits_for_the_guest_and_arrives_whole() {
        let (console, input) = Console::new(Box::new(io::sink())).unwrap();
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
        let (console, input) = Console::new(Box::new(io::sink())).unwrap();
        let driver = Driver::start(console);
        let sender = std::thread::spawn(move || input.send(&vec![0; 2 * MAX_INPUT]));
        drop(driver);
        sender.join().unwrap();
    }

    #[test]
    fn what_was_typed_is_saved() {
        let (console, input) = Console::new(Box::new(io::sink())).unwrap();
        let driver = Driver::start(console);
        input.send(b"ls");
        lock(&driver.board.function).pause();
        let state = lock(&driver.board.function).save();
        let (console, _) = Console::new(Box::new(io::sink())).unwrap();
        let board = Board::with_ram(console, driver.board.ram.clone());
        lock(&board.function).restore(state).unwrap();
        board.root.refresh();
        let mut driver = driver.move_to(board);
        assert_eq!(driver.run(RX, &[Buf::In(DATA, 64)]), 2);
        assert_eq!(driver.bytes(DATA, 2), b"ls");
    }
}
