//! Processes that are never mistaken for others.

use std::io;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// A process of this boot of the host. Numbers of processes are used again, and all are void after a
/// reboot; the start time and the boot's own number tell them apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// When it was started, in clock ticks since the host's boot (proc_pid_stat(5), field 22).
    pub start: u64,
    /// The boot's number (`/proc/sys/kernel/random/boot_id`).
    pub boot: String,
}

impl Process {
    /// The process that has the number `pid` now.
    ///
    /// # Errors
    /// There is none, or it has ended and nobody has looked.
    pub fn of(pid: u32) -> io::Result<Process> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start = start_time(&stat).ok_or(io::ErrorKind::NotFound)?;
        Ok(Process { pid, start, boot: boot()? })
    }

    /// This one.
    ///
    /// # Errors
    /// There is no `/proc`.
    pub fn this() -> io::Result<Process> {
        Process::of(std::process::id())
    }

    /// Whether it is still there.
    pub fn is_alive(&self) -> bool {
        Process::of(self.pid).is_ok_and(|now| now == *self)
    }

    /// Sends it a signal; whether it was there to get it.
    pub fn signal(&self, signal: Signal) -> bool {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return false };
        // The descriptor holds on to whoever has the number now; only then is it asked who that is.
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return false };
        self.is_alive() && pidfd_send_signal(&process, signal).is_ok()
    }
}

/// Of a process that has not ended. The second field is the program's name, which may hold anything.
fn start_time(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") { None } else { fields.nth(18)?.parse().ok() }
}

fn boot() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().into())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_itself_until_it_ends() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        assert!(process.is_alive() && process != Process::this().unwrap());
        assert!(process.signal(Signal::KILL));
        while process.is_alive() {
            std::thread::yield_now(); // a zombie is not alive
        }
        child.wait().unwrap();
        assert!(!process.signal(Signal::KILL));
    }

    #[test]
    fn another_with_the_same_number_is_another() {
        let this = Process::this().unwrap();
        assert!(!Process { start: this.start + 1, ..this.clone() }.is_alive());
        assert!(!Process { boot: "before".into(), ..this }.signal(Signal::KILL), "or this test is dead");
    }

    #[test]
    fn a_program_may_have_any_name() {
        let fields = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        assert_eq!(start_time(&format!("7 (a) Z (b) {fields}")), Some(4242));
        assert_eq!(start_time("7 (sleep) Z 1"), None);
        assert_eq!(start_time(""), None);
    }
}
