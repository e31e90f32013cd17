//! What is predicted of a model's memory, beside what its worker measures when it has been loaded.

use std::path::Path;

use altiplano_test_models::{Architecture, Quantization, Spec};
use altiplano_tests::http;
use altiplano_tests::report::Row;
use anyhow::{Context as _, Result, ensure};

use crate::engine::servers::{Model, Server, serve};

/// What may be wrong of a prediction: three hundredths, or 64 MiB where that is more.
const ALLOWED: (f64, f64) = (0.03, 67_108_864.0);

/// Models of a few layers whose contexts are large, and those contexts.
fn configurations() -> [(Spec, &'static str); 10] {
    // 8 KiB of KV a token.
    let spec = Spec { layers: 4, embd: 512, heads: 8, kv_heads: 8, ff: 512, context: 65_536, ..Spec::default() };
    let window = Spec { architecture: Architecture::Gemma3, layers: 6, ..spec.clone() };
    let vocabulary = Spec { vocab: 65_536, ..spec.clone() };
    let weights = Spec { embd: 1024, ff: 4096, layers: 12, quantization: Quantization::Q4_0, ..spec.clone() };
    [
        (spec.clone(), "{minTokens: 4096, maxTokens: 4096}"),
        (spec.clone(), "{sizing: Fixed, maxTokens: 65536, parallel: 1}"),
        (spec.clone(), "{sizing: Fixed, maxTokens: 4096, parallel: 8}"),
        (spec.clone(), "{sizing: Fixed, maxTokens: 32768, parallel: 1, keyCacheType: Q8_0, valueCacheType: Q8_0}"),
        (spec.clone(), "{sizing: Fixed, maxTokens: 32768, parallel: 2, keyCacheType: Q4_0, valueCacheType: Q4_0}"),
        (spec.clone(), "{minTokens: 16384, maxTokens: 16384, parallel: 16}"),
        (spec, "{maxTokens: 512, parallel: 1}"),
        (window, "{sizing: Fixed, maxTokens: 32768, parallel: 1}"),
        (vocabulary, "{sizing: Fixed, maxTokens: 8192, parallel: 4}"),
        (weights, "{maxTokens: 8192, parallel: 4}"),
    ]
}

/// All of them, one after the other.
pub(super) async fn errors(dir: &Path) -> Result<Vec<Row>> {
    let (mut worst, mut largest) = (0.0_f64, 0.0_f64);
    for (number, (spec, context)) in configurations().into_iter().enumerate() {
        let model = Model::write(dir, &format!("estimated{number}"), &spec)?;
        let more = format!("context: {context}\n  unload: {{policy: Never}}");
        let mut server = serve(&["serve"], &[(&model, &more)], &[]).await?;
        server.logs(1, ": Ready as ").await?;
        let text = metrics(&server).await?;
        let (predicted, measured) = (total(&text, "predicted"), total(&text, "measured"));
        ensure!(predicted > 0.0 && measured > 0.0, "nothing is told: {}", server.proc.log_tail());
        let error = (measured - predicted).abs();
        eprintln!("  {:.1} MiB predicted, {:.1} measured: {context}", predicted / 1_048_576.0, measured / 1_048_576.0);
        worst = worst.max(error / (measured * ALLOWED.0).max(ALLOWED.1));
        largest = largest.max(error / measured);
    }
    let row = |metric: &str, unit: &str, figure| {
        Row::new(format!("memory predicted, ten configurations: {metric}"), unit, figure)
    };
    Ok(vec![
        row("largest error, of what is allowed (3 % or 64 MiB)", "", worst).below(1.0),
        row("largest error", "%", largest * 100.0),
    ])
}

async fn metrics(server: &Server) -> Result<String> {
    let answer = http()?.get(format!("http://{}/metrics", server.address)).send().await?;
    answer.text().await.context("no metrics")
}

/// Bytes on all devices.
fn total(metrics: &str, what: &str) -> f64 {
    let name = format!("altiplano_model_memory_{what}_bytes{{");
    let lines = metrics.lines().filter(|line| line.starts_with(&name));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}
