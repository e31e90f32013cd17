//! From a request for a model that is not loaded to its first token.

use std::process::Stdio;
use std::time::{Duration, Instant};

use altiplano_tests::report::Row;
use altiplano_tests::{Proc, free_address, sandbox};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};

use super::seconds_until;
use crate::engine::client::{Question, ask, random_tokens};
use crate::engine::servers::{self, Model, Server, peer, serve, theirs};
use crate::engine::turns::{median, spread};

/// Tokens of a prompt.
const PROMPT: usize = 64;

/// Cells of everybody's context.
const CELLS: usize = 512;

const ROUNDS: u64 = 7;

/// What llama-swap waits before it looks at a server's health for the first time (proxy/process.go). It looks again each five
/// seconds; here it is looked at each 25 ms, so what is measured is a llama-swap without that.
const FIRST_LOOK: Duration = Duration::from_millis(250);

const CONTEXT: &str = "context: {minTokens: 512, maxTokens: 512, parallel: 1}";

fn question(model: &Model, seed: u64) -> Question {
    Question { prompt: random_tokens(seed, PROMPT, model.vocabulary), generate: 1 }
}

/// Request to first token of an unloaded model; and how soon its memory is free again.
pub(super) async fn wakes(model: &Model) -> Result<Vec<Row>> {
    let spec = format!("{CONTEXT}\n  unload: {{policy: AfterRequest, graceSeconds: 0}}");
    let mut server = serve(&["serve"], &[(model, &spec)], &[]).await?;
    server.logs(1, ": Unloaded").await?;
    let (mut ours, mut back, mut bare, mut swapped) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let gone = |server: &Server| Ok(server.workers().is_empty());
        seconds_until("the worker to go", Instant::now(), || gone(&server)).await?;
        // Whatever else it does for a model that has gone, as after any pause.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let answer = ask(&server, &question(model, round)).await?;
        ours.push(answer.first_token());
        back.push(seconds_until("the worker's memory", answer.done, || gone(&server)).await?);
        bare.push(one_shot(model).await?);
        let begun = Instant::now();
        let peer = theirs(model, CELLS, &["-np", "1"]).await?;
        tokio::time::sleep(FIRST_LOOK.saturating_sub(begun.elapsed())).await;
        let before = begun.elapsed().as_secs_f64();
        swapped.push(before + ask(&peer, &question(model, round)).await?.first_token());
        eprintln!(
            "  wake: ours {:.3} s, bare {:.3}, llama-server started {:.3}; memory back after {:.3}",
            ours[ours.len() - 1],
            bare[bare.len() - 1],
            swapped[swapped.len() - 1],
            back[back.len() - 1]
        );
    }
    let what = format!("wake: request to first token, {PROMPT} tokens");
    let row = || Row::new(&what, "s", median(&ours)).spread(spread(&ours));
    let slowest = back.iter().copied().fold(0.0, f64::max);
    Ok(vec![
        row().beside("llama-bench: start, load, prompt, one token", median(&bare)).ratio_at_most(1.25),
        row().beside("llama-server started, its health awaited (llama-swap)", median(&swapped)).ratio_at_most(0.7),
        Row::new("memory back after the last answer, the slowest", "s", slowest).spread(spread(&back)).below(1.0),
    ])
}

/// A bare program on llama.cpp: from its start to its report of one run, whose model, context and prompt are new.
async fn one_shot(model: &Model) -> Result<f64> {
    let run = format!("{PROMPT},1");
    let threads = servers::threads().to_string();
    let begun = Instant::now();
    let mut child = tokio::process::Command::new(peer("llama-bench")?)
        .arg("--model")
        .arg(&model.path)
        .args(["--threads", &threads, "--n-prompt", "0", "--n-gen", "0", "-pg", &run])
        .args(["--repetitions", "1", "--no-warmup", "--output", "jsonl"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("no standard output")?).lines();
    let line = lines.next_line().await?.context("llama-bench says nothing")?;
    let took = begun.elapsed().as_secs_f64();
    let report: Value = serde_json::from_str(&line).with_context(|| format!("{line:?} is no report"))?;
    ensure!(report["n_prompt"] == PROMPT && report["n_gen"] == 1, "llama-bench ran something else: {line}");
    ensure!(child.wait().await?.success(), "llama-bench failed");
    Ok(took)
}

/// Two models of which one fits are asked in turn.
pub(super) async fn switches(model: &Model) -> Result<Vec<Row>> {
    let dir = sandbox::subdir("models")?;
    let [a, b] = ["a", "b"].map(|name| {
        let path = dir.join(format!("{name}.gguf"));
        std::fs::hard_link(&model.path, &path).map(|()| Model { name: name.to_owned(), path, ..model.clone() })
    });
    let (a, b) = (a?, b?);
    let limit = (need(&a)? * 3 / 2).to_string();
    let spec = format!("{CONTEXT}\n  unload: {{minResidentSeconds: 0}}");
    let mut server = serve(&["serve"], &[(&a, &spec), (&b, &spec)], &["--memory-limit-bytes", &limit]).await?;
    server.logs(1, ": Ready as ").await?;
    let mut router = router(&[&a, &b])?;
    seconds_until("the router", Instant::now(), || {
        router.proc.assert_running()?;
        Ok(std::net::TcpStream::connect(router.address).is_ok())
    })
    .await?;
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    for round in 0..2 * ROUNDS {
        for (server, figures) in [(&mut server, &mut ours), (&mut router, &mut peers)] {
            if round % 2 == 0 { "b" } else { "a" }.clone_into(&mut server.model);
            let took = ask(server, &question(model, round)).await?.first_token();
            eprintln!("  switch to {}: {}: {took:.3} s", server.model, server.name);
            // The first ones find nothing loaded, or the other one.
            if round >= 2 {
                figures.push(took);
            }
        }
    }
    ensure!(server.workers().len() == 1, "both are loaded: {:?}", server.workers());
    let row = Row::new("switch between two models that exclude each other: first token", "s", median(&ours));
    Ok(vec![row.spread(spread(&ours)).beside(&router.name, median(&peers)).ratio_at_most(1.0)])
}

/// Bytes that the model takes, by the dry run.
fn need(model: &Model) -> Result<u64> {
    let config = json!({
        "modelPath": model.path,
        "threads": servers::threads(),
        "context": {"minTokens": CELLS, "maxTokens": CELLS, "parallel": 1},
    });
    let report = servers::runner("--estimate", &config)?;
    let bytes = ["weightsBytes", "contextBytes", "computeBytes", "otherBytes"];
    let of = |memory: &Value| bytes.iter().filter_map(|name| memory[*name].as_u64()).sum::<u64>();
    Ok(report["memory"].as_array().context("no memory")?.iter().map(of).sum())
}

/// llama-server as a router that has one of these models at a time.
fn router(models: &[&Model]) -> Result<Server> {
    let presets = sandbox::subdir("router")?.join("models.ini");
    let threads = servers::threads();
    let text: Vec<String> = models
        .iter()
        .map(|Model { name, path, .. }| {
            let path = path.display();
            format!("[{name}]\nmodel = {path}\nc = {CELLS}\nnp = 1\nthreads = {threads}\nthreads-batch = {threads}\n")
        })
        .collect();
    std::fs::write(&presets, format!("version = 1\n\n{}", text.join("\n")))?;
    let address = free_address()?;
    let mut command = std::process::Command::new(peer("llama-server")?);
    command
        .arg("--models-preset")
        .arg(&presets)
        .args(["--models-max", "1", "--host", "127.0.0.1", "--port", &address.port().to_string()])
        // Not what some other llama.cpp has left on this machine.
        .env("LLAMA_CACHE", sandbox::subdir("router-cache")?);
    let proc = Proc::start("router", command)?;
    let name = "llama-server, router with --models-max 1".to_owned();
    Ok(Server { name, is_ours: false, address, model: models[0].name.clone(), proc })
}
