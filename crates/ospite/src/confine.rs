//! What a VM's process gives up before a guest runs in it.

use std::fs;
use std::path::{Path, PathBuf};

use machine::VmSpec;
use sandbox::{Calls, Keep};

use crate::exit::Code;
use crate::failure::Failure;

/// Confines this process, which has one thread, to what the machine is made of, and to `folders`, in which it
/// makes files. Files are opened afterwards, and again by nobody who is not let in here.
pub fn confine(spec: &VmSpec, folders: Vec<PathBuf>) -> Result<(), Failure> {
    let mut keep = Keep { folders, others_files: true, calls: Some(Calls::Vm), ..Keep::default() };
    keep.read.push(spec.boot.kernel.clone());
    keep.read.extend(spec.boot.initrd.clone());
    for disk in &spec.disks {
        match &disk.base {
            Some(base) => keep.read.push(base.clone()),
            None => keep.read.extend(disk::others(&disk.path, disk.format)),
        }
        let files = if disk.read_only { &mut keep.read } else { &mut keep.write };
        files.push(disk.path.clone());
    }
    // What has no name in the file system needs no leave, and can be given none.
    keep.read.retain(|path| !is_nameless(path));
    // Where its own code lies, and, for the traces of a panic, what that is called.
    keep.read.extend(["/proc/self".into(), "/proc/self/exe".into()]);
    keep.write.push("/dev/kvm".into());
    sandbox::confine(&keep).map_err(|error| Failure::from_error(Code::Internal, &error))
}

/// Everything that a VM's process starts, it has started: no more processes.
pub fn settle(vm: &vmm::Vm) -> Result<(), Failure> {
    sandbox::settle(vm.processes()).map_err(|error| Failure::from_error(Code::Internal, &error))
}

/// A descriptor of memory or of a pipe, by its place in `/proc/self/fd` (proc_pid_fd(5)).
fn is_nameless(path: &Path) -> bool {
    let Ok(to) = fs::read_link(path) else { return false };
    let to = to.as_os_str().as_encoded_bytes();
    to.starts_with(b"/memfd:") || to.starts_with(b"pipe:[")
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn descriptors_of_memory_and_pipes_have_no_name_and_files_do() {
        let memory = rustix::fs::memfd_create("seed", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let (pipe, _end) = std::io::pipe().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let name = |fd: i32| PathBuf::from(format!("/proc/self/fd/{fd}"));
        assert!(is_nameless(&name(memory.as_raw_fd())) && is_nameless(&name(pipe.as_raw_fd())));
        assert!(!is_nameless(file.path()) && !is_nameless(&name(file.as_raw_fd())));
        assert!(!is_nameless(Path::new("/no/such")));
    }
}
