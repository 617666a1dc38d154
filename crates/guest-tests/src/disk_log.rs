//! What a VM does to a disk image, as the host's kernel is told it: strace's record of its system calls,
//! beside what the guest printed. From it, the image as of a power cut of the *host* at any moment can be
//! made: what was synchronized is there, of the rest any part may be.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Result};
use std::path::Path;

use dice::Dice;

/// The unit that a disk writes whole or not at all, in bytes.
const SECTOR: usize = 512;

/// What is traced: everything that ospite changes files with.
const CALLS: &str = "trace=write,pwrite64,pwritev,pwritev2,fallocate,ftruncate,fsync,fdatasync";

/// The words before the program's own that have a record of it written to `log`. Only the calls that are
/// asked for stop the program.
pub(crate) fn recorder(log: &Path) -> Vec<String> {
    let words = "strace -f --seccomp-bpf -y -qq -xx -v -s 33554432 -e signal=none -e";
    let mut command: Vec<String> = words.split(' ').map(String::from).collect();
    command.extend([CALLS.into(), "-o".into(), log.display().to_string()]);
    command
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    Write {
        offset: usize,
        data: Vec<u8>,
    },
    /// Zeroes, whether there is space behind them or not.
    Zero {
        offset: usize,
        length: usize,
    },
    Resize(usize),
    Sync,
    Print(String),
}

/// A system call, between two lines of the record.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Event {
    start: usize,
    end: usize,
    what: What,
}

/// All that was done to one image, in order.
#[derive(Debug)]
pub struct DiskLog {
    events: Vec<Event>,
}

/// What a power cut left of what was not synchronized.
#[derive(Clone, Copy, Debug)]
pub struct Luck {
    /// Of a thousand writes or parts of writes, how many reached the disk.
    pub survive: u64,
    /// Of a thousand writes, how many are torn between sectors.
    pub torn: u64,
}

impl DiskLog {
    /// Reads a record for what was done to `image`.
    pub fn read(log: &Path, image: &Path) -> Result<DiskLog> {
        let path: String = image.canonicalize()?.display().to_string();
        let hex: String = path.bytes().map(|byte| format!("\\x{byte:02x}")).collect();
        let (mut events, mut under_way) = (Vec::new(), HashMap::new());
        for (number, line) in BufReader::new(File::open(log)?).lines().enumerate() {
            let line = line?;
            let Some((thread, call)) = line.split_once(' ') else { continue };
            let call = call.trim_start();
            if let Some(begun) = call.strip_suffix(" <unfinished ...>") {
                under_way.insert(thread.to_owned(), (number, begun.to_owned()));
                continue;
            }
            let (start, call) = match call.strip_prefix("<... ").and_then(|rest| rest.split_once("resumed>"))
            {
                Some((_, rest)) => match under_way.remove(thread) {
                    Some((start, begun)) => (start, begun + rest),
                    None => continue,
                },
                None => (number, call.to_owned()),
            };
            events.extend(what(&call, &hex).map(|what| Event { start, end: number, what }));
        }
        // A call that never came back may have done anything, and is the only one of its thread.
        for (start, call) in under_way.into_values() {
            events.extend(what(&call, &hex).map(|what| Event { start, end: usize::MAX, what }));
        }
        events.sort_by_key(|event| event.start);
        Ok(DiskLog { events })
    }

    /// How many events there are; a cut is before one of them, or behind the last.
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// Whether nothing was recorded.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// How often the image was synchronized before a cut.
    pub fn syncs(&self, cut: usize) -> usize {
        self.events[..cut].iter().filter(|event| event.what == What::Sync).count()
    }

    /// What the guest had printed before a cut.
    pub fn printed(&self, cut: usize) -> String {
        let text = |event: &Event| match &event.what {
            What::Print(text) => Some(text.clone()),
            _ => None,
        };
        self.events[..cut].iter().filter_map(text).collect()
    }

    /// The first cut before which the guest had printed `text`.
    pub fn when_printed(&self, text: &str) -> Option<usize> {
        (1..=self.len()).find(|cut| self.printed(*cut).contains(text))
    }

    /// Turns `image` from what it was before the first event into what a power cut before event `cut` leaves
    /// of it.
    pub fn cut(&self, image: &mut Vec<u8>, cut: usize, luck: Luck, dice: &mut Dice) {
        let now = self.events.get(cut).map_or(usize::MAX, |event| event.start);
        let synced = |event: &&Event| event.what == What::Sync && event.end < now;
        let durable = self.events[..cut].iter().filter(synced).map(|event| event.start).max().unwrap_or(0);
        for event in &self.events[..cut] {
            let safe = event.end < durable;
            match &event.what {
                What::Write { offset, data } => apply(image, *offset, data, safe, luck, dice),
                What::Zero { offset, length } => apply(image, *offset, &vec![0; *length], safe, luck, dice),
                What::Resize(length) if safe || dice.below(1000) < luck.survive => image.resize(*length, 0),
                What::Resize(_) | What::Sync | What::Print(_) => {}
            }
        }
    }
}

fn apply(image: &mut Vec<u8>, offset: usize, data: &[u8], safe: bool, luck: Luck, dice: &mut Dice) {
    let torn = !safe && dice.below(1000) < luck.torn;
    if torn {
        // Sectors lie where they lie, wherever the write begins.
        let mut at = 0;
        while at < data.len() {
            let count = (SECTOR - (offset + at) % SECTOR).min(data.len() - at);
            if dice.below(1000) < luck.survive {
                put(image, offset + at, &data[at..at + count]);
            }
            at += count;
        }
    } else if safe || dice.below(1000) < luck.survive {
        put(image, offset, data);
    }
}

fn put(image: &mut Vec<u8>, offset: usize, data: &[u8]) {
    let end = offset + data.len();
    if image.len() < end {
        image.resize(end, 0);
    }
    image[offset..end].copy_from_slice(data);
}

/// What a call did to the image, or said on standard output. `None` for all else, and for what failed.
fn what(call: &str, image: &str) -> Option<What> {
    let (name, rest) = call.split_once('(')?;
    let (fd, rest) = rest.split_once('<')?;
    let (file, args) = rest.split_once('>')?;
    // The result stands in a column of its own where the line is short; a call under way has none.
    let (args, result) = args.rsplit_once(" = ").unwrap_or((args, "0"));
    let args = args.trim_end().trim_end_matches(')');
    let result: i64 = result.split(' ').next()?.parse().ok()?;
    if name == "write" && fd == "1" {
        return Some(What::Print(String::from_utf8_lossy(&strings(args)).into_owned()));
    }
    if file != image || result < 0 {
        return None;
    }
    let numbers = last_numbers(args);
    match name {
        "pwrite64" | "pwritev" | "pwritev2" => {
            let data = strings(args);
            assert!(
                result == 0 || data.len() as i64 == result,
                "{name} wrote {result} of {} bytes",
                data.len()
            );
            Some(What::Write { offset: numbers[1], data })
        }
        "fallocate" => {
            let (offset, length) = (numbers[0], numbers[1]);
            let zeroes = args.contains("PUNCH_HOLE") || args.contains("ZERO_RANGE");
            zeroes.then_some(What::Zero { offset, length })
        }
        "ftruncate" => Some(What::Resize(numbers[0])),
        "fsync" | "fdatasync" => Some(What::Sync),
        _ => panic!("{name} changes the image, which was not reckoned with"),
    }
}

/// The bytes of all strings among the arguments, which are `\xNN` throughout.
fn strings(args: &str) -> Vec<u8> {
    let mut data = Vec::new();
    for string in args.split('"').skip(1).step_by(2) {
        let digits = string.as_bytes().chunks_exact(4).map(|byte| &byte[2..]);
        data.extend(digits.map(|digits| {
            let digit = |at: usize| char::from(digits[at]).to_digit(16).unwrap_or_default() as u8;
            digit(0) << 4 | digit(1)
        }));
    }
    data
}

/// The numbers after the last string or vector.
fn last_numbers(args: &str) -> Vec<usize> {
    let tail = args.rsplit(['"', ']']).next().unwrap_or(args);
    tail.split(", ").filter_map(|word| word.trim().parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `/d`, as strace writes it.
    const IMAGE: &str = "\\x2f\\x64";

    fn log(lines: &[&str]) -> DiskLog {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk");
        File::create(&image).unwrap();
        let path = image.canonicalize().unwrap().display().to_string();
        let hex: String = path.bytes().map(|byte| format!("\\x{byte:02x}")).collect();
        let text: String = lines.iter().map(|line| line.replace("DISK", &hex) + "\n").collect();
        std::fs::write(dir.path().join("log"), text).unwrap();
        DiskLog::read(&dir.path().join("log"), &image).unwrap()
    }

    #[test]
    fn calls_of_every_kind_are_understood_and_those_to_other_files_are_not() {
        let write = |offset, data: &[u8]| Some(What::Write { offset, data: data.into() });
        let vector = r#"pwritev(7<\x2f\x64>, [{iov_base="\x61\x62", iov_len=2}, {iov_base="\x63", iov_len=1}], 2, 4096) = 3"#;
        assert_eq!(what(vector, IMAGE), write(4096, b"abc"));
        assert_eq!(what(&vector.replace("4096)", "512, RWF_DSYNC)"), IMAGE), write(512, b"abc"));
        assert_eq!(what(r#"pwrite64(7<\x2f\x64>, "\x00\xff", 2, 9) = 2"#, IMAGE), write(9, &[0, 0xff]));
        let punch = r"fallocate(7<\x2f\x64>, FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE, 512, 1024) = 0";
        assert_eq!(what(punch, IMAGE), Some(What::Zero { offset: 512, length: 1024 }));
        assert_eq!(what(r"ftruncate(7<\x2f\x64>, 100) = 0", IMAGE), Some(What::Resize(100)));
        assert_eq!(what(r"fdatasync(7<\x2f\x64>) = 0", IMAGE), Some(What::Sync));
        assert_eq!(what(r"fdatasync(7<\x2f\x64>) = -1 EIO (Input/output error)", IMAGE), None);
        assert_eq!(what(r"fdatasync(7<\x2f\x65>) = 0", IMAGE), None);
        let print = r#"write(1<\x70>, "\x61\x2e", 2) = 2"#;
        assert_eq!(what(print, IMAGE), Some(What::Print("a.".into())));
    }

    #[test]
    fn what_was_synchronized_stays_and_of_the_rest_whole_sectors_may() {
        let data = "\\x61".repeat(1024);
        let second = format!(r#"2 pwrite64(3<DISK>, "{data}", 1024, 512) = 1024"#);
        let log = log(&[
            r#"1 pwrite64(3<DISK>, "\x62", 1, 0 <unfinished ...>"#,
            r#"1 <... pwrite64 resumed>)   = 1"#,
            "1 fdatasync(3<DISK> <unfinished ...>",
            &second,
            r#"1 <... fdatasync resumed>)        = 0"#,
            r#"1 write(1<\x70>, "\x6f\x6b", 2) = 2"#,
        ]);
        assert_eq!((log.len(), log.syncs(log.len())), (4, 1));
        assert_eq!((log.printed(3), log.printed(4)), (String::new(), "ok".into()));
        let cut = |at, survive, torn, seed| {
            let mut image = vec![0; 1536];
            log.cut(&mut image, at, Luck { survive, torn }, &mut Dice::new(seed));
            [0, 511, 512, 1023, 1024, 1535].map(|at| image[at])
        };
        assert_eq!(cut(1, 0, 0, 1), [0; 6], "nothing is synchronized yet");
        assert_eq!(cut(2, 0, 0, 1), [0; 6], "nor before the call has come back");
        assert_eq!(cut(3, 0, 0, 1), [b'b', 0, 0, 0, 0, 0], "the second was written meanwhile");
        assert_eq!(cut(3, 1000, 0, 1), [b'b', 0, b'a', b'a', b'a', b'a']);
        let torn: std::collections::HashSet<_> = (0..64).map(|seed| cut(3, 500, 1000, seed)).collect();
        assert_eq!(torn.len(), 4, "each sector for itself: {torn:?}");
    }
}
