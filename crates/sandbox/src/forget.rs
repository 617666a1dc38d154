//! Code that a process needs while it starts, and hardly again.

#![allow(unsafe_code)] // madvise

use std::ffi::c_void;
use std::ops::Range;
use std::path::Path;
use std::{fs, io};

use rustix::mm::{Advice, madvise};

/// Lets go of the program's own code and of the constants beside it: what is used again comes back from the
/// page cache, 64 KiB at a fault. A process that has started and now does little has some megabytes less
/// resident then. A debugger's breakpoints are gone too.
///
/// # Errors
/// `/proc` is not there, or the kernel refused.
pub fn forget_code() -> io::Result<()> {
    let (program, maps) = (fs::read_link("/proc/self/exe")?, fs::read_to_string("/proc/self/maps")?);
    for Range { start, end } in maps.lines().filter_map(|line| clean(line, &program)) {
        // SAFETY: a private mapping of a file that nobody has written to, and nobody may: its pages are read
        // from the file again.
        unsafe { madvise(start as *mut c_void, end - start, Advice::LinuxDontNeed) }?;
    }
    Ok(())
}

/// The range of a line of `/proc/self/maps` (proc_pid_maps(5)) if it is the program's code, or the beginning
/// of its file. Other parts that are read-only by now were written to by the linker.
fn clean(line: &str, program: &Path) -> Option<Range<usize>> {
    let mut words = line.split_ascii_whitespace();
    let (range, access, offset) = (words.next()?, words.next()?, words.next()?);
    let beginning = offset.bytes().all(|digit| digit == b'0');
    let kind = access == "r-xp" || access == "r--p" && beginning;
    // Behind device and inode.
    if !kind || Path::new(words.nth(2)?) != program {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// KiB of code in memory.
    fn resident() -> usize {
        let program = fs::read_link("/proc/self/exe").unwrap();
        let (mut counts, mut sum) = (false, 0);
        for line in fs::read_to_string("/proc/self/smaps").unwrap().lines() {
            if line.split(' ').next().unwrap().contains('-') {
                counts = clean(line, &program).is_some();
            } else if let Some(size) = line.strip_prefix("Rss:").filter(|_| counts) {
                sum += size.trim().trim_end_matches(" kB").parse::<usize>().unwrap();
            }
        }
        sum
    }

    #[test]
    fn what_is_forgotten_is_not_resident_and_runs_all_the_same() {
        // Every page of it, as far as the file is in the page cache.
        let program = fs::read_link("/proc/self/exe").unwrap();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        for range in maps.lines().filter_map(|line| clean(line, &program)) {
            // SAFETY: a mapping that can be read.
            range.step_by(4096).for_each(|page| unsafe {
                (page as *const u8).read_volatile();
            });
        }
        let before = resident();
        forget_code().unwrap();
        let after = resident();
        assert!(after < before, "{after} KiB after {before}");
    }

    #[test]
    fn only_what_the_linker_has_not_written_to_is_let_go() {
        let clean = |line| clean(line, Path::new("/bin/x"));
        assert_eq!(clean("1000-3000 r-xp 00001000 fd:00 7    /bin/x"), Some(0x1000..0x3000));
        assert_eq!(clean("0-1000 r--p 00000000 fd:00 7 /bin/x"), Some(0..0x1000));
        assert_eq!(clean("4000-5000 r--p 00003000 fd:00 7 /bin/x"), None);
        assert_eq!(clean("5000-6000 rw-p 00000000 fd:00 7 /bin/x"), None);
        assert_eq!(clean("1000-3000 r-xp 00001000 fd:00 7 /lib/x.so"), None);
        assert_eq!(clean("7000-8000 rw-p 00000000 00:00 0"), None);
    }
}
