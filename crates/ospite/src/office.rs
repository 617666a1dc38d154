//! `ospite up`, `down`, `ps`: several VMs that a file declares.

mod down;
mod progress;
mod ps;
mod up;

use std::path::{Path, PathBuf};

pub use down::down;
pub use ps::ps;
use store::Home;
use store::office::Office;
use store::vm::Folder;
pub use up::up;

use crate::exit::Code;
use crate::failure::Failure;

/// The label of a VM that a file declared: the file's absolute path.
const LABEL: &str = "office";

/// The file, and what it says.
fn read(file: &Path) -> Result<(PathBuf, Office), Failure> {
    let path = file.canonicalize().map_err(|error| {
        Failure::new(Code::Build, format!("cannot read {}: {error}", file.display()))
            .hint("name the file that declares the VMs: ospite up office.toml")
    })?;
    let office = Office::read(&path).map_err(|error| Failure::from_error(Code::Build, &error))?;
    Ok((path, office))
}

/// The VMs that the file has declared and that are there, by name; also those that it no longer declares.
fn members(home: &Home, file: &Path) -> Result<Vec<Folder>, Failure> {
    let all = store::vm::list(home)?;
    Ok(all.into_iter().filter(|folder| belongs(folder, file)).collect())
}

fn belongs(folder: &Folder, file: &Path) -> bool {
    folder.definition().is_ok_and(|vm| vm.labels.get(LABEL).map(Path::new) == Some(file))
}
