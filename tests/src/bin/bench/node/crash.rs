//! What is killed, and how soon it is back.

use std::time::Instant;

use altiplano_tests::report::Row;
use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::{PATIENCE, seconds_until};
use crate::engine::client::{Question, ask, random_tokens};
use crate::engine::servers::{Model, Server, serve};
use crate::engine::turns::{median, percentile, spread};

/// Workers that are killed, each of another model: one that is killed again waits before it comes back.
const WORKERS: usize = 24;

/// Agents that are killed, each below another `init`.
const AGENTS: usize = 5;

const SPEC: &str = "context: {maxTokens: 512, parallel: 1}\n  unload: {policy: Never}";

/// kill -9 of a worker: until the agent knows, and until the model is Ready again.
pub(super) async fn kills(model: &Model) -> Result<Vec<Row>> {
    let models: Vec<Model> = (0..WORKERS).map(|number| Model { name: format!("m{number}"), ..model.clone() }).collect();
    let deployed: Vec<(&Model, &str)> = models.iter().map(|model| (model, SPEC)).collect();
    let mut server = serve(&["serve"], &deployed, &[]).await?;
    server.logs(WORKERS, ": Ready as ").await?;
    let (mut noticed, mut ready) = (Vec::new(), Vec::new());
    for (number, worker) in server.workers().into_iter().enumerate() {
        let seen = |words: &str, times: usize| server.proc.log().matches(words).count() >= times;
        let killed = kill(worker)?;
        noticed.push(seconds_until("its end in the log", killed, || Ok(seen("worker ended", number + 1))).await?);
        let again = WORKERS + number + 1;
        ready.push(seconds_until("the model to be ready", killed, || Ok(seen(": Ready as ", again))).await?);
    }
    ensure!(ready.len() == WORKERS, "{} workers of {WORKERS}", ready.len());
    eprintln!("  kill -9: noticed after {noticed:.4?}, ready after {ready:.3?}");
    let row = |metric: &str, figures: &[f64], limit: f64| {
        Row::new(format!("kill -9 of a worker: {metric}, p99 of {WORKERS}"), "s", percentile(figures, 99.0))
            .spread(spread(figures))
            .below(limit)
    };
    Ok(vec![
        row("noticed", &noticed, 0.05),
        row("Ready again", &ready, 3.0),
        Row::new("kill -9 of a worker: Ready again, median", "s", median(&ready)),
    ])
}

/// kill -9 of the agent below `init`: until its successor has answered a request with the same worker.
pub(super) async fn adoptions(model: &Model) -> Result<Vec<Row>> {
    let mut took = Vec::new();
    for round in 0..AGENTS {
        let mut server = serve(&["init", "serve"], &[(model, SPEC)], &[]).await?;
        server.logs(1, ": Ready as ").await?;
        let (agent, workers) = (server.agent()?, server.workers());
        let killed = kill(agent)?;
        let question = Question { prompt: random_tokens(round as u64, 8, model.vocabulary), generate: 1 };
        let mut answered = false;
        while !answered {
            ensure!(killed.elapsed() < PATIENCE, "no answer; {}", server.proc.log_tail());
            tokio::time::sleep(super::LOOK).await;
            answered = is_answered(&server, &question).await;
        }
        took.push(killed.elapsed().as_secs_f64());
        ensure!(server.workers() == workers, "the worker was started again; {}", server.proc.log_tail());
    }
    eprintln!("  adoption: {took:.3?}");
    let slowest = took.iter().copied().fold(0.0, f64::max);
    let metric = format!("kill -9 of the agent: a request answered by the next, slowest of {AGENTS}");
    Ok(vec![Row::new(metric, "s", slowest).spread(spread(&took)).below(1.0)])
}

async fn is_answered(server: &Server, question: &Question) -> bool {
    ask(server, question).await.is_ok()
}

fn kill(pid: u32) -> Result<Instant> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("no process id")?;
    let now = Instant::now();
    kill_process(pid, Signal::KILL)?;
    Ok(now)
}
