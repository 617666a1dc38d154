//! The disk by which a guest's cloud-init is told what to do: in memory, made anew for each start.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;

use machine::DiskSpec;
use rustix::fs::{MemfdFlags, memfd_create};
use store::cloud_init::CloudInit;
use throttle::DiskLimits;

use crate::exit::Code;
use crate::failure::Failure;
use crate::network;

/// The disk; it must be there until the machine has opened it.
pub struct Seed(File);

impl Seed {
    /// What the guest of `vm` is told. It applies it once for each `instance`.
    pub fn new(told: &CloudInit, instance: &str, vm: &str) -> Result<Seed, Failure> {
        let make = || -> io::Result<File> {
            let mut file = File::from(memfd_create(c"cloud-init", MemfdFlags::CLOEXEC)?);
            file.write_all(&told.seed(instance, &network::host_name(vm))?)?;
            Ok(file)
        };
        make().map(Seed).map_err(|error| {
            Failure::new(Code::Internal, format!("cannot make the disk for cloud-init: {error}"))
        })
    }

    /// As the machine sees it.
    pub fn disk(&self) -> DiskSpec {
        DiskSpec {
            path: format!("/proc/self/fd/{}", self.0.as_raw_fd()).into(),
            format: Some(disk::Format::Raw),
            base: None,
            read_only: true,
            serial: Some("cloud-init".into()),
            limits: DiskLimits::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_can_be_opened_as_a_disk_and_goes_with_its_owner() {
        let told = CloudInit { user_data: "#cloud-config\n".into(), network_config: None, vendor_data: None };
        let seed = Seed::new(&told, "web-1", "web").unwrap();
        let DiskSpec { path, format, read_only, .. } = seed.disk();
        assert!(disk::open(&path, format, read_only).unwrap().size() >= 1 << 20);
        drop(seed);
        assert!(disk::open(&path, format, read_only).is_err());
    }
}
