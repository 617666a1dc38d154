//! Medians and ratios, for people and for programs.

use serde::Serialize;

use crate::runner::{BOOT, Times};
use crate::workload::{PAIR, WORKLOADS};

/// The row of a whole Debian: from the start to its login prompt.
pub const DEBIAN: &str = "Debian 12 to login";

/// What a run of the program found out.
#[derive(Debug, Serialize)]
pub struct Table {
    /// One part in so many of the full work was done.
    divide: u64,
    /// How often each item ran; Debian ran once.
    rounds: u32,
    /// Boot first, the compute items' geometric mean last.
    rows: Vec<Row>,
    /// What a second vCPU, or CPU, gained.
    second_cpu: Gain,
}

/// How many times as fast two CPUs did two independent jobs as one did.
#[derive(Debug, Serialize, PartialEq)]
pub struct Gain {
    /// The metal: what could be had at most.
    pub native: Option<f64>,
    /// ospite.
    pub ospite: Option<f64>,
    /// QEMU's translator.
    pub qemu: Option<f64>,
}

/// One row: medians in seconds, and ratios made pair by pair from the medians of the same run.
#[derive(Debug, Serialize, PartialEq)]
pub struct Row {
    /// The item.
    pub item: String,
    /// Native, where the item exists natively.
    pub native: Option<f64>,
    /// ospite.
    pub ospite: Option<f64>,
    /// QEMU's translator.
    pub qemu: Option<f64>,
    /// ospite / native: how much slower than the metal.
    pub of_native: Option<f64>,
    /// QEMU / ospite: how much faster than QEMU.
    pub of_qemu: Option<f64>,
}

/// All runs of the three, in turns.
#[derive(Default)]
pub struct Runs {
    /// Native runs.
    pub native: Vec<Times>,
    /// Runs in ospite.
    pub ospite: Vec<Times>,
    /// Runs in QEMU.
    pub qemu: Vec<Times>,
}

fn median(runs: &[Times], item: &str) -> Option<f64> {
    let mut all: Vec<f64> = runs.iter().filter_map(|t| t.get(item).copied()).collect();
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied()
}

fn row(runs: &Runs, item: &str) -> Row {
    let native = (item != BOOT).then(|| median(&runs.native, item)).flatten();
    let (ospite, qemu) = (median(&runs.ospite, item), median(&runs.qemu, item));
    Row {
        item: item.into(),
        native,
        ospite,
        qemu,
        of_native: ospite.zip(native).map(|(o, n)| o / n),
        of_qemu: ospite.zip(qemu).map(|(o, q)| q / o),
    }
}

fn geometric_mean(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let logs: Option<Vec<f64>> = values.map(|v| v.map(f64::ln)).collect();
    logs.filter(|l| !l.is_empty()).map(|l| (l.iter().sum::<f64>() / l.len() as f64).exp())
}

/// The same item with one CPU and with two.
fn gain(one: &Runs, two: &Runs) -> Gain {
    let gain = |one: &[Times], two: &[Times]| Some(median(one, PAIR.name)? / median(two, PAIR.name)?);
    Gain {
        native: gain(&one.native, &two.native),
        ospite: gain(&one.ospite, &two.ospite),
        qemu: gain(&one.qemu, &two.qemu),
    }
}

fn mean(rows: &[Row]) -> Row {
    let compute: Vec<&Row> =
        rows.iter().filter(|r| WORKLOADS.iter().any(|w| w.compute && w.name == r.item)).collect();
    Row {
        item: "compute, geometric mean".into(),
        native: None,
        ospite: None,
        qemu: None,
        of_native: geometric_mean(compute.iter().map(|r| r.of_native)),
        of_qemu: geometric_mean(compute.iter().map(|r| r.of_qemu)),
    }
}

impl Table {
    /// Of runs with one CPU, of runs with two, and of Debian's.
    pub fn new(divide: u64, rounds: u32, one: &Runs, two: &Runs, debian: &Runs) -> Table {
        let mut rows = vec![row(one, BOOT)];
        rows.extend([row(debian, DEBIAN)].into_iter().filter(|row| row.ospite.is_some()));
        rows.extend(WORKLOADS.iter().map(|w| row(one, w.name)));
        let second = Row { item: format!("{}, 2 CPUs", PAIR.name), ..row(two, PAIR.name) };
        rows.extend([second].into_iter().filter(|row| row.ospite.is_some()));
        rows.push(mean(&rows));
        Table { divide, rounds, rows, second_cpu: gain(one, two) }
    }

    /// For people.
    pub fn text(&self) -> String {
        let cell = |v: Option<f64>| v.map_or("-".into(), |v| format!("{v:.2}"));
        let mut out = format!(
            "{:<24}{:>10}{:>10}{:>10}{:>16}{:>14}\n",
            "item", "native s", "ospite s", "QEMU s", "ospite/native", "QEMU/ospite"
        );
        for r in &self.rows {
            let figures = [r.native, r.ospite, r.qemu].map(cell);
            let [native, ospite, qemu] = figures;
            let (of_native, of_qemu) = (cell(r.of_native), cell(r.of_qemu));
            out += &format!("{:<24}{native:>10}{ospite:>10}{qemu:>10}{of_native:>16}{of_qemu:>14}\n", r.item);
        }
        let [native, ospite, qemu] = [self.second_cpu.native, self.second_cpu.ospite, self.second_cpu.qemu];
        if ospite.is_some() {
            let [native, ospite, qemu] = [native, ospite, qemu].map(cell);
            out += &format!("{:<24}{native:>10}{ospite:>10}{qemu:>10}\n", "2 CPUs, times as fast");
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_come_from_medians_and_missing_peers_stay_empty() {
        let times = |s: f64| Times::from([("sha256".to_string(), s)]);
        let runs =
            Runs { native: vec![times(1.0)], ospite: vec![times(9.0), times(3.0), times(2.0)], qemu: vec![] };
        let row = row(&runs, "sha256");
        assert_eq!((row.ospite, row.of_native, row.of_qemu), (Some(3.0), Some(3.0), None));
        let (runs, none) = (Runs { ospite: vec![times(3.0)], ..Runs::default() }, Runs::default());
        let text = Table::new(1, 1, &runs, &none, &none).text();
        assert!(text.contains("3.00") && !text.contains("Debian") && !text.contains("2 CPUs"), "{text}");
    }

    #[test]
    fn a_second_cpu_gains_what_the_pair_takes_less() {
        let runs = |s: f64| Runs { ospite: vec![Times::from([(PAIR.name.into(), s)])], ..Runs::default() };
        let found = gain(&runs(3.0), &runs(1.5));
        assert_eq!(found, Gain { native: None, ospite: Some(2.0), qemu: None });
        let text = Table::new(1, 1, &runs(3.0), &runs(1.5), &Runs::default()).text();
        assert!(text.contains("2 CPUs, times as fast") && text.contains("2.00"), "{text}");
    }
}
