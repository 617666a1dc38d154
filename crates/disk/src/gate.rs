//! Which other files an image may name.

use std::fmt::Display;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use imago::format::gate::ImplicitOpenGate;
use imago::{FormatAccess, FormatDriverBuilder, StorageOpenOptions};

use crate::file;
use crate::ordered::Ordered;

/// How many images may be stacked on each other by backing files.
pub const MAX_BACKING: u32 = 32;

/// Lets in files of one folder, read-only, to a certain depth.
#[derive(Clone)]
pub(crate) struct FolderGate {
    folder: PathBuf,
    depth: u32,
    /// What was let in.
    passed: Arc<Mutex<Vec<PathBuf>>>,
}

impl FolderGate {
    /// A gate for an image that lies at `image`.
    pub(crate) fn around(image: &Path) -> io::Result<FolderGate> {
        let image = image.canonicalize()?;
        let folder = image.parent().unwrap_or(Path::new("/")).to_path_buf();
        Ok(FolderGate { folder, depth: 0, passed: Arc::default() })
    }

    /// What this gate, and those behind it, have let in.
    pub(crate) fn passed(&self) -> Vec<PathBuf> {
        self.passed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn refused(what: impl Display) -> io::Error {
    io::Error::new(ErrorKind::PermissionDenied, what.to_string())
}

impl ImplicitOpenGate<Ordered> for FolderGate {
    fn open_format<F: FormatDriverBuilder<Ordered>>(
        &mut self,
        builder: F,
    ) -> io::Result<FormatAccess<Ordered>> {
        let deeper = FolderGate { depth: self.depth + 1, ..self.clone() };
        if deeper.depth > MAX_BACKING {
            return Err(refused(format!("more than {MAX_BACKING} backing files, or one that backs itself")));
        }
        Ok(FormatAccess::new(builder.write(false).open(deeper)?))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<Ordered> {
        let Some(named) = options.get_filename().map(Path::to_path_buf) else {
            return Err(refused("it needs a file that has no name"));
        };
        let path = named
            .canonicalize()
            .map_err(|e| io::Error::new(e.kind(), format!("it needs {}: {e}", named.display())))?;
        if !path.starts_with(&self.folder) {
            return Err(refused(format!(
                "it names {}, which is outside of its folder {}; move both into one folder and see: qemu-img rebase -u",
                named.display(),
                self.folder.display(),
            )));
        }
        let file = file::open(&path, true).map_err(refused)?;
        self.passed.lock().unwrap_or_else(PoisonError::into_inner).push(path.clone());
        Ordered::new(file, StorageOpenOptions::new().filename(&path).write(false))
    }
}
