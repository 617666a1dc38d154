//! `unsafe` is denied for the workspace and opened by module or item, with the reason on the same line:
//! `#![allow(unsafe_code)] // why`. The compiler checks that it is opened at all; this checks that
//! it is opened where the plan allows, one module at a time and not by inheritance from a parent.

use std::fs;
use std::path::{Path, PathBuf};

use crate::manifests::Crate;
use crate::plan::{MAY_BE_UNSAFE, MAY_DECLARE_UNSAFE};

const OPENING: &str = "#![allow(unsafe_code)]";
const ON_AN_ITEM: &str = "#[allow(unsafe_code)]";

/// The misplaced openings, one sentence each.
pub fn check(crates: &[Crate]) -> Result<Vec<String>, String> {
    let mut problems = Vec::new();
    for krate in crates {
        problems.extend(check_manifest(&krate.name, &read(&krate.dir.join("Cargo.toml"))?));
        let mut files = Vec::new();
        rust_files(&krate.dir.join("src"), &mut files)?;
        for file in files {
            let found = check_file(&krate.name, &file, &read(&file)?);
            problems.extend(found.map(|what| format!("{}: {what}", file.display())));
        }
    }
    Ok(problems)
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
}

fn rust_files(dir: &Path, files: &mut Vec<PathBuf>) -> Result<(), String> {
    let listing = fs::read_dir(dir).map_err(|error| format!("cannot list {}: {error}", dir.display()))?;
    for entry in listing.flatten() {
        let path = entry.path();
        if path.is_dir() {
            rust_files(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(())
}

fn check_manifest(name: &str, manifest: &str) -> Option<String> {
    let inherits = manifest
        .split("[lints]")
        .nth(1)
        .is_some_and(|rest| rest.trim_start().starts_with("workspace = true"));
    (!inherits).then(|| {
        format!("crate `{name}` does not inherit the workspace's lints; add [lints] workspace = true")
    })
}

fn check_file(krate: &str, path: &Path, source: &str) -> Option<String> {
    let code: Vec<&str> = source.lines().map(without_comment).collect();
    let openings: Vec<usize> = (0..code.len()).filter(|&i| opens(code[i])).collect();
    let uses = code.iter().any(|line| has_unsafe(line));
    if openings.is_empty() {
        return uses.then(|| {
            format!("uses `unsafe`, opened by a parent module; open it here with {OPENING} // why")
        });
    }
    let only_declared = MAY_DECLARE_UNSAFE.contains(&krate)
        && code.iter().filter(|line| has_unsafe(line)).all(|line| line.trim().starts_with("unsafe fn "));
    if !MAY_BE_UNSAFE.contains(&krate) && !only_declared {
        return Some(format!("crate `{krate}` may not hold unsafe code (only {})", MAY_BE_UNSAFE.join(", ")));
    }
    if path.ends_with("src/lib.rs") || path.ends_with("src/main.rs") {
        return Some("opens `unsafe` for the whole crate; open it in the module that needs it".into());
    }
    let wrong = openings.iter().find_map(|&line| check_opening(line, &code, source));
    wrong.or_else(|| (!uses).then(|| "opens `unsafe` and has none".into()))
}

/// For the module or for one item of it, never for the modules below, and with the reason.
fn check_opening(line: usize, code: &[&str], source: &str) -> Option<String> {
    let attribute = code[line].trim();
    let next = code.get(line + 1).map_or("", |next| next.trim_start());
    let a_file = next.trim_end().ends_with(';') && next.split_whitespace().any(|word| word == "mod");
    if attribute != OPENING && (attribute != ON_AN_ITEM || a_file) {
        return Some(format!("`unsafe` is opened by {OPENING} // why, at the top of the module"));
    }
    let why = source.lines().nth(line).and_then(|line| line.split_once("//")).map(|(_, why)| why.trim());
    why.is_none_or(str::is_empty).then(|| "opens `unsafe` without saying why on the same line".into())
}

fn opens(line: &str) -> bool {
    line.trim_start().starts_with('#') && line.contains("allow(") && line.contains("unsafe_code")
}

fn without_comment(line: &str) -> &str {
    line.split("//").next().unwrap_or_default()
}

/// Whether the keyword stands in this line: a block, a function, an impl, an attribute.
fn has_unsafe(line: &str) -> bool {
    line.match_indices("unsafe").any(|(at, word)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].trim_start();
        let whole = before.is_none_or(|c| !c.is_alphanumeric() && !"_`\"".contains(c));
        whole
            && ["{", "(", "fn ", "impl ", "impl<", "extern ", "trait "]
                .iter()
                .any(|next| after.starts_with(next))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(krate: &str, path: &str, source: &str) -> String {
        check_file(krate, Path::new(path), source).unwrap_or_default()
    }

    const GOOD: &str = "//! Doc.\n#![allow(unsafe_code)] // talks to the host\nfn f() { unsafe { g() } }\n";

    #[test]
    fn a_module_that_opens_unsafe_for_itself_and_says_why_is_fine() {
        assert_eq!(problem("mem", "crates/mem/src/host.rs", GOOD), "");
        assert_eq!(problem("pci", "crates/pci/src/lib.rs", "//! `unsafe` is not here\nfn f() {}\n"), "");
    }

    #[test]
    fn a_crate_may_declare_what_it_may_not_do() {
        let declared = GOOD.replace("unsafe { g() }", "g()") + "unsafe fn h() {}\n";
        assert_eq!(problem("disk", "crates/disk/src/ordered.rs", &declared), "");
        assert!(problem("disk", "crates/disk/src/ordered.rs", GOOD).contains("may not hold unsafe code"));
    }

    #[test]
    fn every_other_way_is_named() {
        assert!(problem("virtio", "src/blk.rs", GOOD).contains("may not hold unsafe code"));
        assert!(problem("mem", "src/lib.rs", GOOD).contains("whole crate"));
        assert!(
            problem("mem", "src/a.rs", &GOOD.replace("// talks to the host", ""))
                .contains("without saying why")
        );
        assert!(
            problem("mem", "src/a.rs", "#[allow(unsafe_code)] // x\nmod b;\nunsafe impl A for B {}")
                .contains("top of the module")
        );
        assert!(problem("mem", "src/a.rs", "unsafe impl Send for X {}").contains("parent module"));
        assert!(problem("mem", "src/a.rs", &GOOD.replace("unsafe {", "{")).contains("has none"));
    }

    #[test]
    fn a_crate_that_sets_its_own_lints_is_named() {
        assert_eq!(check_manifest("a", "[package]\n[lints]\nworkspace = true\n"), None);
        assert!(check_manifest("a", "[package]\n").is_some());
    }
}
