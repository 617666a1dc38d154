//! Project chores: `cargo xtask arrows` checks the house plan, `cargo xtask look` looks into a guest.

use std::process::ExitCode;

mod arrows;
mod look;
mod manifests;
mod plan;
mod unsafe_rooms;

const HELP: &str = "\
Project chores.

Usage: cargo xtask <TASK>

Tasks:
  arrows   Fails when a crate uses one that the house plan forbids, or opens `unsafe` where it may not
  look OSPITE-RUN-OPTIONS... -- COMMAND...
           Boots a Debian guest, logs in, runs the commands, prints what they print, powers off
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match args.first().map(String::as_str) {
        Some("arrows") => arrows_hold(),
        Some("look") => look::look(&args[1..]),
        Some("help" | "-h" | "--help") => {
            print!("{HELP}");
            Ok(())
        }
        _ => {
            eprint!("{HELP}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

fn arrows_hold() -> Result<(), String> {
    let problems = problems()?;
    if problems.is_empty() {
        println!("arrows: every crate keeps to the house plan");
        return Ok(());
    }
    Err(format!("the house plan is not kept:\n  {}", problems.join("\n  ")))
}

/// Both checks of the house plan; the problems found, one line each.
fn problems() -> Result<Vec<String>, String> {
    let crates = manifests::workspace()?;
    let mut problems = arrows::check(&crates);
    problems.extend(unsafe_rooms::check(&crates)?);
    Ok(problems)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_house_stands_as_planned() {
        assert_eq!(super::problems().unwrap(), Vec::<String>::new());
    }
}
