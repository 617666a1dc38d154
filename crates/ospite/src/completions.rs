//! `ospite completions`: what shells need to complete our options, and the names of VMs.

use std::ffi::OsStr;

use clap::CommandFactory;
use clap_complete::CompletionCandidate;
use clap_complete::engine::{PathCompleter, ValueCompleter};
use clap_complete::env::{CompleteEnv, Shells};
use store::Name;
use store::image::Image;
use store::vm::Folder;

use crate::cli::{Cli, CompletionsArgs};
use crate::exit::Code;
use crate::failure::Failure;
use crate::{output, vms};

/// Set by the scripts when they ask for candidates.
const VARIABLE: &str = "OSPITE_COMPLETE";

/// Answers a shell that asks for candidates, and ends.
pub fn answer_shells() {
    CompleteEnv::with_factory(Cli::command).var(VARIABLE).complete();
}

/// Prints the script for a shell. It asks the program itself, which knows the VMs of the moment.
pub fn completions(args: &CompletionsArgs) -> Result<Code, Failure> {
    let name = args.shell.to_string();
    let shells = Shells::builtins();
    let shell = shells
        .completer(&name)
        .ok_or_else(|| Failure::new(Code::Usage, format!("there are no completions for {name}")))?;
    let mut script = Vec::new();
    let written = shell.write_registration(VARIABLE, "ospite", "ospite", "ospite", &mut script);
    written.map_err(|error| Failure::from_error(Code::Internal, &error))?;
    output::print(&script)?;
    Ok(Code::Success)
}

/// The VMs that are there.
pub fn vm_names(begin: &OsStr) -> Vec<CompletionCandidate> {
    let folders = vms::home().ok().and_then(|home| store::vm::list(&home).ok()).unwrap_or_default();
    those_that(begin, folders.iter().map(Folder::name))
}

/// A file of the host's, or a VM, after whose colon comes a file of its guest's.
pub fn vm_places(begin: &OsStr) -> Vec<CompletionCandidate> {
    let place = |vm: CompletionCandidate| {
        let mut place = vm.get_value().to_owned();
        place.push(":");
        CompletionCandidate::new(place)
    };
    let vms = vm_names(begin).into_iter().map(place);
    PathCompleter::any().complete(begin).into_iter().chain(vms).collect()
}

/// The images that are there.
pub fn image_names(begin: &OsStr) -> Vec<CompletionCandidate> {
    let images = vms::home().ok().and_then(|home| Image::list(&home).ok()).unwrap_or_default();
    those_that(begin, images.iter().map(|image| &image.name))
}

fn those_that<'a>(begin: &OsStr, names: impl Iterator<Item = &'a Name>) -> Vec<CompletionCandidate> {
    let Some(begin) = begin.to_str() else { return Vec::new() };
    names.filter(|name| name.as_str().starts_with(begin)).map(|name| name.as_str().into()).collect()
}
