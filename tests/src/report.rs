//! Reports of measurements: a Markdown table for people, JSON for programs.

use std::{fmt::Write as _, fs, path::PathBuf};

use anyhow::{Context as _, Result};
use serde::Serialize;

/// One measured figure.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Row {
    /// What was measured.
    pub metric: String,
    /// Its unit, such as `s` or `MiB`.
    pub unit: String,
    /// Altiplano's figure.
    pub ours: f64,
    /// What it is compared with, if anything: `llama-server b1234`.
    pub peer: Option<String>,
    /// The peer's figure, in the same unit and on the same machine.
    pub theirs: Option<f64>,
    /// `ours ÷ theirs`.
    pub ratio: Option<f64>,
    /// How far repeated runs lie apart, in the same unit.
    pub spread: Option<f64>,
    /// What it has to be, in words: `< 1.0`.
    pub target: Option<String>,
    /// Whether it is.
    pub met: Option<bool>,
}

impl Row {
    /// A figure without peer or target.
    #[must_use]
    pub fn new(metric: impl Into<String>, unit: &str, ours: f64) -> Self {
        Self { metric: metric.into(), unit: unit.into(), ours, ..Self::default() }
    }

    /// A figure that has to be below `limit`.
    #[must_use]
    pub fn below(mut self, limit: f64) -> Self {
        self.target = Some(format!("< {limit}"));
        self.met = Some(self.ours < limit);
        self
    }

    /// Beside a peer's figure, `ours ÷ theirs` has to be at least `limit`.
    #[must_use]
    pub fn ratio_at_least(self, limit: f64) -> Self {
        let met = self.ratio.is_some_and(|ratio| ratio >= limit);
        Self { target: Some(format!("ratio ≥ {limit}")), met: Some(met), ..self }
    }

    /// Beside a peer's figure, `ours ÷ theirs` has to be at most `limit`.
    #[must_use]
    pub fn ratio_at_most(self, limit: f64) -> Self {
        let met = self.ratio.is_some_and(|ratio| ratio <= limit);
        Self { target: Some(format!("ratio ≤ {limit}")), met: Some(met), ..self }
    }

    /// Beside a peer's figure.
    #[must_use]
    pub fn beside(mut self, peer: &str, theirs: f64) -> Self {
        self.peer = Some(peer.into());
        self.theirs = Some(theirs);
        self.ratio = (theirs != 0.0).then(|| self.ours / theirs);
        self
    }

    /// With the spread of repeated runs.
    #[must_use]
    pub fn spread(mut self, spread: f64) -> Self {
        self.spread = Some(spread);
        self
    }
}

/// The figures of one measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Its name, and that of its file.
    pub name: String,
    /// What it was measured on and how, for the reader.
    pub setting: String,
    /// In the order of the table.
    pub rows: Vec<Row>,
}

impl Report {
    /// The Markdown table.
    #[must_use]
    pub fn markdown(&self) -> String {
        let optional = |value: Option<f64>| value.map_or_else(String::new, figure);
        let mut table = format!(
            "### {}\n\n{}\n\n| metric | unit | ours | peer | theirs | ratio | spread | target | met |\n\
             |---|---|---:|---|---:|---:|---:|---|---|\n",
            self.name, self.setting
        );
        for row in &self.rows {
            let Row { metric, unit, ours, peer, theirs, ratio, spread, target, met } = row;
            let met = match met {
                Some(true) => "yes",
                Some(false) => "**no**",
                None => "",
            };
            // Writing to a String cannot fail.
            let _ = writeln!(
                table,
                "| {metric} | {unit} | {} | {} | {} | {} | {} | {} | {met} |",
                figure(*ours),
                peer.as_deref().unwrap_or_default(),
                optional(*theirs),
                optional(*ratio),
                optional(*spread),
                target.as_deref().unwrap_or_default(),
            );
        }
        table
    }

    /// Prints the table and writes `NAME.json` into `ALTIPLANO_REPORT_DIR` (default: `target/bench`). Returns its path.
    pub fn publish(&self) -> Result<PathBuf> {
        println!("{}", self.markdown());
        let dir = std::env::var_os("ALTIPLANO_REPORT_DIR")
            .map_or_else(|| crate::repository().join("target/bench"), PathBuf::from);
        let path = dir.join(format!("{}.json", self.name));
        fs::create_dir_all(&dir)
            .and_then(|()| fs::write(&path, serde_json::to_vec_pretty(self)?))
            .with_context(|| format!("could not write {}", path.display()))?;
        Ok(path)
    }
}

/// Three significant digits or all whole ones.
fn figure(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_what_was_missed() {
        let report = Report {
            name: "apply".into(),
            setting: "two cores".into(),
            rows: vec![
                Row::new("apply to Ready, p50", "s", 0.8123).below(1.0).spread(0.05),
                Row::new("prompt", "tok/s", 4200.0).beside("peer 1", 4000.0).ratio_at_least(1.0),
                Row::new("first token", "s", 0.3).beside("peer 1", 1.0).ratio_at_most(0.25),
                Row::new("memory", "MiB", 41.04).below(40.0),
            ],
        };
        let lines: Vec<_> = report.markdown().lines().skip(4).map(str::to_owned).collect();
        assert_eq!(
            lines[2..],
            [
                "| apply to Ready, p50 | s | 0.812 |  |  |  | 0.050 | < 1 | yes |",
                "| prompt | tok/s | 4200 | peer 1 | 4000 | 1.05 |  | ratio ≥ 1 | yes |",
                "| first token | s | 0.300 | peer 1 | 1.00 | 0.300 |  | ratio ≤ 0.25 | **no** |",
                "| memory | MiB | 41.0 |  |  |  |  | < 40 | **no** |",
            ]
        );
    }
}
