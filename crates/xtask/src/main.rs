//! Project chores: `cargo xtask arrows` checks the house plan.

use std::process::ExitCode;

mod arrows;
mod manifests;
mod plan;
mod unsafe_rooms;

const HELP: &str = "\
Project chores.

Usage: cargo xtask <TASK>

Tasks:
  arrows   Fails when a crate uses one that the house plan forbids, or opens `unsafe` where it may not
";

fn main() -> ExitCode {
    let task = std::env::args().nth(1);
    match task.as_deref() {
        Some("arrows") => report(arrows()),
        Some("help" | "-h" | "--help") => {
            print!("{HELP}");
            ExitCode::SUCCESS
        }
        _ => {
            eprint!("{HELP}");
            ExitCode::from(2)
        }
    }
}

/// Both checks of the house plan; the problems found, one line each.
fn arrows() -> Result<Vec<String>, String> {
    let crates = manifests::workspace()?;
    let mut problems = arrows::check(&crates);
    problems.extend(unsafe_rooms::check(&crates)?);
    Ok(problems)
}

fn report(outcome: Result<Vec<String>, String>) -> ExitCode {
    match outcome {
        Ok(problems) if problems.is_empty() => {
            println!("arrows: every crate keeps to the house plan");
            ExitCode::SUCCESS
        }
        Ok(problems) => {
            problems.iter().for_each(|problem| eprintln!("arrows: {problem}"));
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_house_stands_as_planned() {
        assert_eq!(super::arrows().unwrap(), Vec::<String>::new());
    }
}
