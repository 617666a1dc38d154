//! A 16550A UART (National Semiconductor PC16550D data sheet), as a PC's COM port.
//!
//! Written here rather than taken from a crate because the state must be whole: FIFO control, the
//! order of interrupts, the time-out of the receiver, flow control.
//!
//! *Output* never makes a vCPU wait: it goes to a buffer that a thread writes out, and a full buffer
//! shows as a busy transmitter. *Input* comes from a [`SerialInput`] at about the pace of 115200 baud,
//! so that a pasted text meets a guest that keeps up, and it respects RTS: a guest that has ever
//! raised DTR or RTS gets no byte while RTS is down. Linux drops RTS while nobody has the port open,
//! so what was piped in early is still there when a login appears. A guest that never touches the
//! modem lines gets its bytes regardless.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use device::{BadState, Device, IrqLine, Snapshot, Timer, Timers};
use serde::{Deserialize, Serialize};

use crate::SerialInput;
use crate::output::Output;
use crate::sync::lock;

const FIFO_SIZE: usize = 16;
/// One character of ten bits at 115200 baud.
const CHAR_TIME: Duration = Duration::from_micros(87);
/// The receiver's time-out is four characters (8.5).
const TIMEOUT_CHARS: u32 = 4;

/// Register offsets (table II).
mod reg {
    pub const RBR_THR_DLL: u64 = 0;
    pub const IER_DLM: u64 = 1;
    pub const IIR_FCR: u64 = 2;
    pub const LCR: u64 = 3;
    pub const MCR: u64 = 4;
    pub const LSR: u64 = 5;
    pub const MSR: u64 = 6;
    pub const SCR: u64 = 7;
}

mod ier {
    pub const RECEIVED: u8 = 1 << 0;
    pub const THR_EMPTY: u8 = 1 << 1;
    pub const LINE_STATUS: u8 = 1 << 2;
    pub const MODEM_STATUS: u8 = 1 << 3;
    pub const ALL: u8 = 0x0f;
}

/// Interrupt identification, in order of priority (table V).
mod iir {
    pub const LINE_STATUS: u8 = 0x06;
    pub const RECEIVED: u8 = 0x04;
    pub const TIMEOUT: u8 = 0x0c;
    pub const THR_EMPTY: u8 = 0x02;
    pub const MODEM_STATUS: u8 = 0x00;
    pub const NONE: u8 = 0x01;
    pub const FIFOS_ENABLED: u8 = 0xc0;
}

mod fcr {
    pub const ENABLE: u8 = 1 << 0;
    pub const CLEAR_RX: u8 = 1 << 1;
    /// Bits that keep what was written: enable, DMA mode, trigger.
    pub const KEPT: u8 = 0xc9;
}

const LCR_DLAB: u8 = 1 << 7;

mod mcr {
    pub const DTR: u8 = 1 << 0;
    pub const RTS: u8 = 1 << 1;
    pub const OUT1: u8 = 1 << 2;
    /// On a PC it lets the interrupt through to the bus.
    pub const OUT2: u8 = 1 << 3;
    pub const LOOP: u8 = 1 << 4;
    pub const ALL: u8 = 0x1f;
}

mod lsr {
    pub const DATA_READY: u8 = 1 << 0;
    pub const OVERRUN: u8 = 1 << 1;
    pub const THR_EMPTY: u8 = 1 << 5;
    pub const IDLE: u8 = 1 << 6;
}

mod msr {
    pub const DELTAS: u8 = 0x0f;
    pub const TRAILING_RI: u8 = 1 << 2;
    pub const CTS: u8 = 1 << 4;
    pub const DSR: u8 = 1 << 5;
    pub const RI: u8 = 1 << 6;
    pub const DCD: u8 = 1 << 7;
}

/// Saved state of [`Uart`]. Bytes that a [`SerialInput`] still holds belong to the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UartState {
    /// Interrupt enables.
    pub ier: u8,
    /// FIFO control, the bits that last.
    pub fcr: u8,
    /// Line control.
    pub lcr: u8,
    /// Modem control.
    pub mcr: u8,
    /// Modem status.
    pub msr: u8,
    /// Scratch.
    pub scr: u8,
    /// Baud divisor.
    pub divisor: u16,
    /// Bytes received and not read yet.
    pub rx: VecDeque<u8>,
    /// A byte was lost since the last look at LSR.
    pub overrun: bool,
    /// Bytes have waited in the FIFO for four character times.
    pub rx_timeout: bool,
    /// The transmitter became empty and nobody has looked yet.
    pub thre_pending: bool,
    /// The guest has used the modem lines, so RTS is respected.
    pub flow_control: bool,
}

impl Default for UartState {
    fn default() -> UartState {
        UartState {
            ier: 0,
            fcr: 0,
            lcr: 0x03,
            mcr: 0,
            msr: msr::CTS | msr::DSR | msr::DCD,
            scr: 0,
            divisor: 1,
            rx: VecDeque::new(),
            overrun: false,
            rx_timeout: false,
            thre_pending: false,
            flow_control: false,
        }
    }
}

/// The UART.
pub struct Uart {
    state: UartState,
    irq: IrqLine,
    /// The line's level, so that the controllers hear of changes only.
    irq_high: bool,
    out: Output,
    input: SerialInput,
    /// Fires when there is new input, when the next byte may arrive, and when output has room again.
    timer: Arc<Timer>,
    /// Before this moment the line is still busy with the bytes that came last.
    next_arrival: Instant,
}

impl Uart {
    /// A UART that writes to `out` and interrupts through `irq`.
    pub fn new(
        irq: IrqLine,
        out: Box<dyn Write + Send>,
        timers: &Timers,
    ) -> std::io::Result<Arc<Mutex<Uart>>> {
        let slot = Arc::new(std::sync::OnceLock::<std::sync::Weak<Mutex<Uart>>>::new());
        let target = slot.clone();
        let timer = Arc::new(timers.timer(move || {
            if let Some(uart) = target.get().and_then(std::sync::Weak::upgrade) {
                lock(&uart).pump(Instant::now());
            }
        }));
        let uart = Arc::new(Mutex::new(Uart {
            state: UartState::default(),
            irq,
            irq_high: false,
            out: Output::start(out, timer.clone())?,
            input: SerialInput::new(timer.clone()),
            timer,
            next_arrival: Instant::now(),
        }));
        let _ = slot.set(Arc::downgrade(&uart));
        Ok(uart)
    }

    /// Where keystrokes go in.
    pub fn input(&self) -> SerialInput {
        self.input.clone()
    }

    /// Waits until all output so far is written, or `patience` is over.
    pub fn flush(&self, patience: Duration) {
        self.out.flush(patience);
    }

    fn fifo_enabled(&self) -> bool {
        self.state.fcr & fcr::ENABLE != 0
    }

    fn capacity(&self) -> usize {
        if self.fifo_enabled() { FIFO_SIZE } else { 1 }
    }

    /// How many bytes make the "received" interrupt.
    fn trigger(&self) -> usize {
        if !self.fifo_enabled() {
            return 1;
        }
        [1, 4, 8, 14][usize::from(self.state.fcr >> 6)]
    }

    fn may_receive(&self) -> bool {
        let held_back = self.state.flow_control && self.state.mcr & mcr::RTS == 0;
        self.state.mcr & mcr::LOOP == 0 && !held_back
    }

    /// Lets arrive what has arrived by now, and sees to the next arrival.
    fn pump(&mut self, now: Instant) {
        let was_empty = self.state.rx.is_empty();
        if self.may_receive() && now >= self.next_arrival {
            let room = self.capacity().saturating_sub(self.state.rx.len());
            let count = self.input.take(room, &mut self.state.rx);
            if count > 0 {
                self.next_arrival = now + CHAR_TIME * count as u32;
            }
        }
        // Bytes that come in a burst shorter than the trigger have nothing to wait for.
        if self.fifo_enabled() && !self.state.rx.is_empty() && (was_empty || now >= self.next_arrival) {
            self.state.rx_timeout = true;
        }
        self.update();
        if self.may_receive() && self.state.rx.len() < self.capacity() && !self.input.is_empty() {
            self.timer.arm(self.next_arrival.max(now));
        }
    }

    /// The pending interrupt of the highest priority.
    fn cause(&self) -> u8 {
        let (s, enabled) = (&self.state, self.state.ier);
        if enabled & ier::LINE_STATUS != 0 && s.overrun {
            iir::LINE_STATUS
        } else if enabled & ier::RECEIVED != 0 && s.rx.len() >= self.trigger() {
            iir::RECEIVED
        } else if enabled & ier::RECEIVED != 0 && s.rx_timeout && !s.rx.is_empty() {
            iir::TIMEOUT
        } else if enabled & ier::THR_EMPTY != 0 && s.thre_pending && self.out.has_room() {
            iir::THR_EMPTY
        } else if enabled & ier::MODEM_STATUS != 0 && s.msr & msr::DELTAS != 0 {
            iir::MODEM_STATUS
        } else {
            iir::NONE
        }
    }

    fn update(&mut self) {
        // In loopback mode the modem outputs, OUT2 among them, are cut from their pins (8.6).
        let let_through = self.state.mcr & (mcr::OUT2 | mcr::LOOP) == mcr::OUT2;
        let high = let_through && self.cause() != iir::NONE;
        if high != self.irq_high {
            self.irq_high = high;
            self.irq.set(high);
        }
    }

    fn read_rbr(&mut self, now: Instant) -> u8 {
        let byte = self.state.rx.pop_front().unwrap_or(0);
        self.state.rx_timeout = false;
        self.pump(now);
        if !self.state.rx.is_empty() && !self.state.rx_timeout {
            self.timer.arm(now + CHAR_TIME * TIMEOUT_CHARS);
        }
        byte
    }

    fn read_iir(&mut self) -> u8 {
        let cause = self.cause();
        if cause == iir::THR_EMPTY {
            self.state.thre_pending = false;
            self.update();
        }
        cause | if self.fifo_enabled() { iir::FIFOS_ENABLED } else { 0 }
    }

    fn read_lsr(&mut self, now: Instant) -> u8 {
        self.pump(now);
        let mut value = 0;
        if !self.state.rx.is_empty() {
            value |= lsr::DATA_READY;
        }
        if std::mem::take(&mut self.state.overrun) {
            value |= lsr::OVERRUN;
        }
        if self.out.has_room() {
            value |= lsr::THR_EMPTY | lsr::IDLE;
        }
        self.update();
        value
    }

    fn read_msr(&mut self) -> u8 {
        let value = self.state.msr;
        self.state.msr &= !msr::DELTAS;
        self.update();
        value
    }

    fn write_thr(&mut self, byte: u8) {
        if self.state.mcr & mcr::LOOP != 0 {
            self.loop_back(byte);
        } else {
            self.out.push(byte);
        }
        // The transmitter was busy for a moment: an edge for whoever waits for its end.
        self.state.thre_pending = false;
        self.update();
        self.state.thre_pending = true;
        self.update();
    }

    fn loop_back(&mut self, byte: u8) {
        if self.state.rx.len() < self.capacity() {
            self.state.rx.push_back(byte);
            self.state.rx_timeout = self.fifo_enabled();
        } else if self.fifo_enabled() {
            self.state.overrun = true;
        } else {
            // Without FIFOs the newer byte takes the place of the older.
            self.state.rx[0] = byte;
            self.state.overrun = true;
        }
    }

    fn write_ier(&mut self, value: u8) {
        let turned_on = !self.state.ier & value;
        self.state.ier = value & ier::ALL;
        if turned_on & ier::THR_EMPTY != 0 {
            self.state.thre_pending = true;
        }
        self.update();
    }

    fn write_fcr(&mut self, value: u8, now: Instant) {
        let enable = value & fcr::ENABLE;
        // A change of the enable bit empties the FIFOs; with it clear the other bits are not taken (8.3).
        if value & fcr::CLEAR_RX != 0 || enable != self.state.fcr & fcr::ENABLE {
            self.state.rx.clear();
            self.state.rx_timeout = false;
        }
        self.state.fcr = if enable != 0 { value & fcr::KEPT } else { 0 };
        self.pump(now);
    }

    fn write_mcr(&mut self, value: u8, now: Instant) {
        self.state.mcr = value & mcr::ALL;
        if value & (mcr::DTR | mcr::RTS) != 0 {
            self.state.flow_control = true;
        }
        let lines = if value & mcr::LOOP != 0 {
            looped(value)
        } else {
            msr::CTS | msr::DSR | msr::DCD // a null modem with somebody at the other end
        };
        self.state.msr = with_deltas(self.state.msr, lines);
        self.pump(now);
    }

    fn read_at(&mut self, offset: u64, now: Instant) -> u8 {
        let dlab = self.state.lcr & LCR_DLAB != 0;
        match offset {
            reg::RBR_THR_DLL if dlab => self.state.divisor as u8,
            reg::RBR_THR_DLL => self.read_rbr(now),
            reg::IER_DLM if dlab => (self.state.divisor >> 8) as u8,
            reg::IER_DLM => self.state.ier,
            reg::IIR_FCR => self.read_iir(),
            reg::LCR => self.state.lcr,
            reg::MCR => self.state.mcr,
            reg::LSR => self.read_lsr(now),
            reg::MSR => self.read_msr(),
            reg::SCR => self.state.scr,
            _ => 0xff,
        }
    }

    fn write_at(&mut self, offset: u64, value: u8, now: Instant) {
        let dlab = self.state.lcr & LCR_DLAB != 0;
        match offset {
            reg::RBR_THR_DLL if dlab => self.state.divisor = self.state.divisor & 0xff00 | u16::from(value),
            reg::RBR_THR_DLL => self.write_thr(value),
            reg::IER_DLM if dlab => {
                self.state.divisor = self.state.divisor & 0x00ff | u16::from(value) << 8;
            }
            reg::IER_DLM => self.write_ier(value),
            reg::IIR_FCR => self.write_fcr(value, now),
            reg::LCR => self.state.lcr = value,
            reg::MCR => self.write_mcr(value, now),
            reg::SCR => self.state.scr = value,
            _ => {} // LSR and MSR are for the factory's tests
        }
    }
}

/// The modem inputs when they are wired to the outputs (8.6).
fn looped(value: u8) -> u8 {
    let wires = [(mcr::DTR, msr::DSR), (mcr::RTS, msr::CTS), (mcr::OUT1, msr::RI), (mcr::OUT2, msr::DCD)];
    wires.iter().filter(|(from, _)| value & from != 0).fold(0, |lines, (_, to)| lines | to)
}

/// MSR after the input lines became `lines`: deltas stay until read, RI counts only when it falls (8.7).
fn with_deltas(msr: u8, lines: u8) -> u8 {
    let changed = (msr ^ lines) >> 4;
    let fell = (msr & !lines) >> 4;
    let deltas = changed & !msr::TRAILING_RI | fell & msr::TRAILING_RI;
    lines | msr & msr::DELTAS | deltas
}

impl Device for Uart {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let now = Instant::now();
        for (offset, byte) in (offset..).zip(data) {
            *byte = self.read_at(offset, now);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let now = Instant::now();
        for (offset, &byte) in (offset..).zip(data) {
            self.write_at(offset, byte, now);
        }
    }

    fn reset(&mut self) {
        self.state = UartState::default();
        self.pump(Instant::now());
    }
}

impl Drop for Uart {
    fn drop(&mut self) {
        self.input.close();
    }
}

impl Snapshot for Uart {
    type State = UartState;

    fn save(&self) -> UartState {
        self.state.clone()
    }

    fn restore(&mut self, state: UartState) -> Result<(), BadState> {
        let bad = |what| Err(BadState::new("uart", what));
        let room = if state.fcr & fcr::ENABLE != 0 { FIFO_SIZE } else { 1 };
        match &state {
            s if s.ier & !ier::ALL != 0 => bad(format!("IER {:#x}", s.ier)),
            s if s.fcr & !fcr::KEPT != 0 => bad(format!("FCR {:#x}", s.fcr)),
            s if s.mcr & !mcr::ALL != 0 => bad(format!("MCR {:#x}", s.mcr)),
            s if s.rx.len() > room => bad(format!("{} bytes in a receiver for {room}", s.rx.len())),
            _ => {
                self.state = state;
                self.pump(Instant::now());
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Wire;
    use std::io;

    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            lock(&self.0).extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Bench {
        uart: Arc<Mutex<Uart>>,
        wire: Arc<Wire>,
        screen: Screen,
        _timers: Timers,
    }

    fn bench() -> Bench {
        let timers = Timers::start().unwrap();
        let (wire, screen) = (Arc::new(Wire::default()), Screen::default());
        let uart = Uart::new(IrqLine::new(wire.clone(), 4), Box::new(screen.clone()), &timers).unwrap();
        Bench { uart, wire, screen, _timers: timers }
    }

    impl Bench {
        fn read(&self, offset: u64) -> u8 {
            let mut byte = [0];
            lock(&self.uart).read(offset, &mut byte);
            byte[0]
        }
        fn write(&self, offset: u64, value: u8) {
            lock(&self.uart).write(offset, &[value]);
        }
        fn type_in(&self, bytes: &[u8]) {
            let input = lock(&self.uart).input();
            input.send(bytes);
        }
        /// Polls as an early console does, until `count` bytes came.
        fn receive(&self, count: usize) -> Vec<u8> {
            let deadline = Instant::now() + Duration::from_secs(20);
            let mut got = Vec::new();
            while got.len() < count && Instant::now() < deadline {
                if self.read(reg::LSR) & lsr::DATA_READY != 0 {
                    got.push(self.read(reg::RBR_THR_DLL));
                }
            }
            got
        }
        fn wait_for_irq(&self) {
            let deadline = Instant::now() + Duration::from_secs(5);
            while !self.wire.is_high() {
                assert!(Instant::now() < deadline, "no interrupt came");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    #[test]
    fn a_kernel_prints_by_polling_and_every_byte_reaches_the_screen() {
        let b = bench();
        let text: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
        for &byte in &text {
            while b.read(reg::LSR) & lsr::THR_EMPTY == 0 {}
            b.write(reg::RBR_THR_DLL, byte);
        }
        lock(&b.uart).flush(Duration::from_secs(5));
        assert!(*lock(&b.screen.0) == text);
        assert_eq!(b.wire.edges(), 0, "interrupts are off");
    }

    #[test]
    fn linux_finds_a_16550a_by_its_probes() {
        let b = bench();
        b.write(reg::IER_DLM, 0x0f);
        assert_eq!(b.read(reg::IER_DLM), 0x0f);
        b.write(reg::IER_DLM, 0);
        b.write(reg::MCR, mcr::LOOP | mcr::OUT2 | mcr::RTS);
        assert_eq!(b.read(reg::MSR) & 0xf0, msr::DCD | msr::CTS);
        b.write(reg::MCR, 0);
        b.write(reg::IIR_FCR, 0x01);
        assert_eq!(b.read(reg::IIR_FCR) >> 6, 3, "16550A, not 16550");
        b.write(reg::SCR, 0xa5);
        assert_eq!(b.read(reg::SCR), 0xa5);
        b.write(reg::LCR, 0x83);
        b.write(reg::RBR_THR_DLL, 0x0c);
        b.write(reg::IER_DLM, 0x01);
        assert_eq!((b.read(reg::RBR_THR_DLL), b.read(reg::IER_DLM)), (0x0c, 0x01));
    }

    #[test]
    fn the_transmit_interrupt_comes_when_enabled_and_again_after_each_write() {
        let b = bench();
        b.write(reg::MCR, mcr::OUT2);
        b.write(reg::IER_DLM, ier::THR_EMPTY);
        assert!(b.wire.is_high());
        assert_eq!(b.read(reg::IIR_FCR), iir::THR_EMPTY);
        assert!(!b.wire.is_high(), "looking at IIR acknowledges it");
        assert_eq!(b.read(reg::IIR_FCR), iir::NONE);
        let edges = b.wire.edges();
        b.write(reg::RBR_THR_DLL, b'a');
        b.write(reg::RBR_THR_DLL, b'b');
        assert_eq!(b.wire.edges(), edges + 2);
        b.write(reg::MCR, 0);
        assert!(!b.wire.is_high(), "OUT2 gates the line");
    }

    #[test]
    fn a_paste_arrives_whole_and_in_order_by_interrupts() {
        let b = bench();
        b.write(reg::IIR_FCR, 0xc7); // 14 bytes
        b.write(reg::MCR, mcr::OUT2 | mcr::RTS | mcr::DTR);
        b.write(reg::IER_DLM, ier::RECEIVED);
        let paste: Vec<u8> = (0..3000u32).map(|i| (i * 7) as u8).collect();
        b.type_in(&paste);
        let mut got = Vec::new();
        while got.len() < paste.len() {
            b.wait_for_irq();
            let cause = b.read(reg::IIR_FCR) & 0x0f;
            assert!(cause == iir::RECEIVED || cause == iir::TIMEOUT, "{cause:#x}");
            while b.read(reg::LSR) & lsr::DATA_READY != 0 {
                got.push(b.read(reg::RBR_THR_DLL));
            }
        }
        assert!(got == paste);
        assert!(!b.wire.is_high());
    }

    #[test]
    fn a_handler_that_reads_one_byte_per_interrupt_gets_them_all() {
        let b = bench();
        b.write(reg::IIR_FCR, 0x81);
        b.write(reg::MCR, mcr::OUT2 | mcr::RTS);
        b.write(reg::IER_DLM, ier::RECEIVED);
        b.type_in(b"login");
        let got: Vec<u8> = (0..5)
            .map(|_| {
                b.wait_for_irq();
                b.read(reg::RBR_THR_DLL)
            })
            .collect();
        assert_eq!(got, b"login");
    }

    #[test]
    fn what_is_typed_before_the_port_is_opened_waits_for_rts() {
        let b = bench();
        b.write(reg::MCR, mcr::DTR); // the console driver, nobody has the port open
        b.type_in(b"root\n");
        std::thread::sleep(Duration::from_millis(20));
        b.write(reg::IIR_FCR, 0x07);
        assert_eq!(b.read(reg::RBR_THR_DLL), 0, "the driver clears its registers for luck");
        b.write(reg::MCR, mcr::DTR | mcr::RTS | mcr::OUT2);
        assert_eq!(b.receive(5), b"root\n");
    }

    #[test]
    fn a_guest_that_ignores_modem_lines_receives_all_the_same() {
        let b = bench();
        b.type_in(b"y");
        assert_eq!(b.receive(1), b"y");
    }

    #[test]
    fn loopback_returns_bytes_and_counts_an_overrun() {
        let b = bench();
        b.write(reg::MCR, mcr::LOOP);
        b.write(reg::RBR_THR_DLL, b'1');
        b.write(reg::RBR_THR_DLL, b'2');
        b.write(reg::IER_DLM, ier::LINE_STATUS | ier::RECEIVED);
        assert_eq!(b.read(reg::IIR_FCR), iir::LINE_STATUS, "first in priority");
        assert_eq!(b.read(reg::LSR) & 3, lsr::OVERRUN | lsr::DATA_READY);
        assert_eq!(b.read(reg::IIR_FCR), iir::RECEIVED);
        assert_eq!(b.read(reg::RBR_THR_DLL), b'2');
        assert_eq!(b.read(reg::IIR_FCR), iir::NONE);
        lock(&b.uart).flush(Duration::from_secs(5));
        assert!(lock(&b.screen.0).is_empty());
    }

    #[test]
    fn a_saved_uart_goes_on_where_it_was_and_an_impossible_one_is_refused() {
        let b = bench();
        b.write(reg::IIR_FCR, 0x07);
        b.write(reg::MCR, mcr::LOOP | mcr::RTS);
        b.write(reg::RBR_THR_DLL, b'k');
        let saved = lock(&b.uart).save();
        let other = bench();
        lock(&other.uart).restore(saved.clone()).unwrap();
        assert_eq!(lock(&other.uart).save(), saved);
        assert_eq!(other.read(reg::RBR_THR_DLL), b'k');
        let too_many = UartState { rx: (0..17).collect(), fcr: 1, ..UartState::default() };
        assert!(lock(&other.uart).restore(too_many).is_err());
    }
}
