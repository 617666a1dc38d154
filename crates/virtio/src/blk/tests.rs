//! The disk through its queue, as drivers and attackers use it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use disk::{Description, Format, Slice};
use proptest::prelude::*;

use super::*;
use crate::testing::*;
use crate::{Slices, lock};

/// Header, status and contents of the tests' requests.
const HEADER: u64 = DATA;
const STATUS: u64 = DATA + 0x100;
const BUFFER: u64 = DATA + 0x1000;

fn image(length: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(length).unwrap();
    file
}

fn start(path: &Path, read_only: bool) -> Driver {
    Driver::start(Blk::new(
        disk::open(path, Some(Format::Raw), read_only).unwrap(),
        "ospite-0123456789-0123456789",
    ))
}

impl Driver {
    fn header(&self, kind: u32, sector: u64) {
        self.fill(HEADER, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
        self.fill(STATUS, &[0xff]);
    }

    /// Runs a request with this data buffer; its status.
    fn request(&mut self, kind: u32, sector: u64, data: Option<Buf>) -> u8 {
        self.header(kind, sector);
        let mut bufs = vec![Buf::Out(HEADER, 16)];
        bufs.extend(data);
        bufs.push(Buf::In(STATUS, 1));
        self.run(0, &bufs);
        self.bytes(STATUS, 1)[0]
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let bytes = |(sector, count, flags): &(u64, u32, u32)| {
            [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
        };
        self.fill(BUFFER, &ranges.iter().flat_map(bytes).collect::<Vec<_>>());
        self.request(kind, 0, Some(Buf::Out(BUFFER, 16 * ranges.len() as u32)))
    }
}

#[test]
fn sectors_are_written_read_and_flushed() {
    let file = image(1 << 20);
    let mut driver = start(file.path(), false);
    assert_eq!(driver.device_config::<8>(0), 2048u64.to_le_bytes());
    driver.fill(BUFFER, &[0x5a; 1024]);
    assert_eq!(driver.request(1, 7, Some(Buf::Out(BUFFER, 1024))), 0);
    assert_eq!(driver.request(4, 0, None), 0);
    assert_eq!(fs::read(file.path()).unwrap()[7 * 512..9 * 512], [0x5a; 1024]);
    assert_eq!(driver.request(0, 6, Some(Buf::In(BUFFER + 0x1000, 1536))), 0);
    assert_eq!(driver.bytes(BUFFER + 0x1000, 1536), [&[0; 512][..], &[0x5a; 1024]].concat());
    assert_eq!(driver.request(8, 0, Some(Buf::In(BUFFER, 20))), 0);
    assert_eq!(driver.bytes(BUFFER, 20), b"ospite-0123456789-01");
    driver.board.interrupts.wait(0x41);
}

#[test]
fn layouts_of_descriptors_do_not_matter() {
    let file = image(1 << 20);
    let mut driver = start(file.path(), false);
    driver.header(1, 3);
    driver.fill(BUFFER, &(0..=255).cycle().take(512).collect::<Vec<u8>>());
    // A header in pieces, the last together with data; empty pieces.
    driver.fill(HEADER + 16, &driver.bytes(BUFFER, 100));
    driver.run(
        0,
        &[
            Buf::Out(HEADER, 1),
            Buf::Out(HEADER, 0),
            Buf::Out(HEADER + 1, 9),
            Buf::Out(HEADER + 10, 106),
            Buf::Out(BUFFER + 100, 412),
            Buf::In(STATUS, 1),
        ],
    );
    assert_eq!(driver.bytes(STATUS, 1), [0]);
    assert_eq!(fs::read(file.path()).unwrap()[1536..2048], driver.bytes(BUFFER, 512));
    // A read whose status byte follows the data in one buffer.
    driver.header(0, 3);
    let to = BUFFER + 0x1000;
    driver.fill(to, &[0xff; 520]);
    assert_eq!(driver.run(0, &[Buf::Out(HEADER, 16), Buf::In(to, 3), Buf::In(to + 3, 510)]), 513);
    assert_eq!(driver.bytes(to, 514), [&driver.bytes(BUFFER, 512)[..], &[0, 0xff]].concat());
}

#[test]
fn requests_that_cannot_be_get_an_error_status() {
    let file = image(1 << 20);
    let mut driver = start(file.path(), false);
    for (kind, sector, length, status) in [
        (1, 2048, 512, 1),
        (1, 2047, 1024, 1),
        (1, u64::MAX, 512, 1),
        (1, 1 << 55, 512, 1),
        (1, 0, 511, 1),
        (2, 0, 512, 2),
        (5, 0, 512, 2),
        (0xffff_ffff, 0, 512, 2),
    ] {
        assert_eq!(
            driver.request(kind, sector, Some(Buf::Out(BUFFER, length))),
            status,
            "{kind} {sector} {length}"
        );
    }
    assert_eq!(driver.request(0, 2048, Some(Buf::In(BUFFER, 512))), 1);
    driver.run(0, &[Buf::Out(HEADER, 15), Buf::In(STATUS, 1)]);
    assert_eq!(driver.bytes(STATUS, 1), [1], "half a header");
    assert_eq!(driver.request(0, 0, Some(Buf::In(BUFFER, 512))), 0, "and goes on");
    driver.add(0, &[Buf::Out(HEADER, 16)]);
    driver.kick(0);
    eventually("no room for a status is fine", || driver.status() & 64 != 0);
}

#[test]
fn a_read_only_disk_says_so_and_stays_as_it_is() {
    let file = image(1 << 20);
    let mut driver = start(file.path(), true);
    assert_eq!(driver.features() & (feature::RO | feature::DISCARD | feature::CONFIG_WCE), feature::RO);
    driver.fill(BUFFER, &[1; 512]);
    assert_eq!(driver.request(1, 0, Some(Buf::Out(BUFFER, 512))), 1);
    assert_eq!(driver.ranges(11, &[(0, 8, 0)]), 1);
    assert_eq!(driver.ranges(13, &[(0, 8, 1)]), 1);
    assert_eq!(driver.request(0, 0, Some(Buf::In(BUFFER, 512))), 0);
    assert_eq!(driver.bytes(BUFFER, 512), [0; 512]);
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let file = image(1 << 20);
    fs::write(file.path(), vec![0xee; 1 << 20]).unwrap();
    let mut driver = start(file.path(), false);
    assert_eq!(driver.ranges(11, &[(0, 16, 0), (32, 16, 0)]), 0);
    assert_eq!(driver.ranges(13, &[(64, 16, 1), (97, 3, 0)]), 0);
    let mut expected = vec![0xee; 1 << 20];
    for sectors in [0..16, 32..48, 64..80, 97..100] {
        expected[sectors.start * 512..sectors.end * 512].fill(0);
    }
    assert!(fs::read(file.path()).unwrap() == expected);
    for (kind, range, status) in [
        (11, (0, 8, 1), 2),
        (13, (0, 8, 2), 2),
        (13, (2048, 1, 0), 1),
        (11, (u64::MAX, 1, 0), 1),
        (13, (0, 1 << 22, 0), 1),
    ] {
        assert_eq!(driver.ranges(kind, &[range]), status, "{kind} {range:?}");
    }
    assert_eq!(driver.ranges(11, &[(0, 1, 0); 33]), 1);
    assert_eq!(driver.ranges(11, &[]), 1);
    assert!(fs::read(file.path()).unwrap() == expected);
}

/// A disk of nothing, which notes what is asked of it.
#[derive(Default)]
struct Log {
    calls: Mutex<Vec<String>>,
    failures: AtomicUsize,
}

impl Log {
    fn note(&self, call: impl Into<String>) -> Result<()> {
        lock(&self.calls).push(call.into());
        match self.failures.load(Ordering::Relaxed) {
            0 => Ok(()),
            _ => Err(std::io::ErrorKind::StorageFull.into()),
        }
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.calls))
    }
}

struct Logged(Arc<Log>);

impl Disk for Logged {
    fn size(&self) -> u64 {
        1 << 20
    }
    fn description(&self) -> Description {
        Description { format: Format::Raw, probed: false, read_only: false, size: self.size() }
    }
    fn discard_granularity(&self) -> u64 {
        4096
    }
    fn read_vectored_at(&self, slices: &[Slice<'_>], offset: u64) -> Result<()> {
        self.0.note(format!("read {} at {offset}", slices.len()))
    }
    fn write_vectored_at(&self, slices: &[Slice<'_>], offset: u64) -> Result<()> {
        self.0.note(format!("write {} at {offset}", slices.len()))
    }
    fn flush(&self) -> Result<()> {
        self.0.note("flush")
    }
    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.0.note(format!("discard {length} at {offset}"))
    }
    fn write_zeroes(&self, offset: u64, length: u64, _may_free: bool) -> Result<()> {
        self.0.note(format!("zero {length} at {offset}"))
    }
}

fn logged() -> (Arc<Log>, Driver) {
    let log = Arc::new(Log::default());
    let driver = Driver::start(Blk::new(Box::new(Logged(log.clone())), ""));
    (log, driver)
}

#[test]
fn without_a_write_cache_each_write_is_flushed_before_it_is_done() {
    let (log, mut driver) = logged();
    let write = |driver: &mut Driver| driver.request(1, 0, Some(Buf::Out(BUFFER, 512)));
    assert_eq!((driver.device_config(WRITEBACK), write(&mut driver)), ([1], 0));
    assert_eq!(log.take(), ["write 1 at 0"]);
    driver.set_device_config(WRITEBACK, &[0]);
    assert_eq!(write(&mut driver), 0);
    assert_eq!(driver.ranges(13, &[(8, 1, 0)]), 0);
    assert_eq!(log.take(), ["write 1 at 0", "flush", "zero 512 at 4096", "flush"]);
    driver.initialize(TRANSPORT);
    assert_eq!(write(&mut driver), 0);
    assert_eq!(log.take(), ["write 1 at 0", "flush"], "a driver that knows no flush");
    driver.initialize(u64::MAX);
    assert_eq!((driver.device_config(WRITEBACK), write(&mut driver)), ([1], 0));
    assert_eq!(log.take(), ["write 1 at 0"]);
}

/// A disk that takes its time.
struct Slow;

impl Disk for Slow {
    fn size(&self) -> u64 {
        1 << 20
    }
    fn description(&self) -> Description {
        Description { format: Format::Raw, probed: false, read_only: false, size: self.size() }
    }
    fn discard_granularity(&self) -> u64 {
        4096
    }
    fn read_vectored_at(&self, _slices: &[Slice<'_>], _offset: u64) -> Result<()> {
        std::thread::sleep(Duration::from_millis(100));
        Ok(())
    }
    fn write_vectored_at(&self, _slices: &[Slice<'_>], _offset: u64) -> Result<()> {
        Ok(())
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn discard(&self, _offset: u64, _length: u64) -> Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _offset: u64, _length: u64, _may_free: bool) -> Result<()> {
        Ok(())
    }
}

#[test]
fn a_device_with_much_to_do_stands_still_after_one_request_and_goes_on_with_the_others() {
    let mut driver = Driver::start(Blk::new(Box::new(Slow), "slow"));
    driver.header(0, 0);
    for _ in 0..80 {
        driver.add(0, &[Buf::Out(HEADER, 16), Buf::In(BUFFER, 512), Buf::In(STATUS, 1)]);
    }
    driver.kick(0);
    eventually("it never begins", || driver.used_index(0) > 0);
    let began = Instant::now();
    lock(&driver.board.function).pause();
    assert!(began.elapsed() < Duration::from_secs(4), "it took {:?}", began.elapsed());
    let done = driver.used_index(0);
    assert!(done < 40);
    lock(&driver.board.function).resume();
    eventually("it does not go on", || driver.used_index(0) > done + 1);
}

#[test]
fn a_failing_host_is_an_io_error_in_the_guest() {
    let (log, mut driver) = logged();
    log.failures.store(1, Ordering::Relaxed);
    assert_eq!(driver.request(1, 0, Some(Buf::Out(BUFFER, 512))), 1);
    assert_eq!(driver.request(4, 0, None), 1);
    log.failures.store(0, Ordering::Relaxed);
    assert_eq!(driver.request(4, 0, None), 0);
}

#[test]
fn a_disk_that_goes_away_is_flushed_and_unlocked() {
    let (log, driver) = logged();
    drop(driver);
    assert_eq!(log.take(), ["flush"]);
    assert_eq!(Arc::strong_count(&log), 1, "its thread has ended");
    let file = image(1 << 20);
    let driver = start(file.path(), false);
    assert!(disk::open(file.path(), None, false).is_err());
    drop(driver);
    disk::open(file.path(), None, false).unwrap();
}

#[test]
fn a_batch_of_writes_ends_in_one_interrupt() {
    let (log, mut driver) = logged();
    driver.header(1, 0);
    let request = [Buf::Out(HEADER, 16), Buf::Out(BUFFER, 512), Buf::In(STATUS, 1)];
    (0..20).for_each(|_| {
        driver.add(0, &request);
    });
    driver.kick(0);
    (0..20).for_each(|_| assert_eq!(driver.wait_used(0).1, 1));
    driver.board.interrupts.wait(0x41);
    lock(&driver.board.function).pause();
    assert_eq!((log.take().len(), driver.board.interrupts.count(0x41)), (20, 0));
}

fn qemu_img(folder: &Path, args: &[&str]) -> bool {
    match Command::new("qemu-img").current_dir(folder).args(args).output() {
        Err(error) => {
            eprintln!("*** SKIPPED: qemu-img cannot be run ({error}); install qemu-utils ***");
            false
        }
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "qemu-img {args:?}: {text}");
            true
        }
    }
}

#[test]
fn a_qcow2_image_written_through_the_device_satisfies_the_reference_implementation() {
    let dir = tempfile::tempdir().unwrap();
    if !qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "a.qcow2", "64M"]) {
        return;
    }
    let path = dir.path().join("a.qcow2");
    let mut driver = Driver::start(Blk::new(disk::open(&path, None, false).unwrap(), ""));
    let mut raw = vec![0; 64 << 20];
    for i in 0..100u64 {
        let sector = i * 1_309 % (131_072 - 128);
        driver.fill(BUFFER, &[i as u8 + 1; 65536]);
        assert_eq!(driver.request(1, sector, Some(Buf::Out(BUFFER, 65536))), 0);
        raw[sector as usize * 512..][..65536].fill(i as u8 + 1);
    }
    assert_eq!(driver.ranges(13, &[(1000, 3000, 1), (9_001, 77, 0)]), 0);
    raw[1000 * 512..4000 * 512].fill(0);
    raw[9_001 * 512..9_078 * 512].fill(0);
    assert_eq!(driver.request(4, 0, None), 0);
    fs::copy(&path, dir.path().join("crash.qcow2")).unwrap();
    drop(driver);
    fs::write(dir.path().join("a.raw"), raw).unwrap();
    for image in ["a.qcow2", "crash.qcow2"] {
        qemu_img(dir.path(), &["check", "-q", image]);
        qemu_img(dir.path(), &["compare", "-q", "-f", "qcow2", "-F", "raw", image, "a.raw"]);
    }
    qemu_img(dir.path(), &["convert", "-f", "qcow2", "-O", "raw", "a.qcow2", "b.raw"]);
    assert!(fs::read(dir.path().join("a.raw")).unwrap() == fs::read(dir.path().join("b.raw")).unwrap());
}

#[test]
fn pieces_of_memory_split_anywhere() {
    let driver = Driver::find(Board::new(crate::Rng::new()));
    driver.fill(DATA, b"abcdefgh");
    for at in 0..10 {
        let piece = |offset, length| {
            mem::GuestMemoryBackend::get_slice(&*driver.board.ram, mem::GuestAddress(DATA + offset), length)
                .unwrap()
        };
        let mut head = Slices::from(vec![piece(0, 3), piece(3, 1), piece(4, 4)]);
        let tail = head.split_off(at);
        let (mut a, mut b) = ([0; 8], [0; 8]);
        let (n, m) = (head.read(&mut a), tail.read(&mut b));
        assert_eq!((n, n + m), (at.min(8), 8));
        assert_eq!([&a[..n], &b[..m]].concat(), b"abcdefgh");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn random_requests_are_answered_or_refused_and_never_leave_the_disk(
        bytes in prop::collection::vec(any::<u8>(), 64),
        kind in prop_oneof![4 => prop::sample::select(vec![0u32, 1, 4, 8, 11, 13]), 1 => any::<u32>()],
        sector in prop_oneof![3 => 0..2100u64, 1 => any::<u64>()],
        pieces in prop::collection::vec((any::<bool>(), prop_oneof![Just(16u32), Just(512), 0..2000u32]), 1..6),
    ) {
        let file = image(1 << 20);
        let mut driver = start(file.path(), false);
        driver.header(kind, sector);
        driver.fill(BUFFER, &bytes);
        let mut bufs = vec![Buf::Out(HEADER, 16)];
        let (outs, ins): (Vec<_>, Vec<_>) = pieces.into_iter().partition(|(out, _)| *out);
        bufs.extend(outs.into_iter().map(|(_, length)| Buf::Out(BUFFER, length)));
        bufs.extend(ins.into_iter().map(|(_, length)| Buf::In(BUFFER + 0x1000, length)));
        driver.add(0, &bufs);
        driver.kick(0);
        eventually("neither answered nor refused", || driver.used_index(0) == 1 || driver.status() & 64 != 0);
        prop_assert_eq!(fs::metadata(file.path()).unwrap().len(), 1 << 20);
    }
}

fn limited(path: &Path, limits: &str) -> Blk {
    let disk = disk::open(path, Some(Format::Raw), false).unwrap();
    Blk::new(disk, "limited").limited(&limits.parse().unwrap())
}

/// A request whose header and status are at `at`, and its data, where it has some, after them.
fn add(driver: &mut Driver, at: u64, kind: u32, length: u32) -> u16 {
    driver.fill(at, &[&kind.to_le_bytes()[..], &[0; 12]].concat());
    driver.fill(at + 16, &[0xff]);
    let data = Buf::Out(at + 0x200, length);
    let bufs = [Buf::Out(at, 16), data, Buf::In(at + 16, 1)];
    driver.add(0, &bufs)
}

#[test]
fn requests_over_the_limit_wait_and_keep_their_order() {
    let file = image(1 << 20);
    let mut driver = Driver::start(limited(file.path(), "iops=200,iops-burst=10"));
    let begun = Instant::now();
    let mut heads = Vec::new();
    for number in 0..30u64 {
        let at = DATA + number * 0x400;
        driver.fill(at + 0x200, &[number as u8; 512]);
        heads.push(add(&mut driver, at, 1, 512));
        heads.push(add(&mut driver, at + 0x40, 4, 0));
    }
    driver.kick(0);
    for head in heads {
        assert_eq!(driver.wait_used(0).0, u32::from(head));
    }
    assert!(begun.elapsed() >= Duration::from_millis(250), "50 of 60 had to wait, 5 ms each");
    for number in 0..30 {
        let at = DATA + number * 0x400;
        assert_eq!((driver.bytes(at + 16, 1), driver.bytes(at + 0x50, 1)), (vec![0], vec![0]));
    }
    assert_eq!(fs::read(file.path()).unwrap()[..512], [29; 512], "the last write was the last");
}

#[test]
fn neither_a_pause_nor_a_reset_waits_for_requests_nor_pays_for_them() {
    let file = image(1 << 20);
    let blk = limited(file.path(), "bandwidth=1K");
    let throttle = blk.throttle.clone().unwrap();
    let mut driver = Driver::start(blk);
    let begun = Instant::now();
    for number in 0..3 {
        add(&mut driver, DATA + number * 0x4_0000, 1, 0x3_0000); // three minutes' worth
    }
    driver.kick(0);
    driver.wait_used(0);
    lock(&driver.board.function).pause();
    lock(&driver.board.function).resume();
    driver.kick(0);
    assert_eq!(driver.used_index(0), 1);
    driver.initialize(u64::MAX); // resets it first
    assert_eq!(lock(&throttle).pass(0, 0, Instant::now()).is_err(), begun.elapsed().as_secs() < 190);
    assert!(begun.elapsed() < Duration::from_secs(60));
}

#[test]
fn what_touches_no_disk_is_free() {
    let file = image(1 << 20);
    let mut driver = Driver::start(limited(file.path(), "iops=1"));
    let begun = Instant::now();
    for _ in 0..100 {
        assert_eq!(driver.request(1, 1 << 40, Some(Buf::Out(BUFFER, 512))), 1, "no such place");
        assert_eq!(driver.request(8, 0, Some(Buf::In(BUFFER, 20))), 0);
    }
    assert_eq!(driver.request(1, 0, Some(Buf::Out(BUFFER, 512))), 0);
    assert!(begun.elapsed() < Duration::from_secs(60));
}
