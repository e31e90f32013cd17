//! What the bare calls of our llama.cpp reach on this machine at the same work: no server on it is faster.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::client::count;
use super::servers::{Model, runner, threads};
use super::turns::median;

/// Who it is, in a row.
pub(super) const BARE: &str = "llama.cpp's bare calls";

pub(super) struct Limit {
    /// Seconds until all have their first token, when nobody has seen the common beginning.
    pub(super) cold_first: f64,
    /// The same when it has been read.
    pub(super) warm_first: f64,
    /// Tokens generated a second, with the reading.
    pub(super) cold_total: f64,
    /// The same when the common beginning has been read.
    pub(super) warm_total: f64,
    /// Tokens a second after the first ones.
    pub(super) pace: f64,
}

/// Of prompts with `shared` tokens in common and `own` ones after those, for each of which so many are generated; the better
/// of these layouts, figure by figure: one pool of cells (Dynamic) and a part of them for each stream (Fixed).
pub(super) fn limit(model: &Model, sizings: &[&str], shared: usize, own: &[usize], generate: u32) -> Result<Limit> {
    let mut best: Option<Limit> = None;
    for sizing in sizings {
        let report = bare_calls(model, sizing, shared, own, generate)?;
        let seconds = |name: &str| -> Result<f64> {
            let all = report[name].as_array().with_context(|| format!("no {name}"))?;
            Ok(median(&all.iter().filter_map(Value::as_f64).map(|micros| micros / 1e6).collect::<Vec<_>>()))
        };
        let (begun, read, generated) = (seconds("sharedMicros")?, seconds("ownMicros")?, seconds("generateMicros")?);
        let tokens = count(own.len()) * f64::from(generate);
        let found = Limit {
            cold_first: begun + read,
            warm_first: read,
            cold_total: tokens / (begun + read + generated),
            warm_total: tokens / (read + generated),
            pace: (tokens - count(own.len())) / generated,
        };
        best = Some(match best {
            None => found,
            Some(other) => Limit {
                cold_first: found.cold_first.min(other.cold_first),
                warm_first: found.warm_first.min(other.warm_first),
                cold_total: found.cold_total.max(other.cold_total),
                warm_total: found.warm_total.max(other.warm_total),
                pace: found.pace.max(other.pace),
            },
        });
    }
    best.context("no figures")
}

fn bare_calls(model: &Model, sizing: &str, shared: usize, own: &[usize], generate: u32) -> Result<Value> {
    let context = json!({"sizing": sizing, "minTokens": 512, "maxTokens": 512, "parallel": own.len()});
    let config = json!({"modelPath": model.path, "threads": threads(), "context": context});
    let asked = json!({"runner": config, "shared": shared, "own": own, "generate": generate});
    runner("--measure-batches", &asked)
}
