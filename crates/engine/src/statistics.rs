//! What an engine tells about its work, as plain data: for whoever tunes it, or wonders where the time
//! went.

use std::collections::HashMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Rows of a table that are printed for people.
const ROWS: usize = 20;

/// What an engine did for one vCPU, or for several together. Names are in `snake_case`, and the engine's
/// own; of equal names, [`Statistics::add`] adds up the figures.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Statistics {
    /// Where the vCPUs' time went. The parts do not overlap.
    pub times: Vec<Time>,
    /// How often something was where it was looked for.
    pub hits: Vec<Hits>,
    /// How often things happened.
    pub counts: Vec<Count>,
    /// What happened most often, by kind.
    pub tables: Vec<Table>,
}

/// A part of the time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Time {
    /// What it was spent on.
    pub name: String,
    /// Seconds of vCPUs' time.
    pub seconds: f64,
}

/// A hit rate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hits {
    /// What was asked.
    pub name: String,
    /// How often it had the answer,
    pub hits: u64,
    /// of so many times.
    pub lookups: u64,
}

/// A number of events.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// What was counted.
    pub name: String,
    /// How often.
    pub count: u64,
}

/// Events by kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// What was counted.
    pub name: String,
    /// By kind, the most frequent first.
    pub rows: Vec<Count>,
}

impl Statistics {
    /// Adds a part of the time.
    pub fn time(&mut self, name: &str, seconds: f64) {
        match self.times.iter_mut().find(|time| time.name == name) {
            Some(time) => time.seconds += seconds,
            None => self.times.push(Time { name: name.into(), seconds }),
        }
    }

    /// Adds to a hit rate.
    pub fn hit_rate(&mut self, name: &str, hits: u64, lookups: u64) {
        match self.hits.iter_mut().find(|rate| rate.name == name) {
            Some(rate) => (rate.hits, rate.lookups) = (rate.hits + hits, rate.lookups + lookups),
            None => self.hits.push(Hits { name: name.into(), hits, lookups }),
        }
    }

    /// Adds to a number of events.
    pub fn count(&mut self, name: &str, count: u64) {
        add_count(&mut self.counts, name, count);
    }

    /// Adds to a table.
    pub fn table(&mut self, name: &str, rows: impl IntoIterator<Item = (String, u64)>) {
        let known = self.tables.iter().position(|table| table.name == name);
        let at = known.unwrap_or_else(|| {
            self.tables.push(Table { name: name.into(), rows: Vec::new() });
            self.tables.len() - 1
        });
        let table = &mut self.tables[at].rows;
        // There may be as many as a guest has places to jump to.
        let mut counts: HashMap<String, u64> = table.drain(..).map(|row| (row.name, row.count)).collect();
        rows.into_iter().for_each(|(kind, count)| *counts.entry(kind).or_default() += count);
        table.extend(counts.into_iter().map(|(name, count)| Count { name, count }));
        table.sort_unstable_by(|a, b| b.count.cmp(&a.count).then_with(|| a.name.cmp(&b.name)));
    }

    /// Adds those of another vCPU.
    pub fn add(&mut self, other: Statistics) {
        other.times.iter().for_each(|time| self.time(&time.name, time.seconds));
        other.hits.iter().for_each(|rate| self.hit_rate(&rate.name, rate.hits, rate.lookups));
        other.counts.iter().for_each(|count| self.count(&count.name, count.count));
        for table in other.tables {
            self.table(&table.name, table.rows.into_iter().map(|row| (row.name, row.count)));
        }
    }
}

fn add_count(counts: &mut Vec<Count>, name: &str, count: u64) {
    match counts.iter_mut().find(|known| known.name == name) {
        Some(known) => known.count += count,
        None => counts.push(Count { name: name.into(), count }),
    }
}

fn words(name: &str) -> String {
    name.replace('_', " ")
}

fn percent(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part * 100.0 / whole } else { 0.0 }
}

impl fmt::Display for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.times.iter().map(|time| time.seconds).sum();
        writeln!(f, "{total:>14.3} s of vCPU time")?;
        for Time { name, seconds } in &self.times {
            writeln!(f, "{seconds:>14.3} s {:>5.1} %  {}", percent(*seconds, total), words(name))?;
        }
        for Hits { name, hits, lookups } in &self.hits {
            let rate = percent(*hits as f64, *lookups as f64);
            writeln!(f, "{rate:>14.3} % of {lookups} hit in {}", words(name))?;
        }
        for Count { name, count } in &self.counts {
            writeln!(f, "{count:>14} {}", words(name))?;
        }
        for Table { name, rows } in self.tables.iter().filter(|table| !table.rows.is_empty()) {
            writeln!(f, "{}:", words(name))?;
            for Count { name, count } in rows.iter().take(ROWS) {
                writeln!(f, "{count:>14} {name}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(seconds: f64, rows: &[(&str, u64)]) -> Statistics {
        let mut one = Statistics::default();
        one.time("translated_code", seconds);
        one.hit_rate("tlb", 1, 4);
        one.count("units", 7);
        one.table("fallbacks", rows.iter().map(|&(name, count)| (name.to_owned(), count)));
        one
    }

    #[test]
    fn two_vcpus_add_up_by_name_and_the_most_frequent_comes_first() {
        let mut sum = one(1.0, &[("in", 5), ("out", 3)]);
        sum.add(one(0.5, &[("out", 4), ("hlt", 1)]));
        assert_eq!(sum.times, [Time { name: "translated_code".into(), seconds: 1.5 }]);
        assert_eq!((sum.hits[0].hits, sum.hits[0].lookups, sum.counts[0].count), (2, 8, 14));
        let rows: Vec<_> = sum.tables[0].rows.iter().map(|row| (row.name.as_str(), row.count)).collect();
        assert_eq!(rows, [("out", 7), ("in", 5), ("hlt", 1)]);
    }

    #[test]
    fn people_read_percentages_and_words() {
        let text = one(2.0, &[("in", 5)]).to_string();
        assert!(text.contains("2.000 s 100.0 %  translated code"), "{text}");
        assert!(text.contains("25.000 % of 4 hit in tlb") && text.contains("fallbacks:"), "{text}");
    }

    #[test]
    fn a_table_of_very_many_kinds_is_added_up_in_no_time() {
        let rows = || (0..1u64 << 16).map(|kind| (format!("{kind:#x}"), kind % 7));
        let (mut sum, mut other) = (Statistics::default(), Statistics::default());
        let start = std::time::Instant::now();
        sum.table("jumps", rows());
        other.table("jumps", rows());
        sum.add(other);
        assert!(start.elapsed() < std::time::Duration::from_secs(3), "{:?}", start.elapsed());
        assert_eq!(sum.tables[0].rows.len(), 1 << 16);
        assert_eq!(sum.tables[0].rows[0].count, 12);
    }
}
