//! Counts for whoever tunes the jails.

use engine::Statistics;

/// What happened so far.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Times that guest code was let run.
    pub entries: u64,
    /// It stopped for a page that was not mapped,
    pub faults: u64,
    /// in front of a system call,
    pub system_calls: u64,
    /// for an interrupt or another vCPU's wish,
    pub kicks: u64,
    /// at an instruction for the interpreter,
    pub interpreted: u64,
    /// or at code that is not for the host's CPU.
    pub foreign: u64,
    /// Jails that were given to another address space.
    pub flushes: u64,
    /// Most pages that one had.
    pub pages: u64,
}

impl Stats {
    /// Adds the counts to an engine's statistics.
    pub fn report(&self, into: &mut Statistics) {
        for (name, count) in [
            ("entries_into_jails", self.entries),
            ("faults_in_jails", self.faults),
            ("system_calls_in_jails", self.system_calls),
            ("interruptions_of_jails", self.kicks),
            ("instructions_of_jails_interpreted", self.interpreted),
            ("pages_of_code_not_for_jails", self.foreign),
            ("jails_given_away", self.flushes),
            ("pages_in_a_jail_at_most", self.pages),
        ] {
            into.count(name, count);
        }
    }
}
