//! `ospite run`: one VM from the command line to its end.

use std::io;
use std::time::Duration;

use engine::{Engine, Statistics};
use machine::{BootSpec, HostIo, VmSpec};
use serde::Serialize;
use vmm::engines::Choice;
use vmm::{End, Options, Request, Vm, engines};

use crate::agent_socket::AgentSocket;
use crate::cli::{ConsoleKind, MachineArgs, RunArgs};
use crate::confine::{self, confine};
use crate::console::output::Output;
use crate::console::{Attached, Console, Keyboard};
use crate::exit::Code;
use crate::failure::Failure;
use crate::logger::say;
use crate::output::OutputArgs;
use crate::seed::Seed;
use crate::vms::{self, attached};
use crate::{network, panics, signals};

/// Runs the VM, or prints what it would be.
pub fn run(args: &RunArgs) -> Result<Code, Failure> {
    if let Some(name) = &args.vm {
        return attached::run_existing(name, args.escape);
    }
    if let Some(image) = &args.image.image {
        return attached::run_image(image, args);
    }
    let (spec, _seed) = spec(args)?;
    let mut choice: Choice = args.machine.engine.parse().map_err(engine_failure)?;
    choice.options.statistics = args.stats;
    let engine = choice.make().map_err(engine_failure)?;
    if args.dry_run { dry_run(args, &spec, &*engine) } else { live(args, &spec, &*engine) }
}

/// The machine, and its seed, which must be there until that is built.
fn spec(args: &RunArgs) -> Result<(VmSpec, Option<Seed>), Failure> {
    let machine = &args.machine;
    let kernel = machine.kernel.clone().ok_or_else(|| no_kernel(machine))?;
    let seed = machine.cloud_init.as_ref().map(|files| {
        let told = vms::told(files)?;
        // What is told anew is applied anew.
        Seed::new(&told, &format!("{}-{}", args.name(), told.digest()), args.name())
    });
    let seed = seed.transpose()?;
    let disks = machine.disks.iter().map(Into::into).chain(seed.as_ref().map(Seed::disk));
    let spec = VmSpec {
        name: args.name().to_owned(),
        cpus: machine.cpus,
        cpu_model: machine.cpu,
        memory: machine.memory.bytes(),
        memory_backing: machine.memory_backing,
        disks: disks.collect(),
        boot: BootSpec { kernel, initrd: machine.initrd.clone(), cmdline: cmdline(machine) },
        nets: network::cards(args.name(), &machine.network.settings()),
        hpet: machine.hpet || args.test_device,
        test_device: args.test_device,
        agent: args.agent_socket.is_some(),
    };
    Ok((spec, seed))
}

fn cmdline(machine: &MachineArgs) -> String {
    machine.append.clone().unwrap_or_else(|| machine.console.cmdline().into())
}

/// Disks alone will do once there is firmware.
fn no_kernel(machine: &MachineArgs) -> Failure {
    match machine.disks.first() {
        Some(disk) => Failure::new(Code::Usage, "cannot boot from a disk alone: ospite has no firmware yet")
            .hint(format!(
                "add the kernel of the system on it: ospite run --kernel vmlinuz --initrd initrd.img -d {} \
             --append 'console=ttyS0 root=/dev/vda rw'",
                disk.path.display()
            )),
        None => Failure::new(Code::Usage, "cannot start a machine without anything to boot")
            .hint("ospite run --kernel vmlinuz --initrd initrd.img; more examples: ospite run --help"),
    }
}

/// No engine, and where to look why.
pub fn engine_failure(error: engines::Error) -> Failure {
    use engines::Error::{BadOption, Unknown, Unusable};
    if let BadOption(_) | Unknown(_) | Unusable(engine::Error::Option { .. }) = error {
        return Failure::from_error(Code::Usage, &error).hint("ospite run --help tells what there is");
    }
    Failure::from_error(Code::Engine, &error).hint("ospite doctor says which engines work here, and why")
}

/// No machine.
pub fn build_failure(error: &vmm::Error) -> Failure {
    Failure::from_error(Code::Build, error)
}

fn live(args: &RunArgs, spec: &VmSpec, engine: &dyn Engine) -> Result<Code, Failure> {
    let host = |error: io::Error| Failure::from_error(Code::Internal, &error);
    // What this process could not have any more once it is confined.
    let settings = args.machine.network.settings();
    let network = network::prepare(args.name(), &settings, &spec.nets)?;
    let mut agent = args.agent_socket.as_deref().map(AgentSocket::bind).transpose()?;
    confine(spec, Vec::new())?;
    let signals = signals::catch().map_err(host)?;
    let output = Output::start(io::stdout()).map_err(host)?;
    let mut io = host_io(args, &output);
    io.links = network::attach_cards(network)?;
    let options = Options { no_reboot: args.machine.no_reboot };
    let vm = Vm::start(spec, engine, io, options).map_err(|error| build_failure(&error))?;
    agent.as_mut().zip(vm.ports()).map(|(agent, ports)| agent.serve(ports)).transpose()?;
    confine::settle(&vm)?;
    let timeout = Duration::from_secs(args.stop_timeout);
    let killer = signals.watch(vm.control(), output.clone(), timeout).map_err(host)?;
    let (control, reader) = (vm.control(), output.clone());
    panics::last_will(move || {
        reader.never_wait();
        let _ = control.request(Request::Kill); // it may have ended by itself
    });
    let console = Console::attach(attached(args, &vm), &output);
    forget_code();
    let end = vm.wait();
    output.drain();
    drop(console);
    if args.stats {
        tell_statistics(vm.statistics(), args.output)?;
    }
    if panics::happened() {
        say("the VM was ended by a defect in ospite; please report the message above");
        return Ok(Code::Internal);
    }
    if end == End::Killed {
        killer.die_of_it();
    }
    Ok(tell(&end))
}

/// The code that starts a VM is not needed while it runs.
pub fn forget_code() {
    if let Err(error) = sandbox::forget_code() {
        log::debug!("the program's code stays in memory: {error}");
    }
}

/// On standard error: standard output is the guest's.
fn tell_statistics(statistics: Option<Statistics>, output: OutputArgs) -> Result<(), Failure> {
    match statistics {
        Some(statistics) => eprintln!("{}", output.render(&statistics, Statistics::to_string)?.trim_end()),
        None => say("this engine keeps no statistics; the one in software does: --engine soft"),
    }
    Ok(())
}

fn attached(args: &RunArgs, vm: &Vm) -> Attached {
    let control = vm.control();
    Attached {
        name: args.name().to_owned(),
        escape: args.escape,
        keyboard: keyboard(args, vm),
        ask: Box::new(move |request| control.request(request).ok()),
        detach: None,
    }
}

/// All consoles print on standard output.
fn host_io(args: &RunArgs, output: &Output) -> HostIo {
    let console_out: Option<Box<dyn io::Write + Send>> = match args.machine.console {
        ConsoleKind::Serial => None,
        ConsoleKind::Virtio => Some(Box::new(output.guest_end())),
    };
    HostIo { serial_out: Box::new(output.guest_end()), console_out, links: Vec::new() }
}

fn keyboard(args: &RunArgs, vm: &Vm) -> Keyboard {
    match vm.console() {
        Some(console) if args.machine.console == ConsoleKind::Virtio => Keyboard::Virtio(console),
        _ => Keyboard::Serial(vm.serial()),
    }
}

/// Says how it ended, where that is not what everybody expects.
pub fn tell(end: &End) -> Code {
    match end {
        End::PoweredOff => Code::Success,
        End::DebugExit(value) => Code::DebugExit(*value),
        End::Killed => Code::Killed,
        End::Reset => {
            say("the guest reset itself; --no-reboot ends the VM here");
            Code::Reset
        }
        End::TripleFault { cpu, registers } => {
            say(&format!(
                "the guest triple-faulted on vCPU {cpu} ({registers}); --no-reboot ends the VM here"
            ));
            Code::TripleFault
        }
        End::Failed(why) => {
            say(&format!("the VM failed: {why}"));
            Code::Internal
        }
    }
}

/// What `--dry-run` prints.
#[derive(Serialize)]
struct Plan<'a> {
    engine: &'static str,
    asked: &'a VmSpec,
    machine: machine::Description,
}

fn dry_run(args: &RunArgs, spec: &VmSpec, engine: &dyn Engine) -> Result<Code, Failure> {
    let machine = vmm::describe(spec, engine, host_io(args, &Output::default()))
        .map_err(|error| build_failure(&error))?;
    let plan = Plan { engine: engine.name(), asked: spec, machine };
    args.output.print(&plan, |plan| plan.machine.to_string())?;
    Ok(Code::Success)
}
