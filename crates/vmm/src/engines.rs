//! The engines by name.

use engine::Engine;
use engine_kvm::KvmEngine;
use engine_soft::SoftEngine;

/// An engine as its users know it.
pub struct Info {
    /// What users type after `--engine`.
    pub name: &'static str,
    /// What it is, in half a line.
    pub summary: &'static str,
    make: fn() -> Result<Box<dyn Engine>, engine::Error>,
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
    /// The engine says why.
    #[error(transparent)]
    Unusable(#[from] engine::Error),
}

fn names() -> String {
    ENGINES.iter().map(|info| info.name).collect::<Vec<_>>().join(", ")
}

impl Info {
    /// Makes the engine, or says why it does not work on this host.
    pub fn make(&self) -> Result<Box<dyn Engine>, engine::Error> {
        (self.make)()
    }
}

/// The engine called `name`; for `auto` the first one that works.
pub fn pick(name: &str) -> Result<Box<dyn Engine>, Error> {
    if name == "auto" {
        return Ok(auto()?);
    }
    let info = ENGINES.iter().find(|info| info.name == name);
    Ok(info.ok_or_else(|| Error::Unknown(name.into()))?.make()?)
}

/// The last one's refusal is what users get to read: it is the one that should always work.
fn auto() -> Result<Box<dyn Engine>, engine::Error> {
    let mut refusal = None;
    for info in ENGINES {
        match info.make() {
            Ok(engine) => return Ok(engine),
            Err(error) => refusal = Some(error),
        }
    }
    Err(refusal.unwrap_or_else(no_engine))
}

fn no_engine() -> engine::Error {
    engine::Error::Unavailable { engine: "auto", why: "this build of ospite has no engine".into() }
}

fn make_kvm() -> Result<Box<dyn Engine>, engine::Error> {
    Ok(Box::new(KvmEngine::new()?))
}

fn make_soft() -> Result<Box<dyn Engine>, engine::Error> {
    Ok(Box::new(SoftEngine::new()?))
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
