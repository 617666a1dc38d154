//! `ospite autostart`: what ran when the host went down runs again.

use std::env;
use std::path::Path;

use store::vm::{Folder, Restart};

use super::commands;
use crate::cli::AutostartArgs;
use crate::exit::Code;
use crate::failure::Failure;
use crate::output;

/// Starts them, or prints what has systemd do so.
pub fn autostart(args: &AutostartArgs) -> Result<Code, Failure> {
    if args.unit {
        let program = env::current_exe().map_err(|error| Failure::from_error(Code::Internal, &error))?;
        let home = env::var("OSPITE_HOME").ok();
        output::print(unit(&program, home.as_deref(), rustix::process::geteuid().is_root()).as_bytes())?;
        return Ok(Code::Success);
    }
    let home = super::home()?;
    let folders = store::vm::list(&home)?.into_iter().filter(comes_back).collect::<Vec<_>>();
    commands::each(&folders, args.output, |folder| super::start(&home, folder).map(|()| "started"))
}

/// Whether it has a restart policy, and nobody had switched it off. One whose files are broken does not.
fn comes_back(folder: &Folder) -> bool {
    let policy = folder.definition().map(|definition| definition.restart);
    let wanted = matches!(folder.state(), Ok(Some(state)) if state.wanted);
    wanted
        && matches!(policy, Ok(Restart::OnFailure | Restart::Always))
        && matches!(folder.is_on(), Ok(false))
}

/// systemd.service(5). When it is stopped, every process gets SIGTERM, at which VMs power off in order.
fn unit(program: &Path, home: Option<&str>, root: bool) -> String {
    let (place, enable, target) = match root {
        true => ("/etc/systemd/system", "systemctl enable ospite", "multi-user.target"),
        false => (
            "~/.config/systemd/user",
            "systemctl --user enable ospite && loginctl enable-linger",
            "default.target",
        ),
    };
    let home = home.map(|home| format!("Environment={}\n", quoted(&format!("OSPITE_HOME={home}"))));
    let (home, program) = (home.unwrap_or_default(), quoted(&program.display().to_string()));
    format!(
        "# ospite autostart --unit > {place}/ospite.service && {enable}\n\
         [Unit]\n\
         Description=Virtual machines of ospite\n\
         After=network-online.target\n\
         Wants=network-online.target\n\n\
         [Service]\n\
         Type=oneshot\n\
         RemainAfterExit=yes\n\
         {home}\
         ExecStart={program} autostart\n\
         # Longer than the --stop-timeout of your VMs.\n\
         TimeoutStopSec=120\n\n\
         [Install]\n\
         WantedBy={target}\n"
    )
}

/// A word of a unit as it stands: systemd.syntax(7) "Quoting", and `%`, which begins a specifier.
fn quoted(word: &str) -> String {
    format!("\"{}\"", word.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_names_the_program_and_how_it_is_installed() {
        let root = unit(Path::new("/usr/local/bin/ospite"), None, true);
        assert!(root.contains("\nExecStart=\"/usr/local/bin/ospite\" autostart\n"), "{root}");
        assert!(root.contains("WantedBy=multi-user.target") && !root.contains("OSPITE_HOME"));
        let user = unit(Path::new("/my tools/o"), Some("/srv/100%"), false);
        assert!(user.contains("enable-linger") && user.contains("Environment=\"OSPITE_HOME=/srv/100%%\"\n"));
        assert!(user.contains("ExecStart=\"/my tools/o\" autostart"), "{user}");
    }
}
