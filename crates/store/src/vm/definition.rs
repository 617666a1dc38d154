//! What a VM is, as it was asked for: `vm.json`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use net::NetworkSettings;
use serde::{Deserialize, Serialize};
use throttle::DiskLimits;

use crate::Name;
use crate::cloud_init::CloudInit;

/// The version of this file's form. A field that is added gets a default and needs no new one.
pub const VERSION: u32 = 1;

/// A VM as its owner asked for it. Paths are absolute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// The form of this file.
    pub version: u32,
    /// Its name.
    pub name: Name,
    /// When it was created, in seconds since 1970.
    pub created: u64,
    /// What it starts.
    #[serde(flatten)]
    pub boot: Boot,
    /// Number of vCPUs.
    pub cpus: u32,
    /// What they say they are, by name.
    #[serde(default = "host")]
    pub cpu: String,
    /// Memory in bytes.
    pub memory: u64,
    /// What of the host's memory is behind it, by name.
    #[serde(default = "thp")]
    pub memory_backing: String,
    /// Size of its own disk in bytes; the image's where absent.
    #[serde(default)]
    pub disk_size: Option<u64>,
    /// What its own disk may do in a second.
    #[serde(default, skip_serializing_if = "DiskLimits::is_none")]
    pub disk_limits: DiskLimits,
    /// Disks that are not its own.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// What its guest is told at its first start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cloud_init: Option<CloudInit>,
    /// `auto`, or an engine's name.
    pub engine: String,
    /// Which console has the keyboard.
    #[serde(default)]
    pub console: Console,
    /// It has high precision event timers.
    #[serde(default)]
    pub hpet: bool,
    /// A reset by the guest ends the VM.
    #[serde(default)]
    pub no_reboot: bool,
    /// How it is connected.
    #[serde(flatten)]
    pub network: NetworkSettings,
    /// Whether it comes back when it ends.
    #[serde(default)]
    pub restart: Restart,
    /// How to tell that it does its work.
    #[serde(default)]
    pub health: Option<Health>,
    /// How long an orderly power-off may take before the power is cut, in seconds.
    pub stop_timeout: u64,
    /// What others want to remember about it, such as the file that declares it.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// What a VM starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Boot {
    /// A kernel of the host's.
    Kernel {
        /// The kernel.
        kernel: PathBuf,
        /// The initial RAM disk.
        #[serde(default)]
        initrd: Option<PathBuf>,
        /// Its command line.
        cmdline: String,
    },
    /// An image, with the kernel that is kept with it. The VM's own disk is an overlay on it.
    Image {
        /// The image.
        image: Name,
        /// Words for the kernel's command line beside the image's own.
        #[serde(default)]
        append: Option<String>,
    },
}

fn host() -> String {
    "host".into()
}

fn thp() -> String {
    "thp".into()
}

/// A disk that is not the VM's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The image or device.
    pub path: PathBuf,
    /// Its format; told by content where absent.
    #[serde(default)]
    pub format: Option<disk::Format>,
    /// The image that this one, an overlay, is on.
    #[serde(default)]
    pub base: Option<PathBuf>,
    /// The guest may not write.
    #[serde(default)]
    pub read_only: bool,
    /// The serial number that the guest sees.
    #[serde(default)]
    pub serial: Option<String>,
    /// What it may do in a second.
    #[serde(default, skip_serializing_if = "DiskLimits::is_none")]
    pub limits: DiskLimits,
}

/// A console of the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Console {
    /// COM1.
    #[default]
    Serial,
    /// A virtio console.
    Virtio,
}

impl Console {
    /// What tells a Linux kernel to use it.
    pub fn cmdline(self) -> &'static str {
        match self {
            Console::Serial => "console=ttyS0",
            Console::Virtio => "console=hvc0",
        }
    }
}

/// Whether a VM comes back when it ends without having been told to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// It stays off.
    #[default]
    No,
    /// Where its process failed or was killed, not where the guest powered itself off.
    OnFailure,
    /// In either case.
    Always,
}

/// How to tell that a VM does its work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// What is tried.
    pub probe: Probe,
    /// Seconds between two tries.
    pub interval: u64,
    /// Seconds that a try may take.
    pub timeout: u64,
    /// Failed tries in a row until it counts as ill.
    pub retries: u32,
    /// Seconds from the start on in which a VM that has not been healthy yet may fail.
    #[serde(default = "five_minutes")]
    pub start_period: u64,
    /// What follows when it is ill.
    #[serde(default)]
    pub on_failure: OnFailure,
}

fn five_minutes() -> u64 {
    300
}

/// What follows when a VM is ill.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// It is told.
    #[default]
    None,
    /// It is powered off and started again.
    Restart,
}

/// What a health check tries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Probe {
    /// A command in the guest that must return 0.
    Command(Vec<String>),
    /// A TCP port of the guest's whose server must greet.
    Tcp(u16),
    /// An HTTP port and path of the guest's that must answer 2xx or 3xx.
    Http(u16, String),
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A definition for tests.
    pub(crate) fn some(name: &str) -> Definition {
        let kernel = Boot::Kernel { kernel: "/vmlinuz".into(), initrd: None, cmdline: "quiet".into() };
        Definition {
            version: VERSION,
            name: name.parse().unwrap(),
            created: 1,
            boot: kernel,
            cpus: 2,
            cpu: "host".into(),
            memory: 1 << 30,
            memory_backing: "thp".into(),
            disk_size: None,
            disk_limits: DiskLimits::default(),
            disks: vec![Disk {
                path: "/d".into(),
                format: None,
                base: None,
                read_only: true,
                serial: None,
                limits: "iops=500,bandwidth=20M".parse().unwrap(),
            }],
            cloud_init: None,
            engine: "auto".into(),
            console: Console::Serial,
            hpet: false,
            no_reboot: false,
            network: serde_json::from_str(r#"{"network":"office","publish":["8080:80"]}"#).unwrap(),
            restart: Restart::OnFailure,
            health: Some(Health {
                probe: Probe::Http(80, "/".into()),
                interval: 1,
                timeout: 2,
                retries: 3,
                start_period: 300,
                on_failure: OnFailure::None,
            }),
            stop_timeout: 90,
            labels: BTreeMap::from([("office".into(), "/office.toml".into())]),
        }
    }

    #[test]
    fn a_definition_survives_its_file() {
        let web = some("web");
        let text = serde_json::to_string(&web).unwrap();
        assert!(text.contains(r#""network":"office","publish":["8080:80"]"#), "{text}");
        assert!(text.contains(r#""limits":{"iops":500,"bandwidth":20971520}"#), "{text}");
        assert_eq!(serde_json::from_str::<Definition>(&text).unwrap(), web);
    }

    #[test]
    fn a_short_one_of_an_older_version_gets_the_defaults() {
        let text = r#"{ "version": 1, "name": "web", "created": 1, "image": "debian",
            "cpus": 1, "memory": 1073741824, "engine": "auto", "stop_timeout": 90 }"#;
        let web: Definition = serde_json::from_str(text).unwrap();
        assert_eq!(web.boot, Boot::Image { image: "debian".parse().unwrap(), append: None });
        assert_eq!((web.restart, web.console), (Restart::No, Console::Serial));
        assert!(web.labels.is_empty() && web.health.is_none() && web.disk_limits.is_none());
    }
}
