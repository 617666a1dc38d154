//! `ospite-bench`: how fast is the software engine, beside the metal and beside QEMU's translator?
//!
//! The same static busybox does the same work natively, in ospite and in QEMU, in turns in one run;
//! ratios are what to quote, for machines differ and drift.

mod cpio;
mod runner;
mod table;
mod workload;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::Parser;

/// Compare ospite's software engine with the metal and with QEMU's translator.
#[derive(Parser)]
#[command(after_help = "Example:\n  ospite-bench --rounds 3")]
struct Args {
    /// Folder with cloud/vmlinuz, busybox.cpio and busybox, as tools/guest-kernels.sh makes it.
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
    /// Give up on a single run after so many seconds.
    #[arg(long, default_value_t = 900)]
    limit: u64,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
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

const CMDLINE: &str = "console=ttyS0 quiet panic=-1";
const SCRIPT: &str = "bench.sh";
/// The busybox that is measured, in the guest. It goes by its name.
const MEASURED: &str = "busybox";

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
    let guest = Guest::prepare(args)?;
    let with_qemu = Command::new(&args.qemu).arg("--version").output().is_ok();
    if !with_qemu {
        eprintln!("ospite-bench: {} is not installed: its column stays empty", args.qemu.display());
    }
    let limit = Duration::from_secs(args.limit);
    let mut runs = table::Runs::default();
    for round in 1..=args.rounds {
        eprintln!("round {round} of {}: native", args.rounds);
        runs.native.push(runner::run(guest.native(), limit)?);
        eprintln!("round {round} of {}: ospite", args.rounds);
        runs.ospite.push(runner::run(guest.ospite(args), limit)?);
        if with_qemu {
            eprintln!("round {round} of {}: QEMU", args.rounds);
            runs.qemu.push(runner::run(guest.qemu(args), limit)?);
        }
    }
    let rows = table::rows(&runs);
    if args.json {
        println!("{}", serde_json::json!({ "divide": args.divide, "rounds": args.rounds, "rows": rows }));
    } else {
        print!("{}", table::text(&rows));
    }
    Ok(())
}

/// The files that all runs share.
struct Guest {
    kernel: PathBuf,
    initrd: PathBuf,
    busybox: PathBuf,
    script: PathBuf,
}

impl Guest {
    /// Makes the initramfs: the busybox one with the script behind it.
    fn prepare(args: &Args) -> Result<Guest, Error> {
        let read = |path: &Path| std::fs::read(path).map_err(|e| Error::Missing(path.into(), e));
        let script = workload::script(args.divide);
        let mut initrd = read(&args.cache.join("busybox.cpio"))?;
        initrd.resize(initrd.len().next_multiple_of(4), 0);
        initrd.extend(cpio::with_file(SCRIPT, script.as_bytes()));
        let busybox = args.cache.join(&args.busybox);
        initrd.extend(cpio::with_file(MEASURED, &read(&busybox)?));
        let guest = Guest {
            kernel: args.cache.join("cloud/vmlinuz"),
            initrd: args.cache.join("bench.cpio"),
            busybox,
            script: args.cache.join(SCRIPT),
        };
        let write =
            |path: &Path, data: &[u8]| std::fs::write(path, data).map_err(|e| Error::Write(path.into(), e));
        write(&guest.initrd, &initrd)?;
        write(&guest.script, script.as_bytes())?;
        Ok(guest)
    }

    fn native(&self) -> Command {
        let mut command = Command::new(&self.busybox);
        command.arg("sh").arg("-c").arg(". \"$1\"").arg(&self.busybox).arg(&self.script);
        command
    }

    fn cmdline(&self) -> String {
        format!("{CMDLINE} ospite.run=\"/{MEASURED} sh -c '. /{SCRIPT}' /{MEASURED}\"")
    }

    fn ospite(&self, args: &Args) -> Command {
        let mut command = Command::new(&args.ospite);
        command.arg("run").args(args.ospite_args.split_whitespace()).args(["-c", "1", "-m", "512M"]);
        command.arg("--kernel").arg(&self.kernel).arg("--initrd").arg(&self.initrd);
        command.arg("--append").arg(self.cmdline());
        command
    }

    fn qemu(&self, args: &Args) -> Command {
        let mut command = Command::new(&args.qemu);
        command.args(["-machine", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", "512"]);
        command.args(["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]);
        command.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&self.initrd);
        command.arg("-append").arg(self.cmdline());
        command
    }
}
