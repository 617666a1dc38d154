//! The transport as drivers and attackers use it; the device is an entropy source.

use ::pci::{PciFunction, reg};
use device::Snapshot;
use proptest::prelude::*;

use super::{F_EVENT_IDX, F_VERSION_1, status};
use crate::testing::*;
use crate::{Rng, VirtioState, lock};

const READY: u8 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;

#[test]
fn an_os_enumerates_the_device_and_gets_its_interrupts() {
    let board = Board::new(Rng::new());
    assert_eq!(board.config(0), [0xf4, 0x1a, 0x44, 0x10]);
    assert_eq!(board.config::<1>(8), [1], "revision of a non-transitional device");
    board.set_config(reg::BAR0, &[0xff; 8]);
    assert_eq!(u64::from_le_bytes(board.config(reg::BAR0)), 0xffff_ffff_ffff_c004);
    board.set_config(reg::BAR0, &0x41_0000_0000u64.to_le_bytes());
    board.set_config(reg::BAR0 + 8, &[0xff; 4]);
    assert_eq!(u32::from_le_bytes(board.config(reg::BAR0 + 8)), 0xffff_f000);
    board.set_config(reg::BAR0 + 8, &0xd000_0000u32.to_le_bytes());
    let ids: Vec<u8> = board.capabilities().iter().map(|cap| cap.0).collect();
    assert_eq!(ids, [0x11, 9, 9, 9, 9], "without device configuration");
    assert_eq!(board.block(1), (0x41_0000_0000, 56));
    let mut driver = Driver::find(board);
    driver.board.enable_msix();
    driver.initialize(u64::MAX);
    driver.fill(DATA, &[0; 64]);
    assert_eq!(driver.run(0, &[Buf::In(DATA, 60)]), 60);
    assert_ne!(driver.bytes(DATA, 60), [0; 60]);
    assert_eq!(driver.bytes(DATA + 60, 4), [0; 4]);
    driver.board.interrupts.wait(0x41);
    assert_eq!(driver.isr() & 1, 0, "no queue bit with MSI-X");
    assert!(!*lock(&driver.board.interrupts.line));
}

#[test]
fn a_guest_without_msix_gets_a_level_that_reading_isr_clears() {
    let mut driver = Driver::find(Board::new(Rng::new()));
    driver.initialize(F_VERSION_1);
    driver.run(0, &[Buf::In(DATA, 8)]);
    eventually("no interrupt", || *lock(&driver.board.interrupts.line));
    assert_eq!(driver.board.config::<1>(reg::STATUS)[0] & reg::STATUS_INTX as u8, reg::STATUS_INTX as u8);
    let command = reg::COMMAND_MEMORY | reg::COMMAND_BUS_MASTER;
    driver.board.set_config(reg::COMMAND, &(command | reg::COMMAND_INTX_DISABLE).to_le_bytes());
    assert!(!*lock(&driver.board.interrupts.line));
    driver.board.set_config(reg::COMMAND, &command.to_le_bytes());
    assert!(*lock(&driver.board.interrupts.line));
    assert_eq!((driver.isr(), driver.isr()), (1, 0));
    assert!(!*lock(&driver.board.interrupts.line));
}

#[test]
fn features_are_agreed_on_once_and_never_without_version_1() {
    let driver = Driver::find(Board::new(Rng::new()));
    assert_eq!(driver.features(), TRANSPORT);
    for bad in [0, F_EVENT_IDX, F_VERSION_1 | 1 << 5, F_VERSION_1 | 1 << 63] {
        driver.set(20, &[0]);
        driver.set(20, &[3]);
        driver.accept(bad);
        driver.set(20, &[READY]);
        assert_eq!(driver.status(), 3, "{bad:#x}");
        driver.set(20, &[READY | status::DRIVER_OK]);
        assert_eq!(driver.status(), 3, "{bad:#x}");
    }
    driver.accept(F_VERSION_1);
    driver.set(20, &[READY]);
    driver.accept(F_VERSION_1 | F_EVENT_IDX);
    driver.set(8, &0u32.to_le_bytes());
    assert_eq!((driver.status(), driver.get::<4>(12)), (READY, [0; 4]));
    driver.set(8, &2u32.to_le_bytes());
    assert_eq!(driver.get::<4>(12), [0; 4]);
    driver.set(0, &2u32.to_le_bytes());
    assert_eq!(driver.get::<4>(4), [0; 4], "no features past the 64th");
}

#[test]
fn registers_hold_only_what_can_be() {
    let driver = Driver::find(Board::new(Rng::new()));
    for bad in [0u16, 3, 128, 0x8000, 0xffff] {
        driver.set(24, &bad.to_le_bytes());
        assert_eq!(driver.get(24), 64u16.to_le_bytes());
    }
    driver.set(24, &16u16.to_le_bytes());
    assert_eq!(driver.get(24), 16u16.to_le_bytes());
    driver.set(26, &2u16.to_le_bytes());
    assert_eq!(driver.get(26), [0xff, 0xff], "there are vectors 0 and 1");
    driver.set(22, &1u16.to_le_bytes());
    assert_eq!(driver.get::<4>(24), [0; 4], "there is one queue");
    driver.set(28, &1u16.to_le_bytes());
    driver.set(0, &[1]);
    driver.set(1000, &[1; 4]);
    assert_eq!(driver.get::<4>(1000), [0; 4]);
    driver.set(22, &0u16.to_le_bytes());
    driver.set(32, &0x12_3456_7890u64.to_le_bytes());
    driver.set(36, &9u32.to_le_bytes());
    assert_eq!(driver.get(32), 0x9_3456_7890u64.to_le_bytes());
    driver.set(20, &[0]);
    assert_eq!((driver.get(24), driver.get(32)), (64u16.to_le_bytes(), 0u64.to_le_bytes()));
}

#[test]
fn the_window_in_configuration_space_reaches_the_registers() {
    let board = Board::new(Rng::new());
    let caps = board.capabilities();
    let (_, at) = *caps.iter().rev().find(|cap| cap.0 == reg::CAP_VENDOR).unwrap();
    assert_eq!(board.config::<1>(at + 3), [5]);
    let aim = |offset: u32, length: u32| {
        board.set_config(at + 4, &[0]);
        board.set_config(at + 8, &offset.to_le_bytes());
        board.set_config(at + 12, &length.to_le_bytes());
    };
    aim(18, 2);
    assert_eq!(board.config::<2>(at + 16), [1, 0], "one queue");
    aim(20, 1);
    board.set_config(at + 16, &[1]);
    assert_eq!(board.config::<1>(at + 16), [1], "status");
    for (offset, length) in [(20, 3), (21, 2), (20, 0), (0xffff_fffc, 4), (20, u32::MAX)] {
        aim(offset, length);
        board.set_config(at + 16, &[0; 4]);
        board.config::<4>(at + 16);
    }
    aim(20, 1);
    assert_eq!(board.config::<1>(at + 16), [1]);
}

#[test]
fn one_interrupt_answers_a_batch_and_the_driver_may_refuse_it() {
    let mut driver = Driver::start(Rng::new());
    for _ in 0..10 {
        driver.add(0, &[Buf::In(DATA, 16)]);
    }
    driver.kick(0);
    (0..10).for_each(|_| assert_eq!(driver.wait_used(0).1, 16));
    driver.board.interrupts.wait(0x41);
    lock(&driver.board.function).pause(); // whatever was to come has come
    assert_eq!(driver.board.interrupts.count(0x41), 0);
    // used_event is still 0: chain 11 passes it not.
    lock(&driver.board.function).resume();
    driver.run(0, &[Buf::In(DATA, 16)]);
    lock(&driver.board.function).pause();
    assert_eq!(driver.board.interrupts.count(0x41), 0);

    lock(&driver.board.function).resume();
    driver.initialize(F_VERSION_1);
    driver.fill(driver.table(0) + 0x4000, &[1, 0]); // VIRTQ_AVAIL_F_NO_INTERRUPT
    driver.run(0, &[Buf::In(DATA, 16)]);
    lock(&driver.board.function).pause();
    assert_eq!(driver.board.interrupts.count(0x41), 0);
}

/// Sets the queue up by `attack`; the device must ask for a reset, and work after it.
fn breaks(attack: impl FnOnce(&mut Driver)) {
    let mut driver = Driver::start(Rng::new());
    attack(&mut driver);
    driver.kick(0);
    eventually("the device takes no offence", || driver.status() & status::NEEDS_RESET != 0);
    driver.board.interrupts.wait(0x40);
    driver.kick(0);
    driver.initialize(u64::MAX);
    assert_eq!(driver.status(), READY | status::DRIVER_OK);
    assert_eq!(driver.run(0, &[Buf::In(DATA, 8)]), 8);
}

#[test]
fn a_descriptor_loop_breaks_the_device() {
    breaks(|driver| {
        let table = driver.table(0);
        driver.descriptor(table, 0, DATA, 16, F_WRITE | F_NEXT, 1);
        driver.descriptor(table, 1, DATA, 16, F_WRITE | F_NEXT, 0);
        driver.make_available(0, 0);
    });
}

#[test]
fn indices_out_of_range_break_the_device() {
    breaks(|driver| driver.make_available(0, 64));
    breaks(|driver| {
        driver.descriptor(driver.table(0), 0, DATA, 16, F_WRITE | F_NEXT, 64);
        driver.make_available(0, 0);
    });
    breaks(|driver| driver.set_avail(0, 65));
    breaks(|driver| driver.set_avail(0, 0xffff));
}

#[test]
fn buffers_outside_of_memory_break_the_device() {
    for (addr, len) in
        [(RAM, 1), (RAM - 8, 9), (u64::MAX - 4, 8), (u64::MAX, 1), (0, u32::MAX), (0xfee0_0000, 4)]
    {
        breaks(|driver| {
            driver.add(0, &[Buf::In(addr, len)]);
        });
    }
}

#[test]
fn bad_indirect_tables_break_the_device() {
    let indirect = |driver: &mut Driver, addr, len| {
        driver.descriptor(driver.table(0), 0, addr, len, F_INDIRECT, 0);
        driver.make_available(0, 0);
    };
    breaks(|driver| indirect(driver, DATA, 17));
    breaks(|driver| indirect(driver, RAM, 32));
    breaks(|driver| indirect(driver, DATA, 0));
    breaks(|driver| {
        // Nested, and longer than the queue.
        driver.descriptor(DATA, 0, DATA, 16, F_INDIRECT, 0);
        indirect(driver, DATA, 16);
    });
    breaks(|driver| {
        for i in 0..65 {
            driver.descriptor(DATA, i, DATA + 0x1000, 1, F_WRITE | F_NEXT, i + 1);
        }
        indirect(driver, DATA, 66 * 16);
    });
}

#[test]
fn readable_buffers_after_writable_ones_break_the_device() {
    breaks(|driver| {
        driver.add(0, &[Buf::In(DATA, 1), Buf::Out(DATA, 1)]);
    });
}

#[test]
fn rings_outside_of_memory_break_the_device() {
    for (register, address) in
        [(32, RAM), (40, RAM - 2), (48, u64::MAX - 3), (32, 8), (40, 0x2_0001), (48, 0x2_0002)]
    {
        let driver = Driver::start(Rng::new());
        driver.set(20, &[0]);
        driver.set(20, &[3]);
        driver.accept(F_VERSION_1);
        driver.set(20, &[READY]);
        for (register, address) in [(32, 0x1_0000u64), (40, 0x1_4000), (48, 0x1_8000), (register, address)] {
            driver.set(register, &address.to_le_bytes());
        }
        driver.set(28, &1u16.to_le_bytes());
        driver.set(20, &[READY | status::DRIVER_OK]);
        assert_eq!(
            driver.status(),
            READY | status::DRIVER_OK | status::NEEDS_RESET,
            "{register}: {address:#x}"
        );
    }
}

#[test]
fn zero_length_buffers_and_indirect_tables_are_fine() {
    let mut driver = Driver::start(Rng::new());
    assert_eq!(
        driver.run(0, &[Buf::In(DATA, 0), Buf::In(DATA, 5), Buf::In(RAM + 9, 0), Buf::In(DATA + 9, 1)]),
        6
    );
    assert_eq!(driver.run(0, &[Buf::In(DATA, 0)]), 0);
    driver.descriptor(DATA, 0, DATA + 0x100, 8, F_WRITE | F_NEXT, 2);
    driver.descriptor(DATA, 2, DATA + 0x200, 8, F_WRITE, 0);
    driver.descriptor(driver.table(0), 9, DATA, 48, F_INDIRECT, 0);
    driver.make_available(0, 9);
    driver.kick(0);
    assert_eq!(driver.wait_used(0), (9, 16));
    assert_ne!(driver.bytes(DATA + 0x200, 8), [0; 8]);
}

#[test]
fn an_empty_queue_gives_no_interrupt() {
    let mut driver = Driver::find(Board::new(Rng::new()));
    driver.board.enable_msix();
    driver.initialize(F_VERSION_1);
    (0..5).for_each(|_| driver.kick(0));
    driver.run(0, &[Buf::In(DATA, 1)]);
    driver.board.interrupts.wait(0x41);
    lock(&driver.board.function).pause();
    lock(&driver.board.function).resume();
    lock(&driver.board.function).pause();
    assert_eq!(driver.board.interrupts.count(0x41), 0);
}

#[test]
fn an_engine_may_signal_a_kick_by_itself() {
    let mut driver = Driver::start(Rng::new());
    driver.run(0, &[Buf::In(DATA, 1)]);
    let at = driver.board.block(2).0 - driver.board.block(1).0;
    let doorbell = |bar, offset| lock(&driver.board.function).doorbell(bar, offset);
    assert!(
        [(0, at + 1), (0, at + 4), (0, at - 4), (2, at)].map(|(b, o)| doorbell(b, o).is_none()) == [true; 4]
    );
    let event = doorbell(0, at).unwrap();
    driver.add(0, &[Buf::In(DATA, 9)]);
    event.write(1).unwrap();
    assert_eq!(driver.wait_used(0).1, 9);
}

#[test]
fn a_device_that_is_no_bus_master_touches_no_memory() {
    let mut driver = Driver::start(Rng::new());
    driver.board.set_config(reg::COMMAND, &reg::COMMAND_MEMORY.to_le_bytes());
    driver.add(0, &[Buf::In(DATA, 16)]);
    driver.kick(0);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!((driver.bytes(DATA, 16), driver.used_index(0)), (vec![0; 16], 0));
    driver.board.set_config(reg::COMMAND, &(reg::COMMAND_MEMORY | reg::COMMAND_BUS_MASTER).to_le_bytes());
    assert_eq!(driver.wait_used(0), (0, 16));
}

#[test]
fn rings_wrap_around() {
    let mut driver = Driver::start(Rng::new());
    for _ in 0..70_000 / 64 {
        for _ in 0..64 {
            driver.add(0, &[Buf::In(DATA, 1)]);
        }
        driver.kick(0);
        for _ in 0..64 {
            assert_eq!(driver.wait_used(0).1, 1);
        }
    }
}

fn through_json(state: &VirtioState) -> VirtioState {
    serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
}

#[test]
fn a_saved_device_goes_on_elsewhere() {
    let mut driver = Driver::start(Rng::new());
    (0..5).for_each(|_| assert_eq!(driver.run(0, &[Buf::In(DATA, 16)]), 16));
    lock(&driver.board.function).pause();
    driver.add(0, &[Buf::In(DATA, 24)]);
    driver.kick(0); // and it is noticed without the kick
    let state = lock(&driver.board.function).save();
    let board = Board::with_ram(Rng::new(), driver.board.ram.clone());
    lock(&board.function).restore(through_json(&state)).unwrap();
    board.root.refresh();
    assert_eq!(lock(&board.function).save().queues[0].desc, state.queues[0].desc);
    let mut driver = driver.move_to(board);
    assert_eq!(driver.wait_used(0), (5, 24));
    assert_eq!(driver.run(0, &[Buf::In(DATA, 7)]), 7);
}

#[test]
fn impossible_states_are_refused_and_change_nothing() {
    let driver = Driver::start(Rng::new());
    let mut function = lock(&driver.board.function);
    function.pause();
    let state = function.save();
    let spoil: [fn(&mut VirtioState); 9] = [
        |s| s.status |= 0x10,
        |s| s.status = status::DRIVER_OK,
        |s| s.driver_features |= 1 << 40,
        |s| s.queues[0].size = 48,
        |s| s.queues.clear(),
        |s| s.queue_vectors = vec![2],
        |s| s.config_vector = 7,
        |s| s.msix.pending = vec![2],
        |s| s.config.registers[0].0 += 4,
    ];
    for spoil in spoil {
        let mut bad = state.clone();
        spoil(&mut bad);
        assert!(function.restore(bad.clone()).is_err(), "{bad:?}");
        assert_eq!(function.save(), state);
    }
    let console = crate::console::ConsoleState { input: vec![], driver_ready: false, ports: vec![] };
    let bad = VirtioState { device: crate::DeviceState::Console(console), ..state.clone() };
    assert!(function.restore(bad).is_err());
    function.restore(state).unwrap();
}

#[test]
fn the_machines_reset_is_power_on() {
    let fresh = |board: &Board| lock(&board.function).save();
    let before = fresh(&Board::new(Rng::new()));
    let mut driver = Driver::start(Rng::new());
    driver.run(0, &[Buf::In(DATA, 16)]);
    driver.board.root.reset().unwrap();
    assert_eq!(fresh(&driver.board), before);
}

/// A descriptor that is bad in interesting ways.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address =
        prop_oneof![4 => DATA..DATA + 0x2000, 1 => 0..RAM * 2, 1 => any::<u64>(), 1 => Just(0x1_0000u64)];
    let length = prop_oneof![4 => 0..64u32, 1 => (0..9u32).prop_map(|n| n * 16), 1 => any::<u32>()];
    (address, length, 0..8u16, prop_oneof![4 => 0..8u16, 1 => any::<u16>()])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn random_descriptor_tables_are_survived(
        direct in prop::collection::vec(descriptor(), 8),
        indirect in prop::collection::vec(descriptor(), 8),
        heads in prop::collection::vec(prop_oneof![8 => 0..8u16, 1 => any::<u16>()], 1..8),
        index in prop_oneof![4 => 0..9u16, 1 => any::<u16>()],
    ) {
        let mut driver = Driver::start(Rng::new());
        for (i, d) in direct.into_iter().enumerate() {
            driver.descriptor(driver.table(0), i as u16, d.0, d.1, d.2, d.3);
        }
        for (i, d) in indirect.into_iter().enumerate() {
            driver.descriptor(DATA, i as u16, d.0, d.1, d.2, d.3);
        }
        for head in heads {
            driver.make_available(0, head);
        }
        driver.set_avail(0, index);
        driver.kick(0);
        driver.kick(0);
        lock(&driver.board.function).pause();
        lock(&driver.board.function).resume();
        driver.initialize(u64::MAX);
        prop_assert_eq!(driver.run(0, &[Buf::In(DATA, 8)]), 8);
    }

    #[test]
    fn random_register_writes_are_survived(
        writes in prop::collection::vec((0..0x5000u64, any::<u64>(), prop::sample::select(vec![1usize, 2, 3, 4, 8])), 1..60),
    ) {
        let mut driver = Driver::start(Rng::new());
        let base = driver.board.block(1).0;
        for (offset, value, width) in writes {
            let mut data = [0; 8];
            driver.board.mmio.write(base + offset % 0x4400, &value.to_le_bytes()[..width]);
            driver.board.mmio.read(base + offset % 0x4400, &mut data[..width]);
            driver.board.mmio.write(base + offset % 60, &(value % 20).to_le_bytes()[..width]);
        }
        driver.initialize(u64::MAX);
        prop_assert_eq!(driver.run(0, &[Buf::In(DATA, 8)]), 8);
    }
}
