//! The host's CPU: the software engine runs on it, and lets guests have what it has.

use super::host::Host;
use super::{Check, Verdict};

/// Its name and count.
pub fn model(host: &Host) -> Check {
    let cpuinfo = host.read("proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or("unknown model", |(_, name)| name.trim());
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    Check::new(
        "CPU",
        Verdict::Good,
        format!("{model}, {count} for us; a guest may have more vCPUs, and gets no faster"),
    )
}

/// Which instruction sets it has, and which guests therefore miss.
pub fn features() -> Check {
    let (has, lacks): (Vec<_>, Vec<_>) = detect().into_iter().partition(|(_, there)| *there);
    let names = |list: Vec<(&'static str, bool)>| {
        list.into_iter().map(|(name, _)| name).collect::<Vec<_>>().join(" ")
    };
    if lacks.is_empty() {
        return Check::new("CPU features", Verdict::Good, names(has));
    }
    let finding = format!("{}; without: {}", names(has), names(lacks));
    Check::new("CPU features", Verdict::Note, finding)
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Vec<(&'static str, bool)> {
    use std::arch::is_x86_feature_detected as has;
    vec![
        ("cx16", has!("cmpxchg16b")),
        ("sse4.2", has!("sse4.2")),
        ("popcnt", has!("popcnt")),
        ("xsave", has!("xsave")),
        ("avx", has!("avx")),
        ("avx2", has!("avx2")),
        ("fma", has!("fma")),
        ("bmi1", has!("bmi1")),
        ("bmi2", has!("bmi2")),
        ("aes", has!("aes")),
        ("pclmulqdq", has!("pclmulqdq")),
        ("sha", has!("sha")),
        ("rdrand", has!("rdrand")),
        ("rdseed", has!("rdseed")),
    ]
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Vec<(&'static str, bool)> {
    Vec::new()
}
