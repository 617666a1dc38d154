//! A guest's memory and the reference implementation, for the tests.

use std::path::Path;
use std::process::Command;

use mem::{Bytes, GuestAddress, GuestMemoryBackend, GuestRam};

use crate::Slice;

pub(crate) struct Guest(GuestRam);

impl Guest {
    pub(crate) fn new() -> Guest {
        Guest(GuestRam::new(&[0..0x10_0000]).unwrap())
    }

    pub(crate) fn slice(&self, at: u64, length: usize) -> Slice<'_> {
        GuestMemoryBackend::get_slice(&*self.0, GuestAddress(at), length).unwrap()
    }

    pub(crate) fn fill(&self, at: u64, data: &[u8]) {
        self.0.write_slice(data, GuestAddress(at)).unwrap();
    }

    pub(crate) fn bytes(&self, at: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.0.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }
}

/// Runs `qemu-img` in `folder`, or says loudly that it cannot.
pub(crate) fn qemu_img(folder: &Path, args: &[&str]) -> bool {
    match Command::new("qemu-img").current_dir(folder).args(args).output() {
        Err(error) => {
            eprintln!("*** SKIPPED: qemu-img cannot be run ({error}); install qemu-utils ***");
            false
        }
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "qemu-img {args:?}: {text}");
            true
        }
    }
}
