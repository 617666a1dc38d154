//! `cargo xtask look`: boots a Debian guest, runs commands in it, prints what they print, powers off.

use guest_tests::{Ospite, Shell};

/// Arguments for `ospite run`, then `--`, then commands for the guest's shell.
pub fn look(args: &[String]) -> Result<(), String> {
    let mut parts = args.split(|arg| arg == "--");
    let (options, commands) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    if options.is_empty() || commands.is_empty() {
        return Err("write: cargo xtask look OSPITE-RUN-OPTIONS... -- COMMAND...".into());
    }
    let ospite = options.iter().fold(Ospite::run(), |ospite, option| ospite.arg(option));
    let mut shell = Shell::login(ospite.echo().start());
    // Services may still be starting behind the login prompt.
    shell.run_for("systemctl is-system-running --wait", 600);
    let answers: Vec<_> = commands.iter().map(|command| (command, shell.run(command))).collect();
    let end = shell.leave("poweroff").end(300);
    println!("\n");
    for (command, answer) in answers {
        println!("# {command}\n{answer}\n");
    }
    match end.status.code() {
        Some(0) => Ok(()),
        _ => Err(format!("ospite ended with {}: {}", end.status, end.messages.trim())),
    }
}
