//! `ospite-bench`: how fast is the software engine, beside the metal and beside QEMU's translator?
//!
//! The same static busybox does the same work natively, in ospite and in QEMU, in turns in one run;
//! ratios are what to quote, for machines differ and drift.

mod cpio;
mod guest;
mod runner;
mod table;
mod workload;

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::Parser;

use guest::{Debian, Guest};
use table::{DEBIAN, Runs};
use workload::{PAIR, WORKLOADS};

/// Compare ospite's software engine with the metal and with QEMU's translator.
#[derive(Parser)]
#[command(after_help = "Example:\n  ospite-bench --rounds 3")]
struct Args {
    /// Folder with cloud/vmlinuz, busybox.cpio and busybox, as tools/guest-kernels.sh makes it, and with
    /// debian12.raw and debian12.cpio, as tools/guest-debian.sh makes them.
    #[arg(long, default_value = ".cache/guests")]
    cache: PathBuf,
    /// The ospite program.
    #[arg(long, default_value = "target/release/ospite")]
    ospite: PathBuf,
    /// Arguments for `ospite run`, e.g. "--engine soft".
    #[arg(long, default_value = "")]
    ospite_args: String,
    /// QEMU; left out with a warning if it is not installed.
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
    /// The busybox that is measured, by its name in the cache: "busybox-i386" is 32-bit code.
    #[arg(long, default_value = "busybox")]
    busybox: String,
    /// How often each of the three runs.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Do one part in so many of the full work; an interpreter needs 16 or more.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    divide: u64,
    /// A quarter of the work, one round, no Debian: a first impression.
    #[arg(long)]
    quick: bool,
    /// Only the items with one vCPU: neither the gain of a second one nor Debian.
    #[arg(long)]
    items_only: bool,
    /// Give up on a single run after so many seconds.
    #[arg(long, default_value_t = 900)]
    limit: u64,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
}

impl Args {
    fn divide(&self) -> u64 {
        if self.quick { self.divide * 4 } else { self.divide }
    }

    fn rounds(&self) -> u32 {
        if self.quick { 1 } else { self.rounds }
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(self.limit)
    }
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot read {0}; run tools/guest-kernels.sh first")]
    Missing(PathBuf, #[source] std::io::Error),
    #[error("cannot write {0}")]
    Write(PathBuf, #[source] std::io::Error),
    #[error(transparent)]
    Run(#[from] runner::Error),
}

fn main() -> ExitCode {
    match bench(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ospite-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench(args: &Args) -> Result<(), Error> {
    let with_qemu = Command::new(&args.qemu).arg("--version").output().is_ok();
    if !with_qemu {
        eprintln!("ospite-bench: {} is not installed: its column stays empty", args.qemu.display());
    }
    let one = in_turns(args, with_qemu, &Guest::prepare(args, WORKLOADS, 1)?)?;
    let two = match args.items_only {
        true => Runs::default(),
        false => in_turns(args, with_qemu, &Guest::prepare(args, &[PAIR], 2)?)?,
    };
    let debian = match args.items_only || args.quick {
        true => Runs::default(),
        false => logins(args, with_qemu)?,
    };
    let table = table::Table::new(args.divide(), args.rounds(), &one, &two, &debian);
    match args.json {
        true => println!("{}", serde_json::json!(table)),
        false => print!("{}", table.text()),
    }
    Ok(())
}

/// A script natively, in ospite and in QEMU, again and again.
fn in_turns(args: &Args, with_qemu: bool, guest: &Guest) -> Result<Runs, Error> {
    let mut runs = Runs::default();
    let rounds = args.rounds();
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}: native");
        runs.native.push(runner::run(guest.native(), args.limit())?);
        eprintln!("round {round} of {rounds}: ospite");
        runs.ospite.push(runner::run(guest.ospite(args), args.limit())?);
        if with_qemu {
            eprintln!("round {round} of {rounds}: QEMU");
            runs.qemu.push(runner::run(guest.qemu(args), args.limit())?);
        }
    }
    Ok(runs)
}

/// Debian with systemd to its login prompt, once each: it takes long and drifts little.
fn logins(args: &Args, with_qemu: bool) -> Result<Runs, Error> {
    let mut runs = Runs::default();
    let Some(debian) = Debian::find(args) else {
        eprintln!("ospite-bench: no Debian disk: its row stays empty; tools/guest-debian.sh makes one");
        return Ok(runs);
    };
    let login = |command| runner::until(command, "login: ", args.limit());
    eprintln!("Debian: ospite");
    runs.ospite.push([(DEBIAN.into(), login(debian.ospite(args)?)?)].into());
    if with_qemu {
        eprintln!("Debian: QEMU");
        runs.qemu.push([(DEBIAN.into(), login(debian.qemu(args)?)?)].into());
    }
    Ok(runs)
}
