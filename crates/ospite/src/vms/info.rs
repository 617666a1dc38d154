//! How VMs are.

use std::time::Duration;

use serde::Serialize;
use store::Home;
use store::vm::{Boot, Definition, Disk, Folder, HealthState, LastEnd, Phase, Restart, Word};

use super::{Client, now};
use crate::failure::Failure;

/// How long a VM's answer is waited for.
const ANSWER: Duration = Duration::from_millis(1500);

/// A VM as its owner sees it.
#[derive(Debug, Serialize)]
pub struct Info {
    /// Its name.
    pub name: String,
    /// `off`, `failed`, `starting`, `running`, `unhealthy`, `paused`, `restarting`, or `broken` where its files
    /// are.
    pub state: &'static str,
    /// Its process.
    pub pid: Option<u32>,
    /// The process that restarts it.
    pub keeper: Option<u32>,
    /// Seconds since its process was started.
    pub uptime: Option<u64>,
    /// How often the guest was reset since.
    pub resets: Option<u64>,
    /// How often it came back by its restart policy since it was switched on.
    pub restarts: u64,
    /// What executes it, or `auto` before it is known.
    pub engine: Option<String>,
    /// What the host's memory holds of its process, in bytes.
    pub resident: Option<u64>,
    /// How it ended the last time.
    pub last_end: Option<LastEnd>,
    /// Whether it does its work, where it is on and has a health check.
    pub health: Option<HealthState>,
    /// Its folder.
    pub folder: String,
    /// What it was asked to be.
    pub definition: Option<Definition>,
    /// What is wrong with its files.
    pub error: Option<String>,
}

/// Looks at a VM.
pub fn info(home: &Home, folder: &Folder) -> Result<Info, Failure> {
    let on = folder.is_on()?;
    let mut info = Info {
        name: folder.name().to_string(),
        state: if on { "starting" } else { "off" },
        pid: None,
        keeper: None,
        uptime: None,
        resets: None,
        restarts: 0,
        engine: None,
        resident: None,
        last_end: None,
        health: None,
        folder: folder.path().display().to_string(),
        definition: None,
        error: None,
    };
    match folder.definition() {
        Ok(definition) => {
            info.engine = Some(definition.engine.clone());
            info.definition = Some(definition);
        }
        Err(error) => {
            info.state = "broken";
            info.error = Some(vmm::chain(&error));
        }
    }
    info.look_at_state(folder, on);
    if on && info.state != "restarting" {
        info.ask(home, folder);
    }
    Ok(info)
}

impl Info {
    fn look_at_state(&mut self, folder: &Folder, on: bool) {
        let Ok(Some(state)) = folder.state() else { return };
        self.restarts = state.restarts;
        if on {
            self.pid = state.vm.as_ref().filter(|vm| vm.is_alive()).map(|vm| vm.pid);
            self.keeper = state.keeper.as_ref().filter(|keeper| keeper.is_alive()).map(|keeper| keeper.pid);
            self.uptime = self.pid.map(|_| now().saturating_sub(state.started));
            self.resident = self.pid.and_then(resident);
            // Its keeper keeps that up to date; without one it is old.
            self.health = state.health.filter(|_| self.keeper.is_some());
            if state.phase == Phase::Restarting {
                self.state = "restarting";
            }
        } else if self.state == "off" && state.last_end.as_ref().is_some_and(|end| end.failed) {
            self.state = "failed";
        }
        self.last_end = state.last_end;
    }

    fn ask(&mut self, home: &Home, folder: &Folder) {
        let client = Client::connect(home, folder.name(), ANSWER);
        let Ok(status) = client.and_then(|mut client| client.request(vmm::Request::Status)) else { return };
        self.state = match status.vm.state {
            vmm::State::Running if self.is_ill() => "unhealthy",
            vmm::State::Running => "running",
            vmm::State::Paused => "paused",
        };
        self.uptime = Some(status.vm.uptime.as_secs());
        self.resets = Some(status.vm.resets);
        self.engine = Some(status.engine);
    }

    fn is_ill(&self) -> bool {
        self.health.as_ref().is_some_and(|health| health.word == Word::Unhealthy)
    }

    /// Its health, for people.
    pub fn health(&self) -> Option<String> {
        let HealthState { word, reason } = self.health.as_ref()?;
        let reason = reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        Some(format!("{}{reason}", word.as_str()))
    }

    /// The line of a table: see [`TITLES`].
    pub fn row(&self) -> Vec<String> {
        let size = |bytes: u64| store::Size::from(bytes).to_string();
        let of =
            |what: &dyn Fn(&Definition) -> String| self.definition.as_ref().map_or_else(String::new, what);
        vec![
            self.name.clone(),
            self.state.into(),
            self.pid.map_or_else(String::new, |pid| pid.to_string()),
            self.uptime.map_or_else(String::new, duration),
            self.engine.clone().unwrap_or_default(),
            of(&|definition| definition.cpus.to_string()),
            of(&|definition| size(definition.memory)),
            of(&|definition| boots(&definition.boot)),
            of(&ports),
        ]
    }

    /// All of it, for people.
    pub fn text(&self) -> String {
        let mut lines: Vec<(&str, String)> = vec![("name", self.name.clone()), ("state", self.state.into())];
        let mut add = |title, value: Option<String>| lines.extend(value.map(|value| (title, value)));
        add("error", self.error.clone());
        add("process", self.pid.map(|pid| pid.to_string()));
        add("running for", self.uptime.map(duration));
        add("health", self.health());
        add("resets", self.resets.map(|resets| resets.to_string()));
        add("restarts", Some(self.restarts.to_string()));
        add("last end", self.last_end.as_ref().map(last_end));
        add("engine", self.engine.clone());
        if let Some(definition) = &self.definition {
            let size = |bytes: u64| store::Size::from(bytes).to_string();
            add("CPUs", Some(definition.cpus.to_string()));
            add("memory", Some(size(definition.memory)));
            add("resident", self.resident.map(|bytes| format!("{} MiB", bytes >> 20)));
            add("boots", Some(boots(&definition.boot)));
            add(
                "own disk",
                Some(definition.disk_limits).filter(|limits| !limits.is_none()).map(|l| l.to_string()),
            );
            for Disk { path, limits, .. } in &definition.disks {
                let limits = if limits.is_none() { String::new() } else { format!(", {limits}") };
                add("disk", Some(format!("{}{limits}", path.display())));
            }
            let limits = &definition.network.limits;
            let limits = if limits.is_none() { String::new() } else { format!(", {limits}") };
            add("network", Some(format!("{}{limits}", definition.network.mode)));
            add("ports", Some(ports(definition)).filter(|ports| !ports.is_empty()));
            add("restart", Some(policy(definition.restart).into()));
            for (key, value) in &definition.labels {
                add("label", Some(format!("{key}={value}")));
            }
        }
        add("folder", Some(self.folder.clone()));
        lines.iter().map(|(title, value)| format!("{title:<13} {value}\n")).collect()
    }
}

/// The titles of [`Info::row`].
pub const TITLES: [&str; 9] =
    ["NAME", "STATE", "PID", "UPTIME", "ENGINE", "CPUS", "MEMORY", "BOOTS", "PORTS"];

fn boots(boot: &Boot) -> String {
    match boot {
        Boot::Kernel { kernel, .. } => kernel.display().to_string(),
        Boot::Image { image, .. } => format!("image {image}"),
    }
}

fn ports(definition: &Definition) -> String {
    definition.network.publish.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

fn policy(restart: Restart) -> &'static str {
    match restart {
        Restart::No => "no",
        Restart::OnFailure => "on-failure",
        Restart::Always => "always",
    }
}

fn last_end(end: &LastEnd) -> String {
    format!("{}, {} ago", end.how, duration(now().saturating_sub(end.at)))
}

/// In the two units that matter.
fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m {}s", seconds % 60),
        3600..86400 => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

/// proc_pid_statm(5), the second field, in pages.
fn resident(pid: u32) -> Option<u64> {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short() {
        let texts = [0, 59, 61, 3600, 90_061].map(duration);
        assert_eq!(texts, ["0s", "59s", "1m 1s", "1h 0m", "1d 1h"]);
    }

    #[test]
    fn a_process_has_memory() {
        assert!(resident(std::process::id()).unwrap() > 1 << 20);
        assert_eq!(resident(u32::MAX), None);
    }
}
