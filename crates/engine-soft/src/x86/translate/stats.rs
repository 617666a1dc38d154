//! Counts for whoever tunes the translator.

use engine::Statistics;

/// What happened so far. Times are in ticks of the host's counter.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Entries into translated code.
    pub entries: u64,
    /// Time spent translating.
    pub translation_ticks: u64,
    /// Units translated.
    pub units: u64,
    /// Guest instructions translated.
    pub instructions: u64,
    /// Bytes of host code made.
    pub code_bytes: u64,
    /// Misses of the fast TLB that the TLB behind it could answer.
    pub refills: u64,
    /// Misses that ran an instruction's handler.
    pub misses: u64,
    /// Instructions executed by their handlers because they are not translated.
    pub handlers: u64,
    /// Jumps linked.
    pub links: u64,
    /// Units run in lockstep, and those that differed.
    pub compared: u64,
    /// See [`Stats::compared`].
    pub mismatches: u64,
    /// Targets that were not in the jump cache.
    pub jump_misses: u64,
    /// Jumps whose target was looked up without leaving translated code.
    pub resolved: u64,
    /// Instructions across pages.
    pub straddles: u64,
    /// Exits because something wanted attention.
    pub attentions: u64,
    /// Blocks interpreted.
    pub interpreted: u64,
    /// Times that a unit was not translated because another vCPU might have written to its page.
    pub unsettled: u64,
    /// Pages whose code was voided by a write.
    pub voided: u64,
    /// Times that the code cache was full.
    pub flushes: u64,
}

impl Stats {
    /// Adds them to an engine's statistics.
    pub fn report(&self, into: &mut Statistics) {
        into.hit_rate("tlb_behind_the_fast_one", self.refills, self.refills + self.misses);
        into.hit_rate("translated_units", self.entries.saturating_sub(self.units), self.entries);
        for (name, count) in [
            ("units_translated", self.units),
            ("guest_instructions_translated", self.instructions),
            ("host_code_bytes", self.code_bytes),
            ("entries_into_translated_code", self.entries),
            ("jump_cache_misses", self.jump_misses),
            ("jumps_linked", self.links),
            ("jumps_looked_up", self.resolved),
            ("instructions_run_by_handlers", self.handlers),
            ("blocks_interpreted", self.interpreted),
            ("instructions_across_pages", self.straddles),
            ("exits_for_attention", self.attentions),
            ("units_put_off_for_other_vcpus", self.unsettled),
            ("pages_of_code_voided", self.voided),
            ("code_cache_flushes", self.flushes),
            ("units_compared_in_lockstep", self.compared),
            ("units_that_differed", self.mismatches),
        ] {
            into.count(name, count);
        }
    }
}
