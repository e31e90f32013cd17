//! A change of the context's size, as a conversation of 4,000 tokens sees it, and as the bare calls of llama.cpp do it.
//!
//! Peers change the size by starting again: llama-server with another `-c` reads the whole prompt, or gets its slot's state
//! from a file. Ours makes another context on the same weights and moves the state. Both are asked for the conversation and
//! sixteen tokens more.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use altiplano_tests::report::{Report, Row};
use altiplano_tests::{http, sandbox};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::engine::client::{Question, ask, ask_with, random_tokens};
use crate::engine::servers::{self, Model, Server, ours, theirs};
use crate::engine::turns::{median, spread};
use crate::engine::{load_average, shape};

/// Tokens of the conversation.
const CONVERSATION: usize = 4000;

/// Tokens that come with the next turn.
const TURN: usize = 16;

/// Cells before and after.
const SMALL: usize = 8192;
const LARGE: usize = 16_384;

const ROUNDS: u64 = 5;
/// Longest wait for a context that is made beside a stream.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) async fn run() -> Result<Report> {
    let started = Instant::now();
    let (load, version, our_version) = (load_average(), servers::version()?, servers::our_version()?);
    let model = Model::write(&sandbox::subdir("models")?, "bench", &shape())?;
    let mut rows = bare(&model)?;
    let grown = of_ours(&model).await?;
    let (again, restored) = of_theirs(&model).await?;
    let what = format!("size change to first token, conversation of {CONVERSATION} tokens");
    let row = || Row::new(&what, "s", median(&grown)).spread(spread(&grown));
    rows.insert(0, row().beside("llama-server, started again, prompt read again", median(&again)).ratio_at_most(0.03));
    rows.insert(
        1,
        row().beside("llama-server, started again, slot saved and restored", median(&restored)).ratio_at_most(0.3),
    );
    let shape = shape();
    Ok(Report {
        name: "context".into(),
        setting: format!(
            "{:.0} s on {} cores, load {load} before it. Model: random weights, {} layers, width {}, Q4_0, F16 cache. Ours: from \
             {SMALL} cells to {LARGE}, agent and worker, llama.cpp {our_version}. Peer: llama.cpp {version}, from its end to the first token; its \
             start is seen by asking for /health. Median of the rounds; spread: from the least to the most of ours.",
            started.elapsed().as_secs_f64(),
            servers::threads(),
            shape.layers,
            shape.embd,
        ),
        rows,
    })
}

/// The conversation of a round, and the same with the next turn.
fn conversation(model: &Model, round: u64) -> (Question, Question) {
    let prompt = random_tokens(100 + round, CONVERSATION, model.vocabulary);
    let turn = random_tokens(200 + round, TURN, model.vocabulary);
    let next = Question { prompt: [prompt.clone(), turn].concat(), generate: 4 };
    (Question { prompt, generate: 1 }, next)
}

/// Seconds to the first token of a request that makes the context grow.
async fn of_ours(model: &Model) -> Result<Vec<f64>> {
    let mut firsts = Vec::new();
    for round in 0..ROUNDS {
        let server = ours(model, &format!("{{minTokens: {SMALL}, maxTokens: {LARGE}, parallel: 1}}")).await?;
        let (first, next) = conversation(model, round);
        ask(&server, &first).await?;
        ensure!(grows(&server).await? == 0, "the context grew too early");
        // The client's own wish is what makes the difference; nothing is loaded again for it.
        let wish = json!({"num_ctx": LARGE});
        let answer = ask_with(&server, &next, wish, |_| ControlFlow::Continue(())).await?;
        // What only a wish asks for is made beside the stream.
        let end = Instant::now() + PATIENCE;
        while grows(&server).await? != 1 {
            ensure!(Instant::now() < end, "the context did not grow within {PATIENCE:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        eprintln!("  ours: {:.3} s", answer.first_token());
        firsts.push(answer.first_token());
    }
    Ok(firsts)
}

async fn grows(server: &Server) -> Result<u64> {
    let metrics = http()?.get(format!("http://{}/metrics", server.address)).send().await?.text().await?;
    let line = metrics.lines().find(|line| line.starts_with("altiplano_context_grows_total")).context("no metric")?;
    let number = line.rsplit(' ').next().unwrap_or_default();
    number.parse().with_context(|| format!("{line:?} has no count"))
}

/// Seconds from the end of llama-server to the first token of its successor with a larger context: the prompt read again, and
/// the slot's state saved and restored.
async fn of_theirs(model: &Model) -> Result<(Vec<f64>, Vec<f64>)> {
    let slots = sandbox::subdir("slots")?;
    let slots = slots.to_str().context("a path that is no text")?;
    let (mut again, mut restored) = (Vec::new(), Vec::new());
    let arguments = ["-np", "1", "--slot-save-path", slots];
    let one = |cells| theirs(model, cells, &arguments);
    for round in 0..ROUNDS {
        let (first, next) = conversation(model, round);
        for saves in [false, true] {
            let mut server = one(SMALL).await?;
            ask(&server, &first).await?;
            let begun = Instant::now();
            if saves {
                slot(&server, "save").await?;
            }
            server.proc.kill()?;
            let server = one(LARGE).await?;
            if saves {
                slot(&server, "restore").await?;
            }
            let before = begun.elapsed().as_secs_f64();
            let seconds = before + ask(&server, &next).await?.first_token();
            eprintln!("  llama-server, slot saved: {saves}: {seconds:.3} s, {before:.3} s of it before the question");
            if saves { &mut restored } else { &mut again }.push(seconds);
        }
    }
    Ok((again, restored))
}

async fn slot(server: &Server, action: &str) -> Result<()> {
    let url = format!("http://{}/slots/0?action={action}", server.address);
    let response = http()?.post(url).json(&json!({"filename": "conversation.bin"})).send().await?;
    let status = response.status();
    let said: Value = response.json().await?;
    let count = if action == "save" { "n_saved" } else { "n_restored" };
    ensure!(status.is_success() && said[count].as_u64() >= Some(CONVERSATION as u64), "slot {action}: {status} {said}");
    Ok(())
}

/// The engine's resize beside the bare calls, and how long streams stand still beside the moving alone.
fn bare(model: &Model) -> Result<Vec<Row>> {
    let from = CONVERSATION.next_multiple_of(1024);
    let config = json!({
        "modelPath": model.path,
        "threads": servers::threads(),
        "context": {"minTokens": from, "maxTokens": 2 * from, "parallel": 1},
    });
    let report = servers::runner("--measure-resizes", &config)?;
    let times = |name: &str| -> Result<Vec<f64>> {
        let all = report[name].as_array().with_context(|| format!("no {name}"))?;
        Ok(all
            .iter()
            .filter_map(Value::as_f64)
            .map(|micros| Duration::from_secs_f64(micros / 1e6).as_secs_f64() * 1e3)
            .collect())
    };
    let row = |metric: &str, ours: &[f64], peer: &str, theirs: &[f64]| {
        let what = format!("{metric}, {} tokens, {} to {} cells", report["tokens"], report["from"], report["to"]);
        Row::new(what, "ms", median(ours)).spread(spread(ours)).beside(peer, median(theirs)).ratio_at_most(1.3)
    };
    Ok(vec![
        row("resize", &times("resizeMicros")?, "bare get, free, create and set", &times("bareMicros")?),
        row("stall of running streams", &times("stallMicros")?, "bare get and set", &times("movingMicros")?),
    ])
}
