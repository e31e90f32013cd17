//! The worker beside llama-server, in turn, on one machine: speed, fairness to running streams, what sharing saves, and
//! what our own code costs.
//!
//! Both are asked for the same: prompts as token ids, greedy, the end ignored, so that each answer has exactly as many
//! tokens as were asked for. All of Altiplano's path is measured, agent and worker; the client reads sockets and looks
//! for events, no more. Nothing else runs on the machine while one is measured, the other idle.

mod arrival;
pub(crate) mod client;
mod overhead;
pub(crate) mod reuse;
pub(crate) mod servers;
pub(crate) mod speed;
pub(crate) mod turns;

use std::time::{Duration, Instant};

use altiplano_test_models::{Architecture, Quantization, Spec};
use altiplano_tests::report::{Report, Row};
use altiplano_tests::sandbox;
use anyhow::Result;

use servers::Model;

/// What has to be done within ten minutes is stopped after them.
const LIMIT: Duration = Duration::from_mins(10);

/// The scenarios by name, in their order.
const SCENARIOS: [&str; 6] = ["one", "many", "shared", "arrival", "cached", "overhead"];

/// All scenarios, or those that are named.
pub(crate) async fn run(only: &[String]) -> Result<Report> {
    if let Some(unknown) = only.iter().find(|name| !SCENARIOS.contains(&name.as_str())) {
        anyhow::bail!("{unknown:?} is no scenario; these are: {}", SCENARIOS.join(", "));
    }
    let started = Instant::now();
    let load = load_average();
    let model = Model::write(&sandbox::subdir("models")?, "bench", &shape())?;
    let tiny = Model::write(&sandbox::subdir("models")?, "tiny", &Spec::default())?;
    // Before it takes ten minutes.
    let (version, our_version) = (servers::version()?, servers::our_version()?);
    let mut rows: Vec<Row> = Vec::new();
    for scenario in SCENARIOS.iter().filter(|name| only.is_empty() || only.iter().any(|only| only == *name)) {
        let begun = Instant::now();
        let measured = tokio::time::timeout(LIMIT, async {
            match *scenario {
                "one" => speed::one_client(&model).await,
                "many" => speed::many_clients(&model).await,
                "shared" => reuse::shared_prefix(&model).await,
                "arrival" => arrival::long_prompt(&model).await,
                "cached" => reuse::beside_cached(&model).await,
                _ => overhead::added(&tiny).await,
            }
        });
        let measured = measured.await??;
        eprintln!("{scenario}: {:.0} s", begun.elapsed().as_secs_f64());
        for row in &measured {
            let Row { metric, unit, ours, theirs, ratio, .. } = row;
            eprintln!("  {metric}: {ours:.3} {unit}, theirs {theirs:.3?}, ratio {ratio:.3?}");
        }
        rows.extend(measured);
    }
    let shape = shape();
    Ok(Report {
        name: "engine".into(),
        setting: format!(
            "{:.0} s on {} cores, load {load} before it. Model: {:.0} million random weights, {} layers, width {}, {} tokens of \
             vocabulary, Q4_0; the rows that say so use one of 0.2 million. Ours: altiplano-agent serve with its worker, \
             llama.cpp {}. Peer: llama.cpp {version}, built for the same CPUs; each row names the best of its settings. \
             Both: CPU, the same file, threads, context and requests. Median of the rounds; spread: from the least to \
             the most of ours.",
            started.elapsed().as_secs_f64(),
            servers::threads(),
            {
                #[expect(clippy::cast_precision_loss, reason = "for people")]
                let millions = shape.parameters() as f64 / 1e6;
                millions
            },
            shape.layers,
            shape.embd,
            shape.vocab,
            our_version,
        ),
        rows,
    })
}

/// Large enough that llama.cpp and not the servers decides, small enough for ten minutes.
pub(crate) fn shape() -> Spec {
    Spec {
        architecture: Architecture::Llama,
        name: "Altiplano Bench".into(),
        vocab: 32_000,
        layers: 12,
        embd: 768,
        heads: 12,
        kv_heads: 4,
        ff: 2048,
        context: 32_768,
        quantization: Quantization::Q4_0,
        ..Spec::default()
    }
}

pub(crate) fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().unwrap_or("unknown").to_owned()
}
