//! `--engine NAME[,OPTION=VALUE...]`

use std::ffi::OsStr;

use clap::builder::{PossibleValue, TypedValueParser};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, Command, Error};
use vmm::engines::{self, Choice};

/// Takes what [`Choice`] takes; shells complete the names.
#[derive(Clone, Copy, Debug)]
pub struct EngineParser;

impl TypedValueParser for EngineParser {
    type Value = String;

    fn parse_ref(&self, command: &Command, arg: Option<&Arg>, value: &OsStr) -> Result<String, Error> {
        let text = value.to_string_lossy();
        let Err(why) = text.parse::<Choice>() else { return Ok(text.into_owned()) };
        let mut error = Error::raw(ErrorKind::ValueValidation, format!("{why}\n")).with_cmd(command);
        if let Some(arg) = arg {
            error.insert(ContextKind::InvalidArg, ContextValue::String(arg.to_string()));
        }
        Err(error)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let auto = PossibleValue::new("auto").help("the best that works here");
        let names = engines::ENGINES.iter().map(|info| PossibleValue::new(info.name).help(info.summary));
        Some(Box::new(std::iter::once(auto).chain(names)))
    }
}
