//! `ospite doctor`: what this host offers, and the exact commands that mend what it lacks.

use std::fmt::Write;
use std::path::Path;

use engine::Engine;
use engine::x86::CpuModel;
use serde::Serialize;
use vmm::engines;

use crate::cli::DoctorArgs;
use crate::exit::Code;
use crate::failure::Failure;

mod cpu;
mod host;
mod kvm;

use host::Host;

/// The whole answer.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    /// What `--engine auto` takes here.
    auto: Option<&'static str>,
    engines: Vec<EngineReport>,
    checks: Vec<Check>,
}

#[derive(Debug, Serialize)]
struct EngineReport {
    name: &'static str,
    summary: &'static str,
    works: bool,
    /// Why not.
    why: Option<String>,
    /// What makes it slower here than it could be.
    slowed_by: Option<String>,
    /// What `--cpu` can be with it.
    models: Vec<ModelReport>,
}

/// A CPU model on an engine that works.
#[derive(Debug, Serialize)]
struct ModelReport {
    name: &'static str,
    /// Why it cannot be had here.
    why: Option<String>,
}

/// How a thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it should be.
    Good,
    /// Worth knowing.
    Note,
    /// In the way.
    Bad,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    finding: String,
    /// The command that mends it.
    mend: Option<String>,
}

impl Check {
    fn new(name: &'static str, verdict: Verdict, finding: impl Into<String>) -> Check {
        Check { name, verdict, finding: finding.into(), mend: None }
    }

    fn mend(mut self, command: impl Into<String>) -> Check {
        self.mend = Some(command.into());
        self
    }
}

/// Looks around and prints; an exit code other than 0 where no engine works.
pub fn doctor(args: &DoctorArgs) -> Result<Code, Failure> {
    let report = report(&Host::new(Path::new("/")));
    args.output.print(&report, text)?;
    Ok(if report.auto.is_some() { Code::Success } else { Code::Engine })
}

fn report(host: &Host) -> Report {
    let engines = engines::ENGINES.iter().map(try_engine).collect();
    let auto = engines::pick("auto").ok().map(|engine| engine.name());
    let mut checks = vec![host.system(), cpu::model(host), cpu::features()];
    checks.extend([kvm::hardware(host), kvm::device(host), host.memory(), host.files()]);
    Report { version: env!("CARGO_PKG_VERSION"), auto, engines, checks }
}

fn try_engine(info: &engines::Info) -> EngineReport {
    let (name, summary) = (info.name, info.summary);
    match info.make(&engine::Options::default()) {
        Ok(engine) => {
            let (slowed_by, models) = (engine.slowed_by(), models(&*engine));
            EngineReport { name, summary, works: true, why: None, slowed_by, models }
        }
        Err(error) => {
            let why = Some(reason(&error));
            EngineReport { name, summary, works: false, why, slowed_by: None, models: Vec::new() }
        }
    }
}

fn models(engine: &dyn Engine) -> Vec<ModelReport> {
    let report = |model: CpuModel| {
        let why = engine.supports(model).err().map(|error| reason(&error));
        ModelReport { name: model.name(), why }
    };
    CpuModel::ALL.map(report).into()
}

/// Without the name of the engine, which stands before it.
fn reason(error: &engine::Error) -> String {
    match error {
        engine::Error::Unavailable { why, .. } => why.clone(),
        engine::Error::Unsupported { what, .. } => what.clone(),
        other => vmm::chain(other),
    }
}

fn text(report: &Report) -> String {
    let mut text = format!("ospite {}\n\nEngines\n", report.version);
    for engine in &report.engines {
        let mark = if engine.works { "yes" } else { "no" };
        let why = engine.why.as_deref().unwrap_or(engine.summary);
        let auto = if report.auto == Some(engine.name) { " (what --engine auto takes)" } else { "" };
        let _ = writeln!(text, "  {mark:<4} {:<5} {why}{auto}", engine.name);
        let names: Vec<_> = engine.models.iter().filter(|m| m.why.is_none()).map(|m| m.name).collect();
        if !names.is_empty() {
            let _ = writeln!(text, "             --cpu {}", names.join(", "));
        }
        if let Some(why) = &engine.slowed_by {
            let _ = writeln!(text, "             slow: {why}");
        }
        for why in engine.models.iter().filter_map(|model| model.why.as_ref()) {
            let _ = writeln!(text, "             not {why}");
        }
    }
    text.push_str("\nThis host\n");
    for check in &report.checks {
        let mark = match check.verdict {
            Verdict::Good => "ok",
            Verdict::Note => "note",
            Verdict::Bad => "BAD",
        };
        let _ = writeln!(text, "  {mark:<4} {}: {}", check.name, check.finding);
        if let Some(command) = &check.mend {
            let _ = writeln!(text, "       mend: {command}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_can_run_guests_and_the_report_says_by_what() {
        let report = report(&Host::new(Path::new("/")));
        let kvm = report.engines.iter().find(|engine| engine.name == "kvm").unwrap();
        assert_eq!(report.auto, Some(if kvm.works { "kvm" } else { "soft" }));
        let text = text(&report);
        assert!(text.contains("yes  soft"), "{text}");
        assert!(text.contains("--cpu host, x86-64-v2"), "{text}");
        assert!(text.contains("what --engine auto takes"), "{text}");
    }

    #[test]
    fn programs_can_read_it() {
        let json = serde_json::to_value(report(&Host::new(Path::new("/")))).unwrap();
        assert_eq!(json["engines"][1]["name"], "soft");
        assert_eq!(json["engines"][1]["models"][1]["name"], "x86-64-v2");
        assert!(json["checks"].as_array().unwrap().iter().all(|check| check["finding"].is_string()));
    }
}
