//! `ospite run` with a VM that lasts: switched on, and looked at until it ends or is left alone.

use std::thread;
use std::time::{Duration, Instant};

use store::vm::Folder;
use store::{Home, Name};

use super::console::{Over, console};
use crate::cli::{EscapeKey, LifeArgs, RestartArg, RunArgs};
use crate::exit::Code;
use crate::failure::Failure;

/// How long a VM whose console has ended may take to be off.
const END: Duration = Duration::from_secs(20);

/// `ospite run VM`
pub fn run_existing(name: &Name, escape: EscapeKey) -> Result<Code, Failure> {
    let home = super::home()?;
    let folder = super::find(&home, name)?;
    if folder.is_on()? {
        return attach(&home, &folder, escape, 20);
    }
    super::start(&home, &folder)?;
    attach(&home, &folder, escape, usize::MAX)
}

/// `ospite run --image IMAGE`
pub fn run_image(image: &Name, args: &RunArgs) -> Result<Code, Failure> {
    let home = super::home()?;
    let name = match &args.name {
        Some(name) => name.parse().map_err(|error| Failure::from_error(Code::Usage, &error))?,
        None => free_name(&home, image),
    };
    let life = LifeArgs { restart: RestartArg::No, stop_timeout: args.stop_timeout, labels: Vec::new() };
    let folder = super::create(&home, &super::definition(&name, &args.machine, &args.image, &life)?)?;
    super::start(&home, &folder)?;
    attach(&home, &folder, args.escape, usize::MAX)
}

/// `debian`, `debian-2`, ...
fn free_name(home: &Home, image: &Name) -> Name {
    let numbered = (2..10_000).filter_map(|number| format!("{image}-{number}").parse().ok());
    // A name that is too long for a number is given once.
    let mut names = std::iter::once(image.clone()).chain(numbered);
    names.find(|name| !home.vm(name).exists()).unwrap_or_else(|| image.clone())
}

/// The exit code is the one that `run` has for a VM of its own.
fn attach(home: &Home, folder: &Folder, escape: EscapeKey, lines: usize) -> Result<Code, Failure> {
    if console(home, folder, escape, lines)? == Over::Left {
        return Ok(Code::Success);
    }
    let deadline = Instant::now() + END;
    while folder.is_on()? && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(20));
    }
    let end = folder.state()?.and_then(|state| state.last_end);
    Ok(end.and_then(|end| end.code).map_or(Code::Internal, Code::of_process))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_vm_of_an_image_gets_a_number() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::at(folder.path());
        let image: Name = "debian".parse().unwrap();
        for name in ["debian", "debian-2", "debian-3"] {
            let free = free_name(&home, &image);
            assert_eq!(free.as_str(), name);
            std::fs::create_dir_all(home.vm(&free)).unwrap();
        }
        let long: Name = "x".repeat(48).parse().unwrap();
        std::fs::create_dir_all(home.vm(&long)).unwrap();
        assert_eq!(free_name(&home, &long), long, "its creation says that it is taken");
    }
}
