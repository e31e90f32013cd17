//! How far the same question's log-probabilities lie apart when it is computed in other company: llama-server against
//! itself, ours against itself, and ours against llama-server.
//!
//! Floating point sums in the order of the batch, so none of these is zero. What llama-server shows against itself is
//! the bound for ours; `agent/tests/same_answer.rs` holds the engine to it in every test run.
//!
//! Teacher-forced: one text, cut at many places, and at each cut the log-probabilities of the next token. No answer
//! depends on an earlier one, so that nothing drifts apart.

use std::collections::BTreeMap;

use altiplano_test_models::{Quantization, Spec};
use altiplano_tests::report::{Report, Row};
use altiplano_tests::{http, sandbox};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::engine::client::random_tokens;
use crate::engine::servers::{self, Model, Server, ours, theirs};

/// Tokens before each cut.
const CUTS: [usize; 12] = [9, 31, 64, 65, 100, 127, 129, 200, 256, 300, 383, 500];
/// Alternatives that are compared.
const TOP: usize = 10;

/// Log-probabilities of the most probable tokens by their text, at each cut. Only models whose probable tokens all spell
/// text can be compared so.
type Table = Vec<BTreeMap<String, f64>>;

pub(crate) async fn run() -> Result<Report> {
    let mut rows = Vec::new();
    let dir = sandbox::subdir("models")?;
    let models = [
        ("random weights, Q8_0", Model::write(&dir, "random", &shape(Quantization::Q8_0))?),
        ("random weights, F16", Model::write(&dir, "random-f16", &shape(Quantization::F16))?),
    ];
    for (what, model) in &models {
        let text = random_tokens(4711, 512, model.vocabulary);
        let peer = theirs(model, 4096, &["-np", "4", "-kvu"]).await?;
        let reference = alone(&peer, &text).await?;
        let small = theirs(model, 4096, &["-np", "4", "-kvu", "-b", "64", "-ub", "64"]).await?;
        let split = theirs(model, 4096, &["-np", "4", "--no-kv-unified"]).await?;
        let variants = [
            ("in steps of 64", alone(&small, &text).await?),
            ("split streams", alone(&split, &text).await?),
            ("three at once", together(&peer, &text).await?),
            ("with its cache", growing(&peer, &text).await?),
        ];
        let (mut bound, mut widest) = (0.0, "");
        for (name, table) in &variants {
            let apart = apart(&reference, table)?;
            eprintln!("{what}: llama-server {name}: {apart:.6}");
            if apart > bound {
                (bound, widest) = (apart, name);
            }
        }

        let server = ours(model, "{minTokens: 4096, maxTokens: 4096, parallel: 4}").await?;
        let first = alone(&server, &text).await?;
        let ours = [
            ("ours against llama-server, alone", apart(&reference, &first)?),
            ("ours against itself, three at once", apart(&first, &together(&server, &text).await?)?),
            ("ours against itself, what was read before", apart(&first, &growing(&server, &text).await?)?),
        ];
        for (name, figure) in ours {
            let row = Row::new(format!("{what}: {name}: most apart"), "ln p", figure);
            rows.push(row.beside(&format!("llama-server against itself, {widest}"), bound).ratio_at_most(2.0));
        }
        ensure!(same_winners(&reference, &first, 2.0 * bound), "{what}: another token wins where the margin is clear");
    }
    Ok(Report {
        name: "logits".into(),
        setting: format!(
            "The {TOP} most probable tokens after {} prompts, teacher-forced. Ours: llama.cpp {}; peer: llama.cpp {}.",
            CUTS.len(),
            servers::our_version()?,
            servers::version()?
        ),
        rows,
    })
}

fn shape(quantization: Quantization) -> Spec {
    Spec { quantization, ..Spec::compared() }
}

/// One question at a time, nothing reused: no cut is the beginning of another's prompt.
async fn alone(server: &Server, text: &[u32]) -> Result<Table> {
    let mut table = Table::new();
    for (number, cut) in CUTS.iter().enumerate() {
        table.push(next(server, &unlike(number, &text[..*cut])).await?);
    }
    Ok(table)
}

/// The same questions, three at a time.
async fn together(server: &Server, text: &[u32]) -> Result<Table> {
    let mut table = Table::new();
    for (chunk, cuts) in CUTS.chunks(3).enumerate() {
        let prompts: Vec<_> = cuts.iter().enumerate().map(|(n, cut)| unlike(chunk * 3 + n, &text[..*cut])).collect();
        table.extend(futures::future::try_join_all(prompts.iter().map(|prompt| next(server, prompt))).await?);
    }
    Ok(table)
}

/// The same questions, after most of each prompt was read for another.
async fn growing(server: &Server, text: &[u32]) -> Result<Table> {
    let mut table = Table::new();
    for (number, cut) in CUTS.iter().enumerate() {
        let prompt = unlike(number, &text[..*cut]);
        next(server, &prompt[..prompt.len() / 2]).await?;
        next(server, &prompt[..prompt.len() - 1]).await?;
        table.push(next(server, &prompt).await?);
    }
    Ok(table)
}

/// The prompt with another first token for each cut, so that none is a beginning of another.
fn unlike(number: usize, tokens: &[u32]) -> Vec<u32> {
    let first = 300 + u32::try_from(number).unwrap_or_default();
    std::iter::once(first).chain(tokens.iter().skip(1).copied()).collect()
}

/// The most probable next tokens.
async fn next(server: &Server, prompt: &[u32]) -> Result<BTreeMap<String, f64>> {
    let body = json!({
        "model": server.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": true, "logprobs": 20,
    });
    let response = http()?.post(format!("http://{}/v1/completions", server.address)).json(&body).send().await?;
    let status = response.status();
    let answer: Value = response.json().await?;
    ensure!(status.is_success(), "{}: {status}: {answer}", server.name);
    let mut found = BTreeMap::new();
    // OpenAI's form for completions is one object; llama-server answers in that of chats.
    if let Some(Value::Object(top)) = answer.pointer("/choices/0/logprobs/top_logprobs/0") {
        found.extend(top.iter().filter_map(|(text, logprob)| Some((text.clone(), logprob.as_f64()?))));
    } else {
        let top = answer.pointer("/choices/0/logprobs/content/0/top_logprobs").and_then(Value::as_array);
        let top = top.with_context(|| format!("{}: no log-probabilities: {answer}", server.name))?;
        let pair = |entry: &Value| Some((entry["token"].as_str()?.to_owned(), entry["logprob"].as_f64()?));
        found.extend(top.iter().filter_map(pair));
    }
    ensure!(found.len() >= TOP, "{}: {} alternatives: {answer}", server.name, found.len());
    Ok(found)
}

/// The largest difference over the most probable tokens of the first table.
fn apart(reference: &Table, other: &Table) -> Result<f64> {
    let mut most: f64 = 0.0;
    for (one, two) in reference.iter().zip(other) {
        for (text, logprob) in best(one) {
            let found = two.get(text).with_context(|| format!("{text:?} is not among the alternatives: {two:?}"))?;
            most = most.max((found - logprob).abs());
        }
    }
    Ok(most)
}

fn best(table: &BTreeMap<String, f64>) -> Vec<(&String, f64)> {
    let mut all: Vec<_> = table.iter().map(|(text, logprob)| (text, *logprob)).collect();
    all.sort_by(|one, two| two.1.total_cmp(&one.1));
    all.truncate(TOP);
    all
}

/// Where the best leads by more than `margin`, it is the other's best too.
fn same_winners(reference: &Table, other: &Table, margin: f64) -> bool {
    reference.iter().zip(other).all(|(one, two)| {
        let (one, two) = (best(one), best(two));
        one[0].1 - one[1].1 <= margin || one[0].0 == two[0].0
    })
}
