//! Who is on an image.

use std::fs;

use serde::Deserialize;

use crate::{Home, Name};

/// What a VM's definition says of its image; the rest is not ours.
#[derive(Deserialize)]
struct OnImage {
    image: Option<Name>,
}

/// The VMs whose disks are overlays on the image `name`: those whose `vm.json` says `"image": NAME`.
pub fn users(home: &Home, name: &Name) -> Vec<Name> {
    let entries = fs::read_dir(home.vms()).into_iter().flatten().flatten();
    let is_on = |vm: &Name| {
        let text = fs::read(home.vm(vm).join("vm.json")).ok()?;
        serde_json::from_slice::<OnImage>(&text).ok()?.image
    };
    let names = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<Name>().ok());
    let mut users: Vec<Name> = names.filter(|vm| is_on(vm).as_ref() == Some(name)).collect();
    users.sort();
    users
}
