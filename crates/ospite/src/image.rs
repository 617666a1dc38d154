//! `ospite image`: what VMs start from.

use store::Home;
use store::image::{self, Error};

use crate::cli::ImageCommand;
use crate::exit::Code;
use crate::failure::Failure;

mod build;
mod progress;
mod show;
mod transfer;

/// Does it.
pub fn image(command: &ImageCommand) -> Result<Code, Failure> {
    let home = Home::find().map_err(|why| Failure::new(Code::Build, why))?;
    match command {
        ImageCommand::Build(args) => build::build(&home, args),
        ImageCommand::List(args) => show::list(&home, args),
        ImageCommand::Info(args) => show::info(&home, args),
        ImageCommand::Import(args) => transfer::import(&home, args),
        ImageCommand::Export(args) => transfer::export(&home, args),
        ImageCommand::Rm(args) => {
            for name in &args.names {
                image::remove(&home, name).map_err(failure)?;
            }
            Ok(Code::Success)
        }
    }
}

fn failure(error: Error) -> Failure {
    Failure::from_error(Code::Build, &error)
}
