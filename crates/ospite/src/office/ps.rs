//! `ospite ps`: how the VMs of a file are.

use std::thread;

use serde::Serialize;
use store::Home;
use store::vm::Folder;

use super::health;
use crate::cli::PsArgs;
use crate::exit::Code;
use crate::failure::Failure;
use crate::output;
use crate::vms::{self, Info};

/// A VM, and whether it does its work.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    info: Info,
    /// `healthy`, `unhealthy`, or nothing where there is no check or the VM is off.
    health: Option<&'static str>,
    /// Why it is not.
    reason: Option<String>,
}

/// Prints them, and tries each health check once.
pub fn ps(args: &PsArgs) -> Result<Code, Failure> {
    let home = vms::home()?;
    let (file, office) = super::read(&args.file)?;
    let folders = super::members(&home, &file)?;
    let mut rows = thread::scope(|scope| {
        let home = &home;
        let threads: Vec<_> = folders.iter().map(|folder| scope.spawn(move || row(home, folder))).collect();
        let joined = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        joined.collect::<Result<Vec<_>, _>>()
    })?;
    rows.sort_by(|a, b| a.info.name.cmp(&b.info.name));
    let missing: Vec<String> = office
        .members
        .keys()
        .filter(|name| folders.iter().all(|folder| folder.name() != *name))
        .map(ToString::to_string)
        .collect();
    args.output.print(&rows, |rows| {
        let mut lines: Vec<Vec<String>> = rows.iter().map(Row::cells).collect();
        lines.extend(missing.iter().map(|name| vec![name.clone(), "not created".into()]));
        output::table(&["NAME", "STATE", "HEALTH", "UPTIME", "RESTARTS", "PORTS"], &lines)
    })?;
    Ok(Code::Success)
}

fn row(home: &Home, folder: &Folder) -> Result<Row, Failure> {
    let info = vms::info(home, folder)?;
    let definition = info.definition.as_ref().filter(|_| info.state == "running");
    let check = definition.and_then(|vm| Some((vm.health.as_ref()?, &vm.network.publish)));
    let (health, reason) = match check {
        None => (None, None),
        Some((check, publish)) => match health::try_once(check, publish, super::run(folder)) {
            Ok(()) => (Some("healthy"), None),
            Err(reason) => (Some("unhealthy"), Some(reason)),
        },
    };
    Ok(Row { info, health, reason })
}

impl Row {
    fn cells(&self) -> Vec<String> {
        let health = match (self.health, &self.reason) {
            (Some(health), Some(reason)) => format!("{health}: {reason}"),
            (Some(health), None) => health.into(),
            (None, _) => "-".into(),
        };
        let ports = self.info.definition.as_ref().map(|vm| &vm.network.publish);
        let ports = ports.into_iter().flatten().map(ToString::to_string).collect::<Vec<_>>();
        let shown = if ports.len() > 3 {
            format!("{}, ... ({})", ports[..2].join(", "), ports.len())
        } else {
            ports.join(", ")
        };
        let uptime = self.info.uptime.map_or("-".into(), |seconds| format!("{seconds} s"));
        vec![
            self.info.name.clone(),
            self.info.state.into(),
            health,
            uptime,
            self.info.restarts.to_string(),
            shown,
        ]
    }
}
