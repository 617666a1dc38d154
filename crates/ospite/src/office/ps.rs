//! `ospite ps`: how the VMs of a file are.

use crate::at_once::at_once;
use crate::cli::PsArgs;
use crate::exit::Code;
use crate::failure::Failure;
use crate::output;
use crate::vms::{self, Info};

/// Prints them, with what their keepers say about their health.
pub fn ps(args: &PsArgs) -> Result<Code, Failure> {
    let home = vms::home()?;
    let (file, office) = super::read(&args.file)?;
    let folders = super::members(&home, &file)?;
    let mut infos =
        at_once(&folders, |folder| vms::info(&home, folder)).into_iter().collect::<Result<Vec<_>, _>>()?;
    infos.sort_by(|a, b| a.name.cmp(&b.name));
    let missing: Vec<String> = office
        .members
        .keys()
        .filter(|name| folders.iter().all(|folder| folder.name() != *name))
        .map(ToString::to_string)
        .collect();
    args.output.print(&infos, |infos| {
        let mut lines: Vec<Vec<String>> = infos.iter().map(row).collect();
        lines.extend(missing.iter().map(|name| vec![name.clone(), "not created".into()]));
        output::table(&["NAME", "STATE", "HEALTH", "UPTIME", "RESTARTS", "PORTS"], &lines)
    })?;
    Ok(Code::Success)
}

fn row(info: &Info) -> Vec<String> {
    let ports = info.definition.as_ref().map(|vm| &vm.network.publish);
    let ports = ports.into_iter().flatten().map(ToString::to_string).collect::<Vec<_>>();
    let shown = if ports.len() > 3 {
        format!("{}, ... ({})", ports[..2].join(", "), ports.len())
    } else {
        ports.join(", ")
    };
    vec![
        info.name.clone(),
        info.state.into(),
        info.health().unwrap_or("-".into()),
        info.uptime.map_or("-".into(), |seconds| format!("{seconds} s")),
        info.restarts.to_string(),
        shown,
    ]
}
