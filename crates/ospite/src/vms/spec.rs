//! From what was asked for to what is built.

use std::error::Error;
use std::str::FromStr;

use machine::{BootSpec, DiskSpec, VmSpec};
use store::Home;
use store::image::Image;
use store::vm::{Boot, Definition, Disk, Folder};
use throttle::DiskLimits;

use crate::exit::Code;
use crate::failure::Failure;
use crate::network;
use crate::seed::Seed;

/// The machine of a VM, and its seed, which must be there until that is built.
pub fn spec(
    home: &Home,
    folder: &Folder,
    definition: &Definition,
) -> Result<(VmSpec, Option<Seed>), Failure> {
    let (boot, own) = match &definition.boot {
        Boot::Kernel { kernel, initrd, cmdline } => {
            let boot = BootSpec { kernel: kernel.clone(), initrd: initrd.clone(), cmdline: cmdline.clone() };
            (boot, None)
        }
        Boot::Image { image, append } => {
            let image = Image::open(home, image).map_err(|error| Failure::from_error(Code::Build, &error))?;
            (
                image_boot(&image, definition, append.as_deref()),
                Some(own_disk(&image, folder, definition.disk_limits)),
            )
        }
    };
    let name = definition.name.as_str();
    // A VM of the same name that is created later is another one.
    let instance = format!("{name}-{}", definition.created);
    let seed = definition.cloud_init.as_ref().map(|told| Seed::new(told, &instance, name)).transpose()?;
    let disks = own.into_iter().chain(definition.disks.iter().map(disk)).chain(seed.as_ref().map(Seed::disk));
    let spec = VmSpec {
        name: definition.name.to_string(),
        cpus: definition.cpus,
        cpu_model: known(&definition.cpu)?,
        memory: definition.memory,
        memory_backing: known(&definition.memory_backing)?,
        disks: disks.collect(),
        boot,
        nets: network::cards(name, &definition.network),
        hpet: definition.hpet,
        test_device: false,
        agent: true,
    };
    Ok((spec, seed))
}

/// What the definition names, if it exists.
fn known<T: FromStr<Err: Error + 'static>>(name: &str) -> Result<T, Failure> {
    name.parse().map_err(|error| Failure::from_error(Code::Build, &error))
}

/// A later word of the command line overrules an earlier one.
fn image_boot(image: &Image, vm: &Definition, append: Option<&str>) -> BootSpec {
    // Its own name is the VM's (kernel-command-line(7) of systemd), unless cloud-init sees to it.
    let host = match vm.cloud_init {
        None => format!("systemd.hostname={}", vm.name),
        Some(_) => String::new(),
    };
    let words = [vm.console.cmdline(), &host, &image.manifest.cmdline, append.unwrap_or_default()];
    let words: Vec<&str> = words.into_iter().filter(|word| !word.is_empty()).collect();
    BootSpec { kernel: image.kernel(), initrd: image.initrd(), cmdline: words.join(" ") }
}

fn own_disk(image: &Image, folder: &Folder, limits: DiskLimits) -> DiskSpec {
    DiskSpec {
        path: folder.disk(),
        format: Some(disk::Format::Qcow2),
        base: Some(image.disk()),
        read_only: false,
        serial: None,
        limits,
    }
}

fn disk(disk: &Disk) -> DiskSpec {
    let Disk { path, format, base, read_only, serial, limits } = disk.clone();
    DiskSpec { path, format, base, read_only, serial, limits }
}
