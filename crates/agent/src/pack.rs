//! Files and folders of the host, as an archive for the guest.

use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::path::Path;

use crate::Error;
use crate::copy::Progress;

/// How many bytes of files there are at and below `path`.
pub(crate) fn size(path: &Path) -> Result<u64, Error> {
    let metadata = fs::symlink_metadata(path).map_err(Error::host(path))?;
    if !metadata.is_dir() {
        return Ok(if metadata.is_file() { metadata.len() } else { 0 });
    }
    let mut sum = 0;
    for entry in fs::read_dir(path).map_err(Error::host(path))? {
        sum += size(&entry.map_err(Error::host(path))?.path())?;
    }
    Ok(sum)
}

/// Writes `path`, called `name`, and everything below it to `to` as a tar archive.
pub(crate) fn pack(path: &Path, name: &Path, to: impl Write, progress: &Progress) -> Result<(), Error> {
    let mut archive = tar::Builder::new(to);
    add(&mut archive, path, name, progress)?;
    archive.into_inner().and_then(|mut to| to.flush()).map_err(Error::Broken)
}

fn add(
    archive: &mut tar::Builder<impl Write>,
    path: &Path,
    name: &Path,
    progress: &Progress,
) -> Result<(), Error> {
    let metadata = fs::symlink_metadata(path).map_err(Error::host(path))?;
    let mut header = header(&metadata);
    if metadata.is_dir() {
        header.set_entry_type(tar::EntryType::Directory);
        archive.append_data(&mut header, name, io::empty()).map_err(Error::Broken)?;
        for entry in fs::read_dir(path).map_err(Error::host(path))? {
            let entry = entry.map_err(Error::host(path))?;
            add(archive, &entry.path(), &name.join(entry.file_name()), progress)?;
        }
    } else if metadata.is_symlink() {
        let target = fs::read_link(path).map_err(Error::host(path))?;
        header.set_entry_type(tar::EntryType::Symlink);
        archive.append_link(&mut header, name, target).map_err(Error::Broken)?;
        progress.add_file();
    } else if metadata.is_file() {
        let file = File::open(path).map_err(Error::host(path))?;
        header.set_size(metadata.len());
        archive.append_data(&mut header, name, progress.count(Padded::new(file, metadata.len()))).map_err(
            |error| if is_guests(&error) { Error::Broken(error) } else { Error::host(path)(error) },
        )?;
        progress.add_file();
    } else {
        let source = io::Error::other("it is neither file, folder nor symbolic link");
        return Err(Error::Host { path: path.to_owned(), source });
    }
    Ok(())
}

/// Whether it is the other end that has gone.
fn is_guests(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

fn header(metadata: &Metadata) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_metadata_in_mode(metadata, tar::HeaderMode::Complete);
    // Whose it is in the host means nothing in the guest.
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    header
}

/// As many bytes of a file as it had when its header was made, even if it shrinks or grows meanwhile.
struct Padded {
    file: File,
    left: u64,
}

impl Padded {
    fn new(file: File, left: u64) -> Padded {
        Padded { file, left }
    }
}

impl io::Read for Padded {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let most = bytes.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let count = match self.file.read(&mut bytes[..most])? {
            0 => {
                bytes[..most].fill(0);
                most
            }
            count => count,
        };
        self.left -= count as u64;
        Ok(count)
    }
}
