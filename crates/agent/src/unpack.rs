//! An archive from the guest, which may be an attacker's: nothing it says gets out of its folder.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use tar::{Archive, EntryType};

use crate::Error;
use crate::copy::Progress;

/// The longest path, as Linux has it.
const MAX_PATH: u64 = 4096;
/// Read, write, execute. No set-user-ID: files of a guest are nobody's privilege in the host.
const MODE: u32 = 0o777;

/// Unpacks to `to`, which the archive's only top-level entry is called from here on.
pub(crate) fn unpack(from: impl Read, to: &Path, progress: &Progress) -> Result<(), Error> {
    let mut archive = Archive::new(from);
    let (mut long_name, mut long_link) = (None, None);
    let mut folders = Vec::new();
    for entry in archive.entries().map_err(bad)?.raw(true) {
        let mut entry = entry.map_err(bad)?;
        // Extensions are read here and not by the library, which reads them whole, however long they are.
        match entry.header().entry_type() {
            EntryType::GNULongName => long_name = Some(text(&mut entry)?),
            EntryType::GNULongLink => long_link = Some(text(&mut entry)?),
            kind => {
                let name = match long_name.take() {
                    Some(name) => name,
                    None => entry.header().path().map_err(bad)?.into_owned(),
                };
                let link = long_link.take();
                let path = place(&name, to)?;
                let mode = entry.header().mode().map_err(bad)? & MODE;
                match kind {
                    EntryType::Directory => {
                        folder(&path)?;
                        folders.push((path, mode));
                        continue;
                    }
                    EntryType::Regular | EntryType::Continuous => file(&mut entry, &path, mode, progress)?,
                    EntryType::Symlink => {
                        let target = match link {
                            Some(target) => target,
                            None => entry.header().link_name().map_err(bad)?.unwrap_or_default().into_owned(),
                        };
                        remove(&path)?;
                        symlink(target, &path).map_err(Error::host(&path))?;
                    }
                    EntryType::Link => return Err(refuse(&name, "a hard link")),
                    EntryType::Fifo | EntryType::Char | EntryType::Block => continue,
                    _ => return Err(refuse(&name, "an entry of unknown type")),
                }
                progress.add_file();
            }
        }
    }
    // Last: a folder may be one that not even its owner may write to. Children before parents.
    for (path, mode) in folders.into_iter().rev() {
        fs::set_permissions(&path, Permissions::from_mode(mode)).map_err(Error::host(&path))?;
    }
    Ok(())
}

fn bad(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::Other | io::ErrorKind::InvalidData => {
            Error::Archive(crate::error::plain(&error.to_string()))
        }
        _ => Error::Broken(error),
    }
}

fn refuse(name: &Path, what: &str) -> Error {
    Error::Archive(format!("{} is {what}", crate::error::plain(&name.to_string_lossy())))
}

fn text(entry: &mut tar::Entry<'_, impl Read>) -> Result<PathBuf, Error> {
    if entry.size() > MAX_PATH {
        return Err(Error::Archive("a name is longer than any path".into()));
    }
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).map_err(bad)?;
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    Ok(PathBuf::from(std::ffi::OsStr::new(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(
        &bytes,
    ))))
}

/// Where an entry goes: its first component is `to`, and no folder on the way is a symbolic link.
fn place(name: &Path, to: &Path) -> Result<PathBuf, Error> {
    let mut path = to.to_owned();
    let mut components = name.components().filter(|part| *part != Component::CurDir);
    if !matches!(components.next(), Some(Component::Normal(_))) {
        return Err(refuse(name, "not below the folder"));
    }
    for component in components {
        let Component::Normal(part) = component else { return Err(refuse(name, "not below the folder")) };
        if !fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir()) {
            return Err(refuse(name, "below what is no folder"));
        }
        path.push(part);
    }
    Ok(path)
}

/// What is in the way of a file goes, unless it is a folder.
fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::host(path)(error)),
        _ => Ok(()),
    }
}

fn folder(path: &Path) -> Result<(), Error> {
    if !fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir()) {
        fs::create_dir(path).map_err(Error::host(path))?;
    }
    fs::set_permissions(path, Permissions::from_mode(0o700)).map_err(Error::host(path))
}

fn file(entry: &mut impl Read, path: &Path, mode: u32, progress: &Progress) -> Result<(), Error> {
    remove(path)?;
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let mut file: File = options.open(path).map_err(Error::host(path))?;
    io::copy(&mut progress.count(entry), &mut file).map_err(Error::host(path))?;
    file.set_permissions(Permissions::from_mode(mode)).map_err(Error::host(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kind, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o4755);
            header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
            if matches!(kind, EntryType::Symlink | EntryType::Link) {
                header.as_gnu_mut().unwrap().linkname[..content.len()].copy_from_slice(content.as_bytes());
                header.set_size(0);
            } else {
                header.set_size(content.len() as u64);
            }
            header.set_cksum();
            let data = if header.size().unwrap() == 0 { "" } else { content };
            builder.append(&header, data.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn an_archive_cannot_leave_its_folder() {
        use EntryType::*;
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("precious"), "host's").unwrap();
        let precious = dir.path().join("precious").display().to_string();
        for entries in [
            &[("../precious", Regular, "x")][..],
            &[("a/../../precious", Regular, "x")],
            &[("/etc/precious", Regular, "x")],
            &[("", Regular, "x")],
            &[("a", Symlink, ".."), ("a/precious", Regular, "x")],
            &[("a", Directory, ""), ("a/b", Symlink, "../.."), ("a/b/precious", Regular, "x")],
            &[("a", Directory, ""), ("a/b", Link, &precious)],
            &[("a", XHeader, "30 path=../../precious")],
            &[("name", GNULongName, &"x".repeat(5000))],
        ] {
            let to = dir.path().join("to");
            assert!(unpack(&*archive(entries), &to, &Progress::default()).is_err(), "{entries:?}");
            let _ = fs::remove_file(&to);
            let _ = fs::remove_dir_all(&to);
            assert_eq!(fs::read_to_string(dir.path().join("precious")).unwrap(), "host's");
        }
        // A link is replaced and not followed.
        let to = dir.path().join("to");
        symlink(&precious, &to).unwrap();
        unpack(&*archive(&[("a", Regular, "x")]), &to, &Progress::default()).unwrap();
        assert_eq!(fs::read_to_string(&precious).unwrap(), "host's");
        assert_eq!(fs::metadata(&to).unwrap().permissions().mode() & 0o7777, 0o755, "no set-user-ID");
    }

    #[test]
    fn what_is_packed_is_unpacked() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        let long = "n".repeat(150);
        fs::create_dir_all(from.join("empty")).unwrap();
        fs::write(from.join(&long), vec![7; 100_000]).unwrap();
        fs::set_permissions(from.join(&long), Permissions::from_mode(0o640)).unwrap();
        symlink("/nowhere", from.join("link")).unwrap();
        let (mut bytes, progress) = (Vec::new(), Progress::default());
        crate::pack::pack(&from, Path::new("x"), &mut bytes, &progress).unwrap();
        assert_eq!((progress.bytes(), crate::pack::size(&from).unwrap()), (100_000, 100_000));
        let to = dir.path().join("to");
        unpack(&*bytes, &to, &Progress::default()).unwrap();
        assert_eq!(fs::read(to.join(&long)).unwrap(), vec![7; 100_000]);
        assert_eq!(fs::metadata(to.join(&long)).unwrap().permissions().mode() & 0o7777, 0o640);
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("/nowhere"));
        assert!(to.join("empty").is_dir());
    }
}
