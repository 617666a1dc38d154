//! Two vCPUs that mean harm to the whole board at once: ports and memory, at any width, while the machine is
//! reset, paused and saved. Nothing panics, nothing hangs, and the next kernel finds a machine.
//!
//! `OSPITE_SEEDS=N` tries N seeds; a failure names its own, and `OSPITE_SEED=S` begins there.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Once, mpsc};
use std::time::Duration;

use dice::{Dice, seeds};
use engine::CpuIo;

use super::{bench_with, card, disk_driver};

const SEEDS: u64 = 6;
const ACCESSES: usize = 300_000;
/// After which a seed hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where devices answer.
const PORTS: [std::ops::Range<u16>; 14] = [
    0x20..0x22,
    0x40..0x44,
    0x60..0x65,
    0x70..0x72,
    0x80..0x81,
    0x92..0x93,
    0xa0..0xa2,
    0xe0..0xe8,
    0xf4..0xf8,
    0x3f8..0x400,
    0x4d0..0x4d2,
    0x600..0x60c,
    0xcf8..0xd00,
    0x2000..0x2010,
];
/// BARs, ECAM, I/O APIC, HPET, local APIC, the test device, the ends of memory and of all addresses.
const MEMORY: [(u64, u64); 9] = [
    (0xc000_0000, 0x4_0000),
    (0xc000_0000, 0x2000_0000),
    (0xe000_0000, 0x10_0000),
    (0xfec0_0000, 0x40),
    (0xfed0_0000, 0x400),
    (0xfee0_0000, 0x1000),
    (0xff00_0000, 0x1_0000),
    (0x3ff_fff0, 32),
    (u64::MAX - 64, 60),
];

fn value(dice: &mut Dice) -> u64 {
    let some = dice.roll();
    dice.of(&[
        0,
        1,
        2,
        3,
        4,
        6,
        7,
        0xf,
        0x34,
        0x36,
        0x80,
        0xff,
        0xffff,
        0x8000_0000,
        u64::MAX,
        some,
        some,
        some,
    ])
}

fn port(dice: &mut Dice) -> u16 {
    let range = &PORTS[dice.place(PORTS.len())];
    let near = range.start + dice.below(u64::from(range.end - range.start)) as u16;
    let any = dice.roll() as u16;
    dice.of(&[near, near, near, near, near, near, near, any])
}

fn address(dice: &mut Dice) -> u64 {
    let (start, length) = dice.of(&MEMORY);
    let at = start + dice.below(length);
    // Mostly where registers begin.
    if dice.one_in(4) { at } else { at & !3 }
}

/// One access.
fn access(dice: &mut Dice, io: &dyn CpuIo) {
    let bytes = value(dice).to_le_bytes();
    let mut read = [0; 16];
    let (port_width, width) = (dice.of(&[1usize, 1, 1, 2, 4]), dice.of(&[1usize, 2, 4, 4, 4, 8, 3, 0]));
    match dice.below(9) {
        0..2 => io.port_read(port(dice), &mut read[..port_width]),
        2..5 => io.port_write(port(dice), &bytes[..port_width]),
        5 => io.mmio_read(address(dice), &mut read[..width]),
        6..8 => io.mmio_write(address(dice), &bytes[..width]),
        _ => {
            io.end_of_interrupt(bytes[0]);
            io.acknowledge_extint();
            io.mmio_read(address(dice), &mut read);
        }
    }
}

/// Panics on threads of machines so far. Tests' own threads have tests' names.
fn panics() -> usize {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let thread = std::thread::current();
            if ["timers", "serial", "virtio", "hostile"]
                .iter()
                .any(|of| thread.name().is_some_and(|name| name.starts_with(of)))
            {
                COUNT.fetch_add(1, Ordering::SeqCst);
            }
            before(info);
        }));
    });
    COUNT.load(Ordering::SeqCst)
}

fn attack(seed: u64) {
    let mut b = bench_with(|spec| {
        (spec.hpet, spec.test_device) = (true, true);
        spec.nets.push(card(1));
    });
    let over = Arc::new(AtomicBool::new(false));
    let vcpus: Vec<_> = (0..2)
        .map(|cpu| {
            let (io, over) = (b.machine.io(), over.clone());
            let mut dice = Dice::new(2 * seed + cpu);
            let body = move || {
                (0..ACCESSES)
                    .take_while(|_| !over.load(Ordering::Relaxed))
                    .for_each(|_| access(&mut dice, &*io));
            };
            std::thread::Builder::new().name("hostile".into()).spawn(body).unwrap()
        })
        .collect();
    let mut dice = Dice::new(seed | 1 << 40);
    while vcpus.iter().any(|vcpu| !vcpu.is_finished()) {
        match dice.below(4) {
            0 => b.machine.press_power_button(),
            1 => b.machine.pause(),
            2 => b.machine.resume(),
            _ => drop(b.machine.serial().try_send(b"keys")),
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    // The vCPUs stand still, as for the real thing.
    let saved = b.machine.save(&b.vcpus).unwrap();
    b.machine.restore(saved, &mut b.vcpus).unwrap();
    b.machine.resume();
    b.machine.reset(&mut b.vcpus).unwrap();
    b.machine.ram().take_dirty();
    b.guest(disk_driver::start);
    b.write_sector(0, 5, b"after");
    b.machine.flush().unwrap();
    assert_eq!(b.sector(5, 5), b"after");
}

#[test]
fn no_access_to_the_board_harms_it() {
    for seed in seeds(SEEDS) {
        let before = panics();
        let (done, ended) = mpsc::channel();
        std::thread::spawn(move || {
            attack(seed);
            let _ = done.send(());
        });
        assert_eq!(ended.recv_timeout(PATIENCE), Ok(()), "OSPITE_SEED={seed}");
        assert_eq!(panics(), before, "OSPITE_SEED={seed}");
    }
}
