//! A VM comes into being.

use std::fs;
use std::path::{Path, PathBuf};

use store::cloud_init::{CloudInit, Files};
use store::image::{self, Image};
use store::vm::{Boot, Console, Definition, Disk, Folder};
use store::{Home, Name, Size};

use super::now;
use crate::cli::{ConsoleKind, DiskArg, ImageArgs, LifeArgs, MachineArgs};
use crate::exit::Code;
use crate::failure::Failure;

/// Creates a VM, which is off.
pub fn create(home: &Home, definition: &Definition) -> Result<Folder, Failure> {
    let Boot::Image { image, .. } = &definition.boot else {
        return store::vm::create(home, definition, |_| Ok(()));
    };
    let failure = |error: image::Error| Failure::from_error(Code::Build, &error);
    home.prepare().map_err(|error| Failure::from_error(Code::Build, &error))?;
    // From here until the VM names it, the image stays.
    let _held = image::hold(home).map_err(failure)?;
    let image = Image::open(home, image).map_err(failure)?;
    store::vm::create(home, definition, |disk| {
        image::overlay(&image, disk, definition.disk_size).map_err(failure)
    })
}

/// What was asked for, checked as far as it can be without building it.
pub fn definition(
    name: &Name,
    machine: &MachineArgs,
    image: &ImageArgs,
    life: &LifeArgs,
) -> Result<Definition, Failure> {
    Ok(Definition {
        version: store::vm::VERSION,
        name: name.clone(),
        created: now(),
        boot: boot(name, machine, image)?,
        cpus: machine.cpus,
        cpu: machine.cpu.name().into(),
        memory: machine.memory.bytes(),
        memory_backing: machine.memory_backing.name().into(),
        disk_size: image.disk_size.map(Size::bytes),
        disk_limits: image.disk_limit.unwrap_or_default(),
        disks: machine.disks.iter().map(disk).collect::<Result<_, _>>()?,
        cloud_init: machine.cloud_init.as_ref().map(told).transpose()?,
        engine: machine.engine.clone(),
        console: match machine.console {
            ConsoleKind::Serial => Console::Serial,
            ConsoleKind::Virtio => Console::Virtio,
        },
        hpet: machine.hpet,
        no_reboot: machine.no_reboot,
        network: machine.network.settings(),
        restart: life.restart.into(),
        health: None,
        stop_timeout: life.stop_timeout,
        labels: life.labels.iter().cloned().collect(),
    })
}

fn boot(name: &Name, machine: &MachineArgs, image: &ImageArgs) -> Result<Boot, Failure> {
    match (&image.image, &machine.kernel) {
        (Some(image), _) => Ok(Boot::Image { image: image.clone(), append: machine.append.clone() }),
        (None, Some(kernel)) => Ok(Boot::Kernel {
            kernel: file(kernel)?,
            initrd: machine.initrd.as_deref().map(file).transpose()?,
            cmdline: machine.append.clone().unwrap_or_else(|| machine.console.cmdline().into()),
        }),
        (None, None) => {
            Err(Failure::new(Code::Usage, "cannot create a VM without anything to boot").hint(format!(
                "ospite create {name} --image debian, or --kernel vmlinuz; more examples: ospite create --help"
            )))
        }
    }
}

/// What the files say now, which is what the guest is told whenever it starts.
pub fn told(files: &Files) -> Result<CloudInit, Failure> {
    files.read().map_err(|error| Failure::from_error(Code::Build, &error))
}

fn disk(arg: &DiskArg) -> Result<Disk, Failure> {
    let DiskArg { path, format, base, read_only, serial, limits } = arg.clone();
    let base = base.as_deref().map(file).transpose()?;
    Ok(Disk { path: file(&path)?, format, base, read_only, serial, limits })
}

/// A file that is there, by a path that means the same in every folder.
fn file(path: &Path) -> Result<PathBuf, Failure> {
    let cannot = |why: &dyn std::fmt::Display| {
        Failure::new(Code::Build, format!("cannot use {}: {why}", path.display()))
    };
    fs::metadata(path).map_err(|error| cannot(&error))?;
    if path.to_str().is_none() {
        return Err(cannot(&"the name of a file that a VM keeps must be UTF-8"));
    }
    std::path::absolute(path).map_err(|error| cannot(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_remembered_by_paths_that_mean_the_same_everywhere() {
        assert!(file(Path::new("Cargo.toml")).unwrap().is_absolute());
        assert!(file(Path::new("no/such")).unwrap_err().message().contains("no/such"));
    }
}
