//! The engines by name.

use std::str::FromStr;

use engine::{Engine, Options};
use engine_kvm::KvmEngine;
use engine_soft::SoftEngine;

/// An engine as its users know it.
pub struct Info {
    /// What users type after `--engine`.
    pub name: &'static str,
    /// What it is, in half a line.
    pub summary: &'static str,
    make: fn(&Options) -> Result<Box<dyn Engine>, engine::Error>,
}

/// Every engine that ospite knows, the one that `auto` prefers first.
pub const ENGINES: &[Info] = &[
    Info { name: "kvm", summary: "hardware virtualization by the host's CPU", make: make_kvm },
    Info { name: "soft", summary: "a CPU in software; works on every host", make: make_soft },
];

/// No engine of this name, or none that works here.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name is wrong.
    #[error("there is no engine `{0}`; known are: auto, {names}", names = names())]
    Unknown(String),
    /// The text after the name is no option.
    #[error("`{0}` is not an option of an engine; write NAME,OPTION=VALUE, as in soft,tier=interpreter")]
    BadOption(String),
    /// The engine says why.
    #[error(transparent)]
    Unusable(#[from] engine::Error),
}

fn names() -> String {
    ENGINES.iter().map(|info| info.name).collect::<Vec<_>>().join(", ")
}

impl Info {
    /// Makes the engine, or says why it does not work on this host.
    pub fn make(&self, options: &Options) -> Result<Box<dyn Engine>, engine::Error> {
        (self.make)(options)
    }
}

/// An engine as users ask for it: `auto`, or a name and after commas its options, as in
/// `soft,tier=interpreter`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The engine; `None` for the best that works.
    name: Option<&'static str>,
    /// What else was said.
    pub options: Options,
}

impl FromStr for Choice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Choice, Error> {
        let mut parts = text.split(',');
        let name = match parts.next().unwrap_or_default() {
            "auto" => None,
            name => {
                let info = ENGINES.iter().find(|info| info.name == name);
                Some(info.ok_or_else(|| Error::Unknown(name.into()))?.name)
            }
        };
        let values = parts.map(|part| match part.split_once('=') {
            // Which engine an option is for must be said.
            Some((option, value)) if name.is_some() => Ok((option.into(), value.into())),
            _ => Err(Error::BadOption(part.into())),
        });
        let options = Options { values: values.collect::<Result<_, _>>()?, statistics: false };
        Ok(Choice { name, options })
    }
}

impl Choice {
    /// Makes the engine.
    pub fn make(&self) -> Result<Box<dyn Engine>, Error> {
        let Some(name) = self.name else { return Ok(auto(&self.options)?) };
        let info = ENGINES.iter().find(|info| info.name == name);
        Ok(info.ok_or_else(|| Error::Unknown(name.into()))?.make(&self.options)?)
    }
}

/// The engine that `text` asks for; see [`Choice`].
pub fn pick(text: &str) -> Result<Box<dyn Engine>, Error> {
    text.parse::<Choice>()?.make()
}

/// The last one's refusal is what users get to read: it is the one that should always work.
fn auto(options: &Options) -> Result<Box<dyn Engine>, engine::Error> {
    let mut refusal = None;
    for info in ENGINES {
        match info.make(options) {
            Ok(engine) => return Ok(engine),
            Err(error) => refusal = Some(error),
        }
    }
    Err(refusal.unwrap_or_else(no_engine))
}

fn no_engine() -> engine::Error {
    engine::Error::Unavailable { engine: "auto", why: "this build of ospite has no engine".into() }
}

fn make_kvm(options: &Options) -> Result<Box<dyn Engine>, engine::Error> {
    if let Some((name, value)) = options.values.first() {
        return Err(engine::Error::Option {
            engine: "kvm",
            option: format!("{name}={value}"),
            known: "none",
        });
    }
    Ok(Box::new(KvmEngine::new()?))
}

fn make_soft(options: &Options) -> Result<Box<dyn Engine>, engine::Error> {
    Ok(Box::new(SoftEngine::with_options(options)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_name_is_answered_with_the_right_ones() {
        let error = pick("warp").err().unwrap().to_string();
        assert_eq!(error, "there is no engine `warp`; known are: auto, kvm, soft");
    }

    #[test]
    fn options_belong_to_an_engine_that_knows_them() {
        assert!(pick("soft,tier=interpreter").is_ok());
        let refused = |text| pick(text).err().unwrap().to_string();
        assert_eq!(
            refused("soft,tier=warp"),
            "the soft engine has no option `tier=warp`; known are: tier=interpreter|translator|native|lockstep"
        );
        assert!(refused("kvm,tier=interpreter").contains("known are: none"));
        for text in ["auto,tier=lockstep", "soft,", "soft,tier"] {
            assert!(refused(text).contains("write NAME,OPTION=VALUE"), "{text}");
        }
    }

    #[test]
    fn kvm_works_or_says_what_is_missing() {
        match pick("kvm") {
            Ok(engine) => assert_eq!(engine.name(), "kvm"),
            Err(Error::Unusable(error)) => assert!(error.to_string().contains("kvm engine"), "{error}"),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn auto_picks_hardware_where_it_is_real_and_software_elsewhere() {
        let best = if pick("kvm").is_ok() { "kvm" } else { "soft" };
        assert_eq!(pick("auto").unwrap().name(), best);
    }
}
