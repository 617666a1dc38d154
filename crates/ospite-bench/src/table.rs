//! Medians and ratios, for people and for programs.

use serde::Serialize;

use crate::runner::{BOOT, Times};
use crate::workload::WORKLOADS;

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

/// The rows of the table, boot first, the compute items' geometric mean last.
pub fn rows(runs: &Runs) -> Vec<Row> {
    let mut rows = vec![row(runs, BOOT)];
    rows.extend(WORKLOADS.iter().map(|w| row(runs, w.name)));
    let compute: Vec<&Row> =
        rows.iter().filter(|r| WORKLOADS.iter().any(|w| w.compute && w.name == r.item)).collect();
    let mean = Row {
        item: "compute, geometric mean".into(),
        native: None,
        ospite: None,
        qemu: None,
        of_native: geometric_mean(compute.iter().map(|r| r.of_native)),
        of_qemu: geometric_mean(compute.iter().map(|r| r.of_qemu)),
    };
    rows.push(mean);
    rows
}

/// The table as text.
pub fn text(rows: &[Row]) -> String {
    let cell = |v: Option<f64>| v.map_or("-".into(), |v| format!("{v:.2}"));
    let mut out = format!(
        "{:<24}{:>10}{:>10}{:>10}{:>16}{:>14}\n",
        "item", "native s", "ospite s", "QEMU s", "ospite/native", "QEMU/ospite"
    );
    for r in rows {
        out += &format!(
            "{:<24}{:>10}{:>10}{:>10}{:>16}{:>14}\n",
            r.item,
            cell(r.native),
            cell(r.ospite),
            cell(r.qemu),
            cell(r.of_native),
            cell(r.of_qemu)
        );
    }
    out
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
        assert!(text(&[row]).contains("3.00"));
    }
}
