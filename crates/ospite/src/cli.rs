//! The command line's grammar, and the words of `--help`.

use std::path::PathBuf;

use clap::builder::{OsStringValueParser, PossibleValuesParser, TypedValueParser};
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use clap_complete::engine::PathCompleter;
use clap_complete::{ArgValueCompleter, Shell};
use engine::x86::CpuModel;
use machine::MemoryKind;

mod choice;
mod disk;
mod escape;
mod guest;
mod image;
mod office;
mod vms;

use choice::EngineParser;
pub use disk::DiskArg;
pub use escape::EscapeKey;
pub use guest::{CpArgs, ExecArgs};
pub use image::{BuildArgs, ExportArgs, ExportFormat, ImageCommand, ImportArgs, InfoArgs, ListArgs};
pub use office::{DownArgs, PsArgs, UpArgs};
use store::{Name, Size, cloud_init};
pub use vms::{
    AutostartArgs, ConsoleArgs, CreateArgs, ImageArgs, LifeArgs, LogsArgs, ProcessArgs, RestartArg, RmArgs,
    StopArgs, VmInfoArgs, VmListArgs, WhichArgs,
};

use crate::completions::vm_names;
use crate::exit;
use crate::network::{NetworkArgs, NetworkDialerArgs, NetworkProcessArgs};
use crate::output::OutputArgs;

const OVERVIEW: &str = "\
Examples:
  What does this host offer?
    ospite doctor

  A kernel and an initial RAM disk, 2 vCPUs, 1 GiB
    ospite run -c 2 -m 1G --kernel vmlinuz --initrd initrd.img

  A Debian on a disk
    ospite run -m 1G -d debian.img --kernel vmlinuz --initrd initrd.img \\
        --append 'console=ttyS0 root=/dev/vda rw'

  A VM that lasts: create it, switch it on, look at it, switch it off
    ospite create web -d web.qcow2 --kernel vmlinuz --initrd initrd.img \\
        --append 'console=ttyS0 root=/dev/vda rw'
    ospite start web
    ospite console web
    ospite stop web

  All about running a VM
    ospite run --help";

const RUN_EXAMPLES: &str = "\
Examples:
  Boot a kernel; what it prints on its serial line appears here
    ospite run --kernel vmlinuz --initrd initrd.img

  4 vCPUs, 6 GiB, a root file system, a disk that the guest cannot write
    ospite run -c 4 -m 6G -d root.qcow2 -d data.img,readonly,serial=DATA1 \\
        --kernel vmlinuz --initrd initrd.img \\
        --append 'console=ttyS0 root=/dev/vda rw'

  A VM from an image, with a disk of its own, which stays when this ends
    ospite run --image debian --name web -m 1G -p 8080:80

  Come back to it
    ospite run web

  What would be built? Nothing is started
    ospite run --dry-run --output json --kernel vmlinuz

  In a script: type into the guest, keep what it prints
    printf 'root\\nuname -a\\npoweroff\\n' | ospite run -d root.img \\
        --kernel vmlinuz --initrd initrd.img \\
        --append 'console=ttyS0 root=/dev/vda rw' > log

The console:
  On a terminal every key goes to the guest, Ctrl-C too. Ctrl-] opens a menu:
  q cuts the power, p presses the power button, r the reset button, z pauses
  and continues, i tells how the VM is, a second Ctrl-] sends Ctrl-] itself.
  Without a terminal standard input goes to the guest's serial line as it is,
  and its end ends nothing.

Stopping from outside:
  SIGTERM, SIGINT or SIGHUP presses the power button. A second one, or the end
  of --stop-timeout, cuts the power; SIGQUIT does so at once. What the guest
  has flushed to its disks is kept in every case.
";

/// Turns one machine into many: real virtual machines on any x86-64 Linux host.
#[derive(Debug, Parser)]
#[command(name = "ospite", version, long_about = None, after_help = OVERVIEW, max_term_width = 110)]
#[command(arg_required_else_help = true, subcommand_required = true)]
pub struct Cli {
    /// Say more about what is done; twice and three times for more
    #[arg(short, long, global = true, display_order = 900, action = ArgAction::Count)]
    pub verbose: u8,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a virtual machine
    Run(Box<RunArgs>),
    /// Make, list and remove images: what VMs start from
    #[command(subcommand)]
    Image(ImageCommand),
    /// Create a VM that lasts; it is off
    Create(Box<CreateArgs>),
    /// Switch VMs on; they run in the background
    Start(WhichArgs),
    /// Have VMs power off, and cut their power when they do not
    Stop(StopArgs),
    /// Stop VMs and start them again
    Restart(StopArgs),
    /// Cut the power of VMs
    Kill(WhichArgs),
    /// Remove VMs that are off, with their disks
    Rm(RmArgs),
    /// List the VMs
    #[command(visible_alias = "ls")]
    List(VmListArgs),
    /// Tell all about a VM
    Info(VmInfoArgs),
    /// Print what the guest printed
    Logs(LogsArgs),
    /// Make this terminal the VM's
    Console(ConsoleArgs),
    /// Start what has a restart policy and ran when the host went down
    Autostart(AutostartArgs),
    /// Restarts a VM's process
    #[command(hide = true)]
    VmKeeper(ProcessArgs),
    /// A VM in the background
    #[command(hide = true)]
    VmProcess(ProcessArgs),
    /// Run a command in a VM's guest, through its agent: no network is needed
    Exec(Box<ExecArgs>),
    /// Copy files and folders between the host and a VM's guest, through its agent
    Cp(CpArgs),
    /// Make and start the VMs that a file declares, and wait until they do their work
    Up(UpArgs),
    /// Switch off the VMs that a file declares
    Down(DownArgs),
    /// Tell how the VMs that a file declares are
    Ps(PsArgs),
    /// Tell what this host offers, and the commands that mend what it lacks
    Doctor(DoctorArgs),
    /// Print the completion script for a shell
    #[command(
        after_help = "Example:\n  ospite completions bash > ~/.local/share/bash-completion/completions/ospite"
    )]
    Completions(CompletionsArgs),
    /// Print the man page, or write all of them into a folder
    #[command(after_help = "Examples:\n  ospite man | man -l -\n  ospite man ~/.local/share/man/man1")]
    Man(ManArgs),
    /// The process of a network; VMs start it
    #[command(hide = true)]
    NetworkProcess(NetworkProcessArgs),
    /// Connects a VM to its network; VMs start it
    #[command(hide = true)]
    NetworkDialer(NetworkDialerArgs),
}

/// The consoles that a guest can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ConsoleKind {
    /// The serial line: works from the first instruction on
    Serial,
    /// A virtio console: faster, works once its driver is loaded
    Virtio,
}

impl ConsoleKind {
    /// What tells a Linux kernel to use it.
    pub fn cmdline(self) -> &'static str {
        match self {
            ConsoleKind::Serial => "console=ttyS0",
            ConsoleKind::Virtio => "console=hvc0",
        }
    }
}

fn cpu_models() -> impl TypedValueParser<Value = CpuModel> {
    PossibleValuesParser::new(CpuModel::ALL.map(CpuModel::name)).try_map(|name| name.parse())
}

fn memory_backings() -> impl TypedValueParser<Value = MemoryKind> {
    PossibleValuesParser::new(MemoryKind::ALL.map(MemoryKind::name)).try_map(|name| name.parse())
}

/// What a machine is made of, the same for every command that makes one.
#[derive(Args, Debug)]
pub struct MachineArgs {
    /// What executes the guest's code: auto takes the best that works here, soft is a CPU in software
    /// (every host), kvm is the host's hardware virtualization. `soft,tier=interpreter|translator|native|lockstep`
    /// chooses how the former works: one instruction after another, translated, translated but for programs
    /// that compute, which run on the host's CPU (what it does by itself), or the first two compared
    #[arg(long, value_name = "NAME[,tier=TIER]", default_value = "auto", value_parser = EngineParser)]
    pub engine: String,

    /// Number of virtual CPUs
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=254))]
    pub cpus: u32,

    /// What the virtual CPUs say they are: host (all that this host and engine offer), x86-64-v2 or
    /// x86-64-v3 (the same on every engine). `ospite doctor` says which work here
    #[arg(long, value_name = "MODEL", default_value = "host", value_parser = cpu_models())]
    pub cpu: CpuModel,

    /// Memory: 256M, 6G (K, M, G, T are powers of 1024; a plain number is MiB)
    #[arg(short, long, value_name = "SIZE", default_value = "1G")]
    pub memory: Size,

    /// What of the host's memory is behind it: thp (huge pages wherever some are free), small (pages of 4 KiB),
    /// shared (a file without a name), hugetlb (the pool of huge pages that the administrator set aside)
    #[arg(long, value_name = "KIND", default_value = "thp", value_parser = memory_backings())]
    pub memory_backing: MemoryKind,

    /// A disk: the image and, after commas, `readonly`, `format=raw|qcow2|...` (else told by content),
    /// `base=FILE` that a qcow2 overlay is on, `serial=TEXT` that the guest sees, and limits for reads and
    /// writes together: `iops=500` requests a second, `bandwidth=20M` bytes a second; `iops-burst` and
    /// `bandwidth-burst` say how much may come at once after a pause (a tenth of a second's where absent). A
    /// comma in a name is written twice. May be repeated: the guest sees /dev/vda, /dev/vdb, ...
    #[arg(short, long = "disk", value_name = "FILE[,OPTION...]", value_parser = OsStringValueParser::new().try_map(DiskArg::parse), add = ArgValueCompleter::new(PathCompleter::any()))]
    pub disks: Vec<DiskArg>,

    /// Kernel: a Linux bzImage (vmlinuz), a PVH or multiboot ELF image; told by content
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,

    /// The kernel's command line [default: console=ttyS0, or console=hvc0 with --console virtio]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub append: Option<String>,

    /// Which of the guest's consoles has the keyboard: the serial line ttyS0, or hvc0, a virtio console
    /// that is there only if asked for. What the guest prints on either is the VM's output
    #[arg(long, value_name = "NAME", value_enum, default_value_t = ConsoleKind::Serial)]
    pub console: ConsoleKind,

    /// What a guest with cloud-init is told at its first start: user data (`#cloud-config`, a script or a
    /// MIME message) and, after commas, `network-config=FILE` and `vendor-data=FILE`. It comes on a small
    /// disk with the label CIDATA, after the others
    #[arg(long, value_name = "FILE[,OPTION...]", add = ArgValueCompleter::new(PathCompleter::any()))]
    pub cloud_init: Option<cloud_init::Files>,

    /// Its network.
    #[command(flatten)]
    pub network: NetworkArgs,

    /// Add high precision event timers (HPET). Few guests want them: the local APICs' timers, the TSC and
    /// ACPI's timer do their work, and Linux starts more slowly with them
    #[arg(long)]
    pub hpet: bool,

    /// A reset by the guest, or a triple fault, ends the VM instead of restarting it
    #[arg(long)]
    pub no_reboot: bool,
}

/// `ospite run`
#[derive(Args, Debug)]
#[command(after_help = RUN_EXAMPLES.to_owned() + "\n" + &exit::help())]
pub struct RunArgs {
    /// A VM that was created: it is switched on if it is off, and this terminal becomes its console
    #[arg(value_name = "VM", add = ArgValueCompleter::new(vm_names), conflicts_with_all = [
        "image", "disk_size", "disk_limit", "engine", "cpus", "cpu", "memory", "memory_backing", "disks", "kernel", "initrd", "append",
        "cloud_init", "console", "network", "publish", "allow", "limits", "hpet", "no_reboot", "name", "stop_timeout",
        "agent_socket", "stats", "dry_run", "test_device",
    ])]
    pub vm: Option<Name>,

    /// What it starts.
    #[command(flatten)]
    pub image: ImageArgs,

    /// The machine.
    #[command(flatten)]
    pub machine: MachineArgs,

    /// The VM's name [default: ospite; with --image the image's, and a number if that is taken]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// The key that opens the console's menu: ctrl-] or another letter or one of @[\]^_ after `ctrl-`;
    /// `none` gives every key to the guest
    #[arg(long, value_name = "KEY", default_value = "ctrl-]")]
    pub escape: EscapeKey,

    /// How long a guest that was asked to stop by a signal may take, in seconds, before its power is cut
    #[arg(long, value_name = "SECONDS", default_value_t = 90)]
    pub stop_timeout: u64,

    /// A socket for `ospite exec` and `ospite cp`, which take its path in place of a name. Only this user
    /// can connect
    #[arg(long, value_name = "PATH", conflicts_with = "image")]
    pub agent_socket: Option<PathBuf>,

    /// Build the machine, print what it is made of, and start nothing
    #[arg(long, conflicts_with = "image")]
    pub dry_run: bool,

    /// Tell at the end, on standard error, where the time went: translated code, translating, TLB misses,
    /// interpreter, devices; and what happened how often. It slows the guest down a little
    #[arg(long, conflicts_with = "image")]
    pub stats: bool,

    /// Add what CPU test suites (kvm-unit-tests) drive a machine with: a port to write and read at 0xe0, a
    /// port for each interrupt line from 0x2000 on, memory behind MMIO at 0xff000000; and --hpet. The
    /// debug-exit port 0xf4 is on every machine
    #[arg(long, conflicts_with = "image")]
    pub test_device: bool,

    /// How --dry-run and --stats print.
    #[command(flatten)]
    pub output: OutputArgs,
}

impl RunArgs {
    /// The name of a VM that does not last.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or("ospite")
    }
}

/// `ospite doctor`
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// How to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// `ospite completions`
#[derive(Args, Debug)]
pub struct CompletionsArgs {
    /// The shell
    pub shell: Shell,
}

/// `ospite man`
#[derive(Args, Debug)]
pub struct ManArgs {
    /// Folder for a page for each command; without it ospite(1) is printed
    pub dir: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn run(line: &str) -> Result<RunArgs, clap::Error> {
        let words = ["ospite", "run"].into_iter().chain(line.split_whitespace());
        match Cli::try_parse_from(words)?.command {
            Command::Run(args) => Ok(*args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_grammar_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_is_asked_for_is_understood() {
        let args =
            run("-c 4 --cpu x86-64-v2 -m 6G -d a.img -d b.qcow2,readonly --kernel k --initrd i --append quiet --no-reboot")
                .unwrap();
        let machine = args.machine;
        assert_eq!((machine.cpus, machine.memory.bytes(), machine.disks.len()), (4, 6 << 30, 2));
        assert_eq!(machine.cpu, CpuModel::V2);
        assert!(machine.no_reboot && machine.disks[1].read_only);
        assert_eq!(machine.append.as_deref(), Some("quiet"));
    }

    #[test]
    fn what_makes_no_sense_is_a_usage_error() {
        for bad in [
            "-c 0",
            "-c 255",
            "-m 12x",
            "-d a.img,wat",
            "-d a.img,iops=0",
            "-d a.img,bandwidth=-5M",
            "--disk-limit iops=500",
            "--net-limit bandwidth=0",
            "--net-limit iops=500",
            "web --net-limit bandwidth=5M",
            "--image debian --disk-limit bandwidth=5X",
            "--engine warp",
            "--cpu 486",
            "--engine auto,tier=lockstep",
            "--initrd i",
            "--output yaml",
        ] {
            assert_eq!(run(bad).unwrap_err().exit_code(), 2, "{bad}");
        }
    }

    #[test]
    fn help_teaches_by_examples_and_fits_its_own_grammar() {
        let help = Cli::command().find_subcommand_mut("run").unwrap().render_long_help().to_string();
        for word in ["Examples:", "Exit codes:", "Ctrl-]", "debug-exit", "-d root.qcow2"] {
            assert!(help.contains(word), "{word} is missing in:\n{help}");
        }
    }
}
