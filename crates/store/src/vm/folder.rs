//! The folders of VMs: how they come, go, and are found.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

use super::definition::VERSION;
use super::{Definition, Error, State};
use crate::{Home, Lock, Name, write_atomically};

/// Who looks whether a VM is on has its lock for a moment: this long it is waited for.
const A_LOOK: Duration = Duration::from_millis(100);

/// The folder of a VM that was there when it was looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folder {
    name: Name,
    path: PathBuf,
}

impl Folder {
    /// Whose it is.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The VM's own disk; there may be none.
    pub fn disk(&self) -> PathBuf {
        self.path.join("disk.qcow2")
    }

    /// The folder of what the guest printed: the only one in which a VM's process may make files.
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// What our own processes had to say.
    pub fn messages(&self) -> PathBuf {
        self.path.join("ospite.log")
    }

    /// What the VM is.
    ///
    /// # Errors
    /// The file cannot be read or is broken.
    pub fn definition(&self) -> Result<Definition, Error> {
        read(&self.path.join("vm.json"))
    }

    /// Changes what the VM is, from its next start on.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn define(&self, definition: &Definition) -> Result<(), Error> {
        write(&self.path.join("vm.json"), definition)
    }

    /// How the VM is, or was: whether it is on, [`Folder::is_on`] says.
    ///
    /// # Errors
    /// The file is there and cannot be read or is broken.
    pub fn state(&self) -> Result<Option<State>, Error> {
        let path = self.path.join("state.json");
        if path.exists() { read(&path).map(Some) } else { Ok(None) }
    }

    /// Says how the VM is; only for who holds the lock.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn set_state(&self, state: &State) -> Result<(), Error> {
        write(&self.path.join("state.json"), state)
    }

    /// The file that is locked while the VM is on.
    pub fn lock_path(&self) -> PathBuf {
        self.path.join("lock")
    }

    /// Takes the lock: the VM is on as long as anybody holds it.
    ///
    /// # Errors
    /// [`Error::On`] where somebody does.
    pub fn lock(&self) -> Result<Lock, Error> {
        let (path, gone) = (self.lock_path(), || Error::NoSuch { name: self.name.clone(), similar: None });
        let deadline = Instant::now() + A_LOOK;
        loop {
            match Lock::try_now(&path) {
                // Between the look and the lock it may have been removed, and even created anew.
                Ok(Some(lock)) => return if lock.is_at(&path) { Ok(lock) } else { Err(gone()) },
                Ok(None) if Instant::now() < deadline => thread::sleep(A_LOOK / 20),
                Ok(None) => return Err(Error::On(self.name.clone())),
                Err(error) if error.kind() == ErrorKind::NotFound => return Err(gone()),
                Err(error) => return Err(Error::host("lock", &path)(error)),
            }
        }
    }

    /// Whether the VM is on.
    ///
    /// # Errors
    /// What the host says.
    pub fn is_on(&self) -> Result<bool, Error> {
        let path = self.lock_path();
        Lock::is_held(&path).map_err(Error::host("look at", &path))
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let broken = |source| Error::Broken { path: path.into(), source };
    let text = fs::read(path).map_err(Error::host("read", path))?;
    let value: serde_json::Value = serde_json::from_slice(&text).map_err(broken)?;
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(version) if version != u64::from(VERSION) => Err(Error::Version { path: path.into(), version }),
        _ => serde_json::from_value(value).map_err(broken),
    }
}

fn write<T: serde::Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let text =
        serde_json::to_vec_pretty(value).map_err(|source| Error::Broken { path: path.into(), source })?;
    write_atomically(path, &text).map_err(Error::host("write", path))
}

/// The VM of that name.
///
/// # Errors
/// [`Error::NoSuch`], with one of a similar name where there is one.
pub fn find(home: &Home, name: &Name) -> Result<Folder, Error> {
    let folder = Folder { name: name.clone(), path: home.vm(name) };
    if folder.path.join("vm.json").exists() {
        return Ok(folder);
    }
    let distance = |other: &Name| strsim::damerau_levenshtein(other.as_str(), name.as_str());
    let similar = list(home)?.into_iter().map(|folder| folder.name).min_by_key(distance);
    let similar = similar.filter(|other| distance(other) <= 1 + name.as_str().len() / 4);
    Err(Error::NoSuch { name: name.clone(), similar })
}

/// All VMs, by name.
///
/// # Errors
/// The folder cannot be read. One that is not there yet has no VMs.
pub fn list(home: &Home) -> Result<Vec<Folder>, Error> {
    let mut folders: Vec<Folder> = entries(&home.vms())?
        .into_iter()
        .filter_map(|path| Some(Folder { name: path.file_name()?.to_str()?.parse().ok()?, path }))
        .collect();
    folders.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(folders)
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    match fs::read_dir(folder) {
        Ok(entries) => Ok(entries.flatten().map(|entry| entry.path()).collect()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(Error::host("list", folder)(error)),
    }
}

/// Creates a VM. `fill` puts its own disk, if it has one, at the path that it gets.
///
/// # Errors
/// [`Error::Taken`], or what the host says; nothing is left behind then.
pub fn create<E: From<Error>>(
    home: &Home,
    definition: &Definition,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<Folder, E> {
    create_in_steps(home, definition, fill, &mut |_| {})
}

/// Tells `step` before each thing it does, so that tests can cut it short anywhere.
fn create_in_steps<E: From<Error>>(
    home: &Home,
    definition: &Definition,
    fill: impl FnOnce(&Path) -> Result<(), E>,
    step: &mut dyn FnMut(&str),
) -> Result<Folder, E> {
    let _alone = begin(home)?;
    let name = &definition.name;
    let new = Folder { name: name.clone(), path: home.vms().join(format!(".new-{name}")) };
    let made = Folder { name: name.clone(), path: home.vm(name) };
    if made.path.exists() {
        return Err(Error::Taken(name.clone()).into());
    }
    let result = (|| {
        step("make the folder");
        fs::DirBuilder::new().mode(0o700).create(&new.path).map_err(Error::host("make", &new.path))?;
        fs::DirBuilder::new().mode(0o700).create(new.log()).map_err(Error::host("make", &new.path))?;
        step("make the lock");
        let lock = new.lock()?;
        step("make the disk");
        fill(&new.disk())?;
        step("write the definition");
        new.define(definition)?;
        step("give it its name");
        fs::rename(&new.path, &made.path).map_err(Error::host("make", &made.path))?;
        step("make it durable");
        sync(&home.vms())?;
        drop(lock);
        Ok(made)
    })();
    if result.is_err() {
        let _ = fs::remove_dir_all(&new.path); // swept the next time, if not now
    }
    result
}

/// Removes a VM that is off, with its disk.
///
/// # Errors
/// [`Error::On`], or what the host says.
pub fn remove(home: &Home, folder: &Folder) -> Result<(), Error> {
    remove_in_steps(home, folder, &mut |_| {})
}

fn remove_in_steps(home: &Home, folder: &Folder, step: &mut dyn FnMut(&str)) -> Result<(), Error> {
    let _alone = begin(home)?;
    let _off = folder.lock()?;
    let away = home.vms().join(format!(".old-{}", folder.name));
    step("take away its name");
    fs::rename(&folder.path, &away).map_err(Error::host("remove", &folder.path))?;
    step("make it durable");
    sync(&home.vms())?;
    step("delete it");
    fs::remove_dir_all(&away).map_err(Error::host("delete", &away))
}

/// One at a time creates or removes, so that a folder whose name begins with a dot belongs to somebody
/// who died over it.
fn begin(home: &Home) -> Result<Lock, Error> {
    let vms = home.vms();
    home.prepare().map_err(Error::host("make", &vms))?;
    let lock = vms.join(".lock");
    let alone = Lock::wait(&lock).map_err(Error::host("lock", &lock))?;
    for path in entries(&vms)?.into_iter().filter(|path| *path != lock && is_hidden(path)) {
        fs::remove_dir_all(&path).map_err(Error::host("delete", &path))?;
    }
    Ok(alone)
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

fn sync(folder: &Path) -> Result<(), Error> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::host("write", folder))
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::super::definition::tests::some;
    use super::*;

    fn home() -> (tempfile::TempDir, Home) {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::at(folder.path());
        (folder, home)
    }

    fn disk(path: &Path) -> Result<(), Error> {
        fs::write(path, "a disk").map_err(Error::host("write", path))
    }

    fn names(home: &Home) -> Vec<String> {
        list(home).unwrap().iter().map(|folder| folder.name().to_string()).collect()
    }

    /// Runs `work` as if the power failed just before its step number `fatal`; whether it got so far.
    fn cut_short(fatal: usize, work: impl FnOnce(&mut dyn FnMut(&str))) -> bool {
        let mut steps = 0;
        let mut step = |what: &str| {
            steps += 1;
            if steps > fatal {
                std::panic::resume_unwind(Box::new(what.to_owned()));
            }
        };
        catch_unwind(AssertUnwindSafe(|| work(&mut step))).is_err()
    }

    #[test]
    fn a_vm_comes_is_found_and_goes() {
        let (_folder, home) = home();
        assert!(names(&home).is_empty(), "there is not even a folder");
        for name in ["web", "mail"] {
            create(&home, &some(name), disk).unwrap();
        }
        assert_eq!(names(&home), ["mail", "web"]);
        let web = find(&home, &"web".parse().unwrap()).unwrap();
        assert_eq!(web.definition().unwrap(), some("web"));
        assert_eq!(fs::read(web.disk()).unwrap(), b"a disk");
        assert!(web.state().unwrap().is_none() && !web.is_on().unwrap());
        remove(&home, &web).unwrap();
        assert_eq!(names(&home), ["mail"]);
        assert!(matches!(web.lock(), Err(Error::NoSuch { .. })));
    }

    #[test]
    fn a_name_is_given_once_and_a_misspelt_one_gets_a_suggestion() {
        let (_folder, home) = home();
        create(&home, &some("web"), disk).unwrap();
        assert!(matches!(create(&home, &some("web"), disk), Err(Error::Taken(_))));
        let similar = |name: &str| match find(&home, &name.parse().unwrap()) {
            Err(Error::NoSuch { similar, .. }) => similar.map(String::from),
            other => panic!("{other:?}"),
        };
        assert_eq!(similar("wbe").as_deref(), Some("web"));
        assert_eq!(similar("mail"), None);
    }

    #[test]
    fn a_vm_that_is_on_is_not_removed() {
        let (_folder, home) = home();
        let web = create(&home, &some("web"), disk).unwrap();
        let on = web.lock().unwrap();
        assert!(web.is_on().unwrap());
        assert!(matches!(remove(&home, &web), Err(Error::On(_))));
        drop(on);
        remove(&home, &web).unwrap();
    }

    #[test]
    fn a_disk_that_cannot_be_made_leaves_nothing() {
        let (_folder, home) = home();
        let full = |path: &Path| Err(Error::host("write", path)(ErrorKind::StorageFull.into()));
        assert!(matches!(create(&home, &some("web"), full), Err(Error::Host { .. })));
        assert!(fs::read_dir(home.vms()).unwrap().all(|entry| entry.unwrap().file_name() == ".lock"));
    }

    #[test]
    fn creation_cut_short_anywhere_leaves_a_whole_vm_or_none() {
        for fatal in 0.. {
            let (_folder, home) = home();
            let cut = cut_short(fatal, |step| {
                create_in_steps(&home, &some("web"), disk, step).unwrap();
            });
            for folder in list(&home).unwrap() {
                assert_eq!(folder.definition().unwrap(), some("web"), "before step {fatal}");
                assert_eq!(fs::read(folder.disk()).unwrap(), b"a disk");
                remove(&home, &folder).unwrap();
            }
            create(&home, &some("web"), disk).unwrap();
            assert_eq!(fs::read_dir(home.vms()).unwrap().count(), 2, "a VM and the lock");
            if !cut {
                assert!(fatal > 4, "there are more steps than that");
                return;
            }
        }
    }

    #[test]
    fn removal_cut_short_anywhere_leaves_a_whole_vm_or_none() {
        for fatal in 0.. {
            let (_folder, home) = home();
            let web = create(&home, &some("web"), disk).unwrap();
            let cut = cut_short(fatal, |step| remove_in_steps(&home, &web, step).unwrap());
            for folder in list(&home).unwrap() {
                assert_eq!(folder.definition().unwrap(), some("web"), "before step {fatal}");
                assert_eq!(fs::read(folder.disk()).unwrap(), b"a disk");
            }
            create(&home, &some("mail"), disk).unwrap();
            let hidden =
                fs::read_dir(home.vms()).unwrap().filter(|entry| is_hidden(&entry.as_ref().unwrap().path()));
            assert_eq!(hidden.count(), 1, "only the lock");
            if !cut {
                assert!(fatal > 2, "there are more steps than that");
                return;
            }
        }
    }

    #[test]
    fn files_of_another_version_and_broken_ones_are_named() {
        let (_folder, home) = home();
        let web = create(&home, &some("web"), disk).unwrap();
        let path = web.path().join("vm.json");
        fs::write(&path, r#"{ "version": 99 }"#).unwrap();
        let error = web.definition().unwrap_err().to_string();
        assert!(error.contains("99") && error.contains("vm.json"), "{error}");
        fs::write(&path, "{").unwrap();
        assert!(web.definition().unwrap_err().to_string().contains("vm.json is broken"));
        assert_eq!(names(&home), ["web"], "a broken one can still be seen and removed");
    }
}
