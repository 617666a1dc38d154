//! What cargo knows about the workspace's crates.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

/// A crate of the workspace.
pub struct Crate {
    /// Its name.
    pub name: String,
    /// The folder of its manifest.
    pub dir: PathBuf,
    /// The workspace crates that it links: normal and build dependencies, not those of its tests.
    pub uses: Vec<String>,
}

/// All crates of the workspace that holds this one.
pub fn workspace() -> Result<Vec<Crate>, String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .map_err(|error| format!("cannot start cargo metadata: {error}"))?;
    if !output.status.success() {
        return Err(format!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    parse(&output.stdout).ok_or_else(|| "cargo metadata answered in an unknown form".into())
}

fn parse(metadata: &[u8]) -> Option<Vec<Crate>> {
    let metadata: Value = serde_json::from_slice(metadata).ok()?;
    metadata["packages"].as_array()?.iter().map(package).collect()
}

fn package(package: &Value) -> Option<Crate> {
    let dir = PathBuf::from(package["manifest_path"].as_str()?).parent()?.to_owned();
    let dependencies = package["dependencies"].as_array()?.iter();
    let uses = dependencies.filter(|d| d["path"].is_string() && d["kind"] != "dev");
    Some(Crate {
        name: package["name"].as_str()?.to_owned(),
        dir,
        uses: uses.map(|d| d["name"].as_str().map(str::to_owned)).collect::<Option<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_crate_links_from_the_workspace_counts_as_used() {
        let crates = parse(
            br#"{"packages": [{"name": "pci", "manifest_path": "/h/crates/pci/Cargo.toml", "dependencies": [
                {"name": "serde", "path": null, "kind": null},
                {"name": "device", "path": "/h/crates/device", "kind": null},
                {"name": "made", "path": "/h/crates/made", "kind": "build"},
                {"name": "engine", "path": "/h/crates/engine", "kind": "dev"}]}]}"#,
        )
        .unwrap();
        assert_eq!(crates[0].uses, ["device", "made"]);
        assert_eq!(crates[0].dir, PathBuf::from("/h/crates/pci"));
    }
}
