//! A guest that writes anything anywhere: no device panics, and each can be saved, restored and reset
//! in whatever state that left it.

use std::sync::{Arc, Mutex};

use chipset::{
    AcpiPm, DualPic, Hpet, HpetLines, I8042, IoApic, MemorySizes, Pit, Port61, Port92, Post, PowerSink,
    ResetControl, Rtc, Uart,
};
use device::{Device, IrqLine, IrqSink, Msi, MsiSink, Snapshot, Timers};
use dice::Dice;

struct Nowhere;

impl IrqSink for Nowhere {
    fn set_level(&self, _pin: u32, _high: bool) {}
}

impl MsiSink for Nowhere {
    fn send(&self, _msi: Msi) {}
}

fn line() -> IrqLine {
    IrqLine::new(Arc::new(Nowhere), 0)
}

fn power() -> PowerSink {
    Arc::new(|_| {})
}

fn torment<D: Device>(device: &Mutex<D>, registers: u64) {
    let mut dice = Dice::new(registers);
    for _ in 0..50_000 {
        let mut device = device.lock().unwrap();
        let bits = dice.roll();
        let offset = (bits >> 8 & 0xffff) % (registers + 2); // sometimes past the end
        let mut data = dice.roll().to_le_bytes();
        let data = &mut data[..[1, 1, 1, 2, 4, 8, 3, 0][(bits >> 32) as usize % 8]];
        match bits >> 40 & 1 {
            0 => device.read(offset, data),
            _ => device.write(offset, data),
        }
    }
}

/// As [`torment`], and then the state it ended in is one that restore takes.
fn torment_and_keep<D: Device + Snapshot>(device: &Mutex<D>, registers: u64) {
    torment(device, registers);
    let mut device = device.lock().unwrap();
    let state = device.save();
    device.reset();
    device.restore(state).expect("a state that the guest can reach");
}

#[test]
fn no_sequence_of_accesses_harms_a_device() {
    let timers = Timers::start().unwrap();
    let memory = MemorySizes { below_4g: 3 << 30, above_4g: 1 << 30 };
    torment_and_keep(&Uart::new(line(), Box::new(std::io::sink()), &timers).unwrap(), 8);
    torment_and_keep(&Rtc::new(line(), &timers, &memory, 4), 2);
    torment_and_keep(&AcpiPm::new(line(), power(), &timers), 12);
    torment_and_keep(&Mutex::new(DualPic::new(|_| {})), 6);
    torment_and_keep(&Mutex::new(IoApic::new(1, Arc::new(Nowhere))), 0x50);
    torment_and_keep(&Mutex::new(I8042::new(power())), 5);
    torment_and_keep(&Hpet::new(HpetLines::new(Arc::new(Nowhere)), &timers), 0x180);
    torment_and_keep(&Mutex::new(Port92::new(power())), 1);
    torment_and_keep(&Mutex::new(Post::default()), 1);
    torment_and_keep(&Mutex::new(ResetControl::new(power())), 1);
    torment(&Mutex::new(chipset::DebugExit::new(power())), 4);
    let pit = Pit::new(line(), &timers);
    let port61 = Mutex::new(Port61::new(pit.clone()));
    for _ in 0..4 {
        torment(&port61, 1);
        torment_and_keep(&pit, 4);
    }
}
