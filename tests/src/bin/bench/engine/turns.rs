//! Measuring in turn, and what comes of it.

use std::ops::AsyncFnMut;

use altiplano_tests::report::Row;
use anyhow::Result;

use super::servers::Server;

/// Which figures are the better ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Better {
    More,
    Less,
}

/// One figure of every server, by rounds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Series {
    pub(crate) ours: Vec<f64>,
    /// Further settings of ours.
    also_ours: Vec<(String, Vec<f64>)>,
    pub(crate) peers: Vec<(String, Vec<f64>)>,
}

/// Measures `N` figures of each server, ours first, then each of theirs, and this `rounds` times.
pub(crate) async fn in_turn<const N: usize>(
    servers: &[Server],
    rounds: u64,
    mut measure: impl AsyncFnMut(&Server, u64) -> Result<[f64; N]>,
) -> Result<[Series; N]> {
    let mut all: [Series; N] = std::array::from_fn(|_| Series::default());
    let first = servers.iter().find(|server| server.is_ours).map(|server| &server.name);
    for server in servers.iter().filter(|server| Some(&server.name) != first) {
        for series in &mut all {
            let others = if server.is_ours { &mut series.also_ours } else { &mut series.peers };
            others.push((server.name.clone(), Vec::new()));
        }
    }
    for round in 0..rounds {
        for server in servers {
            let figures = measure(server, round).await?;
            eprintln!("  round {round}, {}: {figures:.4?}", server.name);
            for (series, figure) in all.iter_mut().zip(figures) {
                let mut others = series.peers.iter_mut().chain(&mut series.also_ours);
                match others.find(|(name, _)| *name == server.name) {
                    Some((_, known)) => known.push(figure),
                    None => series.ours.push(figure),
                }
            }
        }
    }
    Ok(all)
}

impl Series {
    /// Ours beside the best of theirs.
    pub(crate) fn row(&self, metric: impl Into<String>, unit: &str, better: Better) -> Row {
        let best = self.peers.iter().map(|(name, figures)| (name, median(figures))).reduce(|best, other| {
            let improves = if better == Better::More { other.1 > best.1 } else { other.1 < best.1 };
            if improves { other } else { best }
        });
        let row = self.alone(metric, unit);
        best.map_or(row.clone(), |(name, figure)| row.beside(name, figure))
    }

    /// Another setting of ours, beside the same peers.
    pub(crate) fn of(&self, name: &str) -> Option<Self> {
        let (_, ours) = self.also_ours.iter().find(|(known, _)| known == name)?;
        Some(Self { ours: ours.clone(), also_ours: Vec::new(), peers: self.peers.clone() })
    }

    /// Ours beside the peer of this name.
    pub(crate) fn row_beside(&self, metric: impl Into<String>, unit: &str, peer: &str) -> Row {
        let row = self.alone(metric, unit);
        match self.peers.iter().find(|(name, _)| name == peer) {
            Some((name, figures)) => row.beside(name, median(figures)),
            None => row,
        }
    }

    pub(super) fn alone(&self, metric: impl Into<String>, unit: &str) -> Row {
        Row::new(metric, unit, median(&self.ours)).spread(spread(&self.ours))
    }
}

/// The middle one, or the mean of the two in the middle.
pub(crate) fn median(figures: &[f64]) -> f64 {
    let negated: Vec<f64> = figures.iter().map(|figure| -figure).collect();
    f64::midpoint(percentile(figures, 50.0), -percentile(&negated, 50.0))
}

/// The nearest-rank percentile; not a number when there is nothing.
pub(crate) fn percentile(figures: &[f64], percent: f64) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "a rank")]
    let rank = (sorted.len() as f64 * percent / 100.0).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
}

pub(crate) fn spread(figures: &[f64]) -> f64 {
    let most = figures.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let least = figures.iter().copied().fold(f64::INFINITY, f64::min);
    (most - least).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_of_theirs_is_beside_the_middle_of_ours() {
        let peers = vec![("slow".to_owned(), vec![5.0, 7.0, 6.0]), ("fast".to_owned(), vec![8.0, 9.0])];
        let series = Series { ours: vec![12.0, 9.0, 10.0], also_ours: vec![("other".to_owned(), vec![11.0])], peers };
        let row = series.row("speed", "tok/s", Better::More);
        assert_eq!((row.ours, row.spread, row.peer.as_deref(), row.theirs), (10.0, Some(3.0), Some("fast"), Some(8.5)));
        let row = series.row("latency", "s", Better::Less);
        assert_eq!((row.peer.as_deref(), row.theirs), (Some("slow"), Some(6.0)));
        assert_eq!(series.row_beside("speed", "tok/s", "fast").ratio, Some(10.0 / 8.5));
        let other = series.of("other").map(|other| other.row("speed", "tok/s", Better::More));
        assert_eq!(other.map(|row| (row.ours, row.theirs)), Some((11.0, Some(8.5))));
        assert!(series.of("fast").is_none(), "not ours");
    }

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let figures: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!((percentile(&figures, 50.0), percentile(&figures, 99.0)), (50.0, 99.0));
        assert!((median(&figures) - 50.5).abs() < 1e-9);
        assert!(median(&[]).is_nan());
    }
}
