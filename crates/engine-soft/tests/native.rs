//! Random user-mode instructions on the host's CPU and on the interpreter: the ends must be equal.
//!
//! `OSPITE_CASES` says how many (200,000 if it is not set), `OSPITE_SEED` where the random numbers
//! start; a failure prints the seed that repeats it, and `OSPITE_CASE` runs one case of that seed alone.

#[path = "native/compare.rs"]
mod compare;
#[path = "native/generate.rs"]
mod generate;
#[path = "native/guest.rs"]
mod guest;
#[path = "native/host.rs"]
mod host;
#[path = "native/random.rs"]
mod random;
#[path = "native/state.rs"]
mod state;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use generate::{Case, Generator};
use guest::Interpreter;
use host::{BATCH, Host};
use iced_x86::{Formatter, IntelFormatter};
use state::{AREA, End};

/// Failures that are printed in full; the rest is counted by mnemonic.
const PRINTED: usize = 20;

fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text}")))
}

/// The same numbers each time: what fails is then the doing of a change. Others find more.
const SEED: u64 = 20_261_122;

#[test]
fn the_interpreter_does_what_the_host_cpu_does() {
    let seed = setting("OSPITE_SEED").unwrap_or(SEED);
    let only = setting("OSPITE_CASE");
    let cases = only.map_or(setting("OSPITE_CASES").unwrap_or(200_000), |case| case + 1);
    println!("OSPITE_SEED={seed} OSPITE_CASES={cases}");
    let memory = state::memory(seed);
    let mut generator = Generator::new(seed, memory.clone());
    let mut interpreter = Interpreter::new(memory.clone());
    let mut host = Host::new(memory);
    let mut report = Report::default();
    let mut next = 0;
    while next < cases {
        let count = (cases - next).min(BATCH as u64);
        let mut batch: Vec<(u64, Case)> = (next..next + count).map(|i| (i, generator.case())).collect();
        batch.retain(|(i, case)| {
            only.is_none_or(|only| only == *i) && compare::defined(&case.ins, &case.start)
        });
        next += count;
        run(&batch, &mut host, &mut interpreter, &mut report);
    }
    println!("{} cases of {} instructions compared", report.compared, generator.kinds());
    assert!(report.compared > 0);
    report.finish(seed);
}

fn run(batch: &[(u64, Case)], host: &mut Host, interpreter: &mut Interpreter, report: &mut Report) {
    let starts: Vec<_> = batch.iter().map(|(_, case)| case.start).collect();
    let running = host.start(&starts);
    let guests: Vec<_> =
        starts.iter().map(|start| catch_unwind(AssertUnwindSafe(|| interpreter.run(start)))).collect();
    let (ends, survived) = running.wait();
    for (((index, case), host), guest) in batch.iter().zip(ends).zip(guests) {
        report.compared += 1;
        match guest {
            Ok(guest) => {
                let differences = compare::differences(&case.ins, host, &guest);
                report.add(*index, case, Some((host, &guest)), differences);
            }
            Err(_) => report.add(*index, case, None, vec!["the interpreter panicked".into()]),
        }
    }
    if let Err(why) = survived {
        let (index, case) = &batch[ends.len().min(batch.len() - 1)];
        report.add(*index, case, None, vec![why]);
    }
}

/// What went wrong.
#[derive(Default)]
struct Report {
    compared: u64,
    failed: BTreeMap<String, u32>,
    printed: usize,
}

impl Report {
    fn add(&mut self, index: u64, case: &Case, ends: Option<(&End, &End)>, differences: Vec<String>) {
        if differences.is_empty() {
            return;
        }
        let first = differences[0].split(':').next().unwrap_or_default().to_owned();
        let seen = self.failed.entry(format!("{:?} ({first})", case.ins.mnemonic())).or_default();
        *seen += 1;
        if *seen > 1 || self.printed >= PRINTED {
            return;
        }
        self.printed += 1;
        let mut text = String::new();
        IntelFormatter::new().format(&case.ins, &mut text);
        println!(
            "\ncase {index}: {text}  [{:02x?}] {:?}",
            &case.start.code[..case.start.len as usize],
            case.ins.code()
        );
        for difference in differences {
            println!("  {difference}");
        }
        println!("  start: registers {:x?} flags {:#x}", case.start.gpr, case.start.rflags);
        if let Some((host, guest)) = ends {
            println!(
                "  exceptions: host {:?}, interpreter {:?}; data at {AREA:#x}",
                host.vector, guest.vector
            );
        }
    }

    fn finish(self, seed: u64) {
        if self.failed.is_empty() {
            return;
        }
        println!("\ndiffering instructions:");
        for (what, count) in &self.failed {
            println!("  {count:6} {what}");
        }
        let total: u32 = self.failed.values().sum();
        panic!(
            "{total} of {} cases differ. Repeat with OSPITE_SEED={seed} and the case's number in OSPITE_CASE",
            self.compared
        );
    }
}
