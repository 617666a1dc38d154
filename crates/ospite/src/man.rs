//! `ospite man`: the man pages, made from the same words as `--help`.

use clap::CommandFactory;
use clap_mangen::Man;

use crate::cli::{Cli, ManArgs};
use crate::exit::Code;
use crate::failure::Failure;
use crate::output;

/// Prints ospite(1), or writes a page for each command into a folder.
pub fn man(args: &ManArgs) -> Result<Code, Failure> {
    match &args.dir {
        None => print_page()?,
        Some(dir) => clap_mangen::generate_to(Cli::command(), dir).map_err(|error| {
            Failure::new(Code::Build, format!("cannot write the man pages into {}: {error}", dir.display()))
        })?,
    }
    Ok(Code::Success)
}

fn print_page() -> Result<(), Failure> {
    let mut page = Vec::new();
    let rendered = Man::new(Cli::command()).render(&mut page);
    rendered.map_err(|error| Failure::from_error(Code::Internal, &error))?;
    output::print(&page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn every_command_gets_a_page_with_its_options_and_examples() {
        let dir = tempfile::tempdir().unwrap();
        man(&ManArgs { dir: Some(dir.path().to_owned()) }).unwrap();
        let page = fs::read_to_string(dir.path().join("ospite-run.1")).unwrap();
        assert!(page.contains("\\-\\-no\\-reboot") && page.contains("Examples"), "{page}");
        for name in ["ospite.1", "ospite-doctor.1", "ospite-completions.1", "ospite-man.1"] {
            assert!(dir.path().join(name).exists(), "{name}");
        }
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let failure = man(&ManArgs { dir: Some("/no/such/folder".into()) }).unwrap_err();
        assert!(format!("{failure:?}").contains("/no/such/folder"), "{failure:?}");
    }
}
