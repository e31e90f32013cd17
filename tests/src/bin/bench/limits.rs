//! Ours beside what the bare calls of our llama.cpp reach at the same work, by turns: no server on it is faster on these CPUs.
//! What is below 1 here is ours to mend; what `bench engine` misses where this is 1 is not.

use std::time::Instant;

use altiplano_tests::report::{Report, Row};
use altiplano_tests::sandbox;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::engine::client::{ask, count, questions};
use crate::engine::servers::{self, Model, ours, runner, threads};
use crate::engine::speed::{self, dynamic, fixed, long_prompts, short_prompts};
use crate::engine::turns::{median, spread};
use crate::engine::{load_average, reuse, shape};

/// Who it is, in a row.
const BARE: &str = "llama.cpp's bare calls";

/// One client's prompt, and what it gets.
const PROMPT: usize = 64;
const GENERATE: u32 = 256;

/// Ours and theirs by turns.
#[derive(Default)]
struct Pairs {
    ours: Vec<f64>,
    bare: Vec<f64>,
}

impl Pairs {
    fn add(&mut self, metric: &str, ours: f64, bare: f64) {
        eprintln!("  {metric}: {ours:.3}, bare {bare:.3}");
        self.ours.push(ours);
        self.bare.push(bare);
    }

    fn row(&self, metric: impl Into<String>, unit: &str) -> Row {
        Row::new(metric, unit, median(&self.ours)).spread(spread(&self.ours)).beside(BARE, median(&self.bare))
    }
}

pub(crate) async fn run() -> Result<Report> {
    let started = Instant::now();
    let (load, version) = (load_average(), servers::our_version()?);
    let model = Model::write(&sandbox::subdir("models")?, "bench", &shape())?;
    let mut rows = vec![one(&model).await?];
    for clients in [4, 8, 16] {
        let short = short_prompts(clients);
        rows.push(many(&model, "64 tokens, Dynamic", &dynamic(clients), &short, 3).await?);
        rows.push(many(&model, "64 tokens, Fixed", &fixed(clients), &short, 3).await?);
        rows.push(many(&model, "256 to 512 tokens, Dynamic", &dynamic(clients), &long_prompts(clients), 2).await?);
    }
    rows.extend(shared(&model).await?);
    Ok(Report {
        name: "limits".into(),
        setting: format!(
            "{:.0} s on {} cores, load {load} before it. The model and the work of `bench engine`; ours, agent and worker with a \
             client, and the bare calls by turns, llama.cpp {version}. Median of the rounds; spread: from the least to the \
             most of ours.",
            started.elapsed().as_secs_f64(),
            threads(),
        ),
        rows,
    })
}

async fn one(model: &Model) -> Result<Row> {
    let server = ours(model, "{minTokens: 2048, maxTokens: 2048, parallel: 1}").await?;
    let metric = "generation, 1 client";
    let mut pairs = Pairs::default();
    for round in 0..=6 {
        let asked = questions(model, round, &[PROMPT], GENERATE);
        let mut pace = 0.0;
        for question in &asked {
            pace = ask(&server, question).await?.pace();
        }
        // The first time, buffers are not there yet.
        if round > 0 {
            let bare = BareCalls::make(model, "Dynamic", 0, &[PROMPT], GENERATE)?;
            pairs.add(metric, pace, count(GENERATE as usize - 1) / bare.generated);
        }
    }
    Ok(pairs.row(metric, "tok/s"))
}

async fn many(model: &Model, what: &str, context: &str, prompts: &[usize], rounds: u64) -> Result<Row> {
    let server = ours(model, context).await?;
    let asked = |seed| questions(model, seed, prompts, speed::GENERATE);
    let sizing = if context.contains("Fixed") { "Fixed" } else { "Dynamic" };
    let metric = format!("total, {} clients, prompts of {what}", prompts.len());
    speed::total(&server, &asked(1000)).await?;
    let mut pairs = Pairs::default();
    for round in 0..rounds {
        let total = speed::total(&server, &asked(round)).await?;
        let bare = BareCalls::make(model, sizing, 0, prompts, speed::GENERATE)?;
        let tokens = count(prompts.len() * speed::GENERATE as usize);
        pairs.add(&metric, total, tokens / (bare.read + bare.generated));
    }
    Ok(pairs.row(metric, "tok/s"))
}

async fn shared(model: &Model) -> Result<Vec<Row>> {
    let server = ours(model, &reuse::context()).await?;
    let names = ["cold: first token p50", "cold: total", "warm: first token p50", "warm: total"];
    let mut pairs: [Pairs; 4] = Default::default();
    for round in 0..4 {
        let figures = reuse::cold_and_warm(model, &server, round).await?;
        if round == 0 {
            continue;
        }
        let bare = BareCalls::make(model, "Dynamic", reuse::SHARED, &[reuse::OWN; reuse::CLIENTS], reuse::GENERATE)?;
        let tokens = count(reuse::CLIENTS * reuse::GENERATE as usize);
        let warm = bare.read + bare.generated;
        let limits = [bare.begun + bare.read, tokens / (bare.begun + warm), bare.read, tokens / warm];
        for (((pairs, name), ours), bare) in pairs.iter_mut().zip(names).zip(figures).zip(limits) {
            pairs.add(name, ours, bare);
        }
    }
    let what = format!("{} clients, {} shared + {} own tokens", reuse::CLIENTS, reuse::SHARED, reuse::OWN);
    let unit = |name: &str| if name.ends_with("total") { "tok/s" } else { "s" };
    Ok(pairs.iter().zip(names).map(|(pairs, name)| pairs.row(format!("{what}, {name}"), unit(name))).collect())
}

/// Seconds that the bare calls took.
struct BareCalls {
    /// To read the common beginning.
    begun: f64,
    /// To read what each has of its own.
    read: f64,
    /// To generate all but the first token of each.
    generated: f64,
}

impl BareCalls {
    /// Prompts with `shared` tokens in common and `own` ones after those, for each of which so many are generated, in one pool
    /// of cells (Dynamic) or a part of it for each (Fixed).
    fn make(model: &Model, sizing: &str, shared: usize, own: &[usize], generate: u32) -> Result<Self> {
        let context = json!({"sizing": sizing, "minTokens": 512, "maxTokens": 512, "parallel": own.len()});
        let config = json!({"modelPath": model.path, "threads": threads(), "context": context});
        let asked = json!({"runner": config, "shared": shared, "own": own, "generate": generate});
        let report = runner("--measure-batches", &asked)?;
        let seconds = |name: &str| -> Result<f64> {
            let all = report[name].as_array().with_context(|| format!("no {name}"))?;
            ensure!(!all.is_empty(), "{name} is empty");
            Ok(median(&all.iter().filter_map(Value::as_f64).map(|micros| micros / 1e6).collect::<Vec<_>>()))
        };
        Ok(Self { begun: seconds("sharedMicros")?, read: seconds("ownMicros")?, generated: seconds("generateMicros")? })
    }
}
