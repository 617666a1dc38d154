//! `ospite vm-process NAME`: a VM that lasts. It has no terminal; what the guest prints goes into the VM's
//! log and to who is attached, and whoever wants something of it comes to its control socket.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use machine::HostIo;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use store::vm::{Console, Definition, log};
use store::{Home, Name};
use vmm::{Control, End, Options, Request, Vm, engines};

use crate::confine::{self, confine};
use crate::console::Keyboard;
use crate::exit::Code;
use crate::failure::Failure;
use crate::logger::say;
use crate::run::{build_failure, engine_failure, forget_code, tell};
use crate::vms::{ready, socket, spec};
use crate::{network, panics, vms};

mod hub;
mod server;
pub mod stdio;

use hub::Hub;
use server::Services;

/// Runs a VM to its end.
pub fn run(name: &Name) -> Result<Code, Failure> {
    let home = vms::home()?;
    let folder = vms::find(&home, name)?;
    let _lock = stdio::take_lock(&folder)?;
    vms::keeper::name_process();
    let mut word = stdio::take_word().map_err(|error| host(&error))?;
    let started = start(&home, &folder);
    ready::tell(&mut word, started.as_ref().map(drop));
    drop(word);
    let running = started?;
    forget_code();
    let end = running.vm.wait();
    running.hub.end();
    if panics::happened() {
        say("the VM was ended by a defect in ospite; please report the message above");
        return Ok(Code::Internal);
    }
    if end == End::PoweredOff {
        say("the guest powered itself off");
    }
    Ok(tell(&end))
}

fn host(error: &io::Error) -> Failure {
    Failure::from_error(Code::Internal, error)
}

struct Running {
    vm: Vm,
    hub: Hub,
}

fn start(home: &Home, folder: &store::vm::Folder) -> Result<Running, Failure> {
    let definition = folder.definition()?;
    let (spec, seed) = spec::spec(home, folder, &definition)?;
    let engine = engines::pick(&definition.engine).map_err(engine_failure)?;
    // What this process could not have any more once it is confined.
    let network = network::prepare(&spec.name, &definition.network, &spec.nets)?;
    let listener = socket::listen(&socket::path(home, &definition.name)).map_err(|error| host(&error))?;
    std::fs::create_dir_all(folder.log()).map_err(|error| host(&error))?; // it is empty in old ones
    confine(&spec, vec![folder.log()])?;
    let hub = Hub::new(log::Writer::open(&folder.log()).map_err(|error| host(&error))?);
    let options = Options { no_reboot: definition.no_reboot };
    let mut io = host_io(&definition, &hub);
    io.links = network::attach_cards(network)?;
    let vm = Vm::start(&spec, &*engine, io, options).map_err(|error| build_failure(&error))?;
    confine::settle(&vm)?;
    drop(seed);
    watch_signals(vm.control(), Duration::from_secs(definition.stop_timeout))
        .map_err(|error| host(&error))?;
    let control = vm.control();
    panics::last_will(move || drop(control.request(Request::Kill))); // it may have ended by itself
    let services = Services {
        engine: engine.name().into(),
        ask: Box::new({
            let control = vm.control();
            move |request| control.request(request)
        }),
        agent: Box::new({
            let ports = vm.ports();
            move |client| ports.as_ref().map_or(Ok(()), |ports| vmm::guest_ports::serve(ports, client))
        }),
        hub: hub.clone(),
        keyboard: Box::new({
            let keyboard = keyboard(&definition, &vm);
            move |bytes| keyboard.send(bytes)
        }),
    };
    server::start(listener, Arc::new(services)).map_err(|error| host(&error))?;
    Ok(Running { vm, hub })
}

/// All consoles print into the same log.
fn host_io(definition: &Definition, hub: &Hub) -> HostIo {
    let console_out: Option<Box<dyn io::Write + Send>> = match definition.console {
        Console::Serial => None,
        Console::Virtio => Some(Box::new(hub.clone())),
    };
    HostIo { serial_out: Box::new(hub.clone()), console_out, links: Vec::new() }
}

fn keyboard(definition: &Definition, vm: &Vm) -> Keyboard {
    match vm.console() {
        Some(console) if definition.console == Console::Virtio => Keyboard::Virtio(console),
        _ => Keyboard::Serial(vm.serial()),
    }
}

/// The host shuts down: it tells every process, and more than once. Only SIGQUIT cuts the power at once.
fn watch_signals(control: Control, timeout: Duration) -> io::Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM, SIGQUIT])?;
    let body = move || {
        let mut asked = false;
        for signal in signals.forever() {
            if signal == SIGQUIT {
                let _ = control.request(Request::Kill); // it may have ended
            } else if !std::mem::replace(&mut asked, true) {
                say(&format!(
                    "a signal came: power button pressed, the power is cut in {} s",
                    timeout.as_secs()
                ));
                let _ = control.request(Request::PowerButton);
                let control = control.clone();
                let countdown = move || {
                    thread::sleep(timeout);
                    let _ = control.request(Request::Kill);
                };
                let _ = thread::Builder::new().name("countdown".into()).spawn(countdown);
            }
        }
    };
    thread::Builder::new().name("signals".into()).spawn(body).map(drop)
}
