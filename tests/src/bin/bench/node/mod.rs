//! What the node does with its workers: how long a model that is not loaded takes to its first token, how long two models
//! that exclude each other take to change places, how soon what is killed is back, and how much memory is predicted wrongly.

mod crash;
mod estimates;
mod wake;

use std::time::{Duration, Instant};

use altiplano_test_models::Spec;
use altiplano_tests::report::{Report, Row};
use altiplano_tests::sandbox;
use anyhow::{Result, bail};

use crate::engine::servers::{self, Model};
use crate::engine::{load_average, shape};

/// The scenarios by name, in their order.
const SCENARIOS: [&str; 5] = ["wake", "switch", "crash", "adopt", "estimates"];

/// Longest wait for anything; what is usual here is a hundredth of it.
const PATIENCE: Duration = Duration::from_secs(30);

/// Time between two looks at what is waited for: what is measured here takes some milliseconds at least.
const LOOK: Duration = Duration::from_millis(1);

/// All scenarios, or those that are named.
pub(crate) async fn run(only: &[String]) -> Result<Report> {
    if let Some(unknown) = only.iter().find(|name| !SCENARIOS.contains(&name.as_str())) {
        bail!("{unknown:?} is no scenario; these are: {}", SCENARIOS.join(", "));
    }
    let started = Instant::now();
    let load = load_average();
    let dir = sandbox::subdir("models")?;
    let model = Model::write(&dir, "bench", &shape())?;
    let tiny = Model::write(&dir, "tiny", &Spec::default())?;
    let mut rows: Vec<Row> = Vec::new();
    for scenario in SCENARIOS.iter().filter(|name| only.is_empty() || only.iter().any(|only| only == *name)) {
        let begun = Instant::now();
        rows.extend(match *scenario {
            "wake" => wake::wakes(&model).await?,
            "switch" => wake::switches(&model).await?,
            "crash" => crash::kills(&tiny).await?,
            "estimates" => estimates::errors(&dir).await?,
            _ => crash::adoptions(&tiny).await?,
        });
        eprintln!("{scenario}: {:.0} s", begun.elapsed().as_secs_f64());
    }
    let shape = shape();
    Ok(Report {
        name: "node".into(),
        setting: format!(
            "{:.0} s on {} cores, load {load} before it. Model: random weights, {} layers, width {}, Q4_0, its file in memory; \
             crash and adoption use one of 0.2 million weights. Ours: agent and worker, llama.cpp {}. Peer: llama.cpp {}. \
             Both: CPU, the same files, threads and context. Median of the rounds where no other is named; spread: from \
             the least to the most of ours.",
            started.elapsed().as_secs_f64(),
            servers::threads(),
            shape.layers,
            shape.embd,
            servers::our_version()?,
            servers::version()?,
        ),
        rows,
    })
}

/// Looks again and again; seconds from `since` until it is so.
async fn seconds_until(what: &str, since: Instant, mut is_so: impl FnMut() -> Result<bool>) -> Result<f64> {
    while !is_so()? {
        if since.elapsed() > PATIENCE {
            bail!("waited {PATIENCE:?} for {what}");
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(since.elapsed().as_secs_f64())
}
