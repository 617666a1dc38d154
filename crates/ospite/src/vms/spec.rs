//! From what was asked for to what is built.

use machine::{BootSpec, DiskSpec, VmSpec};
use store::Home;
use store::image::Image;
use store::vm::{Boot, Definition, Disk, Folder};

use crate::exit::Code;
use crate::failure::Failure;
use crate::network;

/// The machine of a VM.
pub fn spec(home: &Home, folder: &Folder, definition: &Definition) -> Result<VmSpec, Failure> {
    let (boot, own) = match &definition.boot {
        Boot::Kernel { kernel, initrd, cmdline } => {
            let boot = BootSpec { kernel: kernel.clone(), initrd: initrd.clone(), cmdline: cmdline.clone() };
            (boot, None)
        }
        Boot::Image { image, append } => {
            let image = Image::open(home, image).map_err(|error| Failure::from_error(Code::Build, &error))?;
            (image_boot(&image, definition, append.as_deref()), Some(own_disk(&image, folder)))
        }
    };
    Ok(VmSpec {
        name: definition.name.to_string(),
        cpus: definition.cpus,
        cpu_model: definition.cpu.parse().map_err(|error| Failure::from_error(Code::Build, &error))?,
        memory: definition.memory,
        disks: own.into_iter().chain(definition.disks.iter().map(disk)).collect(),
        boot,
        nets: network::cards(definition.name.as_str(), &definition.network),
        test_device: false,
        agent: true,
    })
}

/// A later word of the command line overrules an earlier one.
fn image_boot(image: &Image, vm: &Definition, append: Option<&str>) -> BootSpec {
    // Its own name is the VM's (kernel-command-line(7) of systemd).
    let host = format!("systemd.hostname={}", vm.name);
    let words = [vm.console.cmdline(), &host, &image.manifest.cmdline, append.unwrap_or_default()];
    let words: Vec<&str> = words.into_iter().filter(|word| !word.is_empty()).collect();
    BootSpec { kernel: image.kernel(), initrd: image.initrd(), cmdline: words.join(" ") }
}

fn own_disk(image: &Image, folder: &Folder) -> DiskSpec {
    DiskSpec {
        path: folder.disk(),
        format: Some(disk::Format::Qcow2),
        base: Some(image.disk()),
        read_only: false,
        serial: None,
    }
}

fn disk(disk: &Disk) -> DiskSpec {
    let Disk { path, format, base, read_only, serial } = disk.clone();
    DiskSpec { path, format, base, read_only, serial }
}
