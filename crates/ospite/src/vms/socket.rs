//! Where a VM's control socket is, and who may use it.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use store::{Home, Name};

/// The longest path that a socket's address holds, in bytes (unix(7): 108 with the final zero).
const LONGEST: usize = 107;

/// Where a VM's socket is.
pub fn path(home: &Home, name: &Name) -> PathBuf {
    home.runtime().join(format!("{name}.sock"))
}

/// Goes by a descriptor of the folder where the path is too long for an address.
fn short<T>(path: &Path, act: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    if path.as_os_str().len() <= LONGEST {
        return act(path);
    }
    let folder = File::open(folder)?;
    act(&PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name))
}

/// Listens for this user alone. Only for who holds the VM's lock: whatever has the socket's name is of a
/// process that has died.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Its folder lets nobody else in, also not before the permissions are set.
    let listener = short(path, |path| UnixListener::bind(path))?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Connects to a VM.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    short(path, |path| UnixStream::connect(path))
}

/// Whether the other side belongs to the user that we are, or to root.
pub fn is_ours(stream: &UnixStream) -> bool {
    let us = rustix::process::geteuid();
    rustix::net::sockopt::socket_peercred(stream).is_ok_and(|peer| peer.uid == us || peer.uid.is_root())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_works_wherever_its_folder_is_and_replaces_a_dead_one() {
        let folder = tempfile::tempdir().unwrap();
        for depth in [1, 60] {
            let home = Home::at(folder.path().join("folder/".repeat(depth)));
            home.prepare().unwrap();
            let path = path(&home, &"web".parse().unwrap());
            for _ in 0..2 {
                let listener = listen(&path).unwrap();
                let _client = connect(&path).unwrap();
                assert!(is_ours(&listener.accept().unwrap().0));
            }
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }
}
