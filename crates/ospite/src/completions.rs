//! `ospite completions`: what shells need to complete our options.

use clap::CommandFactory;

use crate::cli::{Cli, CompletionsArgs};
use crate::exit::Code;
use crate::failure::Failure;
use crate::output;

/// Prints the script for a shell.
pub fn completions(args: &CompletionsArgs) -> Result<Code, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "ospite", &mut script);
    output::print(&script)?;
    Ok(Code::Success)
}
