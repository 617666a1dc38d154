//! Counts for whoever tunes the translator.

use std::collections::HashMap;

use iced_x86::Mnemonic;

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
    /// Instructions across pages.
    pub straddles: u64,
    /// Exits because something wanted attention.
    pub attentions: u64,
    /// Blocks interpreted.
    pub interpreted: u64,
    /// Pages whose code was voided by a write.
    pub voided: u64,
    /// Times that the code cache was full.
    pub flushes: u64,
    /// Targets that were not in the jump cache, by address; only counted if asked for.
    pub missed: HashMap<u64, u64>,
    /// Handlers run, by instruction; only counted if asked for.
    pub by_mnemonic: HashMap<Mnemonic, u64>,
}

impl std::fmt::Display for Stats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let counts = [
            ("units translated", self.units),
            ("guest instructions translated", self.instructions),
            ("host code bytes", self.code_bytes),
            ("ticks translating", self.translation_ticks),
            ("entries into translated code", self.entries),
            ("jump-cache misses", self.jump_misses),
            ("jumps linked", self.links),
            ("TLB refills", self.refills),
            ("TLB misses", self.misses),
            ("instructions run by handlers", self.handlers),
            ("blocks interpreted", self.interpreted),
            ("instructions across pages", self.straddles),
            ("exits for attention", self.attentions),
            ("pages of code voided", self.voided),
            ("code cache flushes", self.flushes),
        ];
        for (name, count) in counts {
            writeln!(f, "{count:>14} {name}")?;
        }
        let mut handlers: Vec<_> = self.by_mnemonic.iter().collect();
        handlers.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
        for (mnemonic, count) in handlers.into_iter().take(30) {
            writeln!(f, "{count:>14} {mnemonic:?}")?;
        }
        let mut missed: Vec<_> = self.missed.iter().collect();
        missed.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
        for (target, count) in missed.into_iter().take(10) {
            writeln!(f, "{count:>14} {target:#x}")?;
        }
        Ok(())
    }
}
