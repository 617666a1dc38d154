//! The house plan as tables. Change it here, with a reason in the commit, and in ARCHITECTURE.md.

/// A crate and the workspace crates that it may use. Rows may name rooms that are not built yet.
pub const MAY_USE: &[(&str, &[&str])] = &[
    ("mem", &[]),
    ("sandbox", &[]),
    // Tap interfaces are had by ioctls, which no other room may make.
    ("tap", &[]),
    // Talks to programs in the guest over a socket; knows nothing of the machine.
    ("agent", &[]),
    // What users say of limits, on the way from their files to the devices that keep to them.
    ("throttle", &[]),
    ("device", &["mem"]),
    ("engine", &["mem"]),
    ("net", &["mem", "tap", "throttle"]),
    ("disk", &["mem"]),
    ("boot", &["mem"]),
    // A VM's definition names its networks.
    ("store", &["disk", "net", "throttle"]),
    ("pci", &["device", "mem"]),
    ("chipset", &["device", "mem"]),
    ("virtio", &["pci", "device", "disk", "net", "mem", "throttle"]),
    ("engine-soft", &["engine", "mem"]),
    ("engine-kvm", &["engine", "mem"]),
    (
        "machine",
        &[
            "boot",
            "chipset",
            "device",
            "disk",
            "engine",
            "engine-kvm",
            "engine-soft",
            "mem",
            "net",
            "pci",
            "throttle",
            "virtio",
        ],
    ),
    // `vmm` picks the engine by name; it hands it to `machine` as a trait object.
    ("vmm", &["machine", "sandbox", "engine", "engine-kvm", "engine-soft"]),
    // The door: parses and prints, and so names the types of these, but wires nothing.
    ("ospite", &["vmm", "store", "machine", "engine", "disk", "net", "agent", "sandbox", "throttle"]),
    // Tools of the house, never part of the product.
    ("dice", &[]),
    ("guest-tests", &["dice"]),
    ("ospite-bench", &[]),
    ("xtask", &["guest-tests"]),
];

/// The crates in which a module may open `unsafe`.
pub const MAY_BE_UNSAFE: &[&str] = &["mem", "engine-soft", "engine-kvm", "sandbox", "tap"];
/// The crates that may implement methods which a library has declared `unsafe`, with nothing in them that is.
pub const MAY_DECLARE_UNSAFE: &[&str] = &["disk"];
