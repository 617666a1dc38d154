//! `ospite up`: the VMs of a file are made, switched on, and waited for.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use net::NetworkSettings;
use serde::Serialize;
use store::image::{self, Image, Recipe};
use store::office::{Member, Source};
use store::vm::{Boot, Console, Definition, Folder, HealthState, Word};
use store::{Home, Name};

use super::progress::Progress;
use crate::at_once::at_once;
use crate::cli::UpArgs;
use crate::exit::Code;
use crate::failure::Failure;
use crate::vms::{self, health};

/// Digits of a recipe's digest in its image's name.
const DIGITS: usize = 12;

/// A VM that is up.
#[derive(Debug, Serialize)]
struct Up {
    name: String,
    /// Seconds until its health check passed, or it ran where it has none.
    took: f64,
    ports: Vec<String>,
}

/// What all steps need.
struct Site {
    home: Home,
    file: PathBuf,
    progress: Progress,
    timeout: Duration,
}

/// Brings up what the file declares; returns when every health check has passed.
pub fn up(args: &UpArgs) -> Result<Code, Failure> {
    let home = vms::home()?;
    home.prepare().map_err(|error| Failure::new(Code::Build, error.to_string()))?;
    let (file, mut office) = super::read(&args.file)?;
    if let Some(unknown) = args.names.iter().find(|name| !office.members.contains_key(*name)) {
        let known: Vec<_> = office.members.keys().map(Name::as_str).collect();
        let failure = Failure::new(Code::Usage, format!("{} declares no VM `{unknown}`", file.display()));
        return Err(failure.hint(format!("it declares {}", known.join(", "))));
    }
    office.members.retain(|name, _| args.names.is_empty() || args.names.contains(name));
    let progress = Progress::new(office.members.keys(), args.output.is_json());
    let timeout = Duration::from_secs(args.timeout);
    let site = Site { home, file, progress, timeout };
    let outcome = site.bring_up(&office.members);
    site.progress.end();
    let ups = outcome?;
    args.output.print(&ups, |ups| ups.iter().map(Up::line).collect())?;
    Ok(Code::Success)
}

impl Up {
    fn line(&self) -> String {
        let ports =
            if self.ports.is_empty() { String::new() } else { format!(", ports {}", self.ports.join(" ")) };
        format!("{} is up after {:.1} s{ports}\n", self.name, self.took)
    }
}

impl Site {
    fn bring_up(&self, members: &BTreeMap<Name, Member>) -> Result<Vec<Up>, Failure> {
        // One after the other: each takes the whole machine.
        let images = members.iter().map(|(name, member)| Ok((name, self.image(name, &member.image)?)));
        let images = images.collect::<Result<BTreeMap<_, _>, Failure>>()?;
        let results = at_once(members, |(name, member)| self.one(name, member, images[name].clone()));
        results.into_iter().collect()
    }

    /// The image of a VM; made, where it is not there yet.
    fn image(&self, vm: &Name, source: &Source) -> Result<Name, Failure> {
        let cannot = |error: store::image::Error| failure(vm, &error);
        match source {
            Source::Image(name) => {
                Image::open(&self.home, name).map_err(|error| {
                    cannot(error).hint(
                        "ospite image list shows those that are there; image.packages = [...] makes one",
                    )
                })?;
                Ok(name.clone())
            }
            Source::Recipe(recipe) => {
                let digest = recipe.digest().map_err(|error| failure(vm, &error))?;
                let name = image_name(vm, &digest);
                if Image::open(&self.home, &name).is_err() {
                    self.build(vm, &name, recipe)?;
                }
                Ok(name)
            }
        }
    }

    fn one(&self, name: &Name, member: &Member, image: Name) -> Result<Up, Failure> {
        let begun = Instant::now();
        let folder = self.defined(name, member, image)?;
        if !folder.is_on()? {
            self.progress.say(name, "starting");
            vms::start(&self.home, &folder)?;
        }
        self.wait_until_healthy(&folder, begun)?;
        let took = begun.elapsed().as_secs_f64();
        self.progress.say(name, &format!("up after {took:.1} s"));
        let ports = member.publish.iter().map(ToString::to_string).collect();
        Ok(Up { name: name.to_string(), took, ports })
    }

    /// The VM as it is declared, on or off.
    fn defined(&self, name: &Name, member: &Member, image: Name) -> Result<Folder, Failure> {
        match store::vm::find(&self.home, name) {
            Ok(folder) => {
                self.redefine(&folder, member, image)?;
                Ok(folder)
            }
            Err(store::vm::Error::NoSuch { .. }) => {
                self.progress.say(name, "creating");
                vms::create(&self.home, &self.definition(name, member, image)?)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What the file says now is what the VM is from its next start on, which is now if it differs.
    fn redefine(&self, folder: &Folder, member: &Member, image: Name) -> Result<(), Failure> {
        let (name, old) = (folder.name(), folder.definition()?);
        if old.labels.get(super::LABEL).map(Path::new) != Some(&self.file) {
            let whose = old.labels.get(super::LABEL).map_or("by hand".into(), |file| format!("by {file}"));
            let failure =
                Failure::new(Code::WrongState, format!("there is a VM `{name}` already, made {whose}"));
            return Err(
                failure.hint(format!("give one of them another name, or remove it: ospite rm {name}"))
            );
        }
        let mut new = self.definition(name, member, image)?;
        new.created = old.created;
        if new.boot != old.boot {
            // Its disk lies on the old one.
            log::warn!(
                "{name}: its image has changed, its disk has not: ospite rm -f {name} and up again takes the new one"
            );
            new.boot = old.boot.clone();
        }
        new.disk_size = old.disk_size;
        if new == old {
            return Ok(());
        }
        if folder.is_on()? {
            self.progress.say(name, "powering off: its declaration has changed");
            vms::stop(&self.home, folder, Duration::from_secs(old.stop_timeout))?;
        }
        Ok(folder.define(&new)?)
    }

    fn definition(&self, name: &Name, member: &Member, image: Name) -> Result<Definition, Failure> {
        let settings = NetworkSettings {
            mode: member.network.clone(),
            publish: member.publish.clone(),
            allow: member.net_allow.clone(),
            limits: member.net_limit,
        };
        Ok(Definition {
            version: store::vm::VERSION,
            name: name.clone(),
            created: vms::now(),
            boot: Boot::Image { image, append: None },
            cpus: member.cpus,
            cpu: member.cpu.clone(),
            memory: member.memory.bytes(),
            memory_backing: member.memory_backing.clone(),
            disk_size: member.disk.map(store::Size::bytes),
            disk_limits: member.disk_limit,
            disks: Vec::new(),
            cloud_init: member.cloud_init.as_ref().map(vms::told).transpose()?,
            engine: member.engine.clone(),
            console: Console::Serial,
            hpet: false,
            no_reboot: false,
            network: settings,
            restart: member.restart,
            health: member.health(),
            stop_timeout: member.stop_timeout,
            labels: BTreeMap::from([(super::LABEL.into(), self.file.display().to_string())]),
        })
    }

    fn wait_until_healthy(&self, folder: &Folder, begun: Instant) -> Result<(), Failure> {
        let (name, definition) = (folder.name(), folder.definition()?);
        let Some(check) = &definition.health else { return Ok(()) };
        self.progress.say(name, "running; waiting for its health check");
        loop {
            let info = vms::info(&self.home, folder)?;
            let reason = match info.health {
                Some(HealthState { word: Word::Healthy, .. }) => return Ok(()),
                Some(health) => health.reason.unwrap_or("its check has not passed yet".into()),
                // Its keeper was killed.
                None => {
                    match health::try_once(check, &definition.network.publish, health::in_guest(folder)) {
                        Ok(()) => return Ok(()),
                        Err(reason) => reason,
                    }
                }
            };
            if !folder.is_on()? {
                return Err(Failure::new(
                    Code::WrongState,
                    format!("{name} has ended before it was healthy"),
                )
                .hint(format!("see what it said last: ospite logs {name}")));
            }
            if begun.elapsed() > self.timeout {
                let waited = self.timeout.as_secs();
                return Err(Failure::new(
                    Code::WrongState,
                    format!("{name} is not healthy after {waited} s: {reason}"),
                )
                .hint(format!("ospite logs {name} shows what it says; --timeout SECONDS waits longer")));
            }
            self.progress.murmur(name, &format!("running; {reason}"));
            thread::sleep(Duration::from_millis(250));
        }
    }
}

fn failure(vm: &Name, error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::new(Code::Build, format!("{vm}: {}", vmm::chain(error)))
}

/// An image's name says for whom it was made, and of what.
fn image_name(vm: &Name, digest: &str) -> Name {
    let short: String = vm.as_str().chars().take(32).collect();
    let name = format!("{}-{}", short.trim_end_matches('-'), &digest[..DIGITS]);
    name.parse().unwrap_or_else(|_| vm.clone())
}

impl Site {
    fn build(&self, vm: &Name, name: &Name, recipe: &Recipe) -> Result<(), Failure> {
        self.progress.say(vm, &format!("building its image {name}; this takes a minute or two"));
        let mut step = String::new();
        let listener = &mut |progress: image::Progress<'_>| {
            match progress {
                image::Progress::Step(text) => {
                    step = text.to_owned();
                    self.progress.say(vm, &format!("image: {step}"));
                }
                image::Progress::Line(line) => self.progress.murmur(vm, &format!("image: {step}: {line}")),
                image::Progress::Bytes(done, of) if of > 0 => {
                    self.progress.murmur(vm, &format!("image: {step}: {} %", done * 100 / of));
                }
                _ => {}
            }
            ControlFlow::Continue(())
        };
        image::build(&self.home, name, recipe, listener).map(|_| ()).map_err(|error| failure(vm, &error))
    }
}
