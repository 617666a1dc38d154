//! Making an image of what comes from elsewhere: an exported one, or the disk of another machine.

mod kernel;
mod partitions;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::build::{Listener, Progress, convert, go_on};
use super::{DISK, Draft, Error, INITRD, Image, KERNEL, MANIFEST, Manifest, Origin};
use crate::{Home, Name};

/// What a disk from elsewhere is started with; what is absent is found on it.
#[derive(Clone, Debug, Default)]
pub struct Boot {
    /// The kernel.
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: Option<String>,
}

/// Makes the image `name` of `file`: one that [`super::export()`] has made, or a disk image in a format that
/// [`disk::open`] knows. An image of that name must not be there.
///
/// # Errors
/// Where there is one already, the file is neither, no kernel is given or found, or the host says no.
pub fn import(
    home: &Home,
    name: &Name,
    file: &Path,
    boot: &Boot,
    progress: Listener<'_>,
) -> Result<Image, Error> {
    if home.image(name).exists() {
        return Err(Error::Exists { name: name.clone() });
    }
    home.prepare().map_err(|source| Error::io("make", &home.images(), source))?;
    let exported = is_tar(file).map_err(|source| Error::io("read", file, source))?;
    let draft = Draft::new(home, name)?;
    let manifest =
        if exported { unpack(&draft, file, progress)? } else { foreign(&draft, file, boot, progress)? };
    draft.publish(home, manifest)
}

/// By the mark of POSIX's tar (ustar, bytes 257 to 262), and by the manifest's name: it comes first.
fn is_tar(file: &Path) -> io::Result<bool> {
    let mut head = Vec::new();
    File::open(file)?.take(512).read_to_end(&mut head)?;
    Ok(head.get(257..262) == Some(b"ustar") && head.starts_with(MANIFEST.as_bytes()))
}

/// More than any manifest has.
const LONGEST_MANIFEST: u64 = 16 << 20;

fn unpack(draft: &Draft, file: &Path, progress: Listener<'_>) -> Result<Manifest, Error> {
    let failed = |source| Error::io("read", file, source);
    let bad = |why: &str| failed(io::Error::new(io::ErrorKind::InvalidData, why));
    let tar = File::open(file).map_err(failed)?;
    let total = tar.metadata().map_err(failed)?.len();
    let mut archive = tar::Archive::new(tar);
    let mut told: Option<Manifest> = None;
    go_on(progress(Progress::Step("unpacking")))?;
    // Raw: the library reads long names and other extensions whole, however long they are, and we write none.
    for entry in archive.entries().map_err(failed)?.raw(true) {
        let mut entry = entry.map_err(failed)?;
        let path = entry.path().map_err(failed)?.into_owned();
        let known =
            [MANIFEST, DISK, KERNEL, INITRD].into_iter().find(|name| path.as_os_str() == OsStr::new(name));
        let Some(name) = known.filter(|_| entry.header().entry_type().is_file()) else {
            return Err(bad("it holds what no exported image does"));
        };
        if name == MANIFEST {
            let mut text = Vec::new();
            (&mut entry).take(LONGEST_MANIFEST).read_to_end(&mut text).map_err(failed)?;
            told = Some(Manifest::parse(&text).map_err(failed)?);
            continue;
        }
        let from = entry.raw_file_position();
        let to = draft.path().join(name);
        let mut out = File::create_new(&to).map_err(|source| Error::io("write", &to, source))?;
        let mut stopped = false;
        let copied = copy(&mut entry, &mut out, |done| {
            let answer = progress(Progress::Bytes(from + done, total));
            stopped = answer.is_break();
            answer
        });
        if stopped {
            return Err(Error::Stopped);
        }
        copied.map_err(|source| Error::io("unpack", &to, source))?;
    }
    let told = told.ok_or_else(|| bad("it holds no manifest"))?;
    go_on(progress(Progress::Step("checking it")))?;
    let found = draft.manifest(&told.cmdline)?;
    if (&found.disk, &found.kernel, &found.initrd) != (&told.disk, &told.kernel, &told.initrd) {
        return Err(bad("it is damaged: its files are not what its manifest says"));
    }
    Ok(Manifest { name: found.name, size: found.size, ..told })
}

/// Copies in pieces; an answer to stop is an error.
pub(super) fn copy(
    from: &mut dyn Read,
    to: &mut dyn io::Write,
    mut told: impl FnMut(u64) -> std::ops::ControlFlow<()>,
) -> io::Result<()> {
    let (mut buffer, mut done) = (vec![0; 1 << 20], 0);
    loop {
        let count = from.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..count])?;
        done += count as u64;
        if told(done).is_break() {
            return Err(io::Error::other("stopped"));
        }
    }
}

fn foreign(draft: &Draft, file: &Path, boot: &Boot, progress: Listener<'_>) -> Result<Manifest, Error> {
    convert(file, None, &draft.disk(), progress)?;
    let take = |from: &Path, to: PathBuf| match fs::copy(from, &to) {
        Ok(_) => Ok(()),
        Err(source) => Err(Error::io("copy", from, source)),
    };
    let mut found = None;
    if let Some(kernel) = &boot.kernel {
        take(kernel, draft.kernel())?;
        boot.initrd.as_ref().map_or(Ok(()), |initrd| take(initrd, draft.initrd()))?;
    } else {
        go_on(progress(Progress::Step("looking for its kernel")))?;
        let disk: Arc<dyn disk::Disk> =
            disk::open(&draft.disk(), Some(disk::Format::Qcow2), true).map_err(Error::Disk)?.into();
        found = kernel::find(&disk, &draft.kernel(), &draft.initrd())
            .map_err(|source| Error::io("read the kernel in", file, source))?;
        if found.is_none() {
            return Err(Error::NoKernel { file: file.into() });
        }
    }
    let root = found.as_ref().and_then(|found| found.root.clone());
    let own = root.map(|root| format!("root={root} ro console=ttyS0"));
    let cmdline = boot.cmdline.clone().or(own).ok_or_else(|| Error::NoRoot { file: file.into() })?;
    let mut manifest = draft.manifest(&cmdline)?;
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    manifest.origin = Origin::Imported { file: name };
    manifest.kernel_release = found.and_then(|found| found.release);
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use super::super::tests::home;
    use super::*;
    use std::ops::ControlFlow;

    fn import_into(home: &Home, name: &str, file: &Path, boot: &Boot) -> Result<Image, Error> {
        import(home, &name.parse().unwrap(), file, boot, &mut |_| ControlFlow::Continue(()))
    }

    #[test]
    fn an_exported_image_comes_back_as_it_was() {
        let (folder, home) = home(&["debian"]);
        let image = Image::open(&home, &"debian".parse().unwrap()).unwrap();
        let file = folder.path().join("debian.tar");
        super::super::export(&image, &file, &mut |_| ControlFlow::Continue(())).unwrap();
        let back = import_into(&home, "back", &file, &Boot::default()).unwrap();
        back.verify().unwrap();
        assert_eq!(Image::open(&home, &back.name).unwrap(), back);
        assert_eq!(Manifest { name: image.name, ..back.manifest.clone() }, image.manifest);
        assert!(matches!(import_into(&home, "back", &file, &Boot::default()), Err(Error::Exists { .. })));
        // One bit of its disk.
        let mut bytes = fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&file, &bytes).unwrap();
        assert!(import_into(&home, "bad", &file, &Boot::default()).is_err());
        fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
        assert!(import_into(&home, "bad", &file, &Boot::default()).is_err());
        assert_eq!(Image::list(&home).unwrap().len(), 2);
    }

    #[test]
    fn an_archive_with_anything_else_in_it_is_refused() {
        let (folder, home) = home(&["debian"]);
        let image = Image::open(&home, &"debian".parse().unwrap()).unwrap();
        let file = folder.path().join("evil.tar");
        let mut archive = tar::Builder::new(File::create(&file).unwrap());
        archive.append_path_with_name(image.folder.join(MANIFEST), MANIFEST).unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        archive.append_link(&mut header, DISK, "/etc/shadow").unwrap();
        archive.into_inner().unwrap();
        let error = import_into(&home, "evil", &file, &Boot::default()).unwrap_err();
        let why = std::error::Error::source(&error).unwrap().to_string();
        assert!(why.contains("what no exported image does"), "{why}");
    }

    #[test]
    fn a_name_in_an_entry_of_its_own_is_refused_unread() {
        let (folder, home) = home(&["debian"]);
        let image = Image::open(&home, &"debian".parse().unwrap()).unwrap();
        let file = folder.path().join("evil.tar");
        let mut archive = tar::Builder::new(File::create(&file).unwrap());
        let mut header = tar::Header::new_ustar();
        let manifest = fs::read(image.folder.join(MANIFEST)).unwrap();
        header.set_size(manifest.len() as u64);
        archive.append_data(&mut header, MANIFEST, &*manifest).unwrap();
        header.set_entry_type(tar::EntryType::GNULongName);
        header.set_size(KERNEL.len() as u64);
        archive.append_data(&mut header, "name", KERNEL.as_bytes()).unwrap();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(6);
        archive.append_data(&mut header, "short", &b"kernel"[..]).unwrap();
        archive.into_inner().unwrap();
        let error = import_into(&home, "evil", &file, &Boot::default()).unwrap_err();
        let why = std::error::Error::source(&error).unwrap().to_string();
        assert!(why.contains("what no exported image does"), "{why}");
    }

    #[test]
    fn a_foreign_disk_needs_a_kernel_and_says_so() {
        let (folder, home) = home(&[]);
        let (disk, kernel) = (folder.path().join("disk.raw"), folder.path().join("vmlinuz"));
        fs::write(&disk, vec![7; 1 << 20]).unwrap();
        fs::write(&kernel, "kernel").unwrap();
        let error = import_into(&home, "old", &disk, &Boot::default()).unwrap_err();
        assert!(error.to_string().contains("--kernel"), "{error}");
        let mut boot = Boot { kernel: Some(kernel), ..Boot::default() };
        let error = import_into(&home, "old", &disk, &boot).unwrap_err();
        assert!(error.to_string().contains("--append"), "{error}");
        assert!(Image::list(&home).unwrap().is_empty());
        boot.cmdline = Some("root=/dev/vda".into());
        let image = import_into(&home, "old", &disk, &boot).unwrap();
        assert_eq!((image.manifest.size, image.initrd()), (1 << 20, None));
        assert_eq!(image.manifest.origin, Origin::Imported { file: "disk.raw".into() });
        image.verify().unwrap();
    }
}
